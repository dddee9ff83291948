"""The public data sets that are known by name: lists as of any table, and images in the hub's archives."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from sys import intern

import numpy as np
from numpy.typing import NDArray

from mlxpref.data.catalog import CATALOG, missing_files
from mlxpref.data.find_images import ImageFinder
from mlxpref.data.hub_tables import read_tables
from mlxpref.data.mmrb2 import LOCAL_LIST, read_mmrb2
from mlxpref.data.preference_table import leave_out, read_public_table
from mlxpref.data.tar_gz import parts_of, unpack
from mlxpref.errors import DataError
from mlxpref.files import cache_dir
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, PackedImage, Preference, images_of
from mlxpref.text import format_bytes

RowSampler = Callable[[int], Sequence[int] | NDArray[np.int64]]
"""Takes a number of rows, returns the numbers of the rows to take, in their order."""
_GITHUB_LISTS = {"train": "train.json", "validation": "valid.json", "test": "test.json"}
"""ImageReward's lists on GitHub, from which the official numbers come."""
_OFFICIAL_TESTS = {"pickapic": "test_unique", "pickapic_v1": "test_unique", "mmrb2": "test", "genai_bench": "test_v1"}
"""The split that is the official test, of data sets in tables."""


def read_public_set(name: str, folder: Path, split: str, draw: RowSampler, needs_images: bool) -> list[Preference]:
    """The preferences that `draw` chooses of a split of a set of `catalog.CATALOG`, in a folder of the hub's layout.

    Labels are those of `read_public_table`. Of ImageReward and Pick-a-Pic it takes the pairs whose archives are here,
    and logs how many are not; of the others it unpacks the images of chosen pairs. Which image is a, is drawn where the
    files' order tells the label, of rankings only for training: the official baseline of ImageReward is their order.
    Without `needs_images` their names are enough. ConfigError for missing files, with the command that downloads them.
    """
    if name == "imagereward":
        return _read_imagereward(folder, split, draw, needs_images)
    if name in _OFFICIAL_TESTS:
        rows = _read_tables(name, folder, _OFFICIAL_TESTS[name] if split == "test" else split, needs_images)
        return [rows[i] for i in draw(len(rows))]
    path = folder / f"{split}.json"
    if not path.is_file():
        raise missing_files(name, split, f"there is no {path}")
    archive = folder / (f"{split}.tar.gz" if name == "hpdv2" else "images.tar.gz")
    finder = UnpackedImages(path, folder / split if name == "hpdv2" else folder, archive, needs_images)
    listed = read_public_table(path, split, finder)
    return unpack_images(name, split, [listed[i] for i in draw(len(listed))], finder.folder, archive)


def _read_tables(name: str, folder: Path, split: str, needs_images: bool) -> list[Preference]:
    """The preferences of a data set whose tables hold the images, or of MMRB2's local list."""
    is_local = name == "mmrb2" and (folder / LOCAL_LIST).is_file()
    (pattern,) = CATALOG[name].split(split).images
    tables = sorted(folder.glob(pattern))
    if not is_local and not tables:
        where = pattern.rpartition("/")[0]
        other = f" and no {LOCAL_LIST} in {folder}" if name == "mmrb2" else ""
        what = f"there is no {pattern.rpartition('/')[2]} in {folder / where}{other}"
        raise missing_files(name, split, what)
    if name == "mmrb2":
        return read_mmrb2(folder, tables, needs_images)
    part = "image_generation" if name == "genai_bench" else None
    return read_tables(folder, split, part, name, needs_images)[0]


class _Names(ImageFinder):
    """Leaves images as their names, until it is known which ones are needed."""

    def _find(self, name: str) -> PackedImage:
        return PackedImage(self.folder, intern(name))


class UnpackedImages(ImageFinder):
    """Finds images in `folder`, or where an archive was unpacked before; others are their names in the archive.

    It lists each folder once, without a look at files. Images that are not `needed` need not be there.
    """

    def __init__(self, table: Path, folder: Path, archive: Path, needed: bool = True) -> None:
        super().__init__(table, folder, needed)
        self._archive, self._places = archive, [folder]
        with suppress(DataError):  # an incomplete archive, which may not be needed
            if needed and (parts := _parts_of(archive)):
                self._places.append(_target_of(archive, parts))
        self._contents: dict[str, list[tuple[Path, set[str]]]] = {}

    def are_same(self, a: ImageLike, b: ImageLike) -> bool:
        """Whether two images have one name."""
        return a is b

    def _find(self, name: str) -> ImageLike:
        if not self._needed:
            return self.folder / name
        parent, _, last = name.rpartition("/")
        if parent not in self._contents:
            self._contents[parent] = [(folder / parent, _names_in(folder, parent)) for folder in self._places]
        for folder, names in self._contents[parent]:
            if last in names:
                return folder / last
        return PackedImage(self._archive, intern(name))


