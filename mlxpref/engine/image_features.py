"""Image features: every image runs through the frozen vision tower once, then comes from memory or from disk."""

import io
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import deserialize

from mlxpref.checkpoints import bounds
from mlxpref.data.image_cache import ImageCache, content_of
from mlxpref.data.images import load_image
from mlxpref.disk_cache import DiskCache
from mlxpref.engine.vision import VisionEncoder
from mlxpref.errors import ImageError, ModelError
from mlxpref.lru import LRU
from mlxpref.preferences import ImageLike
from mlxpref.text import one_line

_ENCODING = 1
"""The version of the code from pixels to features; a new number makes all that is on disk invalid."""
_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I32": mx.int32}
SeenImages = dict[int, tuple[Image.Image, str]]
"""Images in memory by `id`, each with its content; valid while nobody changes the images."""


@dataclass(frozen=True, eq=False)
class Features:
    """One image as the language model sees it: (tokens, D), its grid (height, width), and deepstack levels.

    `content` is a name of its pixels, the same for equal pixels from any file.
    """

    merged: mx.array
    grid: tuple[int, int]
    deepstack: tuple[mx.array, ...] = ()
    content: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens the image takes in a comparison."""
        return self.grid[0] * self.grid[1]

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return int(self.merged.nbytes + sum(level.nbytes for level in self.deepstack))

    def to_bytes(self) -> bytes:
        """Its arrays, bit by bit, for `from_bytes`."""
        levels = {f"level {number}": level for number, level in enumerate(self.deepstack)}
        stream = io.BytesIO()
        mx.save_safetensors(stream, {"grid": mx.array(self.grid), "merged": self.merged, **levels})
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, body: bytes, content: str) -> Self:
        """The features in these bytes."""
        # Not by `mx.load`, whose threads would call back into Python to read from memory.
        arrays = {name: _array(tensor) for name, tensor in deserialize(body)}  # type: ignore[no-untyped-call]
        mx.eval(arrays)
        height, width = np.array(arrays["grid"]).tolist()
        levels = tuple(arrays[f"level {number}"] for number in range(len(arrays) - 2))
        return cls(arrays["merged"], (height, width), levels, content)


class FeatureStore:
    """Features of images by content and pixel budget; it drops the least recently used first.

    `images` decodes files; a command that decoded them before sets its own cache. `keep_in` lets later runs recall
    features from disk. `runs` counts the images that ran through the vision tower, `seconds` the time to find, decode
    and encode images.
    """

    def __init__(self, tower: Any, processor: Any, max_pixels: int, memory: int = bounds.FEATURE_BYTES) -> None:
        self._encoder, self.processor = VisionEncoder(tower), processor
        self.max_pixels = min(max_pixels, processor.max_pixels)
        self._min_pixels = min(processor.min_pixels, self.max_pixels)
        self.images = ImageCache(self.max_pixels)
        self._features: LRU[str, Features] = LRU(memory, lambda features: features.nbytes)
        self._disk: DiskCache | None = None
        self._conditions = ""  # of all features on disk
        self._share = 1.0  # of contents whose features are kept there
        self.runs, self.seconds = 0, 0.0

    def limit(self, memory: int) -> None:
        """Keep at most so many bytes of features in memory from now on, and none of before."""
        self._features = LRU(memory, lambda features: features.nbytes)

    def keep_in(self, disk: DiskCache, tower: str, share: float = 1.0) -> None:
        """Keep features on disk from now on, and recall them; `tower` is the fingerprint of what encodes them.

        Of many images only a `share` is kept, always the same one: if all took turns, few would stay until they are
        needed again.
        """
        self._disk, self._share = disk, share
        self._conditions = f"features {_ENCODING} {tower} {self._min_pixels} {self.max_pixels}"

    def get(self, image: ImageLike) -> Features:
        """The features of one image, from memory or from the vision tower."""
        return self.get_all([image])[0]

    def get_all(self, images: Iterable[ImageLike], seen: SeenImages | None = None) -> list[Features]:
        """The features of images; encodes images of one size together. ImageError for an unreadable one.

        With `seen`, it hashes an image in memory only once.
        """
        results = self.get_readable(images, seen)
        for each in results:
            if isinstance(each, ImageError):
                raise each
        return [each for each in results if isinstance(each, Features)]

    def get_readable(self, images: Iterable[ImageLike], seen: SeenImages | None = None) -> list[Features | ImageError]:
        """The features of images, or the error of an unreadable one in its place; otherwise like `get_all`."""
        start, by_key = time.perf_counter(), dict[str, Features]()
        waiting: dict[tuple[int, int], list[tuple[str, NDArray[np.float32]]]] = {}  # by grid, in merged patches
        keys: list[str | ImageError] = []
        for place, image in enumerate(images):
            try:
                key, picture = self._key(image, {} if seen is None else seen)
                keys.append(key)
                if features := by_key.get(key) or self._recall(key):
                    by_key[key] = features
                if features or any(key == other for queue in waiting.values() for other, _ in queue):
                    continue
                picture = picture or self._picture(image)
                # The name of these pixels, as features on disk stay: the file may have changed since it was named.
                keys[place] = key = content_of(picture)
                patches, grid = self._patches(picture)
            except ImageError as error:
                keys[place:] = [error]
                continue
            queue = waiting.setdefault(grid, [])
            queue.append((key, patches))
            if len(queue) * grid[0] * grid[1] >= bounds.VISION_TOKENS:
                by_key.update(self._encode(grid, waiting.pop(grid)))
        for grid, queue in waiting.items():
            by_key.update(self._encode(grid, queue))
        self.seconds += time.perf_counter() - start
        return [key if isinstance(key, ImageError) else by_key[key] for key in keys]

    def contents(self, images: Iterable[ImageLike], seen: SeenImages | None = None) -> list[str | None]:
        """The contents of images (`Features.content`), None of an unreadable one; decodes those that are unknown."""
        start, contents = time.perf_counter(), list[str | None]()
        for image in images:
            with suppress(ImageError):
                contents.append(self._key(image, {} if seen is None else seen)[0])
                continue
            contents.append(None)
        self.seconds += time.perf_counter() - start
        return contents

    def missing(self, images: Iterable[ImageLike], seen: SeenImages | None = None) -> list[ImageLike]:
        """The images that would run through the vision tower, one a content; without unreadable ones."""
        images = list(images)
        by_content = dict(zip(self.contents(images, seen), images, strict=True))
        return [image for content, image in by_content.items() if content and not self._is_known(content)]

    def _is_known(self, content: str) -> bool:
        """Whether features are in memory or on disk."""
        return self._features.get(content) is not None or bool(self._disk and self._disk.has(self._disk_key(content)))

    def _recall(self, content: str) -> Features | None:
        """The features of a content from memory, else from disk."""
        if (features := self._features.get(content)) or self._disk is None:
            return features
        if body := self._disk.get(self._disk_key(content)):
            features = Features.from_bytes(body, content)
            self._features.put(content, features)
        return features

    def _disk_key(self, content: str) -> str:
        """The key of features on disk: all that they depend on."""
        return f"{self._conditions} {content}"

    def _key(self, image: ImageLike, seen: SeenImages) -> tuple[str, Image.Image | None]:
        """The content of an image, with its picture for a new image in memory."""
        if not isinstance(image, Image.Image):
            return self.images.content(image, self.max_pixels), None
        if id(image) in seen:
            return seen[id(image)][1], None
        picture = self._picture(image)
        seen[id(image)] = image, content_of(picture)
        return seen[id(image)][1], picture

    def _picture(self, image: ImageLike) -> Image.Image:
        """An image under the pixel budget."""
        if isinstance(image, Image.Image):
            return load_image(image, self.max_pixels)
        return self.images.picture(image, self.max_pixels)

    def _patches(self, picture: Image.Image) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Patches (P, F) of a picture under the pixel budget, and its grid in merged patches."""
        size = {"min_pixels": self._min_pixels, "max_pixels": self.max_pixels}
        try:
            inputs = self.processor([picture], **size)
        except Exception as error:  # from settings that are no numbers, or not one a colour
            raise ModelError(
                f"the checkpoint's image processor cannot be used: {one_line(error)}; copy its original "
                "preprocessor_config.json"
            ) from error
        merge = int(self.processor.merge_size)
        _, height, width = (int(v) for v in np.asarray(inputs["image_grid_thw"]).reshape(-1))  # (1, 3) -> (3,)
        return np.asarray(inputs["pixel_values"], np.float32), (height // merge, width // merge)

    def _encode(self, grid: tuple[int, int], queue: list[tuple[str, NDArray[np.float32]]]) -> dict[str, Features]:
        """Run N images of one size through the tower together, and store their features."""
        pixels = mx.array(np.concatenate([patches for _, patches in queue]))  # (N * P, F)
        merged, levels = self._encoder.encode(pixels, grid)
        mx.eval(merged, levels)
        self.runs += len(queue)
        encoded = {}
        for place, (key, _) in enumerate(queue):
            # Copies: a slice would keep the whole batch in memory.
            features = Features(
                mx.contiguous(merged[place]), grid, tuple(mx.contiguous(level[place]) for level in levels), key
            )
            encoded[key] = features
            self._features.put(key, features)
        mx.eval([x for f in encoded.values() for x in (f.merged, *f.deepstack)])
        for key, features in encoded.items():
            if self._disk is not None and int(key[:8], 16) < self._share * 2**32:  # a content is a digest
                self._disk.put(self._disk_key(key), features.to_bytes())
        return encoded


def _array(tensor: Mapping[str, Any]) -> mx.array:
    """An array of the safetensors format."""
    flat = mx.array(np.frombuffer(tensor["data"], np.uint8))
    return flat.view(_TYPES[tensor["dtype"]]).reshape(tensor["shape"])
