"""Image features: every image goes through the frozen vision tower once, then comes from memory."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlxpref.checkpoints import bounds
from mlxpref.data.images import load_image
from mlxpref.engine.vision import encode
from mlxpref.errors import ModelError
from mlxpref.preferences import ImageLike, PackedImage

__all__ = ["FeatureStore", "Features", "SeenImages"]

SeenImages = dict[int, tuple[Image.Image, str]]
"""Images in memory that were looked at, by `id`, with their content: for as long as nobody can change them."""


@dataclass(frozen=True, eq=False)
class Features:
    """One image as the language model sees it: (tokens, D), its grid (height, width), and deepstack levels.

    `content` is a name of what it shows, the same for equal pixels wherever they come from.
    """

    merged: mx.array
    grid: tuple[int, int]
    deepstack: tuple[mx.array, ...] = ()
    content: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens the image takes in a prompt."""
        return self.grid[0] * self.grid[1]

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return int(self.merged.nbytes + sum(level.nbytes for level in self.deepstack))


class FeatureStore:
    """Features of images, least recently used out first, keyed by content and pixel budget.

    A file is keyed by its path, size and time of change too, so that it is decoded once, and so is one in an archive.
    `runs` counts the images that went through the vision tower.
    """

    def __init__(self, tower: Any, processor: Any, max_pixels: int, memory: int = bounds.FEATURE_BYTES) -> None:
        self._tower, self._processor, self._memory = tower, processor, memory
        self.max_pixels = min(max_pixels, processor.max_pixels)
        self._min_pixels = min(processor.min_pixels, self.max_pixels)
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._content: dict[tuple[Path | PackedImage, int, int, int], str] = {}
        self._bytes = 0
        self.runs = 0

    def get(self, image: ImageLike) -> Features:
        """The features of one image, from memory or from the vision tower."""
        return self.get_all([image])[0]

    def get_all(self, images: Iterable[ImageLike], seen: SeenImages | None = None) -> list[Features]:
        """The features of images, those of one size encoded together.

        With `seen`, an image in memory is looked at only once.
        """
        found: dict[str, Features] = {}
        waiting: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
        keys = []
        for image in images:
            key, loaded = self._key(image, {} if seen is None else seen)
            keys.append(key)
            if key in found or any(key == other for queue in waiting.values() for other, _ in queue):
                continue
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
                continue
            patches, grid = self._patches(loaded if loaded is not None else load_image(image, self.max_pixels))
            queue = waiting.setdefault(grid, [])
            queue.append((key, patches))
            if len(queue) * grid[0] * grid[1] >= bounds.VISION_TOKENS:
                found.update(self._encode(grid, waiting.pop(grid)))
        for grid, queue in waiting.items():
            found.update(self._encode(grid, queue))
        return [found[key] for key in keys]

    def contents(self, images: Iterable[ImageLike], seen: SeenImages | None = None) -> list[str]:
        """The names of what images show (`Features.content`): they are decoded for that, but not encoded."""
        return [self._key(image, {} if seen is None else seen)[0] for image in images]

    def _key(self, image: ImageLike, seen: SeenImages) -> tuple[str, Image.Image | None]:
        """The content of an image as a key, with the decoded image where it had to be decoded for that."""
        if isinstance(image, Image.Image):
            if id(image) in seen:
                return seen[id(image)][1], None
            loaded = load_image(image, self.max_pixels)
            seen[id(image)] = image, _digest(loaded)
            return seen[id(image)][1], loaded
        name = None
        with suppress(OSError, ValueError):  # what cannot be looked at, reading names
            status = (image.archive if isinstance(image, PackedImage) else image).stat()
            name = image, status.st_ino, status.st_size, status.st_mtime_ns
        if name is not None and name in self._content:
            return self._content[name], None
        loaded = load_image(image, self.max_pixels)
        key = _digest(loaded)
        if name is not None:
            self._content[name] = key
        return key, loaded

    def _patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Patches (P, F) of an image under the pixel budget, and its grid in merged patches."""
        size = {"min_pixels": self._min_pixels, "max_pixels": self.max_pixels}
        try:
            inputs = self._processor([image], **size)
        except Exception as error:  # of settings that are no numbers, or not as many as there are colours
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ModelError(
                f"the checkpoint's image processor cannot be used: {reason}; copy its original preprocessor_config.json"
            ) from error
        merge = int(self._processor.merge_size)
        _, height, width = (int(v) for v in np.asarray(inputs["image_grid_thw"]).reshape(-1))
        return np.asarray(inputs["pixel_values"], np.float32), (height // merge, width // merge)

    def _encode(self, grid: tuple[int, int], queue: list[tuple[str, np.ndarray]]) -> dict[str, Features]:
        """Run images of one size through the tower together, and keep what comes out."""
        pixels = mx.array(np.concatenate([patches for _, patches in queue]))
        merged, levels = encode(self._tower, pixels, grid)
        mx.eval(merged, levels)
        self.runs += len(queue)
        encoded = {}
        for place, (key, _) in enumerate(queue):
            # Copies: a slice would keep the whole batch in memory after its neighbours are forgotten.
            features = Features(
                mx.contiguous(merged[place]), grid, tuple(mx.contiguous(level[place]) for level in levels), key
            )
            encoded[key] = features
            self._keep(key, features)
        mx.eval([x for f in encoded.values() for x in (f.merged, *f.deepstack)])
        return encoded

    def _keep(self, key: str, features: Features) -> None:
        self._kept[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._memory and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
