"""The page of a training run: what was learned, how it moved, what it cost, and some of what was written.

It is made from the files of the run's folder alone, so also of an interrupted run or one of another version: what is
missing there is missing here. Texts of the files may be anything; none of them reaches a drawing.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.archives import named_image
from mlxpref.errors import DataError
from mlxpref.power import slowdown
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.report.html import Thumbnail, thumbnail, write_page
from mlxpref.report.run_curves import figures
from mlxpref.report.run_log import RunLog, format_number, number
from mlxpref.text import plain

__all__ = ["RUN_PAGE", "recorded_images", "write_run_page"]

RUN_PAGE = "report.html"
"""What the page of a run is called in its folder."""

Record = dict[str, Any]

_SAMPLED_STEPS = 4
"""Of how many steps the best and the worst rollout are shown, beside those of the whole run."""
_MOST_TEXT = 4000
_MOST_VALUE = 500
_MOST_ROWS = 300
"""How much is shown of a completion or prompt, of a setting's value, and of run.json, in characters and rows."""


@dataclass(frozen=True)
class _Side:
    """One image of a comparison as it was shown: which of the page's pictures, if any, its name, people's share."""

    picture: int | None
    name: str
    path: str
    people: str


@dataclass(frozen=True)
class _Written:
    """One rollout: why it is shown, its text with how many characters were cut, and its numbers with their names."""

    why: str
    text: str
    cut: int
    numbers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Comparison:
    """One comparison of a step with some of its rollouts."""

    step: str
    prompt: str
    sides: tuple[_Side, _Side]
    rollouts: tuple[_Written, ...]


def recorded_images(record: Record) -> tuple[ImageLike, ImageLike] | None:
    """The images of a line of rollouts.jsonl whose `first` and `second` are paths, in the places they were shown in.

    A path that goes on inside an archive is the image there.
    """
    first, second = record.get("first"), record.get("second")
    return (named_image(first), named_image(second)) if isinstance(first, str) and isinstance(second, str) else None


def write_run_page(
    folder: Path, images: Callable[[Record], tuple[ImageLike, ImageLike] | None] = recorded_images
) -> Path:
    """Write report.html into the folder of a run, finished or not, with everything inside, and return its path.

    `images` finds the two images of a line of rollouts.jsonl, in the places they were shown in, or None; it is asked
    for the few lines that are shown. An image that cannot be read leaves its place empty. DataError for a folder
    without run.json and log.jsonl.
    """
    files = [folder / name for name in ("run.json", "log.jsonl", "rollouts.jsonl")]
    if not any(file.is_file() for file in files[:2]):
        raise DataError(f"{folder}: holds no run.json and no log.jsonl; give the --output of a training run")
    run, (lines, bad), (rollouts, bad_rollouts) = _read_run(files[0]), read_lines(files[1]), read_lines(files[2])
    log = RunLog(lines)
    comparisons, pictures = _comparisons(rollouts, images)
    groups, zero, smoothing = figures(log, _settings(run))
    write_page(
        folder / RUN_PAGE,
        "run.html",
        title=_title(run),
        when=_when(run, files),
        notes=[*_notes(log, run), *_damage({"log.jsonl": bad, "rollouts.jsonl": bad_rollouts})],
        headlines=log.headlines(),
        facts=log.facts(),
        changes=log.changes(),
        groups=groups,
        zero=zero,
        smoothing=smoothing,
        ends=log.ends,
        settings=list(_rows(run))[:_MOST_ROWS],
        comparisons=comparisons,
        pictures=pictures,
        recorded=len(rollouts),
        thoughtless=_settings(run).get("think") is False,
    )
    return folder / RUN_PAGE


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of a file of JSON lines, and how many of its lines are none; a missing file has no lines.

    A run that is killed while it writes leaves half a line, perhaps half a character.
    """
    records, bad = [], 0
    # Not splitlines: a completion may hold line separators that JSON leaves as they are.
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        if line.strip():
            record = _parsed(line)
            records += [] if record is None else [record]
            bad += record is None
    return records, bad


def _parsed(text: bytes) -> Record | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_run(path: Path) -> Record:
    return (_parsed(path.read_bytes()) if path.is_file() else None) or {}


def _settings(run: Record) -> Record:
    settings = run.get("settings")
    return settings if isinstance(settings, dict) else {}


def _title(run: Record) -> str:
    """What was trained on what for what."""
    settings, base = _settings(run), run.get("base")
    model = settings.get("model") or (base.get("base_model") if isinstance(base, dict) else "") or "a judge"
    known = [f"{name} {settings[key]}" for name, key in (("on", "data"), ("reward", "reward")) if settings.get(key)]
    return _short(f"{model} trained {', '.join(known)}" if known else f"{model} trained")


def _when(run: Record, files: Sequence[Path]) -> str:
    """When the run was; by its files' dates where it does not say."""
    moments = [time.localtime(file.stat().st_mtime) for file in files if file.is_file()]
    dates = list(dict.fromkeys(time.strftime("%Y-%m-%d %H:%M", moment) for moment in (min(moments), max(moments))))
    if run.get("started"):
        return _short(f"Started {run['started']}, last written {dates[-1]}.")
    return f"{' to '.join(dates)}, by the dates of its files."


