"""The page of a training run: its curves, settings, measurements, and twenty of its rollouts.

It needs only the files in the run's folder, which an interrupted run has, too, and leaves out what they lack. Texts of
the files may be anything; none of them reaches a drawing.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.archives import named_image
from mlxpref.data.images import load_image
from mlxpref.data.thumbnails import LoadImage, try_thumbnail
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.report.curves import COLOURS, curve_svg
from mlxpref.report.html import write_page
from mlxpref.report.run_log import PHASES, Record, RunLog, format_number, number
from mlxpref.text import plain

RUN_PAGE = "report.html"  # the file name of the page in the folder of a run

Images = Callable[[Record], tuple[ImageLike, ImageLike] | None]

_FIGURES: tuple[tuple[str, str, bool, dict[str, str], dict[str, str]], ...] = (
    ("Reward", "The mean over the rollouts of a step.", False, {"reward": "reward"}, {}),
    (
        "Agreement with people",
        "A bar is a 95 % interval.",
        True,
        {"rollouts": "accuracy", "read at once": "read_accuracy", "learned": "kept"},
        {"held-out": "accuracy"},
    ),
    ("Held-out pairs", "", True, {}, {"same image in both orders": "position_consistency", "calibration error": "ece"}),
    ("Form", "", True, {"right form": "format_rate", "mass on labels": "label_mass", "out of tokens": "truncated"}, {}),
    ("Entropy", "In nats a token; near 0 all rollouts are the same.", False, {"entropy": "entropy"}, {}),
    ("Distance from the judge without adapter", "In nats a token or answer.", False, {"KL": "kl"}, {}),
    ("Sampling against scoring", "Mean distance of two log-probabilities.", False, {"mismatch": "mismatch"}, {}),
    ("Other experts", "Chosen in the update, not while writing.", True, {"experts": "rerouted"}, {}),
    ("Gradient norm", "Before clipping.", False, {"norm": "grad_norm"}, {}),
    ("Clipped tokens", "In the last update of a step.", True, {"clipped": "clip_fraction"}, {}),
    ("Learning rate", "", False, {"rate": "learning_rate"}, {}),
    ("Groups without a signal", "", False, {"groups": "skipped"}, {}),
    ("Tokens a second", "If it falls, the machine may be throttled.", False, {"speed": "tokens_per_second"}, {}),
    ("Seconds a step", "", False, {name: column for column, name in PHASES.items()}, {}),
)
"""Title, note, whether values are shares, columns of curves by name, held-out metrics of dots by name."""
_SHOWN_STEPS = 10  # each with the rollouts of the most and the least reward
_MAX_CHARACTERS = 4000
_NUMBERS = (("prefers image 1 with", "p_first", True), ("mass on labels", "label_mass", True),
            ("reward", "reward", False), ("advantage", "advantage", False))  # fmt: skip


def recorded_images(record: Record) -> tuple[ImageLike, ImageLike] | None:
    """The images of a line of rollouts.jsonl whose `first` and `second` are paths, of files or into archives."""
    first, second = record.get("first"), record.get("second")
    return (named_image(first), named_image(second)) if isinstance(first, str) and isinstance(second, str) else None


def write_run_page(folder: Path, images: Images = recorded_images, load: LoadImage = load_image) -> Path:
    """Write report.html, a self-contained page, into the folder of a run, finished or not, and return its path.

    `images` returns the two images of a line of rollouts.jsonl, in the places they were shown in, or None; `load`
    reads them. An image that cannot be read leaves its place empty. DataError for a folder without run.json and
    log.jsonl.
    """
    run, log, rollouts = (folder / name for name in ("run.json", "log.jsonl", "rollouts.jsonl"))
    if not any(file.is_file() and file.stat().st_size for file in (run, log)):
        raise DataError(f"{folder}: holds no run.json and no log.jsonl; give the --output of a training run")
    record = next(_records([run.read_bytes()] if run.is_file() else []), {})
    columns = RunLog(list(_records(_lines(log))))
    settings = record.get("settings") or {}
    names = [settings.get(name) if isinstance(settings, dict) else None for name in ("model", "data")]
    write_page(
        folder / RUN_PAGE,
        "run.html",
        title=plain(f"{names[0] or 'a judge'} trained on {names[1] or 'preferences'}")[:200],
        facts=columns.facts(),
        changes=columns.changes(),
        figures=list(_figures(columns)),
        settings=[(plain(name)[:200], plain(value)[:500]) for name, value in itertools.islice(_rows(record), 300)],
        rollouts=[_rollout(line, images, load) for line in _extremes(lambda: _records(_lines(rollouts)))],
    )
    return folder / RUN_PAGE


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, one at a time, as there may be many; none of a missing one."""
    if file.is_file():
        with file.open("rb") as lines:
            yield from lines


