"""What the columns of a table mean: one list of names for the prompt, the images, and the image that people prefer."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any, Literal

from mlxpref.errors import DataError

PROMPTS = ("prompt", "caption", "prompt_text", "text", "instruction", "question")
IMAGES = ("image", "file_name", "filename", "image_path", "path", "file", "img")
"""The names of a column with one image a row."""
_LISTS = ("images", "generations", "image_paths", "file_paths", "file_path", "image_path")
_RANKS = ("ranking", "rank", "ranks")
_DISTRIBUTION = "choice_dist"
_LABELS = (
    "p_a", "human_preference", "label", "preference", "preferred", "chosen", "winner", "choice", "better", "best",
    "vote", "vote_type", "human_vote", _DISTRIBUTION,
)  # fmt: skip
WINNERS = (
    ("preferred", "rejected"), ("chosen", "rejected"), ("winner", "loser"), ("win", "lose"), ("better", "worse"),
    ("good", "bad"), ("w", "l"),
)  # fmt: skip
"""The names of a preferred image and of the other one, in columns and in folders."""
_SIDES = (("a", "b"), ("0", "1"), ("1", "2"), ("left", "right"), ("first", "second"))
NUMBERED = {*_LABELS} - {"p_a", _DISTRIBUTION}
"""The labels in which a number may be that of an image."""
_TIES = {"tie", "ties", "tied", "both", "bothbad", "equal", "same", "draw", "neither"}
_VERDICT = {"model", "option", "is", "bad", "better", "preferred", "wins", "won", "vote"}
_AROUND = {
    "image", "images", "img", "picture", "photo", "path", "file", "filename", "name", "jpg", "jpeg", "png", "bytes",
    "response", "sample", "generation",
}  # fmt: skip
"""Words beside a side in the name of an image's column: `image_a`, `jpg_0`, `chosen_image_path`."""
_COUNTS = ("label", "votes", "vote", "preference", "num_votes")
"""Words before a side in the name of a column with its share or its votes: `label_0`."""
_KNOWN = 1000
"""The number of labels whose meaning is remembered."""
_OWN = ("prompt", "a", "b", "p_a", "votes", "group", "split")
_BESIDE = ("id", "prompt_id", "has_label", "raw_annotations", "p_people", "p_judge")
_FORMS = "a and b, image_0 and image_1, chosen and rejected, images, or the like"


ShareReader = Callable[[Mapping[str, Any], Sequence[Any]], tuple[float, int]]
"""Takes a row and the cells of its two images, returns the share of people who prefer the first, and their number."""


@dataclass(frozen=True)
class Layout:
    """The columns of a table of preferences.

    A row has a `pair` of images in two columns or in a list, a `ranking` of a list, or one `image` of the ranking of
    its prompt. `sides` are the names of a pair's images; the first one of `winner_first` is the preferred one.
    """

    kind: Literal["pair", "ranking", "image"]
    prompt: str
    images: tuple[str, ...]
    sides: tuple[str, str] = ("a", "b")
    winner_first: bool = False
    labels: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether this is the project's own layout, in which a likely misspelling of a column is an error."""
        return self.images == ("a", "b")

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return (self.prompt, *self.images, *(self.labels if len(self.labels) == 1 and not self.counts else self.counts))


@cache
def is_known(name: str) -> bool:
    """Whether a column has a meaning."""
    known = {*PROMPTS, *IMAGES, *_LISTS, *_RANKS, *_LABELS, *_OWN, *_BESIDE}
    return name in known or side_of(name) is not None or name.rpartition("_")[0] in _COUNTS


