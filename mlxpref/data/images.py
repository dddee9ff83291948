"""Image files read right: every common format, upright, on white, as 8 bit RGB; no model is needed."""

import importlib
import io
import logging
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlxpref.data.archives import read_member
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike, PackedImage

__all__ = ["Skipped", "check_images", "find_images", "load_image", "locate", "read_images"]

PIXEL_LIMIT = 89_478_485
"""The most pixels an image may have: Pillow's own limit against decompression bombs, 256 MiB of RGB."""
ASPECT_LIMIT = 200
"""The most that the longer side may be of the shorter one: the models' image processors refuse more."""
# What an image in a folder is called; HEIC and JPEG XL are among them so that they are named as skipped.
_NAMES = re.compile(r".\.(apng|avif|bmp|gif|hei[cf]|hif|j2k|jfif|jp[2eg]|jpeg|jxl|mpo|p[bgnp]m|png|tiff?|webp)$", re.I)
# Not all that Pillow knows: EPS would start Ghostscript, and rare parsers are a risk for no one's benefit.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_TO_JPEG = "convert it, on a Mac with `sips -s format jpeg FILE --out FILE.jpg`"
_REMEDIES = {
    "HEIF": f"is a HEIC image, which needs a decoder: `pip install pillow-heif`, or {_TO_JPEG}",
    "AVIF": f"is an AVIF image, which needs a decoder: `pip install -U pillow`, or {_TO_JPEG}",
    "JXL": f"is a JPEG XL image, which is not read; {_TO_JPEG}",
    "": "is damaged or not an image of a format that is read, whatever its name says; convert or remove it",
}
_TOO_LARGE = f"has more than {PIXEL_LIMIT:,} pixels, the most that is read; make it smaller first"

# Without a handler anywhere, Python prints Pillow's log of damaged TIFF files to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Skipped:
    """An image file that could not be read, and why."""

    path: Path
    error: str


def load_image(source: ImageLike | str, max_pixels: int | None = None) -> Image.Image:
    """Read an image as it is meant to be seen: RGB, upright, on white, the first frame of an animation.

    `source` is a file, a part of one, or an image in memory, which stays as it is. Values beyond 8 bit are scaled, not
    clipped. Colour profiles are not applied: the models' own processors do not either. With `max_pixels`,
    the model's pixel budget, an image of at least 16 times as many pixels is reduced (see `_reduce`); none is
    ever cropped or enlarged. Raises DataError, one line, for what cannot be read.
    """
    source = Path(source) if isinstance(source, str) else source
    try:
        return _load(source, max_pixels)
    except DataError as error:
        where = "an image in memory" if isinstance(source, Image.Image) else source
        raise DataError(f"{where}: {error}") from error.__cause__


def read_images(
    paths: Iterable[Path], max_pixels: int | None = None
) -> tuple[list[tuple[Path, Image.Image]], list[Skipped]]:
    """Read many files; those that cannot be read are skipped and named.

    Each image is reduced (see `load_image`) before the next one is opened, to less than 16 times the budget:
    at 512 x 512 that is under 12 MiB an image. For hundreds of images use `check_images` and load each when
    it is needed. Raises DataError if fewer than two can be read.
    """
    skipped: list[Skipped] = []
    images = list(_readable(paths, max_pixels, skipped))
    return images, skipped


def check_images(paths: Iterable[Path]) -> tuple[list[Path], list[Skipped]]:
    """The same with no image kept: each file is decoded once, to know which can be read."""
    skipped: list[Skipped] = []
    readable = [path for path, _ in _readable(paths, None, skipped)]
    return readable, skipped


