"""Image files as pictures: every common format, upright, on white, as 8 bit RGB."""

import importlib
import io
import math
import os
import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.containers import check_png_pixels, without_extras
from mlxpref.errors import DataError, ImageError
from mlxpref.files import open_file, read_file
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.text import one_line

DECODING = 1
"""The version of the code from files to pixels; a new number makes what is kept of them on disk invalid."""
PIXEL_LIMIT = 89_478_485
"""Larger images are read at a reduced size: 256 MiB of RGB are left."""
MEMORY_LIMIT = 4 << 30
"""The most bytes that reading an image may take: 715 million pixels of a PNG or JPEG, 268 million of a WebP."""
# Measured peaks in bytes a pixel: of some formats, of the others, and of progressive JPEG.
_BYTES = {"WEBP": 16, "AVIF": 10, "HEIF": 10, "JPEG2000": 20}
_USUAL_BYTES, _PROGRESSIVE_BYTES = 6, 7
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
_TURNS = {number: Image.Transpose(turn) for number, turn in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()}
"""The transposition that undoes an EXIF orientation."""
_OPENING = Lock()
_STRIP = 1 << 24
"""Pixels of a very large image that are converted at a time."""


def load_image(
    source: ImageLike | str | io.BytesIO, max_pixels: int | None = None, archives: ArchiveCache | None = None
) -> Image.Image:
    """Read an image as RGB: upright, on white, the first frame of an animation.

    `source` is a file, a part of one, its content, or an image in memory, which is not changed. Values beyond 8 bit are
    scaled, not clipped. Colour profiles are ignored, as by the models' own processors. With `max_pixels`, the model's
    pixel budget, an image of at least 16 times as many pixels is reduced (see `reduction`); none is ever cropped or
    enlarged. `archives` keeps archives open. ImageError, one line, for unreadable images.
    """
    return read_image(source, max_pixels, archives)[0]


