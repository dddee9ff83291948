"""The parts of a request's JSON: texts and images within bounds. What is wrong is said with its place."""

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mlxpref.data.images import load_image, open_image
from mlxpref.errors import DataError, ImageError
from mlxpref.preferences import ImageLike
from mlxpref.serve.limits import ALL_PIXELS, IMAGES, PIXELS, PROMPT_CHARACTERS
from mlxpref.text import UNDECODED

_DATA_URL = re.compile(r"data:[^,]{0,100};base64,")
_FORM = "give the file's bytes in base64, or as data:image/png;base64,..."


def get_list(body: Mapping[str, Any], *names: str) -> list[Any]:
    """The list of a key, or of its other names; DataError for none, for another value, and for a longer one."""
    name = next((name for name in names if body.get(name) is not None), names[0])
    values = body.get(name)
    if not isinstance(values, list) or not values:
        raise DataError(f'"{name}" must be a list that is not empty')
    if len(values) > IMAGES:
        raise DataError(f'"{name}" has {len(values)} entries, more than {IMAGES}: send several requests')
    return values


def get_text(value: Any, name: str) -> str:
    """A text, which may be empty; DataError for another value and for a document."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be text")
    if len(value) > PROMPT_CHARACTERS:
        raise DataError(f"{name} has {len(value):,} characters, more than {PROMPT_CHARACTERS:,}; shorten it")
    if UNDECODED.search(value):
        raise DataError(f"{name} is not valid Unicode: it has half of a surrogate pair")
    return value


def get_content(value: Any, name: str) -> bytes:
    """The bytes of an image; DataError for what is no base64."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be text: {_FORM}")
    start = match.end() if (match := _DATA_URL.match(value)) else 0
    try:
        return base64.b64decode("".join(value[start:].split()), validate=True)  # some encoders write lines
    except (binascii.Error, ValueError) as error:
        if value.startswith(("http://", "https://", "file:", "/")):  # a "/" may also begin base64
            raise DataError(f"{name} is an address or a path, and this server opens none: {_FORM}") from error
        raise DataError(f"{name} is not valid base64 ({error}): {_FORM}") from error


def decode(content: bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture in an image's bytes, under the judge's pixel budget; DataError with its name if there is none."""
    try:
        with io.BytesIO(content) as file:
            _check_pixels(file)
            return load_image(file, max_pixels)
    except DataError as error:
        raise DataError(f"{name} {error.reason if isinstance(error, ImageError) else error}") from error


def decode_all(contents: Sequence[bytes | DataError], max_pixels: int) -> list[ImageLike | DataError]:
    """The pictures, and in the place of one that cannot be read the reason."""
    images: list[ImageLike | DataError] = []
    left = ALL_PIXELS
    for content in contents:
        try:
            if isinstance(content, DataError):
                raise content
            image = decode(content, "it", max_pixels)
            left -= image.width * image.height
            if left < 0:
                raise DataError("it is one too many for the memory; send several requests")
            images.append(image)
        except DataError as error:
            images.append(error)
    return images


def _check_pixels(file: io.BytesIO) -> None:
    """DataError for an image of too many pixels, by its header."""
    try:
        width, height = open_image(file).size
    except Exception:  # `load_image` says what is wrong
        width, height = 0, 0
    file.seek(0)
    if width * height > PIXELS:
        raise DataError(f"is {width} x {height} pixels, more than {PIXELS >> 20} million; make it smaller first")
