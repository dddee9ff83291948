"""MMRB2's text-to-image pairs: the hub's tables, or the list that the official script writes beside its images."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from sys import intern
from typing import Any

from mlxpref.data.find_images import ImageFinder
from mlxpref.data.hub_tables import warn_of_missing
from mlxpref.data.preference_table import leave_out
from mlxpref.data.tables import read_table, use_rows
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike, PackedImage, Preference, Side

LOCAL_LIST = "t2i.json"
"""What the official script writes, with the images in a folder beside it."""
_ID, _PROMPT, _PROMPT_IMAGES, _CHOSEN, _VOTES = "pair_id", "prompt_text", "prompt_images", "chosen", "human_annotations"
_COLUMNS = {_ID, _PROMPT, _PROMPT_IMAGES, _CHOSEN, _VOTES, "response_a_images", "response_b_images"}
_PLACE = re.compile(r"<image_\d+>")
_ANNOTATORS, _FOR_A, _HIGHEST = 3, 4, 6


def read_mmrb2(folder: Path, tables: Sequence[Path], needs_images: bool) -> list[Preference]:
    """The preferences in `t2i.json` of a folder, else in the hub's tables; a and b are A and B.

    The better side is always `chosen`. `p_people` is the share of the three annotators who give A 4 to 6 points; where
    their majority says otherwise, `chosen` is the label. An image in a table is known as `<pair_id>/a` or `/b`. Without
    `needs_images`, a file in the list need not be there. Few bad rows are logged and left out, see `leave_out`.
    """
    path = folder / LOCAL_LIST
    if path.is_file():
        tables = [path]
    else:
        warn_of_missing("mmrb2", "test", [table.name for table in tables])
    return [each for table in tables for each in _read(table, ImageFinder(table, folder, needs_images))]


def _read(path: Path, finder: ImageFinder) -> list[Preference]:
    preferences: list[Preference] = []

    def use(_: int, row: dict[str, Any]) -> None:
        preferences.append(_preference(_as_in_a_table(row), finder))

    errors, count = use_rows(path, read_table(path, _COLUMNS.__contains__), use)
    if not preferences:
        raise DataError(f"{path}: none of {count} rows can be used: {errors[0] if errors else 'it has none'}")
    leave_out(path, errors, count)
    return preferences


def _as_in_a_table(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the local list with a table's columns; a row of a table as it is."""
    if "prompt_content" not in row:
        return row
    prompt = row["prompt_content"]
    result = {
        _ID: row.get("id", row.get(_ID)),
        _PROMPT: "\n".join(map(str, _content("prompt_content", prompt, "text"))),
        _PROMPT_IMAGES: _content("prompt_content", prompt, "image"),
        **{key: row[key] for key in (_CHOSEN, _VOTES) if key in row},
    }
    for side in "ab":
        response = row.get(f"response_{side}")
        content = response.get("response_content") if isinstance(response, dict) else None
        result[f"response_{side}_images"] = _content(f"response_{side}", content, "image")
    return result


def _content(name: str, parts: Any, kind: str) -> list[Any]:
    """The parts of a kind, text or image, among `[["text", ...], ["image", ...]]`."""
    if not isinstance(parts, list) or not all(isinstance(each, list) and len(each) == 2 for each in parts):
        raise DataError(f'"{name}" must be a list of ["text", ...] and ["image", path]')
    return [value for each, value in parts if each == kind]


def _preference(row: dict[str, Any], finder: ImageFinder) -> Preference:
    """The preference of a row; DataError with all its errors."""
    problems: list[str] = []
    prompt, chosen = str(row.get(_PROMPT, "")).strip(), str(row.get(_CHOSEN, "")).strip().lower()
    if not prompt:
        problems.append(f'"{_PROMPT}" must be text, not empty')
    if row.get(_PROMPT_IMAGES) or _PLACE.search(prompt):
        problems.append("its prompt has images: it is of another task than text-to-image (t2i), the one that is read")
    if chosen not in ("a", "b"):
        problems.append(f'"{_CHOSEN}" must be A or B, not {row.get(_CHOSEN)!r:.40}')
    votes = _votes(row.get(_VOTES), problems)
    images = [_image(row, side, finder, problems) for side in "ab"]
    if problems or images[0] is None or images[1] is None:
        raise DataError("; ".join(problems))
    better: Side = "a" if chosen == "a" else "b"
    share = sum(vote >= _FOR_A for vote in votes) / len(votes) if votes else float(better == "a")
    label = None if (share > 0.5) == (better == "a") else better
    prompt = intern(prompt)
    return Preference(prompt, images[0], images[1], share, len(votes) or 1, prompt, label)


def _votes(cell: Any, problems: list[str]) -> Sequence[float]:
    """The annotators' points, written as JSON in a table; none where the row has none."""
    if cell in (None, ""):
        return ()
    try:
        votes = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        votes = None
    numbers = [each for each in votes if type(each) in (int, float)] if isinstance(votes, list) else []
    if len(numbers) != _ANNOTATORS or votes != numbers or not all(1 <= each <= _HIGHEST for each in numbers):
        problems.append(f'"{_VOTES}" must be {_ANNOTATORS} numbers from 1 to {_HIGHEST}, not {cell!r:.40}')
    return numbers


def _image(row: dict[str, Any], side: str, finder: ImageFinder, problems: list[str]) -> ImageLike | None:
    """The one image of a response; None with an error among the problems."""
    name = f"response_{side}_images"
    images = row.get(name)
    if not isinstance(images, list) or len(images) != 1:
        count = len(images) if isinstance(images, list) else 0
        problems.append(f"response {side.upper()} has {count} images; one of text-to-image has one")
        return None
    if isinstance(images[0], PackedImage):
        return replace(images[0], known_as=f"{row[_ID]}/{side}" if _ID in row else "")
    try:
        return finder.find(str(images[0]))
    except DataError as error:
        problems.append(f"response {side.upper()} is {images[0]!r:.100}: {error}")
        return None