def _notes(log: RunLog, run: Record) -> list[str]:
    """What should be known before the numbers are read."""
    if not log.steps:
        return ["No step is recorded."]
    notes = [] if run else ["run.json is missing or damaged, so the settings are not known."]
    planned, last = number(log.records[-1].get("steps")), log.steps[-1]
    if planned > last:
        ended = run.get("ended")
        early = isinstance(ended, dict) and ended.get("early")
        why = "its patience ended the run" if early else "the run was ended, or goes on"
        notes.append(
            f"{last:g} of {planned:g} steps are recorded: {why}. The learning rate was planned for all of them."
        )
    resumed = run.get("resumed")
    if isinstance(resumed, list) and resumed:
        after = [f"{number(each.get('after_step')):g}" for each in resumed if isinstance(each, dict)]
        notes.append(f"The run was resumed after step {_few(after)}.")
    if slower := slowdown(log.column("tokens_per_second"), log.column("tokens")):
        notes.append(
            f"The last steps wrote {format_number(slower[1])} tokens a second, "
            f"the first ones {format_number(slower[0])}: the machine was hot, on battery, short of memory or shared. "
            "What was learned is the same."
        )
    if failed := [f"{step:g}" for step in log.not_finite()]:
        notes.append(
            f"In {len(failed)} of {len(log.steps)} steps loss or gradient was not finite, and the adapter stayed as "
            f"it was: {_few(failed)}."
        )
    return notes


def _few(words: Sequence[str]) -> str:
    return ", ".join(words[:10]) + (", ..." if len(words) > 10 else "")


def _damage(bad: dict[str, int]) -> list[str]:
    return [
        f"{name}: {count} line{'s' if count > 1 else ''} could not be read and {'are' if count > 1 else 'is'} left out."
        for name, count in bad.items()
        if count
    ]


