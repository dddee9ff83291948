"""The file that a distillation writes: what may be replaced by another one."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxpref.data.image_files import ImageFiles
from mlxpref.engine.profile import own_profile
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.judge import Judge
from mlxpref.preferences import Pair, Preference
from mlxpref.text import counted, few

_ROW = {"prompt", "a", "b", "p_a_shown_first", "judge"}
"""Columns of the file, by which an earlier one is known."""


def name_of(judge: Judge) -> str:
    """The judge's name in the file, with that of its profile if it is not our own."""
    name = f"{judge.name} with {judge.adapter}" if judge.adapter else judge.name
    is_own = judge.profile.version() == own_profile().version()
    return name if is_own else f"{name} by the profile {judge.profile.name}"


def check_distilled(path: Path) -> None:
    """ConfigError, before the work, for an output that cannot be one, or a file that no distillation wrote."""
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"{path}: `train` and `eval` know preferences by .jsonl; give a name that ends in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; make it, or give another output")
    _earlier_rows(path)


def _earlier_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier distillation, none without a file; ConfigError for any other file."""
    rows: list[Any] = [None]
    with suppress(OSError, ValueError):
        rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    if not all(isinstance(row, dict) and row.keys() >= _ROW for row in rows):
        raise ConfigError(f"{path}: is there, and no earlier result of `distill`; give another output")
    return rows


def check_replaced(judge: Judge, path: Path, pairs: Iterable[Pair | Preference], most: int) -> None:
    """ConfigError, before the work, for an earlier distillation with rows that `most` of these pairs would lack."""
    if not (rows := _earlier_rows(path)):
        return
    advice = "give another output (--output), or remove the file"
    if others := sorted({str(row["judge"]) for row in rows} - {name_of(judge)}):
        raise ConfigError(
            f"{path}: has {counted(len(rows), 'pair')} judged by {few(others, 3)}, not {name_of(judge)}, which "
            f"would be replaced; {advice}"
        )
    names, planned = ImageFiles(path, judge.vlm.features.images, copies=False), set[tuple[str, frozenset[str]]]()
    for pair in pairs:
        with suppress(DataError, OSError):  # an image that is gone: its pairs would be lost
            planned.add((pair.prompt, frozenset((names.of(pair.a), names.of(pair.b)))))
    kept = sum((row["prompt"], frozenset((row["a"], row["b"]))) in planned for row in rows)
    if lost := len(rows) - min(kept, most):
        raise ConfigError(
            f"{path}: has {counted(len(rows), 'pair')} of an earlier distillation, and this one, of other data or of "
            f"fewer pairs, would lose {lost}; {advice}"
        )
