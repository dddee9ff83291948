"""A user's preferences in one file: pairs of images, rankings, or images with their ranks, in any format of a table."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, islice
from pathlib import Path
from sys import intern
from typing import Any, TypeVar

import numpy as np

from mlxpref.data.columns import Layout, check_row, first_number, is_known, layout_of, share_for_first, whole
from mlxpref.data.find_images import ImageFinder
from mlxpref.data.label_file import merge_answers
from mlxpref.data.tables import NumberedRow, read_table, unusable, use_rows
from mlxpref.errors import DataError, UnknownSplitError
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, Preference, Side
from mlxpref.text import UNDECODED, first_ten

T = TypeVar("T")
SplitPreference = tuple[str | None, Preference]
EXAMPLE = '{"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}'
TOLERATED = 0.01
"""The largest share of a public data set's rows or images that are left out."""
_SAMPLE = 1000


class NoSplitsError(DataError):
    """A split was asked for, and the data have none; with all their preferences."""

    def __init__(self, path: Path, split: str, preferences: list[Preference]) -> None:
        super().__init__(f'{path}: no split "{split}", as it has no splits; leave out --split')
        self.preferences = preferences


def read_preferences(path: Path, split: str | None = None, images: ImageFinder | None = None) -> list[Preference]:
    """The preferences of a user's file, in its order; its formats and columns are in this package's README.

    It takes the rows of `split`, None takes all; NoSplitsError if no row has one. For the clicks of `mlxpref label` see
    `merge_answers`. It checks that image files exist, without opening them. One DataError for all bad rows: their count
    and the first ten.
    """
    return preferences_of(path, merge_answers(read_table(path, is_known), path), split, images or ImageFinder(path))


def preferences_of(
    path: Path, numbered: Sequence[NumberedRow], split: str | None, images: ImageFinder
) -> list[Preference]:
    """The preferences of numbered rows, whose cells may be images, too; errors, which begin with `path`, as above."""
    rows, errors, count = _read_rows(path, numbered, images, split)
    if errors:
        where = f"\n  images are looked for in {images.folder}; --data-dir names another folder"
        raise DataError(f"{unusable(path, errors, count)}{where if images.missing else ''}")
    names, all_rows = {name for name, _ in rows}, [preference for _, preference in rows]
    if split is None:
        return all_rows
    if names == {None}:
        raise NoSplitsError(path, split, all_rows)
    if None in names:
        without = sum(name is None for name, _ in rows)
        raise DataError(f'{path}: {without} of {len(rows)} rows have no "split"; give it to all or to none')
    if split not in names:
        known = ", ".join(sorted(filter(None, names)))
        raise UnknownSplitError(f'{path}: no rows of split "{split}"; there are {known}; give one with --split')
    return [preference for name, preference in rows if name == split]


def read_public_table(path: Path, split: str, images: ImageFinder | None = None) -> list[Preference]:
    """The preferences of a table of a public data set; few bad rows are logged and left out, see `leave_out`."""
    rows, errors, count = _read_rows(path, read_table(path, is_known), images or ImageFinder(path), split, _SAMPLE)
    if not rows and errors:
        raise DataError(f"{path}: none of {count} rows can be used: {errors[0]}")
    leave_out(path, errors, count)
    return [preference for _, preference in rows]


def leave_out(where: Path, errors: Sequence[str], count: int, what: str = "rows") -> None:
    """Log the unusable ones among `count` rows of a public data set; DataError if they are more than one in a hundred.

    Its user cannot correct them, and the others are good.
    """
    message = f"{where}: {len(errors)} of {count} {what} cannot be used"
    if len(errors) > TOLERATED * count:
        raise DataError(f"{message}; download the data set again:\n  {first_ten(errors)}")
    for line in f"{message} and are left out:\n  {first_ten(errors)}".split("\n") if errors else ():
        logger.warning(line)


def random_sides(preferences: Sequence[Preference]) -> list[Preference]:
    """The preferences with a and b exchanged in a random half, the same each time: their order may tell the label."""
    swaps = np.random.default_rng(list(b"table")).random(len(preferences)) < 0.5
    return [each.swapped() if swap else each for each, swap in zip(preferences, swaps, strict=True)]


