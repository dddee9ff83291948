"""Small pictures of images, for pages and notebooks."""

import base64
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mlxpref.data.images import load_image
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike

_THUMBNAIL_BYTES = 50_000  # 200 thumbnails of this size are 13.3 MB as data addresses
_EXACT_SIDE = 128  # pages enlarge smaller pictures, and people judge their pixels: these stay exact if the bytes allow

LoadImage = Callable[[ImageLike], Image.Image]
"""Reads an image: `load_image`, or a cache of decoded images."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as WebP, its size in pixels, and whether it has the image's exact pixels."""

    content: bytes
    width: int
    height: int
    exact: bool = False

    @property
    def uri(self) -> str:
        """The picture as a data address."""
        return "data:image/webp;base64," + base64.b64encode(self.content).decode()


def thumbnail(
    image: ImageLike, side: int = 320, load: LoadImage = load_image, limit: int = _THUMBNAIL_BYTES
) -> Thumbnail:
    """An image at most `side` pixels wide and high, without EXIF or profile; DataError where it cannot be read.

    `load` reads it. A lower quality keeps it to about `limit` bytes. A small picture that need not be made smaller has
    its exact pixels if they fit: written in the quickest way, which takes a millisecond at most, and some more bytes.
    """
    picture = load(image).copy()
    is_whole = max(picture.size) <= min(side, _EXACT_SIDE)
    picture.thumbnail((side, side))
    exact = [(True, 80)] if is_whole else []
    for lossless, quality in [*exact, *((False, quality) for quality in (80, 60, 40, 20))]:
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=quality, lossless=lossless, method=0 if lossless else 4)
        if file.tell() <= limit:
            break
    return Thumbnail(file.getvalue(), *picture.size, lossless)


def try_thumbnail(
    image: ImageLike | None, side: int = 320, load: LoadImage = load_image, limit: int = _THUMBNAIL_BYTES
) -> Thumbnail | None:
    """As `thumbnail`, but None for no image or an unreadable one: a page is never lost for a picture."""
    with suppress(DataError, OSError):
        # A path may be a pipe, whose reading would wait forever.
        if image is not None and (not isinstance(image, Path) or image.is_file()):
            return thumbnail(image, side, load, limit)
    return None
