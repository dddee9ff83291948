"""Image scores of another tool, from a table, matched with the images of preferences."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from mlxpref.data.columns import IMAGES
from mlxpref.data.tables import read_table, unusable, use_rows
from mlxpref.errors import DataError
from mlxpref.judge.metrics import Floats
from mlxpref.preferences import ImageLike, PackedImage, Preference, image_name
from mlxpref.text import first_ten

_SCORE = "score"


def read_scores(path: Path) -> dict[str, float]:
    """The scores of a table by image, in its order; higher is better.

    Its columns `image` (or `file_name` and the like) and `score` count. One DataError counts all rows without an image,
    without a finite number or with an image of an earlier row, and shows the first ten.
    """
    scores: dict[str, float] = {}
    rows = list(read_table(path, lambda name: name in (*IMAGES, _SCORE)))
    columns = {name for _, row in rows if isinstance(row, dict) for name in row}
    named = next((name for name in IMAGES if name in columns), None)
    if columns and (named is None or _SCORE not in columns):
        raise DataError(f"{path}: its columns must be image and score; it has {', '.join(sorted(columns))}")

    def use(number: int, row: dict[str, Any]) -> None:
        image, score = str(row.get(named or "", "")).strip(), row.get(_SCORE, "")
        try:
            value = math.nan if isinstance(score, bool) else float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not image:
            raise DataError("no image")
        if not math.isfinite(value):
            raise DataError(f"the score of {image} must be a finite number, not {str(score)[:40]!r}")
        if image in scores:
            raise DataError(f"{image} has a score already, in an earlier row")
        scores[image] = value

    errors, count = use_rows(path, rows, use)
    if errors:
        raise unusable(path, errors, count)
    if not scores:
        raise DataError(f"{path}: no scores in this file; write rows like photo.png,0.7 below a line image,score")
    return scores


def match_scores(scores: Mapping[str, float], preferences: Sequence[Preference], path: Path) -> dict[str, float]:
    """The scores of the preferences' images, by `image_name`; scores of other images are left out.

    A row names an image of the data by its path, or by last parts of it that no other path has. An image in an archive
    also has its path after unpacking in place, and the one that it is known as. `path` is the file of the scores. One
    DataError counts and names images without a score or with several, and rows that name several images.
    """
    images = {image_name(image): image for p in preferences for image in (p.a, p.b)}
    rows_of: dict[str, list[str]] = defaultdict(list)
    problems: list[str] = []
    for row, names in zip(scores, _named_images(list(scores), images), strict=True):
        if len(names) > 1:
            problems.append(f"{row} may be any of {len(names)} images, such as {names[0]} and {names[1]}")
        elif names:
            rows_of[names[0]].append(row)
    problems += [f"{name} has {len(rows)} scores: {', '.join(rows)}" for name, rows in rows_of.items() if len(rows) > 1]
    if problems:
        raise DataError(
            f"{path}: {len(problems)} images are not clear; give longer paths, once:\n  {first_ten(problems)}"
        )
    if missing := [name for name in images if name not in rows_of]:
        raise DataError(
            f"{path}: {len(missing)} of {len(images)} images have no score; add them:\n  {first_ten(missing)}"
        )
    return {name: scores[rows[0]] for name, rows in rows_of.items()}


def prefer_by_score(scores: Mapping[str, float], preferences: Sequence[Preference]) -> Floats:
    """The preferences for a (N,) of a tool that scores images: 1 or 0 by the higher score, 0.5 for equal ones."""
    a = np.array([scores[image_name(p.a)] for p in preferences], np.float64)
    b = np.array([scores[image_name(p.b)] for p in preferences], np.float64)
    return 0.5 * (1 + np.sign(a - b))


def _named_images(rows: Sequence[str], images: Mapping[str, ImageLike]) -> Iterator[list[str]]:
    """For each row, the names of the images of the data that match it."""
    parts = [PurePath(row).parts for row in rows]
    lengths = {len(each) for each in parts}
    endings: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for name, image in images.items():
        for whole in _paths(name, image):
            for length in lengths:
                if length <= len(whole):
                    endings[whole[-length:]][name] = None
    for row, each in zip(rows, parts, strict=True):
        yield [row] if row in images else list(endings.get(each, ()))


def _paths(name: str, image: ImageLike) -> list[tuple[str, ...]]:
    """The paths of an image as parts."""
    paths = [PurePath(name)]
    if isinstance(image, PackedImage):
        paths.append(image.archive.parent / image.member)
        paths += [PurePath(image.known_as)] if image.known_as else []
    return [path.parts for path in paths]