def _read_rows(
    path: Path, numbered: Iterable[NumberedRow], images: ImageFinder, split: str | None, sample: int | None = None
) -> tuple[list[SplitPreference], list[str], int]:
    """The pairs of a table, each with its split, the errors of bad rows, and the number of rows.

    The first `sample` rows tell its layout, else all.
    """
    filled = ((n, {k: v for k, v in row.items() if v != ""} if isinstance(row, dict) else row) for n, row in numbered)
    head = list(islice(filled, sample))
    layout, first = _layout_of(path, head)
    entries: Iterable[NumberedRow] = chain(head, filled)
    splits, preferences, groups = list[str | None](), list[Preference](), set[str]()

    def use(number: int, row: dict[str, Any]) -> None:
        if row.get("has_label") in (False, 0, "False", "false"):  # Pick-a-Pic's rows that nobody labelled
            return
        check_row(row, layout)
        pairs = _pair(row, layout, images, first) if layout.kind == "pair" else _ranking(row, layout, images)
        if layout.kind == "ranking" and (group := pairs[0].group) in groups:  # another one of the same prompt
            pairs = [replace(pair, group=f"{group} ({number})") for pair in pairs]
        groups.add(pairs[0].group)
        preferences.extend(pairs)
        splits.extend([row.get("split")] * len(pairs))

    errors, count = use_rows(path, _rankings(entries, layout) if layout.kind == "image" else entries, use)
    one_sided = not layout.own and len(preferences) > 1 and len({p.better for p in preferences} - {"tie"}) == 1
    if layout.winner_first or one_sided or (split == "train" and layout.kind != "pair"):
        preferences = random_sides(preferences)
    return list(zip(splits, preferences, strict=True)), errors, count


def _layout_of(path: Path, numbered: Sequence[NumberedRow]) -> tuple[Layout, int]:
    """The layout of a table, and the number of the first image in its labels; DataError where rows say too little."""
    readable = [row for _, row in numbered if isinstance(row, dict)]
    columns = {key: value for row in reversed(readable) for key, value in row.items()}  # each with its first value
    if not numbered:
        raise DataError(f"{path}: no preferences in this file; write rows like {EXAMPLE}, or a table of these columns")
    try:
        layout = layout_of(columns)
    except DataError as error:
        # Without a good row, the errors of the rows say more.
        problem = next((str(row) for _, row in numbered if isinstance(row, DataError)), str(error))
        named = f"; its columns are {', '.join(columns)}" if columns else ""
        raise DataError(f"{path}: none of {len(numbered)} rows can be used: {problem}{named}") from error
    if layout.kind == "pair" and (first := first_number(readable, layout)) is not None:
        names = layout.images if len(layout.images) == 2 else tuple(f"{layout.images[0]}[{i}]" for i in (0, 1))
        logger.info(f'{path}: "{layout.labels[0]}" {first} is read as {names[0]}, {first + 1} as {names[1]}')
        return layout, first
    return layout, 0


def _pair(row: Mapping[str, Any], layout: Layout, images: ImageFinder, first: int) -> list[Preference]:
    """The preference of a row with two images; DataError with all its errors."""
    problems: list[str] = []
    names, cells = layout.images, [row[name] for name in layout.images]
    if len(names) == 1:
        cells = cells[0] if isinstance(cells[0], list) else []
        names = (f"{names[0]}[0]", f"{names[0]}[1]")
        if len(cells) != 2:
            raise DataError(f'"{layout.images[0]}" must be a list of two images')
    prompt, group = _texts(row, layout, problems)
    found = [_try(problems, _image, name, cell, images) for name, cell in zip(names, cells, strict=True)]
    known = tuple(str(cell) for cell in cells)
    share, people = _try(problems, share_for_first, row, layout, first, (known[0], known[1])) or (0.5, 1)
    votes = whole(row.get("votes", people))
    if votes is None or votes < 1:
        problems.append(f'"votes" must be a whole number from 1 on, not {json.dumps(row["votes"])[:40]}')
    a, b = found
    files = [each for each in found if isinstance(each, Path) and each.exists()]  # else not needed
    if a and b and (a == b or (len(files) == 2 and files[0].samefile(files[1]))):
        problems.append(f'"{names[0]}" and "{names[1]}" are the same file')
    if problems or a is None or b is None:
        raise DataError("; ".join(problems))
    return [Preference(prompt, a, b, share, votes or 1, group, "a" if layout.winner_first and share == 0.5 else None)]


