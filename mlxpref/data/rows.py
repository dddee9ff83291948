"""What the readers of public data sets share: long lists read in pieces, unusable rows, sides, and images."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.catalog import data_set_of, shown_size
from mlxpref.data.tar_gz import parts_of, unpack
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import cache_dir
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, PackedImage, Preference, Side
from mlxpref.text import first_ten, format_bytes

__all__ = [
    "Row",
    "RowErrors",
    "RowSampler",
    "all_rows",
    "missing",
    "preferences_of",
    "random_swaps",
    "read_json_rows",
    "swapped",
    "with_images",
]

RowSampler = Callable[[int], Sequence[int] | NDArray[np.int64]]
"""Which of so many rows are taken, in their order."""
Images = dict[str, ImageLike]

_TOLERATED = 0.01
"""The share of rows that may be unusable: nobody can correct a public data set, and a few bad rows are not the rest."""
_CHUNK = 4 * 2**20
_ROW_LIMIT = 16 * 2**20
"""Characters that are read at once, and the most that one row may have."""
_BETWEEN = re.compile(r"[\s,]*")


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
    """The rows, or images, of a public data set that cannot be used: named, counted, and left out, if they are few."""

    def __init__(self, where: Path, what: str = "rows") -> None:
        self._where, self._what, self._errors = where, what, list[str]()

    def add(self, what: str) -> None:
        """One more row, and what is wrong with it."""
        self._errors.append(what)

    def settle(self, rows: int) -> None:
        """Say which of so many are left out; DataError if they are more than one in a hundred, or there is nothing."""
        if not rows:
            raise DataError(f"{self._where}: it has no {self._what}; download it again")
        if not self._errors:
            return
        count = f"{self._where}: {len(self._errors)} of {rows} {self._what} cannot be used"
        if len(self._errors) > _TOLERATED * rows:
            raise DataError(f"{count}; download the data set again:\n  {first_ten(self._errors)}")
        for line in f"{count} and are left out:\n  {first_ten(self._errors)}".split("\n"):
            logger.warning(line)


def all_rows(count: int) -> Sequence[int]:
    """All of so many rows."""
    return range(count)


def read_json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects in a file that holds a JSON array of them, or one after the other, counted from 1.

    Only a piece of the file is in memory at a time. DataError for what is not JSON, and for a file that ends early.
    """
    scan = json.JSONDecoder().raw_decode
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_CHUNK)
            place = len(text) - len(text.lstrip())
            is_array = text[place : place + 1] == "["
            place += is_array
            number = 0
            while True:
                place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
                if is_array and text[place : place + 1] == "]":
                    return
                try:
                    value, end = scan(text, place)
                except json.JSONDecodeError as error:
                    more = file.read(_CHUNK)
                    if not more and not is_array and place == len(text):
                        return
                    if not more or len(text) - place > _ROW_LIMIT:
                        why = error.msg if more or place < len(text) else "it ends early"
                        raise DataError(
                            f"{path}: not valid JSON at row {number + 1} ({why}); download it again"
                        ) from error
                    text, place = text[place:] + more, 0
                    continue
                number, place = number + 1, end
                yield number, value
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8; download it again") from error
    except RecursionError as error:
        raise DataError(f"{path}: not valid JSON (nested too deeply); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name") from error


def random_swaps(key: str) -> Iterator[bool]:
    """Whether to exchange a and b, drawn by `key`, for one row after the other: a list's order may tell the label."""
    rng = np.random.default_rng(list(key.encode()))
    while True:
        yield from (rng.random(1024) < 0.5).tolist()


def swapped(rows: Iterable[Row], key: str) -> list[Row]:
    """The rows with a and b exchanged in half of them, drawn by `key`."""
    return [_exchanged(row) if exchange else row for row, exchange in zip(rows, random_swaps(key), strict=False)]


