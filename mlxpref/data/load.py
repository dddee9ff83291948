"""Loads preferences by the data's name; each format has its own file."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from mlxpref.data.catalog import CATALOG, catalog_name, folder_of
from mlxpref.data.columns import WINNERS
from mlxpref.data.find_images import ImageFinder, locate
from mlxpref.data.folders import has_folders, read_folders
from mlxpref.data.hub_tables import Agree, hub_name, read_hub_tables, read_tables
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.left_out import LeftOut, is_public
from mlxpref.data.preference_table import NOBODY, NoSplitsError, read_preferences
from mlxpref.data.public_files import fetch
from mlxpref.data.public_sets import read_public_set
from mlxpref.data.survey import EXAMPLE
from mlxpref.data.tables import SUFFIXES
from mlxpref.demo.preferences import SPLITS, demo_preferences
from mlxpref.errors import ConfigError, DataError, ImageError, UnknownSplitError
from mlxpref.log import track_many
from mlxpref.preferences import PackedImage, Preference
from mlxpref.text import first_ten

T = TypeVar("T")

DEMO_COUNTS = {"train": 2000, "test": 400, "heldout": 400, "four": 400}
"""The number of demo preferences without a limit."""
ALL_ROWS = "all rows"
"""The split of data without splits."""
DECODED_IMAGES, _RUN = 2000, 20
"""The number of images to decode before the work, and the length of a run of them."""
_KNOWN = (
    f"demo, {', '.join(CATALOG)}, a file ({', '.join(SUFFIXES)}) with rows like {EXAMPLE}, a folder with "
    f"{WINNERS[0][0]}/ and {WINNERS[0][1]}/ or parquet tables in it, or owner/name of a data set on the hub"
)


class Preferences(list[Preference]):
    """Preferences with the name of their split, ALL_ROWS of data without splits."""

    def __init__(self, preferences: Iterable[Preference], split: str = ALL_ROWS) -> None:
        super().__init__(preferences)
        self.split = split


@contextmanager
def _without_collection() -> Iterator[None]:
    """Rows hold no circles, and a look for some, again and again, is a fifth of the time of a million."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@_without_collection()
def load_preferences(
    data: str,
    split: str,
    limit: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    needs_split: bool = False,
    needs_images: bool = True,
    agree: Agree = lambda question: False,
) -> Preferences:
    """The preferences of `--data`: `demo`, a public data set, a user's file or folder, or `owner/name` of the hub.

    `demo` has the splits train, test, heldout and four; `seed` determines its pictures. The files of a public data set
    (`catalog.CATALOG`) are in `data_dir` or in the hub's cache; see its reader. A user's preferences are a file of rows
    (`preference_table.read_preferences`), whose images may be in `data_dir`, two folders (`folders.read_folders`), or
    tables in a folder or on the hub (`hub_tables`), which are downloaded if the user does `agree`; with their own
    splits. Without any, it takes all rows, or raises an error if it `needs_split`. Without `needs_images` the names of
    images are enough. `limit` draws that many preferences by `seed`, in their order, as the first ones are often all of
    one prompt; a smaller limit draws a subset of a larger one's. ConfigError for an unknown name or split and for
    missing files, DataError for errors in them.
    """
    drawn(limit, seed, 0)  # a wrong limit is an error before any work
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(
            f"--data-dir {data_dir}: no such folder; give the one that holds the files or images of {data}"
        )
    data = catalog_name(data)
    if data == "demo":
        if data_dir is not None:
            raise ConfigError("--data-dir is where the files or images of other data are; --data demo needs none")
        if split not in SPLITS:
            raise UnknownSplitError(f"split {split!r}: the demo has {', '.join(SPLITS)}")
        count = DEMO_COUNTS[split] if limit is None else limit
        return Preferences(demo_preferences(split, count, seed), split)
    draw = partial(drawn, limit, seed)
    if data in CATALOG:
        CATALOG[data].split(split)
        if data_dir is None:
            fetch(data, split, limit, agree, needs_images)
        folder = folder_of(data, data_dir, split)
        listed = read_public_set(data, folder, split, draw, needs_images)
        if not listed:
            raise DataError(f"{data}, split {split}: {NOBODY}")
        return Preferences(listed, split)
    try:
        preferences = _of_a_user(data, split, limit, data_dir, needs_images, agree)
    except NoSplitsError as error:
        if needs_split:
            raise
        preferences, split = error.preferences, ALL_ROWS
    return Preferences((preferences[i] for i in draw(len(preferences))), split)