def find_images(paths: Sequence[Path | str], recursive: bool = False) -> list[Path]:
    """The image files among files and folders, in natural order (2.png before 10.png), each once.

    A file is taken whatever its name is; of a folder, the files that are named like images and not hidden
    (`.DS_Store`, `._*`). Subfolders only if `recursive`. The order depends on the names alone, not on that of
    `paths`. Raises DataError for a path that does not exist and for a folder without images.
    """
    found: list[Path] = []
    for given in paths:
        path = locate(str(given))
        if path is None:
            raise DataError(f"{given}: no such file or folder; check the name")
        found += _in_folder(path, recursive) if path.is_dir() else [path]
    unique: dict[tuple[str, int], Path] = {}
    for path in sorted(found, key=_natural):
        unique.setdefault(_identity(path), path)
    return list(unique.values())


def locate(name: str, folder: Path = Path()) -> Path | None:
    """The file or folder of this name, relative to `folder`, in whichever Unicode form its name is stored.

    "é" is one character or two: names written on a Mac often differ from those in text files, and Linux tells
    them apart. None if there is none in any form.
    """
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        with suppress(OSError, ValueError):  # the name is too long, or the folder may not be entered
            if (folder / form).exists():
                return folder / form
    return None


def _load(source: ImageLike, max_pixels: int | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels)
    with _opened(source) as file:
        return _decode(file, max_pixels)


def _opened(source: Path | PackedImage) -> BinaryIO:
    """A file, or a part of one in memory, to read from."""
    if isinstance(source, PackedImage):
        return io.BytesIO(read_member(source))
    try:
        if source.exists() and not source.is_file():  # opening a named pipe would wait for ever
            raise DataError("is a folder or a device, not an image file")
        return source.open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened ({getattr(error, 'strerror', error)}); check the name") from error


def _decode(source: BinaryIO | Image.Image, max_pixels: int | None) -> Image.Image:
    kind = "" if isinstance(source, Image.Image) else _kind(source)
    formats = _formats(kind)
    with warnings.catch_warnings():
        # Pillow warns of damage that it can repair; what it cannot repair, it raises.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if isinstance(source, Image.Image):
                return _finish(source, max_pixels)
            # Never a path: Pillow maps one into memory, and then garbles rotated plain TIFF files.
            with Image.open(source, formats=formats) as image:
                return _finish(image, max_pixels)
        except (DataError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(_TOO_LARGE) from error
        except UnidentifiedImageError as error:
            raise DataError(_REMEDIES["" if kind in formats else kind]) from error
        except Exception as error:
            # Decoders raise whatever their parsers stumble on: OSError, SyntaxError, struct.error ...
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"is damaged ({reason}); make or download it again") from error


def _kind(file: BinaryIO) -> str:
    """What a file begins like, if its decoder may be missing; DataError if there is nothing to decode."""
    try:
        head = file.read(64)
        file.seek(0)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); check the disk") from error
    if not head:
        raise DataError("is empty (0 bytes); make or download it again")
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JXL"
    brands = {head[i : i + 4] for i in range(8, len(head), 4)} if head[4:8] == b"ftyp" else set()
    return "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if brands & _HEIF_BRANDS else ""


def _formats(kind: str) -> list[str]:
    """What a file may be; HEIC where its decoder, which mlxpref does not bring along, is installed."""
    if kind == "HEIF":
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return [name for name in (*_FORMATS, "HEIF") if name in Image.OPEN]


