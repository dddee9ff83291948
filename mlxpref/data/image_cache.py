"""Decodes each image once for all steps of a command: check, content name, encoding, page; and not to name it again."""

import hashlib
import json
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import PIL
from PIL import Image

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.images import DECODING, load_image, read_content, read_image, reduction, shrink
from mlxpref.disk_cache import DiskCache
from mlxpref.errors import ImageError
from mlxpref.preferences import ImageLike, PackedImage

_PICTURE_BYTES = 1 << 28
"""Default bytes of cached pictures: 256 of 512 by 512 pixels, or 64 of 1024 by 1024."""
_Key = tuple[Path | PackedImage, int, int, int]
"""A file or a part of one in its current state: with inode, size and time of change."""


class ImageCache:
    """Pictures of files and archives, up to `memory` bytes, and names of their contents.

    The first pictures stay: if a command needs images twice in the same order, it decodes those that fit once, the
    others twice. `max_pixels` is the expected pixel budget before the model is known.

    `disk` has the sizes and contents of what earlier commands decoded, by a digest of the file's bytes: dates of files
    can lie, and bytes are read a hundred times faster than photographs are decoded.
    """

    def __init__(self, max_pixels: int, memory: int = _PICTURE_BYTES) -> None:
        self.max_pixels = max_pixels
        self.disk: DiskCache | None = None
        self.archives = ArchiveCache()
        self._free = memory
        self._sizes: dict[_Key, tuple[int, int]] = {}
        self._reasons: dict[_Key, str] = {}  # of unreadable images
        self._pictures: dict[tuple[_Key, int], Image.Image] = {}  # by their factor of reduction
        self._latest: dict[tuple[_Key, int], Image.Image] = {}  # the last one that did not fit
        self._contents: dict[tuple[_Key, int], str] = {}
        self._digests: dict[_Key, str] = {}  # of the files' bytes, where there is a disk
        self._read: tuple[_Key, bytes] | None = None  # the last ones

    def check(self, image: Path | PackedImage) -> None:
        """Decode an image unless it is cached; ImageError if it cannot be read."""
        key = _key(image)
        if key not in self._sizes and not self._recall(image, key, self.max_pixels):
            self._picture(image, key, self.max_pixels)
            if self._latest or self.disk is not None:  # its picture will be dropped before its content is needed
                self.content(image, self.max_pixels)

    def size(self, image: Path | PackedImage) -> tuple[int, int]:
        """Width and height of the whole image in pixels; ImageError if it cannot be read."""
        return self._size(image, _key(image))

    def content(self, image: Path | PackedImage, max_pixels: int) -> str:
        """A name of an image's content, the same for equal pixels in any file; ImageError if it is unreadable."""
        key = _key(image)
        size = self._size(image, key)
        factor = reduction(size, max_pixels)
        if (key, factor) not in self._contents and not self._recall(image, key, max_pixels):
            self._contents[key, factor] = content_of(self._picture(image, key, max_pixels))
            if self.disk is not None and self._digests[key]:
                record = json.dumps({"size": size, "content": self._contents[key, factor]})
                self.disk.put(self._disk_key(key, max_pixels), record.encode())
        return self._contents[key, factor]

    @property
    def mean_pixels(self) -> float:
        """The mean number of pixels under the budget, of the images whose size is known; the budget without any."""
        pixels = [min(width * height, self.max_pixels) for width, height in self._sizes.values()]
        return sum(pixels) / len(pixels) if pixels else self.max_pixels

    def picture(self, image: Path | PackedImage, max_pixels: int) -> Image.Image:
        """The image of `load_image`, not to be changed; ImageError if it cannot be read."""
        return self._picture(image, _key(image), max_pixels)

    def load(self, image: ImageLike) -> Image.Image:
        """An image for display, not to be changed, under the expected pixel budget; ImageError as above."""
        if isinstance(image, Image.Image):
            return load_image(image)
        return self.picture(image, self.max_pixels)

    def _size(self, image: Path | PackedImage, key: _Key) -> tuple[int, int]:
        if key not in self._sizes and not self._recall(image, key, self.max_pixels):
            self._picture(image, key, self.max_pixels)
        return self._sizes[key]

    def _picture(self, image: Path | PackedImage, key: _Key, max_pixels: int) -> Image.Image:
        if key in self._sizes:
            factor = reduction(self._sizes[key], max_pixels)
            for pictures in (self._pictures, self._latest):
                if (key, factor) in pictures:
                    return pictures[key, factor]
                if (key, 1) in pictures:
                    return shrink(pictures[key, 1], factor)
        return self._decoded(image, key, max_pixels)

    def _decoded(self, image: Path | PackedImage, key: _Key, max_pixels: int) -> Image.Image:
        """Decode an image, and keep its picture if there is memory for it, or the reason why it cannot be read."""
        if key in self._reasons:
            raise ImageError(str(image), self._reasons[key])
        try:
            content = self._bytes(image, key) if self.disk is not None else None
            picture, self._sizes[key] = read_image(image, max_pixels, self.archives, content=content)
        except ImageError as error:
            self._reasons[key] = error.reason
            raise
        factor = reduction(self._sizes[key], max_pixels)
        size = 4 * picture.width * picture.height  # Pillow keeps four bytes of an RGB pixel
        self._latest = {}
        if size <= self._free:
            self._free -= size
            self._pictures[key, factor] = picture
        else:
            self._latest[key, factor] = picture
        return picture

    def _recall(self, image: Path | PackedImage, key: _Key, max_pixels: int) -> bool:
        """Whether size and content of an image are on disk; they are then here, too."""
        if self.disk is None or key in self._reasons:
            return False
        with suppress(ImageError):  # decoding says why
            if key not in self._digests:
                self._bytes(image, key)
            if self._digests[key] and (record := self.disk.get(self._disk_key(key, max_pixels))):
                values = json.loads(record)
                width, height = values["size"]
                self._sizes[key] = width, height
                self._contents[key, reduction((width, height), max_pixels)] = values["content"]
                return True
        return False

    def _bytes(self, image: Path | PackedImage, key: _Key) -> bytes:
        """The bytes of an image's file, whose digest is kept; ImageError if they cannot be read."""
        if self._read is None or self._read[0] != key:
            self._read = key, read_content(image, self.archives)
            digest = hashlib.sha256(self._read[1]).hexdigest()
            # Of a file that changes unseen nothing is kept: its picture may be of other bytes.
            self._digests[key] = digest if self._digests.get(key, digest) == digest else ""
        return self._read[1]

    def _disk_key(self, key: _Key, max_pixels: int) -> str:
        """The key of a record on disk: all that size and content depend on."""
        return f"image {DECODING} {_decoders()} {self._digests[key]} {max_pixels}"


def content_of(picture: Image.Image) -> str:
    """A name of a picture's content: a digest of its size and its pixels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _key(image: Path | PackedImage) -> _Key:
    try:
        status = (image.archive if isinstance(image, PackedImage) else image).stat()
    except (OSError, ValueError):  # reading says why
        return image, 0, 0, 0
    return image, status.st_ino, status.st_size, status.st_mtime_ns


@cache
def _decoders() -> str:
    """The versions of what decodes images."""
    return f"{PIL.__version__} {version('pillow-heif') if find_spec('pillow_heif') else ''}"
