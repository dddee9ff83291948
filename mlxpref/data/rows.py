"""Shared parts of the readers of public data sets: long lists, unusable rows, random sides, images."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxpref.data.catalog import missing_files
from mlxpref.data.tar_gz import parts_of, unpack
from mlxpref.errors import DataError
from mlxpref.files import cache_dir
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, Preference, Side
from mlxpref.text import first_ten, format_bytes

RowSampler = Callable[[int], Sequence[int] | NDArray[np.int64]]
"""Takes a number of rows, returns the numbers of the rows to take, in their order."""
Images = dict[str, ImageLike]

_TOLERATED = 0.01
"""The largest share of unusable rows: a user cannot correct a public data set, and the other rows are good."""
READ_CHARACTERS = 4 * 2**20
ROW_LIMIT = 16 * 2**20
"""Characters to read at a time, and the most of one row."""
_SEPARATORS = re.compile(r"[\s,\[\]]*")


class Row(NamedTuple):
    """A preference whose images are still names."""

    prompt: str
    a: str
    b: str
    p_people: float
    votes: int = 1
    group: str = ""
    label: Side | None = None


class RowErrors:
    """The unusable rows, or images, of a public data set: few of them are logged and left out."""

    def __init__(self, where: Path, what: str = "rows") -> None:
        self._where, self._what, self._errors = where, what, list[str]()

    def add(self, error: str) -> None:
        """Add a row's error."""
        self._errors.append(error)

    def raise_or_log(self, rows: int) -> None:
        """Log the unusable ones of `rows`; DataError if they are more than one in a hundred, or without rows."""
        if not rows:
            raise DataError(f"{self._where}: it has no {self._what}; download it again")
        count = f"{self._where}: {len(self._errors)} of {rows} {self._what} cannot be used"
        if len(self._errors) > _TOLERATED * rows:
            raise DataError(f"{count}; download the data set again:\n  {first_ten(self._errors)}")
        if self._errors:
            for line in f"{count} and are left out:\n  {first_ten(self._errors)}".split("\n"):
                logger.warning(line)


def all_rows(count: int) -> Sequence[int]:
    """The numbers of all of `count` rows."""
    return range(count)


def parse_rows(path: Path, entries: Iterable[Any], parse: Callable[[Any], Iterable[Row]]) -> list[Row]:
    """The rows that `parse` makes of a file's entries, without entries for which it raises an error.

    DataError for too many of these, see `RowErrors`.
    """
    errors, rows, number = RowErrors(path), list[Row](), 0
    for number, entry in enumerate(entries, 1):
        try:
            rows += list(parse(entry))
        except KeyError as error:
            errors.add(f'row {number}: has no "{error.args[0]}"')
        except (TypeError, ValueError, AttributeError, DataError) as error:
            errors.add(f"row {number}: {error}")
    errors.raise_or_log(number)
    return rows


