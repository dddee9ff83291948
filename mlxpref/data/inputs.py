"""Images as people hand them over in Python: files, folders, pictures, arrays, bytes, or any mixture of them."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxpref.data.find_images import ImageFinder, Skipped, find_images, locate, reasons_of, try_images
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import ALL_ROWS, Preferences, drawn, load_preferences
from mlxpref.data.preference_table import NoSplitsError, preferences_of
from mlxpref.data.survey import EXAMPLE
from mlxpref.data.tables import SUFFIXES
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import expand
from mlxpref.preferences import ImageLike, PackedImage, Pair, Preference
from mlxpref.text import UNDECODED, first_ten, one_line, shorten

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-3
"""How far a float may lie outside of 0 to 1."""
_LISTED = Path("list of preferences")
_FORMS = "give a path, a PIL image, an array (height x width x 3) or the bytes of a file"


class ArrayLike(Protocol):
    """An array of NumPy, MLX, torch or JAX."""

    def __array__(self, *args: Any, **named: Any) -> Any: ...


ImageInput = str | os.PathLike[str] | PackedImage | Image.Image | bytes | bytearray | memoryview | BinaryIO | ArrayLike
"""One image: a file's name, a PIL image, an array (height x width, or with 1, 3 or 4 channels last; 8 bit, or floats or
booleans from 0 to 1), or the content of an image file."""
ImagesInput = Iterable[ImageInput] | ImageInput
"""Several images: a folder, a list or generator of images and folders, or an array of them."""
PreferencesInput = str | os.PathLike[str] | Iterable[Preference | Mapping[str, Any]]
"""Preferences: the name of a data set, a file or folder, or a list, which may be of dicts like the rows of a file."""


def find_given(images: ImagesInput, cache: ImageCache) -> tuple[list[ImageLike], list[Skipped]]:
    """At least two readable images in the order given, those of a folder in natural order, and those left out.

    Only an image of a folder is left out: the user named the others, and counts on their number. DataError, one line,
    names those of them that cannot be used.
    """
    found, skipped, problems = list[ImageLike](), list[Skipped](), dict[str, list[str]]()
    for number, value in enumerate(_listed(images)):
        try:
            folder = _path_of(value) if isinstance(value, str | os.PathLike) else None
            if folder is None or not folder.is_dir():
                found.append(_checked(value, cache))
                continue
            readable, unreadable = try_images(find_images([folder]), cache)
            found += readable
            skipped += unreadable
        except DataError as error:
            problems.setdefault(str(error), []).append(f"image {number}")
    if problems and isinstance(images, str | os.PathLike):
        order = "" if "*" in str(images) else "; the order is (images, prompt)"
        raise DataError(first_ten([*problems]) + order)
    if problems:
        raise named_problems(problems)
    if len(found) < 2:
        reasons = f"; {reasons_of(skipped)}" if skipped else ""
        raise DataError(f"images are compared with each other: two are needed, not {len(found)}{reasons}")
    return found, skipped


def named_problems(problems: Mapping[str, Sequence[str]]) -> DataError:
    """One line for several images: each problem after the names of the images that have it."""
    lines = [f"{first_ten(names, ', ')}: {problem}" for problem, names in problems.items()]
    return DataError(first_ten(lines, "; "))


def check_pair(a: ImageInput, b: ImageInput, cache: ImageCache) -> tuple[ImageLike, ImageLike]:
    """Two readable images; DataError, one line, names both if neither can be used."""
    found, problems = list[ImageLike](), list[str]()
    for name, image in (("a", a), ("b", b)):
        try:
            found.append(_checked(image, cache))
        except DataError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise DataError("; ".join(problems))
    return found[0], found[1]


def image_from(value: ImageInput) -> ImageLike:
    """The file or picture that is meant; DataError says what was given instead, and how to convert it."""
    if isinstance(value, PackedImage | Image.Image) or (isinstance(value, Path) and not str(value).startswith("~")):
        return value
    if isinstance(value, str | os.PathLike):
        return _path_of(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return load_image(io.BytesIO(value))
    if hasattr(value, "read"):
        return load_image(io.BytesIO(_content_of(value)))
    if hasattr(value, "__array__"):
        return _picture_of(_array_of(value))
    raise DataError(f"{_kind_of(value)} is no image; {_FORMS}")


def preferences_from(
    data: PreferencesInput,
    split: str | None,
    limit: int | None = None,
    data_dir: Path | None = None,
    usual: str = "test",
) -> tuple[str, Preferences]:
    """A name for data, and its preferences: those of `load_preferences`, or the given ones with images in any form.

    Without `split` it takes `usual`, or all rows of data without splits.
    """
    if isinstance(data, str | os.PathLike):
        name = expand(data)
        return name, load_preferences(name, split or usual, limit, data_dir=data_dir, needs_split=split is not None)
    if isinstance(data, Preference | Mapping) or not isinstance(data, Iterable):
        raise DataError(f"data: {_kind_of(data)}; give a name, a file, a folder, or a list of preferences")
    items, name = list[Any](data), ALL_ROWS
    try:
        if all(isinstance(item, Mapping) for item in items):
            rows = [(i, {name: _cell(x) for name, x in row.items() if x is not None}) for i, row in enumerate(items)]
            preferences = preferences_of(_LISTED, lambda: rows, split or usual, ImageFinder(_LISTED, data_dir))
            name = split or usual
        elif split is not None:
            raise ConfigError(f"split {split!r}: Preferences have no splits; give those of one")
        else:
            preferences = [_preference(number, item) for number, item in enumerate(items)]
    except NoSplitsError as error:
        if split is not None:
            raise
        preferences = error.preferences
    except (AttributeError, TypeError) as error:
        table = '; of a table of pandas give df.to_dict("records")' if hasattr(data, "columns") else ""
        raise DataError(f"{_LISTED}: not all are Preferences, or dicts like {EXAMPLE}{table}") from error
    return str(_LISTED), Preferences((preferences[number] for number in drawn(limit, 0, len(preferences))), name)


def check_prompt(prompt: str, criterion: str = "") -> None:
    """DataError for a prompt that is no text, as where the arguments are in another order, or blank.

    With the user's own criterion it may be left out.
    """
    if not isinstance(prompt, str):
        raise DataError(f"the prompt is text, not {_kind_of(prompt)}; it comes after the images")
    if not prompt.strip() and not criterion:
        raise DataError(
            "the prompt is empty; give the text that the images were made from, or a criterion to mlxpref.load"
        )
    if UNDECODED.search(prompt):
        raise DataError("the prompt is not UTF-8 text: it has half of a surrogate pair")


def check_model(model: Any, order: str) -> None:
    """ConfigError for preferences in the place of a model, as where the arguments are in another `order`."""
    if not isinstance(model, str | os.PathLike | None):
        raise ConfigError(f"{_kind_of(model)} is no name of a model; the order is {order}")
    if model is not None and Path(model).suffix.lower() in SUFFIXES:
        raise ConfigError(f"{shorten(model, 100)} is no model; the order is {order}")


def _preference(number: int, given: Preference) -> Preference:
    """A usable preference of a list; DataError with its number."""
    try:
        check_prompt(given.prompt)
        return replace(given, a=image_from(given.a), b=image_from(given.b))
    except DataError as error:
        raise DataError(f"{_LISTED}, {number}: {error}") from error


def _cell(value: Any) -> Any:
    """A value of a dict as one of a row in a file; images are made from what is neither text nor a number."""
    if isinstance(value, list | tuple):
        return [_cell(each) for each in value]
    if isinstance(value, dict) and value.get("bytes"):  # an image of Hugging Face's datasets
        return image_from(value["bytes"])
    if value is None or isinstance(value, str | bool | int | float | dict):
        return value
    return value.item() if isinstance(value, np.generic) else image_from(value)


def _listed(images: Any) -> list[Any]:
    """The images of an argument one by one; a single one is a list of one."""
    kinds = (str, os.PathLike, PackedImage, Image.Image, bytes, bytearray, memoryview)
    if isinstance(images, kinds) or hasattr(images, "read"):
        return [images]
    if hasattr(images, "__array__"):
        array = _array_of(images)
        if array.ndim == 4 and array.shape[-1] not in _CHANNELS:
            raise DataError(_refusal(array))
        return list(array) if array.ndim == 4 or (array.ndim == 1 and array.dtype.kind in "OUT") else [array]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise DataError(f"images: {_kind_of(images)} is no list of images; give a folder, or a list of images")
    return list(images)


def _checked(value: ImageInput, cache: ImageCache) -> ImageLike:
    """An image that can be read; DataError where it cannot."""
    image = image_from(value)
    if isinstance(image, Image.Image):
        load_image(image)
    else:
        cache.check(image)
    return image


def _path_of(value: str | os.PathLike[str]) -> Path:
    """A file or folder that exists, `~` being the home folder; DataError for none."""
    name = expand(value)
    if not isinstance(name, str):
        raise DataError(f"{_kind_of(name)} is no file name; give text or a Path")
    if name.startswith(("http://", "https://")):
        raise DataError(f"{shorten(name, 100)}: is a web address; download it first")
    path = locate(name) if name.strip() else None
    if path is None:
        pattern = "; of a pattern give the files, sorted(glob.glob(pattern))" if "*" in name else ""
        raise DataError(f"{shorten(name, 100) or repr(name)}: no such file or folder{pattern}")
    return path


def _content_of(file: Any) -> bytes:
    """The bytes of an open file from its beginning; DataError for one in text mode."""
    with suppress(Exception):  # a stream of a network has only the rest
        file.seek(0)
    try:
        content = file.read()
    except Exception as error:
        raise DataError(f"the file cannot be read ({one_line(error)}); open it with mode 'rb'") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise DataError("the file is open as text; open it with mode 'rb'")
    return bytes(content)


def _array_of(value: Any) -> NDArray[Any]:
    """The values of any library's array; DataError for one that NumPy cannot read."""
    try:
        return np.asarray(value)
    except Exception as error:  # each library has its own: bfloat16, gradients, another device
        raise DataError(
            f"{_kind_of(value)}: NumPy cannot read it ({one_line(error, 120)}); give it as float32 on the CPU, "
            "for torch x.detach().float().cpu().numpy(), for MLX x.astype(mx.float32)"
        ) from error


