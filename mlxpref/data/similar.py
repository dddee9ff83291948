"""Groups of near-duplicates, such as the pictures of a burst, by perceptual hashes."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.find_images import reasons_of
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import read_image
from mlxpref.data.inputs import ImagesInput, find_given
from mlxpref.data.prompts import PromptGroup
from mlxpref.errors import ConfigError, DataError
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.text import short_names

BITS = 64
DISTANCE = 10
"""The most bits in which near-duplicates differ by default; `scripts/similar_images.py` measures it."""
LARGEST_DISTANCE = BITS // 2
"""Pictures that have nothing in common differ in so many bits."""
_PIXELS = 128 * 128
"""The pixel budget of a picture that is hashed: more pixels change a bit or two of the hash."""

Hashes = NDArray[np.uint64]


class HashedImageCache(ImageCache):
    """An image cache that hashes images when it checks them.

    It reads a JPEG roughly then, which takes a third of the time or less: of photographs that are similar to no other
    more is not needed.
    """

    def __init__(self, max_pixels: int) -> None:
        super().__init__(max_pixels)
        self._hashes: dict[Path | PackedImage, np.uint64] = {}

    def check(self, image: Path | PackedImage) -> None:
        """Hash an image; ImageError if it cannot be read."""
        if image not in self._hashes:
            self._hashes[image] = perceptual_hash(image, self.archives)

    def hashes(self, images: Sequence[ImageLike]) -> Hashes:
        """The hashes (N,) of images that were checked, or are in memory."""
        return np.array([perceptual_hash(x) if isinstance(x, Image.Image) else self._hashes[x] for x in images])


def perceptual_hash(image: ImageLike, archives: ArchiveCache | None = None) -> np.uint64:
    """The 64 bits of pHash, nearly the same for near-duplicates; ImageError if the image cannot be read."""
    import imagehash  # takes a tenth of a second

    picture, _ = read_image(image, _PIXELS, archives, rough=True)
    return np.uint64(int(str(imagehash.phash(picture)), 16))


def group_similar(images: ImagesInput, distance: int = DISTANCE) -> list[list[ImageLike]]:
    """The groups of near-duplicates among two or more images, a list or a folder, in order of their first images.

    An image that is similar to no other is a group of one. Similar are two images whose perceptual hashes differ in at
    most `distance` of 64 bits, and a group has all that such steps lead to. Unreadable images of a folder are left out,
    with a warning. DataError names others that cannot be read; ConfigError for a distance that is none.
    """
    if not isinstance(distance, Integral) or not 0 <= distance <= LARGEST_DISTANCE:
        raise ConfigError(f"distance {distance!r}: give a whole number from 0 to {LARGEST_DISTANCE}")
    cache = HashedImageCache(_PIXELS)
    given, left_out = find_given(images, cache)
    if left_out:
        logger.warning(f"left out, as it cannot be read: {reasons_of(left_out)}")
    return [[given[i] for i in group] for group in near_duplicates(cache.hashes(given), int(distance))]


def split_by_similarity(
    groups: Sequence[PromptGroup], distance: int, images: HashedImageCache
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """The groups of near-duplicates within each prompt, and the images that are similar to no other as groups of one.

    A group has the name of its first image. `images` has checked all of them. DataError if all are alone.
    """
    hashes = [images.hashes(group.images) for group in groups]
    paths = [path for group in groups for path in group.images]
    names = dict(zip(paths, short_names([str(path) for path in paths]), strict=True))
    parts = [
        PromptGroup(group.prompt, tuple(group.images[i] for i in members), names[group.images[members[0]]])
        for group, own in zip(groups, hashes, strict=True)
        for members in near_duplicates(own, distance)
    ]
    similar = [part for part in parts if len(part.images) > 1]
    if not similar:
        raise DataError(
            f"no two of {len(paths)} images are similar: the nearest differ in {min(map(_nearest, hashes))} of {BITS} "
            f"bits, more than --similar {distance}; give more, or leave out --group-by to rank all together"
        )
    return similar, [part for part in parts if len(part.images) == 1]


def near_duplicates(hashes: Hashes, distance: int) -> list[list[int]]:
    """The groups of N hashes: connected components of those that differ in at most `distance` bits, ascending.

    A burst drifts: its ends differ more than neighbours do, and would be torn apart if all had to be near each other.
    """
    left, groups = np.arange(len(hashes)), list[list[int]]()
    while len(left):
        group, left = left[:1].tolist(), left[1:]
        for member in group:  # grows meanwhile; a matrix of all distances would not fit for very many images
            near = np.bitwise_count(hashes[left] ^ hashes[member]) <= distance
            group += left[near].tolist()
            left = left[~near]
        groups.append(sorted(group))
    return groups


def _nearest(hashes: Hashes) -> int:
    """The fewest bits in which two of N hashes differ."""
    return min(int(np.bitwise_count(hashes[i + 1 :] ^ hashes[i]).min()) for i in range(len(hashes) - 1))