def layout_of(columns: Mapping[str, Any]) -> Layout:
    """The layout of a table with these columns, each with its first value; DataError where they say too little."""
    if "p_people" in columns and ("p_judge" in columns or "p_a" in columns):
        raise DataError('"p_people" is a column of predictions by a judge; give the preferences that it was judged by')
    prompt = next((name for name in PROMPTS if name in columns), None)
    labels = tuple(name for name in _LABELS if name in columns)
    ranks = next((name for name in _RANKS if name in columns), None)
    pairs = _pairs_in(columns)
    several = next((name for name in _LISTS if isinstance(columns.get(name), list)), None)
    one = next((name for name in IMAGES if name in columns), None)
    if problem := _misspelling(columns) if not (pairs and labels and prompt) else None:
        raise DataError(problem)
    if prompt is None and (pairs or several or one):
        raise DataError('"prompt" missing (or caption, text, and the like)')
    if several and answer_in(columns.get("chosen")):  # a judge's answers about two images, and not their names
        plain = next((name for name in PROMPTS if isinstance(columns.get(name), str)), prompt)
        return Layout("pair", plain or "", (several,), ("1", "2"), labels=labels)
    for sides, images in pairs:
        winner_first = sides in WINNERS or (images == ("path1", "path2") and not set(labels) - {_DISTRIBUTION})
        named = (tuple(f"{word}_{side}" for side in sides) for word in _COUNTS)
        counts = next((names for names in named if columns.keys() >= {*names}), ())
        if winner_first:
            return Layout("pair", prompt or "", images, sides, winner_first)
        if labels or counts:
            return Layout("pair", prompt or "", images, sides, False, labels, counts)
    if pairs:
        raise DataError('"p_a" missing: nothing says which image is preferred (label, preference, or the like)')
    if several and ranks and isinstance(columns[ranks], list):
        return Layout("ranking", prompt or "", (several,), labels=(ranks,))
    if several and labels:
        return Layout("pair", prompt or "", (several,), labels=labels)
    if one and ranks and not several:
        return Layout("image", prompt or "", (one,), labels=(ranks,))
    missing = [f'"{name}"' for name in _OWN[:4] if name not in columns]
    raise DataError(f"{' and '.join(missing)} missing; its images may also be named {_FORMS}")


def check_row(row: Mapping[str, Any], layout: Layout) -> None:
    """DataError for a row without a needed column, or with a likely misspelling of one."""
    if layout.own and (problem := _misspelling(row)):
        raise DataError(problem)
    if missing := [f'"{name}"' for name in layout.needed if name not in row]:
        raise DataError(f"{' and '.join(missing)} missing")


def _misspelling(columns: Collection[str]) -> str | None:
    absent = [name for name in _OWN if name not in columns]
    for name in columns:
        if not is_known(name) and (meant := get_close_matches(name.casefold(), absent, 1, 0.8)):
            return f'unknown key "{name}"; "{meant[0]}" may be meant: rename it'
    return None


def first_number(labels: Mapping[str, Collection[int]], layout: Layout) -> int | None:
    """The number of the first image in labels that are numbers, 0 or 1; None without such labels.

    `labels` are the whole numbers in all rows by column. They count from 0, but from 1 where there is a 2 and no 0, or
    where the columns are named so.
    """
    numbers = {number for name in layout.labels for number in labels.get(name, ())}
    if not numbers:
        return None
    return 0 if 0 in numbers else 1 if 2 in numbers or layout.sides == ("1", "2") else 0


def share_reader(layout: Layout, first: int) -> ShareReader:
    """What `share_for_first` says of the rows of a table, in which the same few labels stand again and again."""
    names = ("p_a", _DISTRIBUTION, *layout.counts, *layout.labels)
    known: dict[str, tuple[float, int]] = {}

    def read(row: Mapping[str, Any], images: Sequence[Any]) -> tuple[float, int]:
        labels = repr([row.get(name) for name in names])
        share = known.get(labels)
        if share is None:
            share = share_for_first(row, layout, first, images)
            if "'" not in labels and '"' not in labels and len(known) < _KNOWN:  # text may name one of the images
                known[labels] = share
        return share

    return read


def share_for_first(row: Mapping[str, Any], layout: Layout, first: int, images: Sequence[Any]) -> tuple[float, int]:
    """The share of people who prefer a pair's first image, and their number; `images` are the cells of both.

    DataError where no side is preferred, or where labels contradict each other.
    """
    if layout.winner_first:
        votes = _numbers(row.get(_DISTRIBUTION) or (1, 0))
        share = _probability(row["p_a"]) if "p_a" in row else max(votes) / sum(votes)
        if share < 0.5:
            raise DataError(f"'p_a' contradicts that {layout.images[0]} is preferred")
        return share, max(1, round(sum(votes)))
    shares, problems = dict[str, float](), list[str]()
    people = 1
    for name in (*layout.counts[:1], *layout.labels):
        cell = row.get(name)
        value = answer_in(cell) or cell
        try:
            is_count = name in layout.counts
            if is_count or isinstance(value, (list, tuple)):
                votes = _numbers([row.get(each) for each in layout.counts] if is_count else value)
                if votes == (1, 1) and name != _DISTRIBUTION and "vote" not in name:
                    raise DataError(f'"{name}" prefers both images')
                total = votes[0] + votes[1]
                shares[name] = votes[0] / total
                people = max(1, round(total))
            elif name == "p_a":
                shares[name] = _probability(value)
            elif value is not None:
                shares[name] = _side(name, value, layout, first, images)
        except DataError as error:
            problems.append(str(error))
    if ("p_a" in row and "p_a" not in shares) or not shares:
        raise DataError(
            "; ".join(problems) or f'"{(*layout.labels, *layout.counts)[0]}" missing: no image is preferred'
        )
    if len(shares) > 1 and min(shares.values()) < 0.5 < max(shares.values()):
        raise DataError(f"{' and '.join(f'{name!r}' for name in shares)} contradict each other")
    return shares.get("p_a", next(iter(shares.values()))), people


