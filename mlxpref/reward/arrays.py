"""Batches of images as training code has them: arrays of any library, channels first or last, or lists of anything."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.inputs import ImageInput, ImagesInput, image_from, named_problems
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import ImageLike
from mlxpref.text import one_line

T = TypeVar("T")

_CHANNELS = (1, 3, 4)


def images_of(batch: ImagesInput, cache: ImageCache) -> list[ImageLike]:
    """The images of a batch in their order, each decoded or converted once; `cache` keeps the decoded files.

    A batch is a list of images, or an array of them: (N, height, width, channels) or (N, channels, height, width), of
    NumPy, MLX, torch or JAX, in 8 bit or as floats from 0 to 1. Channels are the axis of 1, 3 or 4. Of images so thin
    that both are, they are last if the numbers are of 8 bit and first if they are floats, as trainers have them.
    DataError, one line, names all images that cannot be used by their number in the batch.
    """
    return usable([_try_image(image, cache) for image in _listed(batch)])


def usable(results: Sequence[T | DataError]) -> list[T]:
    """Results of images if all have one; else a DataError, one line, that names the others by their numbers."""
    problems: dict[str, list[str]] = {}
    for number, result in enumerate(results):
        if isinstance(result, DataError):
            problems.setdefault(str(result), []).append(f"image {number}")
    if problems:
        raise named_problems(problems)
    return [result for result in results if not isinstance(result, DataError)]


def _listed(batch: Any) -> list[Any]:
    """The images of a batch one by one; ConfigError for one image, and for what is none."""
    if _is_array(batch):
        array = _numpy(batch)
        if array.ndim == 4:
            return list(_channels_last(array))
        if array.ndim != 1 or array.dtype.kind not in "OUT":  # not an array of files' names
            videos = "; of videos give one frame each" if array.ndim == 5 else ""
            raise ConfigError(
                f"images: an array of shape {array.shape}; give (N, height, width, channels), (N, channels, height, "
                f"width), or a list of images{videos}"
            )
        return list(array)
    if isinstance(batch, str | bytes | Image.Image) or not isinstance(batch, Iterable):
        raise ConfigError(
            f"images: {type(batch).__name__} {batch!r:.40} is no batch; give a list or an array of images"
        )
    return list(batch)


def _try_image(image: ImageInput, cache: ImageCache) -> ImageLike | DataError:
    """One image that can be read, or the error of one that cannot."""
    try:
        found = image_from(_channels_last(_numpy(image)) if _is_array(image) else image)
        if isinstance(found, Image.Image):
            return load_image(found) if found is image else found  # its file may be damaged
        cache.check(found)
        return found
    except DataError as error:
        return error


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Image.Image | str)  # a NumPy text has it, too


def _numpy(value: Any) -> NDArray[Any]:
    """The values of any library's array, of any float type, on any device, with gradients or without."""
    try:
        if hasattr(value, "detach"):  # torch
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        elif isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(mx.float32)
        return np.asarray(value)
    except Exception as error:  # each library has its own
        raise DataError(f"a {type(value).__name__} that NumPy cannot read ({one_line(error, 120)})") from error


def _channels_last(array: NDArray[Any]) -> NDArray[Any]:
    """One image (H, W, C) or several (N, H, W, C) of an array (C, H, W) or (N, C, H, W), too."""
    if array.ndim not in (3, 4):
        return array
    is_first, is_last = array.shape[-3] in _CHANNELS, array.shape[-1] in _CHANNELS
    return np.moveaxis(array, -3, -1) if is_first and not (is_last and array.dtype == np.uint8) else array
