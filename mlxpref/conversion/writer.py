"""A model's folder in the making: beside its final name until it is whole, weights written as they are made."""

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
from mlxpref.files import free_bytes
from mlxpref.log import track
from mlxpref.text import format_bytes

__all__ = [
    "check_space",
    "copy_side_files",
    "folder_bytes",
    "new_folder",
    "stream_weights",
    "write_config",
]

_FULL = re.compile("no space left|unable to write", re.IGNORECASE)
"""How MLX spells a full disk, with an exception of its own."""
_SPARE = 64 * 2**20
"""Bytes beside the weights: tokenizer, templates, and what the file system adds."""
_SINGLE = "model.safetensors"


@contextlib.contextmanager
def new_folder(output: Path, overwrite: bool = False, apart_from: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which takes the name `output` when all went well, and is gone when anything did not.

    `apart_from` are folders that it is made from: it may not be one of them, hold one, or lie in one. ConfigError for
    an output that is in the way, ModelError for a disk that is full.
    """
    _check_output(output, overwrite, apart_from)
    final = output.resolve()
    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}")
    created = [folder for folder in final.parents if not folder.exists()]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, final)
    except OSError as error:
        why = "no space left" if error.errno == 28 else error.strerror or error
        raise ModelError(
            f"{output}: cannot be written: {why}; free some space or give another place, nothing was kept"
        ) from error
    except RuntimeError as error:
        if _FULL.search(str(error)):
            raise ModelError(f"{output}: cannot be written: no space left; free some, nothing was kept") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the model is there
            for folder in created:
                folder.rmdir()


def check_space(output: Path, needed: int) -> None:
    """Refuse before anything is written what the disk has no room for; `needed` in bytes of weights."""
    free = free_bytes(output)
    if free < needed + _SPARE:
        sizes = f"{format_bytes(needed + _SPARE)} are needed, {format_bytes(free)} are free"
        raise ModelError(f"{output}: no space left for the model: {sizes}; free some, or give another output")


def stream_weights(
    folder: Path,
    weights: dict[str, mx.array],
    shard_size: int,
    kind: str = "mlx",
) -> None:
    """Write weights that may be lazy, each made when its turn comes and let go of with its file; `weights` is emptied.

    No more is in memory than one file of at most `shard_size` bytes (or one tensor, where that is larger) and what the
    next tensor is made of. `kind` is the library that the files are for, "mlx" or "pt". Raises ModelError for a weight
    that is not finite.
    """
    names = sorted(weights)
    sizes = {name: int(weights[name].nbytes) for name in names}
    shards = _shards(sizes, shard_size)
    place: dict[str, str] = {}
    file_of = {name: number for number, shard in enumerate(shards) for name in shard}
    made: dict[str, mx.array] = {}
    for name in track(names, len(names), "writing weights"):
        made[name] = _made(name, weights.pop(name))
        shard = shards[file_of[name]]
        if name == shard[-1]:
            file = _SINGLE if len(shards) == 1 else f"model-{file_of[name] + 1:05d}-of-{len(shards):05d}.safetensors"
            mx.save_safetensors(str(folder / file), made, {"format": kind})
            _sync(folder / file)
            place |= dict.fromkeys(made, file)
            made.clear()
            mx.clear_cache()
    total = {"total_size": sum(sizes.values())}
    text = json.dumps({"metadata": total, "weight_map": dict(sorted(place.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, processors, templates and generation config, without what would load code; their names."""
    names = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in names:
        content = (source / name).read_bytes()
        if name.endswith("config.json") and b"auto_map" in content:
            kept = {key: value for key, value in json.loads(content).items() if key != "auto_map"}
            content = json.dumps(kept, indent=2, ensure_ascii=False).encode() + b"\n"
        (folder / name).write_bytes(content)
    return names


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, without what would load code."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    (folder / CONFIG).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, as files of at most so many bytes, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, added in sizes.items():
        if shards[-1] and size + added > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += added
    return shards


def _made(name: str, weight: mx.array) -> mx.array:
    """A weight in memory, by itself; ModelError where it is not finite."""
    mx.eval(weight)
    if mx.issubdtype(weight.dtype, mx.floating) and not bool(mx.isfinite(weight).all().item()):
        raise ModelError(
            f"{name} holds numbers that are not finite; download the checkpoint again, or give another dtype"
        )
    # What it was made from is of other sizes than what comes next.
    mx.clear_cache()
    return weight


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _check_output(output: Path, overwrite: bool, apart_from: Sequence[Path]) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder to write the model into")
    place = output.resolve()
    for source in (each.resolve() for each in apart_from):
        if place == source:
            raise ConfigError(f"{output}: is the source itself; give another output folder")
        if place in source.parents or source in place.parents:
            raise ConfigError(f"{output}: source and output must not lie within each other; give another output folder")
    if any(here.resolve().is_relative_to(place) for here in (Path(), Path.home())):
        raise ConfigError(f"{output}: is or holds the folder you are in, or your home; give a folder of its own")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output}: is not empty; give another folder, or --overwrite to replace it")


def _replace(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place; what was there is removed only when the new one stands."""
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
