"""HPDv2: pairs to train with, and rankings of nine or ten images by ten people each to test with."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from mlxpref.data.rows import Row, RowErrors, RowSampler, all_rows, missing, random_swaps, read_json_rows, with_images
from mlxpref.errors import DataError
from mlxpref.preferences import Preference, Side

__all__ = ["ranking_rows", "read_hpdv2", "train_rows"]

_DAMAGED = {"00006811.jpg", "00168743.jpg", "00331911.jpg", "00310087.jpg"}
"""Images of the training set that another project's reader passes over as corrupt; not looked at here."""


def read_hpdv2(folder: Path, split: str, draw: RowSampler = all_rows) -> list[Preference]:
    """The preferences of a split, `train` or `test`, in a folder of the hub's layout.

    Of the test, a pair's `p_people` is the share of the ten people who rank a above b, and its label the order of the
    official ranking, which that of the votes need not be. Of the training set each pair has one vote, and which image
    is a is drawn: nothing says that the list's order tells nothing. `draw` chooses among the pairs.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise missing("hpdv2", split, f"there is no {path}")
    rows = train_rows(path) if split == "train" else ranking_rows(path)
    rows = [rows[i] for i in draw(len(rows))]
    return with_images("hpdv2", split, rows, folder / split, folder / f"{split}.tar.gz", f"{split}/")


def train_rows(path: Path) -> list[Row]:
    """The pairs of train.json, with names of images, sides drawn."""
    faults, rows, number = RowErrors(path), list[Row](), 0
    keep = dict[str, str]().setdefault  # a name and a prompt stand in many pairs, and are in memory once
    exchange = random_swaps("hpdv2")
    for number, entry in read_json_rows(path):
        try:
            prompt, (first, second) = entry["prompt"], entry.get("file_path") or entry["image_path"]
            p_first = _share(*entry["human_preference"])
            if not (isinstance(prompt, str) and isinstance(first, str) and isinstance(second, str)):
                raise DataError("prompt and images must be text")
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            faults.add(f"row {number}: {_why(error)}")
            continue
        if first in _DAMAGED or second in _DAMAGED:
            faults.add(f"row {number}: {first if first in _DAMAGED else second} is known to be damaged")
        elif first == second:
            faults.add(f"row {number}: names {first} twice")
        else:
            prompt, first, second = keep(prompt, prompt), keep(first, first), keep(second, second)
            a, b, p_people = (second, first, 1 - p_first) if next(exchange) else (first, second, p_first)
            rows.append(Row(prompt, a, b, p_people, 1, prompt))
    faults.settle(number)
    return rows


def ranking_rows(path: Path) -> list[Row]:
    """All pairs of each ranking of test.json, with names of images; each ranking is a group of its own."""
    faults, rows, number = RowErrors(path), list[Row](), 0
    groups: set[str] = set()
    for number, entry in read_json_rows(path):
        try:
            group = _text(entry["prompt"])
            group = f"{group} ({number})" if group in groups else group
            rows += _pairs(entry, group)
            groups.add(group)
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            faults.add(f"row {number}: {_why(error)}")
    faults.settle(number)
    return rows


def _pairs(entry: dict[str, Any], group: str) -> Iterator[Row]:
    names, ranks = entry["image_path"], entry["rank"]
    raters = [rater["rank"] for rater in entry.get("raw_annotations") or ()]
    for ranking in (ranks, *raters):
        if len(ranking) != len(names) or not all(isinstance(rank, int) for rank in ranking):
            raise DataError(f"{len(names)} images, but the ranks {ranking}")
    if len(set(map(_text, names))) < len(names):
        raise DataError("names an image twice")
    for i, j in combinations(range(len(names)), 2):
        label: Side = "a" if ranks[i] < ranks[j] else "b" if ranks[i] > ranks[j] else "tie"
        votes = [_preference(ranking[i], ranking[j]) for ranking in raters or [ranks]]
        yield Row(entry["prompt"], names[i], names[j], sum(votes) / len(votes), len(votes), group, label)


def _preference(rank: int, other: int) -> float:
    """What one person's ranks of two images say for the first of them; the lower rank is the better."""
    return 1.0 if rank < other else 0.0 if rank > other else 0.5


def _share(first: int, second: int) -> float:
    """The share of people who prefer the first image of a pair."""
    if first not in (0, 1) or second not in (0, 1):
        raise DataError(f'"human_preference" is {first} and {second}, not 1 and 0')
    return (1 + first - second) / 2


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{value!r:.60} is not text")
    return value


def _why(error: Exception) -> str:
    return f'has no "{error.args[0]}"' if isinstance(error, KeyError) else str(error)