def _exchanged(row: Row) -> Row:
    label: Side | None = {"a": "b", "b": "a"}.get(row.label or "", row.label)  # type: ignore[assignment]
    return Row(row.prompt, row.b, row.a, 1 - row.p_people, row.votes, row.group, label)


def preferences_of(rows: Sequence[Row], images: Images) -> list[Preference]:
    """Rows with their images in the place of names; those of which an image is not there are left out."""
    return [
        Preference(prompt, images[a], images[b], p_people, votes, group, label)
        for prompt, a, b, p_people, votes, group, label in rows
        if a in images and b in images
    ]


def missing(name: str, split: str, what: str) -> ConfigError:
    """The error for files of a data set that are not there: how they are had, and how large they are."""
    size = shown_size(data_set_of(name).split(split))
    return ConfigError(
        f"--data {name}, split {split}: {what}; download it with `mlxpref data {name} --split {split}` ({size}), or "
        "say with --data-dir where it is"
    )


def with_images(
    name: str, split: str, rows: Sequence[Row], folder: Path, archive: Path, inside: str = ""
) -> list[Preference]:
    """The preferences of rows, with the images that they name; a few of which are not there are left out.

    The images are files below `folder`, if somebody has unpacked them there, else members of `archive`: of a .tar of
    its name in place (in it they may be below `inside`), of a .tar.gz, also in parts, unpacked once into the user's
    cache.
    """
    wanted = dict.fromkeys(image for row in rows for image in (row.a, row.b))
    images: Images = {image: folder / image for image in _files_below(folder, wanted)}
    absent = [image for image in wanted if image not in images]
    plain, parts, problems = archive.with_suffix(""), parts_of(archive) if absent else [], []
    if absent and plain.is_file():
        images |= _inside(plain, absent, inside)
    elif absent and parts:
        target = cache_dir() / "unpacked" / f"{archive.name.split('.')[0]}-{_stamp(parts)}"
        problems = _unpack(archive, parts, absent, target)
        images |= {image: target / image for image in _files_below(target, absent)}
    elif not images:
        raise missing(name, split, f"there is neither {archive.name}, whole or in parts, nor its images in {folder}")
    else:
        problems = [f"{image}: is not in {folder}" for image in absent]
    faults = RowErrors(archive, "images")
    for problem in problems:
        faults.add(problem)
    faults.settle(len(wanted))
    return preferences_of(rows, images)


def _inside(archive: Path, names: Iterable[str], folder: str) -> Images:
    """Members of a tar that is read in place, in a folder of it or in none."""
    images: Images = {}
    archives = ArchiveCache()
    for name in names:
        members = [PackedImage(archive, f"{folder}{name}"), PackedImage(archive, name)]
        images[name] = next(filter(archives.has, members), members[0])
    return images


def _unpack(archive: Path, parts: Sequence[Path], names: Sequence[str], target: Path) -> list[str]:
    """Unpack what is not there yet, and say so; a line for each image that cannot be."""
    there = set(_files_below(target, names))
    names = [name for name in names if name not in there]
    if not names:
        return []
    size = sum(part.stat().st_size for part in parts)
    logger.info(f"{archive}: {format_bytes(size)} are read once, and {len(names)} images of it kept in {target}")
    work = track(unpack(parts, names, target), len(names), f"unpacking {archive.name}")
    return [f"{name}: {problem}" for name, problem in work if problem]


def _files_below(folder: Path, names: Iterable[str]) -> list[str]:
    """The names that are files below a folder: each of its folders is listed once, no file looked at."""
    listed: dict[str, set[str]] = {}
    found = []
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent not in listed:
            inner = folder / parent
            is_below = inner.is_dir() and ".." not in inner.parts and not parent.startswith("/")
            listed[parent] = set(os.listdir(inner)) if is_below else set()  # noqa: PTH208  half a million names
        if last in listed[parent]:
            found.append(name)
    return found


def _stamp(parts: Sequence[Path]) -> str:
    """What tells an archive from another one of its name."""
    status = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    return hashlib.sha256(repr(status).encode()).hexdigest()[:12]
