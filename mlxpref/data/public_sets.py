"""The public data sets that are known by name: lists as of any table, and images in the hub's archives."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from mlxpref.preferences import ImageLike, PackedImage, Preference
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
    listed = read_public_table(path, split, _Names(path))
    chosen = [listed[i] for i in draw(len(listed))]
    if name == "hpdv2":
        return unpack_images(name, split, chosen, folder / split, folder / f"{split}.tar.gz", needs_images)
    return unpack_images(name, split, chosen, folder, folder / "images.tar.gz", needs_images)


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
    usable = []
    for each in listed:
        a, b = (images.get(x.member) if isinstance(x, PackedImage) else None for x in (each.a, each.b))
        if a and b:
            usable.append(each.with_images(a, b))
    return usable


def unpack_images(
    name: str, split: str, listed: Sequence[Preference], folder: Path, archive: Path, needed: bool = True
) -> list[Preference]:
    """The preferences with their images, without the few whose images are missing.

    The images are files below `folder`, if unpacked there, else members of `archive`, a .tar.gz or a .tar of its name,
    also in parts, which it unpacks once into the user's cache. Not `needed`, they need not be there.
    """
    names = _names_of(listed)
    if not needed:
        return _with_images(listed, {image: folder / image for image in names})
    images: dict[str, ImageLike] = {image: folder / image for image in _files_below(folder, names)}
    absent = [image for image in names if image not in images]
    parts = parts_of(archive) or parts_of(archive.with_suffix("")) if absent else []
    problems = [f"{image}: is not in {folder}" for image in absent]
    if parts:
        target = cache_dir() / "unpacked" / f"{archive.name.split('.')[0]}-{_stamp(parts)}"
        unpacked = {*_files_below(target, absent)}
        problems = []
        if left := [image for image in absent if image not in unpacked]:
            size = format_bytes(sum(part.stat().st_size for part in parts))
            logger.info(f"{archive}: {size} are read once, and {len(left)} images of it kept in {target}")
            work = track(unpack(parts, left, target), len(left), f"unpacking {archive.name}")
            problems = [f"{image}: {problem}" for image, problem in work if problem]
        images |= {image: target / image for image in _files_below(target, absent)}
    elif not images:
        what = f"there is neither {archive.name}, whole or in parts, nor its images in {folder}"
        raise missing_files(name, split, what)
    leave_out(archive, problems, len(names), "images")
    return _with_images(listed, images)


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
