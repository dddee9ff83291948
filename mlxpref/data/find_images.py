"""Finds image files: in folders, by the names in a table, unreadable ones, and duplicates."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.image_cache import ImageCache
from mlxpref.errors import DataError
from mlxpref.files import expand, sha256_of
from mlxpref.log import track
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.text import few, first_ten

IMAGE_NAME = re.compile(
    r".\.(apng|avif|bmp|gif|hei[cf]|hif|j2k|jfif|jp[2eg]|jpeg|jxl|mpo|p[bgnp]m|png|tiff?|webp)$", re.I
)
"""Names of images in a folder; HEIC and JPEG XL are here so that they are reported as skipped."""

_MANY = 100
"""More images take so long to read that progress is shown."""
_LINK = re.compile(r"(https?|s3|gs|data):", re.I)


@dataclass(frozen=True)
class Skipped:
    """An image file that is left out, and the reason."""

    path: Path
    error: str


def check_images(paths: Iterable[Path], images: ImageCache) -> tuple[list[Path], list[Skipped]]:
    """As `try_images`; DataError, with the first reasons, if fewer than two can be read."""
    readable, skipped = try_images(paths, images)
    if len(readable) < 2:
        reasons = reasons_of(skipped)
        count = f"{len(readable)} of {len(readable) + len(skipped)}"
        raise DataError(f"two images are needed, {count} can be read{': ' if reasons else ''}{reasons}")
    return readable, skipped


def try_images(paths: Iterable[Path], images: ImageCache) -> tuple[list[Path], list[Skipped]]:
    """The readable files, and the others, each with the reason; `images` caches the decoded ones."""
    readable, skipped, paths = list[Path](), list[Skipped](), list(paths)
    for path in track(paths, len(paths), "reading images") if len(paths) > _MANY else paths:
        try:
            images.check(path)
            readable.append(path)
        except DataError as error:
            skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
    return readable, skipped


def reasons_of(skipped: Sequence[Skipped]) -> str:
    """The first ten errors of skipped images, each once with its first images, on one line."""
    paths: dict[str, list[str]] = {}
    for skip in skipped:
        paths.setdefault(skip.error, []).append(str(skip.path))
    named = [(few(of, 3), "each of " if len(of) > 1 else "", error) for error, of in paths.items()]
    return first_ten([f"{each}{names} {error}" for names, each, error in named], "; ")


def find_images(paths: Sequence[Path | str], recursive: bool = False) -> list[Path]:
    """The image files among files and folders, in natural order (2.png before 10.png), each once.

    A file may have any name; in a folder it takes files that are named like images and not hidden (`.DS_Store`, `._*`).
    Subfolders only if `recursive`. The order depends only on the names, not on that of `paths`. DataError for a path
    that does not exist and for a folder without images.
    """
    files: list[Path] = []
    for name in paths:
        path = locate(str(name))
        if path is None:
            raise DataError(f"{name}: no such file or folder; check the name")
        files += _in_folder(path, recursive) if path.is_dir() else [path]
    unique: dict[tuple[str, int], Path] = {}
    for path in sorted(files, key=_natural_key):
        unique.setdefault(file_identity(path), path)
    return list(unique.values())


def locate(name: str, folder: Path = Path()) -> Path | None:
    """The file or folder of this name, relative to `folder`, in any Unicode form of the name.

    "é" is one character or two: names from a Mac often differ from those in text files, and Linux distinguishes them.
    None if no form exists.
    """
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        with suppress(OSError, ValueError):  # the name is too long, or the folder is not accessible
            if (folder / form).exists():
                return folder / form
    return None


class ImageFinder:
    """Finds the images that a table names, in `folder` or else in the table's own.

    Below `folder`, files and members of zips are also found by their last name if it is unique, as lists from elsewhere
    have other folders. Where images are not `needed`, a missing one is just its path, or its address.
    """

    def __init__(self, table: Path, folder: Path | None = None, needed: bool = True) -> None:
        self.folder, self.missing = folder or table.parent, 0
        self._search, self._needed = folder is not None, needed
        self.found: dict[str, ImageLike] = {}
        self._numbers: dict[int, int] = {}  # of the files, by which the file system knows them, by the id of the Path
        self._folders: dict[str, Path] = {}
        self._by_name: dict[str, list[ImageLike]] = {}

    def find(self, name: str) -> ImageLike:
        """The image of this name, each time the same; DataError, which continues the name, if there is none."""
        image = self.found.get(name)
        if image is None:
            image = self.found[name] = self._find(name)
        return image

    def are_same(self, a: ImageLike, b: ImageLike) -> bool:
        """Whether two images that were found are one, perhaps by two names of its file."""
        if not isinstance(a, Path) or not isinstance(b, Path):
            return a == b
        numbers = self._numbers.get(id(a)), self._numbers.get(id(b))
        if None not in numbers and numbers[0] != numbers[1]:
            return False
        with suppress(OSError, ValueError):  # an impossible name
            return a == b or (a.exists() and b.exists() and a.samefile(b))  # else not needed
        return False

    def _find(self, name: str) -> ImageLike:
        if self._needed and _LINK.match(name):
            raise DataError("is no file: save the image, and give the file's name")
        usual = os.path.join(self.folder, expand(name))  # noqa: PTH118  a million names: Path takes thrice as long
        with suppress(OSError, ValueError):
            status = os.stat(usual)  # noqa: PTH116
            if S_ISREG(status.st_mode):
                parent, _, last = usual.rpartition("/")
                if parent not in self._folders:
                    self._folders[parent] = Path(f"{parent}/")
                found = self._folders[parent] / last
                self._numbers[id(found)] = status.st_ino  # the Path lives as long as this object
                return found
        path = locate(expand(name), self.folder) or locate(name.replace("\\", "/"), self.folder)  # from Windows
        if path is not None and path.is_file():
            return path
        named = self._named(re.split(r"[/\\]", name)[-1]) if self._search else []
        if len(named) == 1:
            return named[0]
        if not self._needed:
            return self.folder / name
        self.missing += 1
        raise DataError(f"no such file, but {len(named)} of its last name" if named else "no such file")

    def _named(self, name: str) -> list[ImageLike]:
        """The files and members of zips of this name below the folder, which is searched once."""
        if not self._by_name:
            archives = ArchiveCache()
            for folder, _, files in os.walk(self.folder, followlinks=True):
                paths = [Path(folder, file) for file in files]
                members = (PackedImage(p, m) for p in paths if p.suffix == ".zip" for m in archives.members(p))
                images: list[ImageLike] = [*paths, *members]
                for image in images:
                    self._by_name.setdefault(str(image).rpartition("/")[2], []).append(image)
        found = self._by_name.get(name, [])
        return [each for each in found if isinstance(each, Path)] or found  # unpacked, beside their zip


def find_duplicates(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Groups of files with identical bytes, by their first one, each in the order of `paths`.

    It reads only files of equal size. An unreadable file is in no group, and an image saved again, in other bytes, is
    no duplicate.
    """
    sizes, alike = dict[int, list[Path]](), dict[str, list[Path]]()
    for path in dict.fromkeys(paths):
        with suppress(OSError, ValueError):
            sizes.setdefault(path.stat().st_size if path.is_file() else -1, []).append(path)
    for size, same_size in sizes.items():
        for path in same_size if size >= 0 and len(same_size) > 1 else ():
            with suppress(OSError):
                alike.setdefault(sha256_of(path), []).append(path)
    groups = (tuple(group) for group in alike.values() if len(group) > 1)
    return sorted(groups, key=lambda group: paths.index(group[0]))


