"""HPDv2: training pairs, and test rankings of nine or ten images by ten people each."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from sys import intern
from typing import Any

from mlxpref.data.catalog import missing_files
from mlxpref.data.rows import Row, RowSampler, all_rows, parse_rows, random_swaps, read_json_rows, with_images
from mlxpref.errors import DataError
from mlxpref.preferences import Preference, Side

_DAMAGED = {"00006811.jpg", "00168743.jpg", "00331911.jpg", "00310087.jpg"}
"""Training images that another project's reader skips as corrupt; not checked here."""


def read_hpdv2(folder: Path, split: str, draw: RowSampler = all_rows, needs_images: bool = True) -> list[Preference]:
    """The preferences of a split, `train` or `test`, in a folder of the hub's layout.

    In the test a pair's `p_people` is the share of the ten people who rank a above b, and its label the order of the
    official ranking, which may differ from that of the votes. Training pairs have one vote each, with a drawn at
    random, as the list's order may depend on the label. `draw` chooses among the pairs.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise missing_files("hpdv2", split, f"there is no {path}")
    rows = train_rows(path) if split == "train" else ranking_rows(path)
    rows = [rows[i] for i in draw(len(rows))]
    return with_images("hpdv2", split, rows, folder / split, folder / f"{split}.tar.gz", needs_images)


def train_rows(path: Path) -> list[Row]:
    """The pairs of train.json, with names of images and random sides."""
    return random_swaps(parse_rows(path, read_json_rows(path), _pair), "hpdv2")


def ranking_rows(path: Path) -> list[Row]:
    """All pairs of each ranking of test.json, with names of images; each ranking is a group of its own."""
    entries = enumerate(read_json_rows(path), 1)
    groups: set[str] = set()

    def pairs(numbered_entry: tuple[int, Any]) -> Iterator[Row]:
        number, entry = numbered_entry
        group = _text(entry["prompt"])
        group = f"{group} ({number})" if group in groups else group
        rows = list(_ranking_pairs(entry, group))
        groups.add(group)
        yield from rows

    return parse_rows(path, entries, pairs)


def _pair(entry: Any) -> Iterator[Row]:
    # Many pairs share names and prompts: interned, they are in memory once.
    prompt, (first, second) = entry["prompt"], entry.get("file_path") or entry["image_path"]
    preference, other = entry["human_preference"]
    if preference not in (0, 1) or other not in (0, 1):
        raise DataError(f'"human_preference" is {preference} and {other}, not 1 and 0')
    if not (isinstance(prompt, str) and isinstance(first, str) and isinstance(second, str)):
        raise DataError("prompt and images must be text")
    if first in _DAMAGED or second in _DAMAGED:
        raise DataError(f"{first if first in _DAMAGED else second} is known to be damaged")
    if first == second:
        raise DataError(f"names {first} twice")
    prompt = intern(prompt)
    yield Row(prompt, intern(first), intern(second), (1 + preference - other) / 2, 1, prompt)


def _ranking_pairs(entry: dict[str, Any], group: str) -> Iterator[Row]:
    names, ranks = entry["image_path"], entry["rank"]
    raters = [rater["rank"] for rater in entry.get("raw_annotations") or ()]
    for ranking in (ranks, *raters):
        if len(ranking) != len(names) or not all(isinstance(rank, int) for rank in ranking):
            raise DataError(f"{len(names)} images, but the ranks {ranking}")
    if len(set(map(_text, names))) < len(names):
        raise DataError("names an image twice")
    for i, j in combinations(range(len(names)), 2):
        label: Side = "a" if ranks[i] < ranks[j] else "b" if ranks[i] > ranks[j] else "tie"
        # The lower rank is the better one.
        votes = [(1 + (r[i] < r[j]) - (r[i] > r[j])) / 2 for r in raters or [ranks]]
        yield Row(entry["prompt"], names[i], names[j], sum(votes) / len(votes), len(votes), group, label)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{value!r:.60} is not text")
    return value