def answer_in(cell: Any) -> str | None:
    """A judge's answer in the messages of a cell, such as `image 2`, without its reasons; None of any other cell."""
    if not isinstance(cell, list) or not (messages := [each for each in cell if isinstance(each, dict)]):
        return None
    content = messages[-1].get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    words = " ".join(text for text in texts if isinstance(text, str))
    if not words or None in texts:  # a picture is none
        return None
    return f"image {re.sub('<think>.*?</think>|<[^>]*>', ' ', words, flags=re.DOTALL)}"


@cache
def side_of(name: str) -> tuple[str, str] | None:
    """The side in the name of an image's column, and the name with a blank in its place; None if there is none."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).casefold())
    sides = [word for word in words if word not in _AROUND]
    if len(sides) != 1 or not any(sides[0] in each for each in (*WINNERS, *_SIDES)):
        return None
    return sides[0], " ".join("" if word == sides[0] else word for word in words)


def _pairs_in(columns: Collection[str]) -> list[tuple[tuple[str, str], tuple[str, ...]]]:
    """The pairs of columns with images, each with its sides; a preferred one and another go first."""
    by_side = {each: name for name in sorted(columns) if (each := side_of(name))}
    frames = sorted({frame for _, frame in by_side}, key=lambda frame: (len(frame), frame))
    return [
        (sides, tuple(by_side[side, frame] for side in sides))
        for sides in (*WINNERS, *_SIDES)
        for frame in frames
        if all((side, frame) in by_side for side in sides)
    ]


def _side(name: str, value: Any, layout: Layout, first: int, images: Sequence[Any]) -> float:
    """A label as the share for the first image: a number, a word, or the image itself."""
    names = [str(cell) for cell in images]
    ends = [re.split(r"[/\\]", each)[-1] for each in names]
    for known in (names, ends):
        if value in known and known[0] != known[1]:
            return float(value == known[0])
    number = whole(value)
    if number is not None and number - first in (0, 1):
        return float(number == first)
    if value in (0.5, "0.5"):
        return 0.5
    # Text without a letter is a number, and names no side: "2" beside "0", or "-1" beside "1".
    text = value.casefold() if isinstance(value, str) and re.search("[A-Za-z]", value) else ""
    words = re.findall(r"[a-z]+|\d+", text)
    words = [word.removesuffix("vote") for word in words if word not in _AROUND | _VERDICT]
    if words and set(words) <= _TIES:
        return 0.5
    for sides in (layout.sides, *_SIDES[:1], *_SIDES[3:]):
        if len(words) == 1 and words[0] in sides:
            return float(words[0] == sides[0])
    rows = "" if number is None else " in all rows"  # without this one, the other numbers might be misread
    raise DataError(f'"{name}" is {value!r:.40}, which names none of the two images: write a, b or tie{rows}')


def whole(value: Any) -> int | None:
    """A whole number, also as text."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.0+)?\s*", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: Any) -> tuple[float, float]:
    """Two numbers of votes; DataError for others."""
    try:
        first, second = map(float, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{value!r:.40} are no two numbers of votes") from error
    if min(first, second) < 0 or not 0 < first + second < float("inf"):
        raise DataError(f"{first:g} and {second:g} prefer none of the two images")
    return first, second


def _probability(value: Any) -> float:
    with_point = value.replace(",", ".") if isinstance(value, str) else value
    try:
        share = float("nan") if isinstance(value, bool) else float(with_point)
    except (TypeError, ValueError, OverflowError):
        share = float("nan")
    if not 0 <= share <= 1:
        raise DataError(f'"p_a" must be a number from 0 to 1, not {json.dumps(value, default=str)[:40]}')
    return abs(share)  # -0.0 is 0.0
