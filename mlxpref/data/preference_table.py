"""A user's preferences in one file: pairs of images, rankings, or images with their ranks, in any format of a table."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import combinations, islice
from pathlib import Path
from sys import intern
from typing import Any, TypeVar

import numpy as np

from mlxpref.data.columns import Layout, ShareReader, check_row, is_known, share_reader, whole
from mlxpref.data.find_images import ImageFinder
from mlxpref.data.label_file import merge_answers
from mlxpref.data.survey import NumberedLayout, Survey, filled, say_first
from mlxpref.data.tables import NumberedRow, read_table, unusable, use_rows
from mlxpref.errors import DataError, UnknownSplitError
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, PackedImage, Preference, Side
from mlxpref.text import UNDECODED, first_ten

T = TypeVar("T")
TOLERATED = 0.01
"""The largest share of a public data set's rows or images that are left out."""
NOBODY = "nobody labelled any of its rows (has_label is false)"
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
    notes = set[str]()  # said once, however often the rows are read
    merged = partial(merge_answers, path=path, notes=notes)
    try:
        return preferences_of(path, lambda: read_table(path, is_known), split, images or ImageFinder(path), merged)
    finally:
        for each in notes:
            logger.warning(each)


def preferences_of(
    path: Path,
    rows: Callable[[], Iterable[NumberedRow]],
    split: str | None,
    images: ImageFinder,
    merged: Callable[[Iterable[NumberedRow]], Iterable[NumberedRow]] = iter,
) -> list[Preference]:
    """The preferences of numbered rows, whose cells may be images, too; errors, which begin with `path`, as above.

    `rows` begins to read them, `merged` makes one of several. Memory never holds all: a million would fill it.
    """
    try:
        layout = Survey(path).layout(islice(rows(), _SAMPLE))
    except DataError:  # the others may say more
        layout = Survey(path).layout(merged(rows()))
    survey = Survey(path)
    table = _read_rows(path, survey.watch(merged(rows())), layout, images, split)
    if (whole := survey.layout()) != layout:
        layout, images.missing = whole, 0
        table = _read_rows(path, filled(merged(rows())), layout, images, split)
    say_first(path, *layout)
    if table.errors:
        where = f"\n  images are looked for in {images.folder}; --data-dir names another folder"
        raise DataError(f"{unusable(path, table.errors, table.count)}{where if images.missing else ''}")
    if not table.preferences:
        raise DataError(f"{path}: {NOBODY}")
    names = {*table.splits}
    if split is None:
        return table.preferences
    if names == {None}:
        raise NoSplitsError(path, split, table.preferences)
    if None in names:
        without = table.splits.count(None)
        raise DataError(f'{path}: {without} of {len(table.splits)} rows have no "split"; give it to all or to none')
    if split not in names:
        known = ", ".join(sorted(filter(None, names)))
        raise UnknownSplitError(f'{path}: no rows of split "{split}"; there are {known}; give one with --split')
    return [each for each, name in zip(table.preferences, table.splits, strict=True) if name == split]


def read_public_table(path: Path, split: str, images: ImageFinder | None = None) -> list[Preference]:
    """The preferences of a table of a public data set; few bad rows are logged and left out, see `leave_out`."""
    layout = Survey(path).layout(islice(read_table(path, is_known), _SAMPLE))
    table = _read_rows(path, filled(read_table(path, is_known)), layout, images or ImageFinder(path), split)
    say_first(path, *layout)
    if not table.preferences and table.errors:
        raise DataError(f"{path}: none of {table.count} rows can be used: {table.errors[0]}")
    leave_out(path, table.errors, table.count)
    return table.preferences


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


@dataclass(frozen=True)
class _Table:
    """The pairs of a table and the split of each, the errors of bad rows, and the number of all rows."""

    preferences: list[Preference]
    splits: list[str | None]
    errors: list[str]
    count: int


def _read_rows(
    path: Path, rows: Iterable[NumberedRow], numbered: NumberedLayout, images: ImageFinder, split: str | None
) -> _Table:
    """Read rows, one at a time."""
    layout, first = numbered
    splits, preferences, groups = list[str | None](), list[Preference](), set[str]()
    share_of, checked = share_reader(layout, first or 0), set[tuple[str, ...]]()

    def use(number: int, row: dict[str, Any]) -> None:
        if row.get("has_label") in (False, 0, "False", "false"):  # Pick-a-Pic's rows that nobody labelled
            return
        if (columns := tuple(row)) not in checked:
            check_row(row, layout)
            checked.add(columns)
        if layout.kind == "pair":
            preferences.append(_pair(row, layout, images, share_of))
            splits.append(row.get("split"))
            return
        pairs = _ranking(row, layout, images)
        if layout.kind == "ranking":
            if (group := pairs[0].group) in groups:  # another one of the same prompt
                pairs = [replace(pair, group=f"{group} ({number})") for pair in pairs]
            groups.add(pairs[0].group)
        preferences.extend(pairs)
        splits.extend([row.get("split")] * len(pairs))

    errors, count = use_rows(path, _rankings(rows, layout) if layout.kind == "image" else rows, use)
    tells = layout.winner_first or (not layout.own and _is_one_sided(preferences))
    if tells or (split == "train" and layout.kind != "pair"):
        preferences = random_sides(preferences)
    return _Table(preferences, splits, errors, count)


def _is_one_sided(preferences: Sequence[Preference]) -> bool:
    """Whether the better image always stands on the same side."""
    decided = (side for each in preferences if (side := each.better) != "tie")
    first = next(decided, None)
    return len(preferences) > 1 and first is not None and all(side == first for side in decided)


def _pair(row: Mapping[str, Any], layout: Layout, images: ImageFinder, share_of: ShareReader) -> Preference:
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
    share, people = _try(problems, share_of, row, cells) or (0.5, 1)
    votes = whole(row["votes"]) if "votes" in row else people
    if votes is None or votes < 1:
        problems.append(f'"votes" must be a whole number from 1 on, not {json.dumps(row["votes"])[:40]}')
    a, b = found
    if a and b and images.are_same(a, b):
        problems.append(f'"{names[0]}" and "{names[1]}" are the same file')
    if problems or a is None or b is None:
        raise DataError("; ".join(problems))
    return Preference(prompt, a, b, share, votes or 1, group, "a" if layout.winner_first and share == 0.5 else None)


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
    if not isinstance(prompt, str) or not _is_prompt(prompt):
        problems.append(f'"{layout.prompt}" must be text, not empty')
    for key in ("group", "split"):
        if (name := row.get(key)) is not None and not isinstance(name, str):
            problems.append(f'"{key}" must be text')
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
    if isinstance(cell, PackedImage):
        return cell
    if isinstance(cell, str) and (known := images.found.get(cell)) is not None:
        return known
    found = [cell] if _is_text(cell) else list(_images_in(cell))
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
    if _is_text(cell) or isinstance(cell, ImageLike):
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


@lru_cache(8)
def _is_prompt(text: str) -> bool:
    """`_is_text`, of which pairs that follow each other ask the same."""
    return _is_text(text)
