"""Checkpoints: all that a run needs to go on, kept so that a readable one is there whenever the process dies.

A checkpoint is a folder with arrays, with numbers, and with the checksums of both (as `sha256sum -c` reads them). It
is written as `checkpoint.new`, brought to the disk, and only then takes the name `checkpoint` from the one before,
which stays as `checkpoint.previous`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.errors import ConfigError
from mlxpref.files import sha256_of, sync
from mlxpref.log import logger

__all__ = ["CHECKPOINT_FILES", "Checkpoint", "read_checkpoint", "write_checkpoint"]

_LAST, _NEW, _PREVIOUS = "checkpoint", "checkpoint.new", "checkpoint.previous"
_ARRAYS, _STATE, _SUMS = "arrays.safetensors", "state.json", "SHA256SUMS"
CHECKPOINT_FILES = tuple(f"{folder}/{name}" for folder in (_LAST, _NEW, _PREVIOUS) for name in (_ARRAYS, _STATE, _SUMS))
"""Every file that checkpoints ever have in a run's folder."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood after a step; `complete` where that was its end.

    `arrays` and `numbers` are the trainer's state, `sizes` the bytes that each record file had then.
    """

    step: int
    arrays: Mapping[str, mx.array]
    numbers: Mapping[str, Any]
    sizes: Mapping[str, int]
    complete: bool = False


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Make a checkpoint the last one in a run's folder; ConfigError where it cannot be written, the last one kept."""
    last, new, previous = (run / name for name in (_LAST, _NEW, _PREVIOUS))
    try:
        if not last.exists() and _is_intact(new):
            new.rename(last)  # the swap was cut off here, and this is the newest one
        _build(new, checkpoint)
        if _is_intact(last):
            shutil.rmtree(previous, ignore_errors=True)
            last.rename(previous)
        else:  # the one before is the only good one
            shutil.rmtree(last, ignore_errors=True)
        new.rename(last)
        sync(run)
    except (OSError, RuntimeError) as error:  # MLX raises the latter for a full disk
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{last}: step {checkpoint.step} cannot be kept ({why}); a checkpoint written before is still there: "
            f"correct that, and go on with --resume --output {run}"
        ) from error


def read_checkpoint(run: Path) -> Checkpoint | None:
    """The last readable checkpoint in a run's folder, or None; a warning says where that is not simply the last one."""
    # Where the process died within the swap, the newest one has not got its name yet.
    for name in (_LAST, _NEW, _PREVIOUS):
        if not _is_intact(run / name):
            continue
        state = json.loads((run / name / _STATE).read_text(encoding="utf-8"))
        arrays = mx.load(str(run / name / _ARRAYS))
        assert isinstance(arrays, dict)
        checkpoint = Checkpoint(arrays=arrays, **state)
        if name != _LAST and (run / _LAST).exists():
            logger.warning(f"{run / _LAST}: damaged; going on from the one before, of step {checkpoint.step}")
        return checkpoint
    damaged = [str(run / name) for name in (_LAST, _PREVIOUS) if (run / name).exists()]
    if damaged:
        logger.warning(f"{', '.join(damaged)}: damaged, and no other checkpoint is there: the run starts over")
    else:
        logger.warning(f"{run}: no checkpoint yet: the run starts over")
    return None


def _build(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as a folder and bring it to the disk; what cannot be finished is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        mx.save_safetensors(str(folder / _ARRAYS), dict(checkpoint.arrays))
        state = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name != "arrays"}
        (folder / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        (folder / _SUMS).write_text(_sums(folder), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_intact(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose files are what was written."""
    try:
        return (folder / _SUMS).read_bytes() == _sums(folder).encode()
    except OSError:
        return False


def _sums(folder: Path) -> str:
    return "".join(f"{sha256_of(folder / name)}  {name}\n" for name in (_ARRAYS, _STATE))