def load_outside_test(load: Callable[[str], T], has_learned: bool) -> T:
    """The preferences of the first split that `load` knows and an evaluation does not use by default; else of test.

    It does not take those of train for a judge that `has_learned`.
    """
    for split in ("validation", "heldout", *(() if has_learned else ("train",))):
        with suppress(UnknownSplitError):
            return load(split)
    return load("test")


def check_preferences(data: str, preferences: Sequence[Preference], images: ImageCache, begun: bool = False) -> LeftOut:
    """Find unreadable images before the work, and return those that are left out.

    It checks that every image exists, in its folder or in its archive's list, and decodes up to DECODED_IMAGES of them,
    in random runs if there are more: the work may then still find a damaged one. `images` caches the decoded ones.
    DataError names the first ten of a user's files, unless the work has `begun` earlier; of a public data set only if
    they are too many.
    """
    names = dict.fromkeys(image for p in preferences for image in (p.a, p.b) if not isinstance(image, Image.Image))
    sample = _drawn_runs(len(names))
    missing, damaged = dict[str, str](), dict[str, str]()
    absent = {*images.archives.absent(image for image in names if isinstance(image, PackedImage))}
    for number, image in enumerate(track_many(names, "looking for images")):
        # Not `Path.is_file`, which takes thrice as long: there may be half a million.
        exists = image not in absent if isinstance(image, PackedImage) else os.path.isfile(image)  # noqa: PTH113
        if not exists or number in sample:
            try:
                images.check(image)
            except ImageError as error:
                (damaged if exists else missing)[error.name] = error.reason
    left_out = LeftOut(data, preferences)
    problems = missing | damaged
    if problems and not begun and not is_public(data):
        lines = [f"{name}: {reason}" for name, reason in problems.items()]
        raise DataError(
            f"{data}: {len(lines)} of {len(names)} images cannot be read; correct them or remove their rows:\n  "
            + first_ten(lines)
        )
    if problems:
        left_out.add(problems, len(missing) / len(names) + len(damaged) / max(1, len(sample)))
    return left_out


def _of_a_user(
    data: str, split: str, limit: int | None, data_dir: Path | None, needs_images: bool, agree: Agree
) -> list[Preference]:
    """The preferences of a file, a folder, or a data set on the hub; NoSplitsError where it has no splits."""
    path, hub = locate(data), hub_name(data)
    if path is None and hub is not None:
        try:
            if data_dir:
                tables = read_tables(data_dir, split, hub.part, needs_images=needs_images)
            else:
                tables = read_hub_tables(hub, split, limit, agree, needs_images)
        except DataError as error:
            where = "" if data_dir else "no such file or folder here; on the hub: "
            raise DataError(f"--data {data}: {where}{error}") from error
    elif path is None:
        if Path(data).suffix or len(Path(data).parts) > 1:
            raise ConfigError(f"--data {data}: no such file or folder; known are {_KNOWN}")
        raise ConfigError(f"unknown --data {data}: known are {_KNOWN}")
    elif path.is_dir():
        if data_dir is not None:
            raise ConfigError(f"--data-dir {data_dir}: --data is a folder itself; leave it out")
        if has_folders(path) or not any(path.rglob("*.parquet")):
            return read_folders(path, split)
        tables = read_tables(path, split, needs_images=needs_images)
    elif path.suffix.lower() in SUFFIXES:
        return read_preferences(path, split, ImageFinder(path, data_dir, needs_images))
    else:
        raise ConfigError(f"--data {data}: not a file of {', '.join(SUFFIXES)}; known are {_KNOWN}")
    preferences, found = tables
    if found is None:
        raise NoSplitsError(Path(data), split, preferences)
    return preferences


def _drawn_runs(count: int) -> range | set[int]:
    """Numbers of the images to decode: in runs, since archives read neighbours together."""
    if count <= DECODED_IMAGES:
        return range(count)
    starts = np.random.default_rng(0).choice(count // _RUN, DECODED_IMAGES // _RUN, replace=False) * _RUN
    return {int(start) + i for start in starts for i in range(_RUN)}


def drawn(limit: int | None, seed: int, count: int) -> Sequence[int]:
    """The numbers of the rows to take: all of `count`, or `limit` random ones; ConfigError for a limit below 1."""
    if limit is None:
        return range(count)
    if not isinstance(limit, Integral) or limit < 1:
        raise ConfigError(f"limit {limit!r}: it must be at least 1")
    numbers: list[int] = np.sort(np.random.default_rng(seed).permutation(count)[:limit]).tolist()
    return numbers