def read_image(
    source: ImageLike | str | io.BytesIO,
    max_pixels: int | None = None,
    archives: ArchiveCache | None = None,
    rough: bool = False,
    content: bytes | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """The image of `load_image`, and the width and height of the whole image; from the file's `content` if given.

    `rough` lets the decoder of a JPEG skip detail that is not needed, which is several times faster: the pixels are
    not those of a PNG.
    """
    source = Path(source) if isinstance(source, str) else source
    try:
        if isinstance(source, Image.Image | io.BytesIO):
            return _decode(source, max_pixels, rough)
        with io.BytesIO(content) if content is not None else _open(source, archives or ArchiveCache()) as file:
            return _decode(file, max_pixels, rough)
    except DataError as error:
        where = "an image in memory" if isinstance(source, Image.Image | io.BytesIO) else source
        raise ImageError(str(where), str(error)) from error.__cause__


def read_content(source: Path | PackedImage, archives: ArchiveCache) -> bytes:
    """The bytes of an image's file, or of a part of one; ImageError if they cannot be read."""
    try:
        return archives.read(source) if isinstance(source, PackedImage) else read_file(source)
    except DataError as error:
        raise ImageError(str(source), str(error)) from error.__cause__


def reduction(size: tuple[int, int], max_pixels: int | None) -> int:
    """How often smaller an image far above the pixel budget is read in width and height; 1 for others.

    The model's processor resizes to the budget with a bicubic filter, and the result must match the reference: so
    images below 16 times the budget (2048 x 2048 for 512 x 512) stay unchanged. Above, at least twice the budget's
    width and height remain. Of every image at most `PIXEL_LIMIT` pixels remain.
    """
    pixels = size[0] * size[1]
    spare = math.isqrt(pixels // (4 * max_pixels)) if max_pixels else 1
    return max(1, spare, math.isqrt((pixels - 1) // PIXEL_LIMIT) + 1 if pixels else 1)


def shrink(picture: Image.Image, factor: int) -> Image.Image:
    """A picture reduced by this factor, which need not divide its size."""
    return picture if factor == 1 else _resize(picture, picture.size, 1, factor)


def _resize(picture: Image.Image, whole: tuple[int, int], blocks: int, factor: int) -> Image.Image:
    """A picture, read at a `blocks`-th of the size `whole`, at the size for `factor`.

    The bicubic filter covers the whole image. After the processor's own it differs from that one alone by .3 of 255
    levels (mean over photographs). Averages over blocks alone differ by up to 5, because they stretch an image whose
    size the factor does not divide.
    """
    width, height = whole
    size, box = (-(-width // factor), -(-height // factor)), (0, 0, width / blocks, height / blocks)
    return picture.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2)


def _open(source: Path | PackedImage, archives: ArchiveCache) -> BinaryIO:
    """An open file, or a part of one in memory."""
    if isinstance(source, PackedImage):
        return io.BytesIO(archives.read(source))
    return open_file(source)


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """An opened image of a format that is read, its pixels not decoded; of any size."""
    Image.init()
    # Never a path: Pillow would map the file into memory and garble rotated plain TIFF files.
    with _OPENING:
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `_check_size` has its own
        try:
            return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = bound


def _decode(source: BinaryIO | Image.Image, max_pixels: int | None, rough: bool) -> tuple[Image.Image, tuple[int, int]]:
    """A picture and the size of the whole image."""
    kind = "" if isinstance(source, Image.Image) else _kind(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can repair, and raises errors for other damage
        try:
            if isinstance(source, Image.Image):
                return _finish(source, max_pixels)
            if kind == "HEIF":
                return _decode_heif(source, max_pixels)
            return _read(source, max_pixels, rough)
        except (DataError, MemoryError):
            raise
        except Exception as error:
            # Decoders raise errors of many types: OSError, SyntaxError, struct.error ...
            with suppress(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, struct.error):
                if not isinstance(source, Image.Image):
                    return _read_pixels_only(source, max_pixels)
            if isinstance(error, UnidentifiedImageError | ImportError):
                raise DataError(_REMEDIES["" if kind in FORMATS else kind]) from error
            raise DataError(f"is damaged ({one_line(error)}); make or download it again") from error


def _read(file: BinaryIO, max_pixels: int | None, rough: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in a file that has no damage."""
    with open_image(file) as image:
        if image.format in ("JPEG", "MPO"):
            file.seek(-min(16, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if not any(file.read()):  # which a JPEG decoder takes for grey pixels
                raise OSError("the file ends in zeros")
        if image.format == "PNG":
            check_png_pixels(file)
        return _finish(image, max_pixels, may_draft=rough or image.width * image.height > PIXEL_LIMIT)


def _read_pixels_only(file: BinaryIO, max_pixels: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in a file with damage beside the pixels; an error if pixels are missing."""
    file.seek(0)
    content = file.read()
    results = [_read(io.BytesIO(pixels), max_pixels) for pixels in without_extras(content) if pixels != content]
    if not results or any(result != results[0] for result in results):
        raise OSError("pixels are missing")
    return results[0]


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


def _decode_heif(file: BinaryIO, max_pixels: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """A HEIC image; ImportError without its decoder, which is no requirement of mlxpref."""
    container = importlib.import_module("pillow_heif").open_heif(file)
    _check_size(container.size, _BYTES["HEIF"])
    return _finish(container.to_pillow(), max_pixels)


def _check_size(size: tuple[int, int], pixel_bytes: int) -> None:
    """DataError for a size in the header that no model can use, or that takes too much memory."""
    width, height = size
    if width * height * pixel_bytes > MEMORY_LIMIT:
        memory = f"{MEMORY_LIMIT >> 30} GiB of memory to read"
        raise DataError(f"is {width} x {height} pixels, which takes more than {memory}; make it smaller first")
    if max(size) > ASPECT_LIMIT * min(size):
        raise DataError(f"is {width} x {height} pixels, more than {ASPECT_LIMIT}:1, which no model reads; crop it")


def _finish(image: Image.Image, max_pixels: int | None, may_draft: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """The pixels of an opened image, upright, on white, as RGB, and the size of the whole image.

    `may_draft` allows a JPEG decoder to skip detail, which changes `image`.
    """
    usual = _PROGRESSIVE_BYTES if image.info.get("progressive") else _USUAL_BYTES
    _check_size(image.size, _BYTES.get(image.format or "", usual))
    whole, factor = image.size, reduction(image.size, max_pixels)
    is_large, read_at = whole[0] * whole[1] > PIXEL_LIMIT, 1
    if may_draft and isinstance(image, JpegImageFile):
        # Only here: else a JPEG and its PNG would not give the same pixels.
        drafted = image.draft(None, (-(-whole[0] // factor), -(-whole[1] // factor)))
        read_at = round(whole[0] / drafted[1][2]) if drafted else 1
    key = _transparent_colour(image)
    image.load()
    blocks = 1
    if read_at == 1:
        whole = image.size  # a TIFF turns when it is loaded
        read_at = blocks = max(2, factor // 2) if is_large else 1
    picture = _flatten(image, key, blocks)
    if factor > 1:
        picture = _resize(picture, whole, read_at, factor)
    with suppress(Exception):  # damaged EXIF is ignored
        orientation = image.getexif().get(0x0112, 1)
        picture = picture.transpose(_TURNS[orientation])
        whole = whole[::-1] if orientation > 4 else whole
    picture.info = {}  # drop text and profiles, which may take megabytes
    return picture, whole


def _transparent_colour(image: Image.Image) -> tuple[Any, Image.Image | None]:
    """What is transparent: a colour in the depth of the decoded pixels, or what Pillow reads from the file itself.

    Pillow decodes 16 bit colours to their high bytes. So they come with an image of the low bytes.
    """
    colour = image.info.get("transparency")
    if colour is None or not isinstance(image, PngImageFile) or not image.tile:
        return colour, None
    kind = image.tile[0][3]
    if kind not in ("L;2", "L;4", "L", "RGB", "RGB;16B"):
        return colour, None
    if kind == "RGB;16B" and image.fp is not None:
        with open_image(cast(BinaryIO, image.fp)) as low:
            low.tile = [low.tile[0]._replace(args="RGB;16L")]
            low.load()
        return colour, low
    if kind == "RGB":
        return tuple(value & 255 for value in colour), None
    most = 2 ** int(kind[2:] or 8) - 1  # bits above the depth mean nothing
    return (colour & most) * 255 // most, None


def _flatten(image: Image.Image, key: tuple[Any, Image.Image | None], blocks: int) -> Image.Image:
    """8 bit RGB of a loaded image, on white where it is transparent, averaged over blocks, some rows at a time."""
    width, height = image.size
    rows = blocks * max(1, _STRIP // (blocks * width)) if blocks > 1 else height
    boxes = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    white = _white(image, boxes) if image.mode in ("I", "F") else 1
    picture = Image.new("RGB", (-(-width // blocks), -(-height // blocks)))
    for box in boxes:
        strip = image.crop(box)
        if key[1] is not None:
            high, low = np.asarray(strip), np.asarray(key[1].crop(box))
            differs = (high != np.array(key[0]) >> 8) | (low != np.array(key[0]) & 255)
            strip.putalpha(Image.fromarray(255 * differs.any(2).astype(np.uint8)))
        elif key[0] is not None:
            strip.info["transparency"] = key[0]
        rgb = _on_white(_eight_bit(strip, white) if strip.mode[0] in "IF" else strip)
        picture.paste(rgb.reduce(blocks) if blocks > 1 else rgb, (0, box[1] // blocks))
    return picture


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow cannot convert premultiplied grey directly
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _white(image: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> float:
    """The white of modes I and F, which do not define it: the first of the usual values above the brightest pixel.

    Floats may exceed it fourfold: otherwise one highlight of 1.01 would turn the rest black.
    """
    brightest = max(float(_finite(image.crop(box)).max()) for box in boxes)
    whites, excess = ((1.0, 255.0, 65535.0), 4) if image.mode == "F" else ((255.0, 65535.0, 2.0**31), 1)
    return next((white for white in whites if brightest <= excess * white), brightest)


def _finite(image: Image.Image) -> NDArray[np.float32]:
    return np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)


def _eight_bit(image: Image.Image, white: float) -> Image.Image:
    """Grey of 16 bit, 32 bit or floating point as 8 bit grey; Pillow's own conversion would clip it to white."""
    if not image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.clip(_finite(image) * (255 / white), 0, 255)).astype(np.uint8))
    values = np.asarray(image)
    grey = Image.fromarray(np.round(np.arange(65536) / 257).astype(np.uint8)[values])
    if isinstance(see_through := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
    return grey