def _read_imagereward(folder: Path, split: str, draw: RowSampler, needs_images: bool) -> list[Preference]:
    """The pairs of GitHub's list, else of the hub's table, whose images are in files or zips below the folder."""
    path, table = folder / _GITHUB_LISTS[split], folder / f"metadata-{split}.parquet"
    if not path.is_file() and not table.is_file():
        raise missing_files("imagereward", split, f"there is neither {table} nor {path.name}")
    listed = read_public_table(path if path.is_file() else table, split, _Names(folder / path.name))
    finder, images = ImageFinder(path, folder, needs_images), dict[str, ImageLike]()
    for name in _names_of(listed):
        try:
            images[name] = finder.find(name)
        except DataError:
            member = PurePosixPath(name)
            archive = folder / f"{member.parent}.zip"
            if archive.is_file():  # it should be there: reading it says what is wrong
                images[name] = PackedImage(archive, f"{member.parent.name}/{member.name}")
    usable = _with_images(listed, images)
    if not usable:
        raise missing_files("imagereward", split, f"none of its images is in a file or a zip below {folder}")
    if len(usable) < len(listed):
        logger.warning(
            f"imagereward, split {split}: the images of {len(usable)} of {len(listed)} pairs are in {folder}; "
            f"`mlxpref data imagereward --split {split}` downloads the others"
        )
    return [usable[i] for i in draw(len(usable))]


def _names_of(listed: Iterable[Preference]) -> list[str]:
    """The names of images, each once."""
    return list(dict.fromkeys(x.member for p in listed for x in (p.a, p.b) if isinstance(x, PackedImage)))


def _with_images(listed: Iterable[Preference], images: Mapping[str, ImageLike]) -> list[Preference]:
    """The preferences with images instead of names, without those whose images are missing."""
    usable = list[Preference]()
    for each in listed:
        a, b = (images.get(x.member) if isinstance(x, PackedImage) else x for x in (each.a, each.b))
        if a and b:
            usable.append(each.with_images(a, b))
    return usable


def unpack_images(name: str, split: str, listed: list[Preference], folder: Path, archive: Path) -> list[Preference]:
    """The preferences with the images that `UnpackedImages` did not find, without the few whose images are missing.

    It unpacks the `archive`, a .tar.gz or a .tar of its name, also in parts, once into the user's cache.
    """
    absent = _names_of(listed)
    if not absent:
        return listed
    parts, images = _parts_of(archive), dict[str, ImageLike]()
    problems = [f"{image}: is not in {folder}" for image in absent]
    if parts:
        target, size = _target_of(archive, parts), format_bytes(sum(part.stat().st_size for part in parts))
        logger.info(f"{archive}: {size} are read once, and {len(absent)} images of it kept in {target}")
        work = track(unpack(parts, absent, target), len(absent), f"unpacking {archive.name}")
        problems = [f"{image}: {problem}" for image, problem in work if problem]
        finder = UnpackedImages(archive, target, archive)
        images = {image: found for image in absent if isinstance(found := finder.find(image), Path)}
    images_of_all = images_of(listed)
    if not parts and len(absent) == len(images_of_all):
        what = f"there is neither {archive.name}, whole or in parts, nor its images in {folder}"
        raise missing_files(name, split, what)
    leave_out(archive, problems, len(images_of_all), "images")
    return _with_images(listed, images)


def _names_in(folder: Path, parent: str) -> set[str]:
    """The names in a folder below another one, none where it is not below."""
    if parent.startswith("/") or ".." in parent.split("/"):
        return set()
    with suppress(OSError, ValueError):  # there is no such folder, or its name is impossible
        return set(os.listdir(folder / parent))  # noqa: PTH208  half a million names
    return set()


def _parts_of(archive: Path) -> list[Path]:
    """The parts of a .tar.gz, or of a .tar of its name; none if it is not there."""
    return parts_of(archive) or parts_of(archive.with_suffix(""))


def _target_of(archive: Path, parts: Sequence[Path]) -> Path:
    """The folder for unpacked images; its name has a digest that tells archives of the same name apart."""
    try:
        status = [(os.path.realpath(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    except OSError as error:  # a link to a blob of the hub's cache that is gone
        raise DataError(f"{archive}: cannot be read ({error.strerror}); download it again") from error
    stamp = hashlib.sha256(repr(status).encode()).hexdigest()[:12]
    return cache_dir() / "unpacked" / f"{archive.name.split('.')[0]}-{stamp}"