def file_identity(path: Path) -> tuple[str, int]:
    """Equal for two spellings of one file (a Mac ignores case and Unicode form), never for two files."""
    real = Path(os.path.realpath(path))
    return fold_name(str(real)), real.stat().st_ino if real.exists() else 0


def fold_name(name: str) -> str:
    """A name without case and in one Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def _in_folder(folder: Path, recursive: bool) -> list[Path]:
    """The images of a folder; DataError, with a hint, if there are none."""
    if files := list(_walk(folder, recursive, set())):
        return files
    deeper = not recursive and any(_walk(folder, True, set()))
    hint = "; its subfolders do: add --recursive" if deeper else ", like .jpg, .png or .webp files"
    raise DataError(f"{folder}: this folder holds no images{hint}")


def _walk(folder: Path, recursive: bool, entered: set[str]) -> Iterator[Path]:
    """The image files below a folder; it follows links to folders, but enters no folder twice."""
    entered.add(os.path.realpath(folder))
    try:
        visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        entries = [(entry, entry.is_dir()) for entry in sorted(visible, key=_natural_key)]
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    for entry, is_folder in entries:
        if not is_folder and re.search(IMAGE_NAME, entry.name):
            yield entry
        if is_folder and recursive and os.path.realpath(entry) not in entered:
            yield from _walk(entry, recursive, entered)


def _natural_key(path: Path) -> tuple[list[list[tuple[int, int, str]]], str]:
    """Sort key: folder by folder, numbers by value, letters regardless of case and Unicode form."""

    def pieces(part: str) -> list[tuple[int, int, str]]:
        runs = re.findall(r"\d+|\D+", fold_name(part))
        return [(0, int(run), "") if run.isdecimal() else (1, 0, run) for run in runs]

    return [pieces(part) for part in path.parts], str(path)
