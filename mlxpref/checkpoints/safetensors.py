"""What the weights of a model folder are, from the heads of its safetensors files: read as if they were hostile.

MLX may overflow, allocate or end the process on a malformed file, so it is given none that is not checked here first.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.errors import ModelError

__all__ = ["INDEX", "TensorInfo", "read_file_tensor_infos", "read_json_object", "read_tensor_infos"]

INDEX = "model.safetensors.index.json"
"""The file that says which tensor is in which file, where there are several."""

_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_WIDTHS |= {"I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of the types that MLX reads; for some others mlx-vlm would write into the file."""
# The format allows 100 MB; a head of a hundred layers has 0.2 MB, and what is parsed takes twenty times its text.
_HEAD_LIMIT = 25_000_000
_LARGEST = 2**31 - 1
"""MLX counts along an axis in 32 bits."""
_AXES = 16
_FILE_NAME = re.compile(r"\w[\w.+ -]{0,200}\.safetensors")
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: `dtype` as safetensors names it, its bytes from `start` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by name, of the files that its index names, or else of all that it has.

    No weights are read; empty for a folder without weights. Raises ModelError for files that are damaged or missing,
    and for an index that does not say what they hold.
    """
    index = folder / INDEX
    placed = _read_index(index) if index.exists() or index.is_symlink() else None
    names = _weight_files(folder) if placed is None else sorted(set(placed.values()))
    found: dict[str, TensorInfo] = {}
    for name in names:
        for tensor, stored in read_file_tensor_infos(folder / name).items():
            if tensor in found:
                raise ModelError(
                    f"{folder}: {_short(tensor)} is in both {found[tensor].file.name} and {name}; {_AGAIN}"
                )
            found[tensor] = stored
    if placed is not None:
        _check_index(index, placed, found)
    return found


def read_file_tensor_infos(file: Path, remedy: str = _AGAIN) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file by name, in the order of its bytes; ModelError with a remedy for no such."""
    try:
        if not file.is_file():
            raise ModelError(f"{file}: no such file, though weights belong there; {remedy}")
        with file.open("rb") as stream:
            length = file.stat().st_size
            start = stream.read(8)
            size = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= size <= length - 8:
                raise ValueError(f"it has {length} bytes, and its head cannot have {size} of them")
            if size > _HEAD_LIMIT:
                raise ValueError(f"a head of {size} bytes, where {_HEAD_LIMIT} are plenty")
            head = json.loads(stream.read(size).decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(head, dict):
            raise ValueError("its head is no JSON object")
        _check_metadata(head.pop("__metadata__", {}))
        found = [(name, _stored(file, name, entry, 8 + size)) for name, entry in head.items()]
        return _checked(found, 8 + size, length)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ModelError(f"{file}: not readable as weights: {_reason(error)}; {remedy}") from error


def read_json_object(file: Path, limit: int = 64 << 20, remedy: str = _AGAIN) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; ModelError with a remedy for anything else."""
    try:
        if not file.is_file():
            raise ValueError("no such file")
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"larger than {limit} bytes")
        found = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # half a character can be read, and then not be written
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ModelError(f"{file}: not readable as JSON: {_reason(error)}; {remedy}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not readable as JSON: no object at its top; {remedy}")
    return found


def _weight_files(folder: Path) -> list[str]:
    """The weight files of a folder without index, as mlx-vlm takes them."""
    names = (file.name for file in folder.glob("*.safetensors"))
    return sorted(name for name in names if not name.startswith(".") and not name.endswith("consolidated.safetensors"))


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor by the index: files of this very folder."""
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{index}: no weight_map that says which tensor is in which file; {_AGAIN}")
    for tensor, name in placed.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ModelError(
                f"{index}: puts {_short(tensor)} into {_short(name)}, which is no safetensors file of this folder; "
                f"{_AGAIN}"
            )
    return placed


def _check_index(index: Path, placed: Mapping[str, str], found: Mapping[str, TensorInfo]) -> None:
    """Refuse an index that does not say what the files hold."""
    for tensor, name in placed.items():
        if tensor not in found or found[tensor].file.name != name:
            raise ModelError(f"{index}: puts {_short(tensor)} into {name}, where it is not; {_AGAIN}")
    for tensor, stored in found.items():
        if tensor not in placed:
            raise ModelError(f"{index}: does not name {_short(tensor)}, which is in {stored.file.name}; {_AGAIN}")


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that comes twice, readers take different values."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} comes twice in its head")
        found[name] = value
    return found


def _check_metadata(metadata: Any) -> None:
    if metadata is None:  # as MLX writes where there are none
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts by name")


def _stored(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """An entry of a head, checked by itself; offsets in it are from `base`. Raises ValueError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} is not given by its dtype, shape and data_offsets")
    if not name.isprintable():
        raise ValueError(f"{_short(name)} is no name")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise ValueError(f"{_short(name)} is stored as {_short(dtype)}, not as one of {', '.join(_WIDTHS)}")
    if not _are_whole(shape) or len(shape) > _AXES or any(axis > _LARGEST for axis in shape):
        raise ValueError(f"{_short(name)} has the shape {_short(shape)}")
    if not _are_whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} has the offsets {_short(offsets)}, not two whole numbers")
    taken, needed = offsets[1] - offsets[0], math.prod(shape) * _WIDTHS[dtype]
    if taken != needed:
        raise ValueError(f"{_short(name)} has {_short(taken)} bytes, of its shape it would have {_short(needed)}")
    return TensorInfo(file, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_whole(values: Any) -> bool:
    """Whether a list has whole numbers from 0 alone; true and false are none."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _checked(found: Iterable[tuple[str, TensorInfo]], start: int, end: int) -> dict[str, TensorInfo]:
    """Tensors in the order of their bytes, which they fill from `start` to `end`; raises ValueError where not."""
    ordered = dict(sorted(found, key=lambda item: (item[1].start, item[1].end)))
    place = start
    for name, stored in ordered.items():
        if stored.start != place:
            raise ValueError(
                f"{_short(name)} begins at byte {_short(stored.start)}, what is before it ends at {_short(place)}"
            )
        place = stored.end
    if place != end:
        raise ValueError(f"its tensors end at byte {_short(place)}, the file has {end}")
    return ordered


def _short(value: Any) -> str:
    """A value of a file within a line; numbers of any length."""
    try:
        return repr(value) if isinstance(value, str) and len(value) <= 120 else reprlib.repr(value)
    except ValueError:  # a product of thousands of digits
        return "far too many"


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300] or type(error).__name__