def _finish(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Decode an opened image, unless its header already says that it cannot be used."""
    width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise DataError(_TOO_LARGE)
    if max(width, height) > ASPECT_LIMIT * min(width, height):
        raise DataError(f"is {width} x {height} pixels, more than {ASPECT_LIMIT}:1, which no model reads; crop it")
    image.load()
    picture = _reduce(_flatten(_upright(image)), max_pixels)
    picture.info = {}  # text and profiles of megabytes that nobody asks for
    return picture


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF says; damaged EXIF is no reason to lose the picture."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()


def _flatten(image: Image.Image) -> Image.Image:
    """8 bit RGB of an image of any mode, composited on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no direct way from premultiplied grey
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bit, 32 bit or floating point as 8 bit grey; Pillow's own conversion would clip it to white.

    Modes I and F do not say what white is: here it is the first of the usual values that holds the brightest
    pixel. Floats may exceed it fourfold: otherwise one pixel of 1.01, a highlight, would turn the rest black.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        table = np.round(np.arange(65536) / 257).astype(np.uint8)
        grey = Image.fromarray(table[values])
        if isinstance(see_through := image.info.get("transparency"), int):
            grey.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
        return grey
    values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
    whites, excess = ((1.0, 255.0, 65535.0), 4) if image.mode == "F" else ((255.0, 65535.0, 2.0**31), 1)
    white = next((w for w in whites if values.max() <= excess * w), float(values.max()))
    return Image.fromarray(np.round(np.clip(values * (255 / white), 0, 255)).astype(np.uint8))


def _reduce(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """An image far above the pixel budget, averaged over whole blocks of pixels; any other as it is.

    The model's processor resizes to the budget with a bicubic filter, and its result must be the reference's: so
    nothing is touched below 16 times the budget (2048 x 2048 for 512 x 512). Above, at least twice the budget's
    width and height remain: box and bicubic together then differ from bicubic alone by 0.6 of 255 levels at most
    (mean over HPDv2 images). JPEG's quick draft mode is not used: a JPEG and its PNG must give the same pixels.
    """
    factor = math.isqrt(image.width * image.height // (4 * max_pixels)) if max_pixels else 1
    return image.reduce(factor) if factor > 1 else image


def _readable(
    paths: Iterable[Path], max_pixels: int | None, skipped: list[Skipped]
) -> Iterator[tuple[Path, Image.Image]]:
    """The images that can be read, one at a time; the others are added to `skipped`."""
    count = 0
    for path in paths:
        try:
            image = _load(path, max_pixels)
        except DataError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            count += 1
            yield path, image
    if count < 2:
        reasons = [f"{skip.path} {skip.error}" for skip in skipped[:10]]
        reasons += [f"and {len(skipped) - 10} more"] if len(skipped) > 10 else []
        why = f": {'; '.join(reasons)}" if skipped else ""
        raise DataError(f"two images are needed, {count} of {count + len(skipped)} can be read{why}")


def _in_folder(folder: Path, recursive: bool) -> list[Path]:
    """The images of a folder; if there are none, an error that says where some would be."""
    if found := list(_walk(folder, recursive, set())):
        return found
    deeper = not recursive and any(_walk(folder, True, set()))
    hint = "; its subfolders do: add --recursive" if deeper else ", like .jpg, .png or .webp files"
    raise DataError(f"{folder}: this folder holds no images{hint}")


def _walk(folder: Path, recursive: bool, entered: set[str]) -> Iterator[Path]:
    """The image files below a folder; links to folders are followed, but no folder is entered twice."""
    entered.add(os.path.realpath(folder))
    try:
        visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        entries = [(entry, entry.is_dir()) for entry in sorted(visible, key=_natural)]
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    for entry, is_folder in entries:
        if not is_folder and re.search(_NAMES, entry.name):
            yield entry
        if is_folder and recursive and os.path.realpath(entry) not in entered:
            yield from _walk(entry, recursive, entered)


def _identity(path: Path) -> tuple[str, int]:
    """Equal for two spellings of one file (a Mac ignores case and Unicode form), never for two files."""
    real = Path(os.path.realpath(path))
    return _folded(str(real)), real.stat().st_ino if real.exists() else 0


def _natural(path: Path) -> tuple[list[list[tuple[int, int, str]]], str]:
    """Sort key: folder by folder, numbers by value, letters regardless of case and Unicode form."""

    def pieces(part: str) -> list[tuple[int, int, str]]:
        runs = re.findall(r"\d+|\D+", _folded(part))
        return [(0, int(run), "") if run.isdecimal() else (1, 0, run) for run in runs]

    return [pieces(part) for part in path.parts], str(path)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