def _ranking(row: Mapping[str, Any], layout: Layout, images: ImageFinder) -> list[Preference]:
    """All pairs of a row with a list of images and their ranks, the lower the better.

    With the ranks of several people (`raw_annotations`), `p_people` is the share of them, and the row's own ranks are
    the label.
    """
    (column,), (ranks_column,) = layout.images, layout.labels
    problems: list[str] = []
    prompt, group = _texts(row, layout, problems)
    cells, people = row[column], row.get("raw_annotations")
    raters = [each.get("rank") for each in people if isinstance(each, dict)] if isinstance(people, list) else []
    rankings = [
        [whole(rank) for rank in ranks] if isinstance(ranks, list) else [] for ranks in (row[ranks_column], *raters)
    ]
    count = len(cells) if isinstance(cells, list) else 0
    if count < 2 or any(len(ranks) != count or None in ranks for ranks in rankings):
        raise DataError(f'"{column}" and "{ranks_column}" must be lists of images and of their ranks, equally long')
    tried = [_try(problems, _image, f"{column}[{i}]", cell, images) for i, cell in enumerate(cells)]
    found = [image for image in tried if image is not None]
    if len(set(map(str, found))) < len(found):
        problems.append(f'"{column}" names an image twice')
    if problems:
        raise DataError(problems[0] + (f"; and {len(problems) - 1} more" if len(problems) > 1 else ""))
    pairs = []
    for i, j in combinations(range(count), 2):
        signs = [np.sign((ranks[j] or 0) - (ranks[i] or 0)) for ranks in rankings]
        votes = signs[1:] or signs
        sides: tuple[Side, Side, Side] = ("tie", "a", "b")
        share, label = float(np.mean([(1 + sign) / 2 for sign in votes])), sides[int(signs[0])] if raters else None
        pairs.append(Preference(prompt, found[i], found[j], share, len(votes), group, label))
    return pairs


def _rankings(numbered: Iterable[NumberedRow], layout: Layout) -> Iterator[NumberedRow]:
    """The rows of a table of one image a row as rankings, by `prompt_id` or else by the prompt."""
    groups: dict[Any, tuple[int, dict[str, Any]]] = {}
    for number, row in numbered:
        try:
            if isinstance(row, DataError):
                raise row
            check_row(row, layout)
            key = str(row.get("prompt_id", row[layout.prompt]))
            _, ranking = groups.setdefault(
                key, (number, {layout.prompt: row[layout.prompt], "id": key, "split": row.get("split")})
            )
            if ranking[layout.prompt] != row[layout.prompt]:
                raise DataError(f'"prompt_id" {key} has another prompt in an earlier row')
            for column in (*layout.images, *layout.labels):
                ranking.setdefault(column, []).append(row[column])
        except DataError as error:
            yield number, error
    yield from groups.values()


def _texts(row: Mapping[str, Any], layout: Layout, problems: list[str]) -> tuple[str, str]:
    """The prompt and the group of a row."""
    prompt = row[layout.prompt]
    if isinstance(prompt, str):
        prompt = intern(prompt)  # in memory once for many pairs
    elif isinstance(prompt, list | dict):  # messages of a conversation
        prompt = "\n".join(_prompt_texts(prompt))
    if not _is_text(prompt):
        problems.append(f'"{layout.prompt}" must be text, not empty')
    problems += [f'"{key}" must be text' for key in ("group", "split") if not isinstance(row.get(key), str | None)]
    return prompt, row.get("group") or (str(row["id"]) if layout.kind != "pair" and "id" in row else prompt)


def _try(problems: list[str], work: Callable[..., T], *values: Any) -> T | None:
    """What `work` returns; or None, with its error among the problems."""
    try:
        return work(*values)
    except DataError as error:
        problems.append(str(error))
        return None


def _image(column: str, cell: Any, images: ImageFinder) -> ImageLike:
    """The image of a cell: a path, bytes in a table, {path}, a list of one, or messages with one image."""
    found = list(_images_in(cell))
    if len(found) != 1:
        problem = f"holds {len(found)} images, not one" if found else "must name an image, and is text or empty"
        raise DataError(f'"{column}" {problem}')
    if not isinstance(found[0], str):
        return found[0]
    try:
        return images.find(found[0])
    except DataError as error:
        raise DataError(f'"{column}" is {json.dumps(found[0], ensure_ascii=False)}: {error}') from error


def _images_in(cell: Any) -> Iterator[str | ImageLike]:
    """The images that a cell names, also within lists and messages."""
    if isinstance(cell, ImageLike) or _is_text(cell):
        yield cell
    elif isinstance(cell, list):
        for each in cell:
            yield from _images_in(each)
    elif isinstance(cell, dict):
        # The text of a message is no image: a message's content is a list then.
        inner = [cell[key] for key in ("path", "image", "file_name", "image_url", "url") if cell.get(key)]
        inner += [cell["content"]] if isinstance(cell.get("content"), list) else []
        yield from _images_in(inner[0]) if inner and cell.get("type") != "text" else ()


def _prompt_texts(cell: Any) -> Iterator[str]:
    """The texts of a prompt's messages, without those of other roles than the user's."""
    for each in cell if isinstance(cell, list) else [cell]:
        if isinstance(each, dict) and each.get("role") in (None, "user"):
            content = each.get("content", each.get("text"))
            yield from [content] if isinstance(content, str) else _prompt_texts(content or ())


def _is_text(value: object) -> bool:
    """Whether this is text that is not blank and has no half of a surrogate pair, which JSON allows."""
    return isinstance(value, str) and bool(value.strip()) and not UNDECODED.search(value)