def read_json_rows(path: Path, remedy: str = "download it again") -> Iterator[Any]:
    """The objects in a file that holds a JSON array of them, or one after the other.

    Memory holds only a piece of the file. DataError for invalid JSON, and for a file that ends early.
    """
    decode = json.JSONDecoder().raw_decode
    text, place, number, closed = "", 0, 0, True
    try:
        with path.open(encoding="utf-8-sig") as file:
            while True:
                gap = _SEPARATORS.match(text, place)
                assert gap is not None  # it may be empty
                place = gap.end()
                if number == 0 and "[" in gap[0]:
                    closed = False
                closed = closed or "]" in gap[0]
                try:
                    value, end = decode(text, place)
                except json.JSONDecodeError as error:
                    more = file.read(READ_CHARACTERS)
                    if not more and place == len(text) and closed:
                        return
                    if not more or len(text) - place > ROW_LIMIT:
                        reason = error.msg if place < len(text) else "it ends early"
                        raise DataError(f"{path}: not valid JSON at row {number + 1} ({reason}); {remedy}") from error
                    text, place = text[place:] + more, 0
                    continue
                number, place = number + 1, end
                yield value
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8; {remedy}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not valid JSON (nested too deeply); {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name") from error


def random_swaps(rows: Iterable[Row], key: str) -> list[Row]:
    """The rows with a and b exchanged in a random half, by `key`: a list's order may tell the label."""
    rng = np.random.default_rng(list(key.encode()))
    rows = list(rows)
    swaps = np.concatenate([rng.random(1024) for _ in range(0, len(rows), 1024)] or [np.empty(0)]) < 0.5
    return [_exchanged(row) if swap else row for row, swap in zip(rows, swaps, strict=False)]


def _exchanged(row: Row) -> Row:
    label: Side | None = {"a": "b", "b": "a"}.get(row.label or "", row.label)  # type: ignore[assignment]
    return Row(row.prompt, row.b, row.a, 1 - row.p_people, row.votes, row.group, label)


def preferences_of(rows: Iterable[Row], images: Images) -> list[Preference]:
    """Rows with images instead of names, without rows whose images are missing."""
    return [
        Preference(prompt, images[a], images[b], p_people, votes, group, label)
        for prompt, a, b, p_people, votes, group, label in rows
        if a in images and b in images
    ]


def with_images(
    name: str, split: str, rows: Sequence[Row], folder: Path, archive: Path, needs_images: bool = True
) -> list[Preference]:
    """The preferences of rows with their images, without the few rows whose images are missing and `needs_images`.

    The images are files below `folder`, if unpacked there, else members of `archive`, a .tar.gz or a .tar of its name,
    also in parts, which it unpacks once into the user's cache.
    """
    names = dict.fromkeys(image for row in rows for image in (row.a, row.b))
    if not needs_images:
        return preferences_of(rows, {image: folder / image for image in names})
    images: Images = {image: folder / image for image in _files_below(folder, names)}
    absent = [image for image in names if image not in images]
    parts, problems = parts_of(archive) or parts_of(archive.with_suffix("")) if absent else [], list[str]()
    if parts:
        target = cache_dir() / "unpacked" / f"{archive.name.split('.')[0]}-{_stamp(parts)}"
        problems = _unpack(archive, parts, absent, target)
        images |= {image: target / image for image in _files_below(target, absent)}
    elif not images:
        what = f"there is neither {archive.name}, whole or in parts, nor its images in {folder}"
        raise missing_files(name, split, what)
    else:
        problems = [f"{image}: is not in {folder}" for image in absent]
    errors = RowErrors(archive, "images")
    for problem in problems:
        errors.add(problem)
    errors.raise_or_log(len(names))
    return preferences_of(rows, images)


def _unpack(archive: Path, parts: Sequence[Path], names: Sequence[str], target: Path) -> list[str]:
    """Unpack the missing images; returns a line for each image that cannot be unpacked."""
    files = set(_files_below(target, names))
    names = [name for name in names if name not in files]
    if not names:
        return []
    size = sum(part.stat().st_size for part in parts)
    logger.info(f"{archive}: {format_bytes(size)} are read once, and {len(names)} images of it kept in {target}")
    work = track(unpack(parts, names, target), len(names), f"unpacking {archive.name}")
    return [f"{name}: {problem}" for name, problem in work if problem]


def _files_below(folder: Path, names: Iterable[str]) -> list[str]:
    """The names that are files below a folder; it lists each folder once, without a look at files."""
    contents: dict[str, set[str]] = {}
    files = []
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent not in contents:
            inner = folder / parent
            is_below = inner.is_dir() and ".." not in inner.parts and not parent.startswith("/")
            contents[parent] = set(os.listdir(inner)) if is_below else set()  # noqa: PTH208  half a million names
        if last in contents[parent]:
            files.append(name)
    return files


def _stamp(parts: Sequence[Path]) -> str:
    """A digest that tells archives of the same name apart."""
    status = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    return hashlib.sha256(repr(status).encode()).hexdigest()[:12]
