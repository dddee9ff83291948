"""The saved state of a run, written so that a readable one exists even if the process dies at any time.

A state is the folder `checkpoint` with arrays, numbers and the checksums of both (for `sha256sum -c`). It is written as
`checkpoint.new`, synced to the disk, and only then renamed to `checkpoint`; the one before stays as
`checkpoint.previous`.
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

_LAST, _NEW, _PREVIOUS = "checkpoint", "checkpoint.new", "checkpoint.previous"
_ARRAYS, _NUMBERS, _SUMS = "arrays.safetensors", "state.json", "SHA256SUMS"
STATE_FILES = tuple(f"{folder}/{name}" for folder in (_LAST, _NEW, _PREVIOUS) for name in (_ARRAYS, _NUMBERS, _SUMS))
"""All files of states in a run's folder."""


@dataclass(frozen=True)
class RunState:
    """The state of a run after a step; `complete` if that was its end.

    `arrays` and `numbers` are the trainer's state, `sizes` the bytes of each record file then, `totals` those of all
    steps; None of a run of an earlier version, whose log has none. `line` is that of the step, if the log lacks it.
    """

    step: int
    arrays: Mapping[str, mx.array]
    numbers: Mapping[str, Any]
    sizes: Mapping[str, int]
    complete: bool = False
    totals: Mapping[str, float] | None = None
    line: Mapping[str, Any] | None = None

    def without_arrays(self) -> dict[str, Any]:
        """Return all fields but the arrays, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}


def write_state(run: Path, state: RunState) -> None:
    """Make a state the last one in a run's folder; ConfigError if it cannot be written, and the one before stays."""
    last, new, previous = (run / name for name in (_LAST, _NEW, _PREVIOUS))
    try:
        if not last.exists() and _is_intact(new):
            new.rename(last)  # the process died in the swap, and this is the newest one
        _build(new, state)
        if _is_intact(last):
            shutil.rmtree(previous, ignore_errors=True)
            last.rename(previous)
        else:  # the one before is the only good one
            shutil.rmtree(last, ignore_errors=True)
        new.rename(last)
        sync(run)
    except (OSError, RuntimeError) as error:  # MLX raises the latter for a full disk
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{last}: step {state.step} cannot be saved ({reason}); what was saved before is still there: "
            f"correct that, and continue with --resume --output {run}"
        ) from error


def read_state(run: Path) -> RunState | None:
    """Return the last readable state in a run's folder, or None; warn if it is not the last one."""
    # If the process died in the swap, the newest one is still `checkpoint.new`.
    for name in (_LAST, _NEW, _PREVIOUS):
        if not _is_intact(run / name):
            continue
        arrays = mx.load(str(run / name / _ARRAYS))
        assert isinstance(arrays, dict)
        state = RunState(arrays=arrays, **json.loads((run / name / _NUMBERS).read_text(encoding="utf-8")))
        if name != _LAST and (run / _LAST).exists():
            logger.warning(f"{run / _LAST}: damaged; the run continues from the one before, of step {state.step}")
        return state
    folders = [str(run / name) for name in (_LAST, _PREVIOUS) if (run / name).exists()]
    problem = f"{', '.join(folders)}: damaged, and there is no other" if folders else f"{run}: no step was saved yet"
    logger.warning(f"{problem}: the run starts over")
    return None


def _build(folder: Path, state: RunState) -> None:
    """Write a state as a folder and sync it to the disk; remove an unfinished one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        mx.save_safetensors(str(folder / _ARRAYS), dict(state.arrays))
        (folder / _NUMBERS).write_text(json.dumps(state.without_arrays(), indent=2) + "\n", encoding="utf-8")
        (folder / _SUMS).write_text(_sums(folder), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_intact(folder: Path) -> bool:
    """Whether a folder is a state with intact files."""
    try:
        return (folder / _SUMS).read_bytes() == _sums(folder).encode()
    except OSError:
        return False


def _sums(folder: Path) -> str:
    return "".join(f"{sha256_of(folder / name)}  {name}\n" for name in (_ARRAYS, _NUMBERS))