def _records(texts: Iterable[bytes]) -> Iterator[Record]:
    """The JSON objects in texts; skips half lines, which a killed run leaves."""
    for text in texts:
        with suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(text), dict):
                yield value


def _figures(log: RunLog) -> Iterator[dict[str, Any]]:
    """The curves of a run; values that are missing, or 0 in every step, get no figure."""
    for title, note, share, columns, metrics in _FIGURES:
        curves = {name: log.column(column) for name, column in columns.items()}
        curves |= log.reward_parts() if title == "Reward" else {}
        curves = {name: values for name, values in curves.items() if np.nan_to_num(values).any()}
        dots = {name: dots for name, metric in metrics.items() if (dots := log.held_out(metric)).steps}
        if not curves and not dots:
            continue
        ends = [(e.first, e.last) for values in curves.values() if (e := log.first_last(values))]
        ends += [(dot.values[0], dot.values[-1]) for dot in dots.values()]
        texts = [" → ".join(format_number(value, share) for value in pair) for pair in ends]
        keys = list(zip([*curves, *dots], itertools.cycle(COLOURS), texts, strict=False))
        drawing = curve_svg(
            curves, max(5, len(log.steps) // 40), steps=log.steps, dots=dots, share=share, size=(4.6, 2.5)
        )
        yield {"title": title, "note": note, "drawing": drawing, "keys": keys}


def _rows(values: Record, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The entries of run.json as names and values, nested ones as `table.name`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _extremes(read: Callable[[], Iterable[Record]]) -> list[Record]:
    """The rollouts with the most and the least reward of steps spread over the run; `read` reads all, twice."""

    def by_step() -> Iterator[tuple[float, Record]]:
        for record in read():
            if math.isfinite(step := number(record.get("step"))) and math.isfinite(number(record.get("reward"))):
                yield step, record

    numbers = sorted({step for step, _ in by_step()})
    places = np.linspace(0, len(numbers) - 1, _SHOWN_STEPS).round().astype(int).tolist() if numbers else []
    shown: dict[float, list[Record]] = {numbers[place]: [] for place in places}
    for step, record in by_step():
        if step in shown:
            shown[step].append(record)
    rollouts = []
    for records in filter(None, shown.values()):
        records.sort(key=lambda record: -number(record["reward"]))
        rollouts += [records[0], *records[1:][-1:]]
    return rollouts


def _rollout(record: Record, images: Images, load: LoadImage) -> dict[str, Any]:
    """The template's values for a line of rollouts.jsonl."""
    y, pair = number(record.get("y")), images(record) or (None, None)
    paths = [plain(image) if isinstance(image, Path | PackedImage) else "" for image in pair]
    people = [format_number(share, True) for share in (y, 1 - y)]
    numbers = [(name, format_number(number(record.get(field)), share)) for name, field, share in _NUMBERS]
    return {
        "step": f"{number(record.get('step')):g}",
        "prompt": plain(record.get("prompt") or "")[:_MAX_CHARACTERS],
        "sides": list(zip((try_thumbnail(image, 200, load) for image in pair), paths, people, strict=True)),
        "text": "\n".join(map(plain, str(record.get("text") or "")[:_MAX_CHARACTERS].splitlines())),
        "numbers": [(name, value) for name, value in numbers if value],
    }