def _rows(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Everything in run.json as names and values, a table within it as `table.name`; settings by their name alone."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _rows(value, "" if name == "settings" and not prefix else f"{prefix}{name}.")
        else:
            yield _short(prefix + name), _short(value if isinstance(value, str) else json.dumps(value))


def _short(text: object) -> str:
    line = plain(text)
    return line if len(line) <= _MOST_VALUE else line[:_MOST_VALUE] + "..."


def _comparisons(
    records: Sequence[Record], images: Callable[[Record], tuple[ImageLike, ImageLike] | None]
) -> tuple[list[_Comparison], list[Thumbnail]]:
    """The rollouts to show beside their comparisons, in the order of the steps, and the pictures, each once."""
    found: dict[str, list[tuple[Record, str]]] = {}
    for record, why in _chosen(records):
        key = json.dumps([record.get(name) for name in ("step", "prompt", "y", "first", "second")])
        found.setdefault(key, []).append((record, why))
    pictures: dict[str, tuple[int, Thumbnail]] = {}
    comparisons = []
    for rollouts in found.values():
        record = rollouts[0][0]
        shown = images(record) or (None, None)
        y = number(record.get("y"))
        sides = tuple(_side(image, share, pictures) for image, share in zip(shown, (y, 1 - y), strict=True))
        written = tuple(_written(*each) for each in rollouts)
        prompt = _cut(record.get("prompt"))[0]
        comparisons.append(_Comparison(f"{number(record.get('step')):g}", prompt, (sides[0], sides[1]), written))
    return comparisons, [picture for _, picture in pictures.values()]


def _chosen(records: Sequence[Record]) -> list[tuple[Record, str]]:
    """Rollouts spread over the run, each with why it was chosen: best and worst of some steps, and of all."""
    steps: dict[float, list[Record]] = {}
    for record in records:
        if math.isfinite(step := number(record.get("step"))) and math.isfinite(number(record.get("reward"))):
            steps.setdefault(step, []).append(record)
    if not steps:
        return []
    ordered = sorted(steps)
    picked = {ordered[i] for i in np.linspace(0, len(ordered) - 1, _SAMPLED_STEPS).round().astype(int)}
    reasons: dict[int, list[str]] = {}
    chosen: dict[int, Record] = {}
    every = [record for step in ordered for record in steps[step]]
    for group, of in [(every, "the run"), *((steps[step], "its step") for step in sorted(picked))]:
        ranked = sorted(group, key=lambda record: number(record.get("reward")))
        if number(ranked[0].get("reward")) == number(ranked[-1].get("reward")):
            ends = [(ranked[0], ("the only one kept of " if len(ranked) == 1 else "all have the same reward of ") + of)]
        else:
            ends = [(ranked[-1], "most reward of " + of), (ranked[0], "least reward of " + of)]
        for record, why in ends:
            chosen[id(record)] = record
            reasons.setdefault(id(record), []).append(why)
    return sorted(
        ((record, ", ".join(reasons[key])) for key, record in chosen.items()),
        key=lambda pair: (number(pair[0].get("step")), -number(pair[0].get("reward"))),
    )


def _side(image: ImageLike | None, share: float, pictures: dict[str, tuple[int, Thumbnail]]) -> _Side:
    path = plain(image) if isinstance(image, Path | PackedImage) else ""
    small = _picture(image)
    place = pictures.setdefault(small.uri, (len(pictures), small))[0] if small else None
    return _Side(place, Path(path).name, path, format_number(share, "share"))


def _picture(image: ImageLike | None) -> Thumbnail | None:
    """The thumbnail, or None: what was trained for hours is not lost because a file was moved meanwhile."""
    # A path that a file names may be a pipe, which would be waited for.
    if image is None or (isinstance(image, Path) and not image.is_file()):
        return None
    try:
        return thumbnail(image)
    except (DataError, OSError):
        return None


def _written(record: Record, why: str) -> _Written:
    text, cut = _cut(record.get("text"))
    numbers = [
        ("prefers Image 1 with", format_number(number(record.get("p_first")), "share")),
        ("mass on the labels", format_number(number(record.get("label_mass")), "share")),
        ("reward", f"{number(record.get('reward')):.3f}"),
        ("advantage", f"{number(record.get('advantage')):+.3f}".replace("-", "−")),
    ]
    return _Written(
        why, text, cut, tuple((name, value) for name, value in numbers if value.strip("+") not in ("", "nan"))
    )


def _cut(text: object) -> tuple[str, int]:
    """Text of several lines that shows and does nothing else, and how many of its characters were cut."""
    if not isinstance(text, str):
        return "", 0
    lines = "\n".join(plain(line) for line in text[:_MOST_TEXT].splitlines())
    return lines, max(0, len(text) - _MOST_TEXT)
