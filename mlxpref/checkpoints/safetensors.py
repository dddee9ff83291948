"""The tensors of a model folder, from the headers of its safetensors files, without reading weights.

The format's own library refuses malformed headers. MLX overflows or ends the process on some well-formed ones, which
raise ModelError here.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlxpref.checkpoints.files import DOWNLOAD_AGAIN, INDEX, printable, read_index, weight_files
from mlxpref.errors import ModelError

_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_WIDTHS |= {"I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of the types that MLX reads; for some other types mlx-vlm would write into the file."""
_LARGEST_AXIS = 2**31 - 1
"""The longest axis: MLX counts in 32 bits."""
_AXES = 16


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: `dtype` as safetensors names it, its bytes from `start` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.end - self.start

    def chunks(self, most: int = 1 << 24) -> Iterator[bytes]:
        """Its bytes in chunks of at most `most`; raises OSError."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for offset in range(0, self.size, most):
                yield stream.read(min(most, self.size - offset))


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor by name in the files of a folder's index, or in all weight files without an index.

    Empty for a folder without weights. ModelError for damaged or missing files, and for an index that does not match
    them.
    """
    index, tensors = read_index(folder), dict[str, TensorInfo]()
    for name in weight_files(folder, index):
        for tensor, info in read_file_tensor_infos(folder / name).items():
            if tensor in tensors:
                files = f"{tensors[tensor].file.name} and {name}"
                raise ModelError(f"{folder}: two sets of weights: {tensor!r} is in both {files}; keep what you mean")
            tensors[tensor] = info
    if index:
        _check_index(folder / INDEX, index, tensors)
    return tensors


def read_file_tensor_infos(file: Path, remedy: str = DOWNLOAD_AGAIN) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file by name, in the order of the bytes.

    ModelError, ending with `remedy`, for a damaged or missing file.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file, though weights belong there; {remedy}")
    tensors: dict[str, TensorInfo] = {}
    try:
        with file.open("rb") as stream:
            end = 8 + int.from_bytes(stream.read(8), "little")
        with safe_open(file, framework="numpy") as weights:
            for name in weights.offset_keys():  # in the order of their bytes; the library refuses gaps
                part = weights.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if not name.isprintable() or len(name) > 300:
                    raise ValueError(f"{name!r:.120} is not the name of a tensor")
                if dtype not in _WIDTHS:
                    raise ValueError(f"{name!r} is stored as {dtype}, not as one of {', '.join(_WIDTHS)}")
                if len(shape) > _AXES or any(axis > _LARGEST_AXIS for axis in shape):
                    raise ValueError(f"{name!r} has the shape {shape!s:.120}")
                start, end = end, end + math.prod(shape) * _WIDTHS[dtype]
                tensors[name] = TensorInfo(file, dtype, shape, start, end)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file}: not readable as weights: {printable(error)}; {remedy}") from error
    return tensors


def _check_index(index: Path, file_of: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """ModelError for an index that does not match the files."""
    for tensor, name in file_of.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise ModelError(f"{index}: puts {tensor!r:.120} into {name}, where it is not; {DOWNLOAD_AGAIN}")
    for tensor in sorted(tensors.keys() - file_of.keys()):
        file = tensors[tensor].file.name
        raise ModelError(f"{index}: does not name {tensor!r}, which is in {file}; {DOWNLOAD_AGAIN}")
