"""Writing a model folder: under a temporary name until it is complete, weights one by one."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.checkpoints.files import CONFIG, INDEX, SIDE_FILES
from mlxpref.errors import ConfigError, ModelError
from mlxpref.files import free_bytes, sync
from mlxpref.log import track
from mlxpref.text import format_bytes

_FULL = re.compile("no space left|unable to write", re.IGNORECASE)
"""MLX's messages for a full disk, in its own exception."""
_SPARE = 64 * 2**20
"""Bytes besides the weights: tokenizer, templates, and the file system's overhead."""


@contextlib.contextmanager
def new_folder(output: Path, overwrite: bool = False, apart_from: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder to write into. It takes the name `output` when the block ends, and is removed after an error.

    `apart_from` are folders that the output may not be, contain or lie in. ConfigError for an unusable output,
    ModelError for a full disk.
    """
    _check_output(output, overwrite, apart_from)
    final = output.resolve()
    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}")
    parents = [folder for folder in final.parents if not folder.exists()]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, final)
    except OSError as error:
        reason = "no space left" if error.errno == 28 else error.strerror or error
        raise ModelError(
            f"{output}: cannot be written: {reason}; free some space or give another place, nothing was kept"
        ) from error
    except RuntimeError as error:
        if _FULL.search(str(error)):
            raise ModelError(f"{output}: cannot be written: no space left; free some, nothing was kept") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the model is there
            for folder in parents:
                folder.rmdir()


def check_space(output: Path, size: int) -> None:
    """Raise ModelError if the disk of `output` has no room for `size` bytes of weights."""
    free = free_bytes(output)
    if free < size + _SPARE:
        sizes = f"{format_bytes(size + _SPARE)} are needed, {format_bytes(free)} are free"
        raise ModelError(f"{output}: no space left for the model: {sizes}; free some, or give another output")


def write_model(
    folder: Path,
    source: Path,
    config: Mapping[str, Any],
    weights: dict[str, mx.array],
    shard_size: int = 5 * 10**9,
    kind: str = "mlx",
) -> None:
    """Write a config, the other files of the source, and weights into a folder; `weights` is emptied.

    It writes nothing that would load code. Weights may be lazy: memory holds one file of at most `shard_size` bytes (or
    one larger tensor) and the sources of the next tensor. `kind` is the library for the files, "mlx" or "pt".
    ModelError that names the source for a weight that is not finite.
    """
    _write_json(folder / CONFIG, config)
    _copy_side_files(source, folder)
    _stream_weights(folder, source, weights, shard_size, kind)


def _stream_weights(folder: Path, source: Path, weights: dict[str, mx.array], shard_size: int, kind: str) -> None:
    """Compute and write weights one by one; free them with their file."""
    from huggingface_hub import split_state_dict_into_shards_factory

    shards = split_state_dict_into_shards_factory(
        {name: int(weights[name].nbytes) for name in sorted(weights)},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    last = {names[-1]: folder / file for file, names in shards.filename_to_tensors.items()}
    names = [name for shard in shards.filename_to_tensors.values() for name in shard]
    tensors: dict[str, mx.array] = {}
    for name in track(names, len(names), "writing weights"):
        tensors[name] = _evaluated(source, name, weights.pop(name))
        if file := last.get(name):
            mx.save_safetensors(str(file), tensors, {"format": kind})
            sync(file)
            tensors.clear()
            mx.clear_cache()
    index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
    _write_json(folder / INDEX, index)


def _copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, processors, templates and generation config."""
    for name in SIDE_FILES:
        if not (source / name).is_file():
            continue
        content = (source / name).read_bytes()
        if name.endswith("config.json") and b"auto_map" in content:
            _write_json(folder / name, json.loads(content))
        else:
            (folder / name).write_bytes(content)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file without keys that load code."""
    plain = {key: value for key, value in content.items() if key != "auto_map"}
    file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _evaluated(source: Path, name: str, weight: mx.array) -> mx.array:
    """Compute one weight; ModelError if it is not finite."""
    weight = mx.contiguous(weight)  # of a view, an expert's say, saving would make a copy, for all of a file at once
    mx.eval(weight)
    if mx.issubdtype(weight.dtype, mx.floating) and not is_finite(weight):
        raise ModelError(
            f"{source}: {name} holds numbers that are not finite; download the checkpoint again, or give another dtype"
        )
    # The next weight needs buffers of other sizes.
    mx.clear_cache()
    return weight


def is_finite(weight: mx.array) -> bool:
    """Whether every number of a weight is finite.

    Of half precision by bits, because MLX compares it on a CPU as float32, which takes three times as long: infinities
    and NaN have all bits of the exponent.
    """
    if weight.dtype.size != 2:
        return bool(mx.isfinite(weight).all().item())
    infinite = mx.array(mx.inf, weight.dtype).view(mx.uint16)
    return not bool(((weight.view(mx.uint16) & infinite) == infinite).any().item())


def _check_output(output: Path, overwrite: bool, apart_from: Sequence[Path]) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder to write the model into")
    place = output.resolve()
    for source in (each.resolve() for each in apart_from):
        if place == source:
            raise ConfigError(f"{output}: is the source itself; give another output folder")
        if place in source.parents or source in place.parents:
            raise ConfigError(f"{output}: source and output must not lie within each other; give another output folder")
    if any(parent.resolve().is_relative_to(place) for parent in (Path(), Path.home())):
        raise ConfigError(f"{output}: is or holds the folder you are in, or your home; give a folder of its own")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output}: is not empty; give another folder, or --overwrite to replace it")


def _replace(temporary: Path, final: Path) -> None:
    """Rename a finished folder, and then remove an old one of that name."""
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    try:
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