def _picture_of(array: NDArray[Any]) -> Image.Image:
    """An array (height, width) or (height, width, channels) as a picture; DataError says how to convert another."""
    if refusal := _refusal(array):
        raise DataError(refusal)
    if array.dtype != np.uint8:
        array = np.round(255 * np.clip(array.astype(np.float32), 0, 1)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _refusal(array: NDArray[Any]) -> str:
    """Why an array is no picture, and how to make one of it; empty if it is one."""
    given = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        advice = "give height x width x 1, 3 or 4"
        if array.ndim in (3, 4) and array.shape[-3] in _CHANNELS and min(array.shape[-2:]) > max(_CHANNELS):
            moved = "1, 2, 0" if array.ndim == 3 else "0, 2, 3, 1"
            advice = f"its channels come first; give x.transpose({moved}), for torch x.permute({moved})"
        elif array.ndim == 4:
            advice = "it is a batch; give its images as a list"
        return f"{given}: {advice}"
    if array.dtype == np.uint8 or array.dtype == np.bool_:
        return ""
    if array.dtype.kind not in "fiu":
        return f"{given}: these are no numbers of pixels; {_FORMS}"
    low, high = float(array.min()), float(array.max())
    given += f", values from {low:g} to {high:g}"
    if not np.isfinite([low, high]).all():
        return f"{given}: not all are numbers; replace them, as by np.nan_to_num(x)"
    if array.dtype.kind == "f" and low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return ""
    advice = "bring them to 0 to 1"
    if low >= 0 and high <= 1:
        advice = "give x.astype('float32') if 1 is white"
    elif low >= 0 and high <= 255:
        advice = "give x.astype('uint8')"
    elif low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
        advice = "give (x + 1) / 2"
    elif low >= 0 and high <= 65535:
        advice = "give x / 65535"
    return f"{given}: floats go from 0 to 1, whole numbers are uint8; {advice}"


def _kind_of(value: object) -> str:
    """What a value is, in words."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def pairs_from(pairs: Iterable[Pair], criterion: str) -> Iterator[Pair]:
    """Pairs of any images as pairs of files and pictures, lazily; an array becomes one picture in all its pairs.

    DataError for what is no pair, and for one without a prompt, unless there is the user's own `criterion`.
    """
    pictures: dict[int, tuple[object, ImageLike]] = {}  # with their arrays, so that the id of one stays its own

    def picture(image: ImageInput) -> ImageLike:
        if isinstance(image, ImageLike):
            return image_from(image)
        if id(image) not in pictures:
            pictures[id(image)] = image, image_from(image)
        return pictures[id(image)][1]

    for pair in pairs:
        if not isinstance(pair, Pair | Preference):
            raise DataError(f"{pair!r:.40} is no pair; give Pair(a, b, prompt)")
        check_prompt(pair.prompt, criterion)
        yield Pair(picture(pair.a), picture(pair.b), pair.prompt)
