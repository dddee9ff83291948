"""The images of preferences as files that a file of rows can name."""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image, open_image
from mlxpref.errors import DataError
from mlxpref.files import cache_dir, write_file
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.text import UNDECODED


class ImageFiles:
    """The names of images for a file of preferences: their paths from its folder, or copies in a folder beside it.

    Copied are images from archives, tables and memory, which have no file but perhaps one in a cache, and those whose
    names are no text. With `copies` False they are only named.
    """

    def __init__(self, path: Path, images: ImageCache, copies: bool = True) -> None:
        self.folder, self.copies = path.with_name(f"{path.stem}-images"), set[Path]()
        self._copies = copies
        self._root, self._images = os.path.realpath(path.absolute().parent), images
        self._cache: Path | None = None
        with suppress(DataError):  # the user has no home
            self._cache = cache_dir()
        self._names: dict[Path | PackedImage | int, str] = {}

    def of(self, image: ImageLike) -> str:
        """The name of an image; DataError for one that cannot be read any more, OSError for a full disk."""
        key = id(image) if isinstance(image, Image.Image) else image
        if key not in self._names:
            self._names[key] = self._name(image)
        return self._names[key]

    def _name(self, image: ImageLike) -> str:
        if isinstance(image, Path) and not (self._cache and image.is_relative_to(self._cache)):
            # A link keeps its own name: what it leads to may have none that says what it is.
            name = os.path.relpath(Path(os.path.realpath(image.absolute().parent)) / image.name, self._root)
            if not UNDECODED.search(name):
                return name
        content, suffix = self._content(image), ""
        with suppress(OSError, ValueError):  # of another format, or damaged beside its pixels: reading goes by these
            suffix = f".{open_image(io.BytesIO(content)).format}".lower()
        copy = self.folder / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        if self._copies and not copy.exists():
            self.folder.mkdir(exist_ok=True)
            write_file(copy, content)
        self.copies.add(copy)
        return f"{self.folder.name}/{copy.name}"

    def _content(self, image: ImageLike) -> bytes:
        if isinstance(image, Path):
            return image.read_bytes()
        if isinstance(image, PackedImage):
            try:
                return self._images.archives.read(image)
            except DataError as error:
                raise DataError(f"{image}: {error}") from error
        file = io.BytesIO()
        load_image(image).save(file, "PNG")
        return file.getvalue()
