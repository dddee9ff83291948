"""Image files as pictures: every common format, upright, on white, as 8 bit RGB."""

import importlib
import io
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlxpref.data.archives import ArchiveCache
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.text import one_line

PIXEL_LIMIT = 89_478_485
"""The most pixels an image may have: Pillow's own limit against decompression bombs, 256 MiB of RGB."""
ASPECT_LIMIT = 200
"""The largest ratio of the sides: the models' image processors refuse more."""
# Fewer formats than Pillow knows: EPS would start Ghostscript, and rare parsers are a needless risk.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_TO_JPEG = "convert it, on a Mac with `sips -s format jpeg FILE --out FILE.jpg`"
_REMEDIES = {
    "HEIF": f"is a HEIC image, which needs a decoder: `pip install pillow-heif`, or {_TO_JPEG}",
    "AVIF": f"is an AVIF image, which needs a decoder: `pip install -U pillow`, or {_TO_JPEG}",
    "JXL": f"is a JPEG XL image, which is not read; {_TO_JPEG}",
    "": "is damaged or not an image of a format that is read, whatever its name says; convert or remove it",
}
_TOO_LARGE = f"has more than {PIXEL_LIMIT:,} pixels, the most that is read; make it smaller first"


def load_image(
    source: ImageLike | str | io.BytesIO, max_pixels: int | None = None, archives: ArchiveCache | None = None
) -> Image.Image:
    """Read an image as RGB: upright, on white, the first frame of an animation.

    `source` is a file, a part of one, its content, or an image in memory, which is not changed. Values beyond 8 bit are
    scaled, not clipped. Colour profiles are ignored, as by the models' own processors. With `max_pixels`, the model's
    pixel budget, an image of at least 16 times as many pixels is reduced (see `reduction`); none is ever cropped or
    enlarged. `archives` keeps archives open. DataError, one line, for unreadable images.
    """
    source = Path(source) if isinstance(source, str) else source
    try:
        if isinstance(source, Image.Image | io.BytesIO):
            picture = _decode(source)
        else:
            with _open(source, archives or ArchiveCache()) as file:
                picture = _decode(file)
    except DataError as error:
        where = "an image in memory" if isinstance(source, Image.Image | io.BytesIO) else source
        raise DataError(f"{where}: {error}") from error.__cause__
    factor = reduction(picture.size, max_pixels)
    return picture.reduce(factor) if factor > 1 else picture


def reduction(size: tuple[int, int], max_pixels: int | None) -> int:
    """The side of the pixel blocks to average in an image far above the pixel budget, else 1.

    The model's processor resizes to the budget with a bicubic filter, and the result must match the reference: so
    images below 16 times the budget (2048 x 2048 for 512 x 512) stay unchanged. Above, at least twice the budget's
    width and height remain: box and bicubic together then differ from bicubic alone by at most 0.6 of 255 levels (mean
    over HPDv2 images). It avoids JPEG's quick draft mode: a JPEG and its PNG must give the same pixels.
    """
    return max(1, math.isqrt(size[0] * size[1] // (4 * max_pixels))) if max_pixels else 1


def _open(source: Path | PackedImage, archives: ArchiveCache) -> BinaryIO:
    """An open file, or a part of one in memory."""
    if isinstance(source, PackedImage):
        return io.BytesIO(archives.read(source))
    try:
        if source.exists() and not source.is_file():  # opening a named pipe would wait forever
            raise DataError("is a folder or a device, not an image file")
        return source.open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened ({getattr(error, 'strerror', error)}); check the name") from error


def _decode(source: BinaryIO | Image.Image) -> Image.Image:
    kind = "" if isinstance(source, Image.Image) else _kind(source)
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        # Pillow warns of damage that it can repair, and raises errors for other damage.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if isinstance(source, Image.Image):
                return _finish(source)
            if kind == "HEIF":
                return _decode_heif(source)
            # Never a path: Pillow would map the file into memory and garble rotated plain TIFF files.
            with Image.open(source, formats=formats) as image:
                return _finish(image)
        except (DataError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(_TOO_LARGE) from error
        except (UnidentifiedImageError, ImportError) as error:
            raise DataError(_REMEDIES["" if kind in formats else kind]) from error
        except Exception as error:
            # Decoders raise errors of many types: OSError, SyntaxError, struct.error ...
            raise DataError(f"is damaged ({one_line(error)}); make or download it again") from error


def _kind(file: BinaryIO) -> str:
    """The format of a file whose decoder may be missing (HEIF, AVIF, JXL), else ""; DataError for an empty file."""
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


def _decode_heif(file: BinaryIO) -> Image.Image:
    """A HEIC image; ImportError without its decoder, which is no requirement of mlxpref."""
    container = importlib.import_module("pillow_heif").open_heif(file)
    _check_size(container.size)
    return _finish(container.to_pillow())


def _check_size(size: tuple[int, int]) -> None:
    """DataError for a size in the header that no model can use."""
    width, height = size
    if width * height > PIXEL_LIMIT:
        raise DataError(_TOO_LARGE)
    if max(size) > ASPECT_LIMIT * min(size):
        raise DataError(f"is {width} x {height} pixels, more than {ASPECT_LIMIT}:1, which no model reads; crop it")


def _finish(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, upright, on white, as RGB."""
    _check_size(image.size)
    image.load()
    picture = _flatten(_upright(image))
    picture.info = {}  # drop text and profiles, which may take megabytes
    return picture


def _upright(image: Image.Image) -> Image.Image:
    """A copy, rotated by its EXIF; damaged EXIF is ignored."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()


def _flatten(image: Image.Image) -> Image.Image:
    """8 bit RGB of an image of any mode, on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow cannot convert premultiplied grey directly
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bit, 32 bit or floating point as 8 bit grey; Pillow's own conversion would clip it to white.

    Modes I and F do not define white: here it is the first of the usual values above the brightest pixel. Floats may
    exceed it fourfold: otherwise one highlight of 1.01 would turn the rest black.
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
