"""The pictures as a page shows them: upright pixels on white and nothing else of the file, no EXIF, no name."""

import io
from collections.abc import Sequence
from pathlib import Path

from mlxpref.data.images import load_image
from mlxpref.lru import LRU
from mlxpref.report.html import thumbnail

__all__ = ["Pictures"]

_SIDE = 2048  # at most: as many pixels as a large screen gives one of two pictures
_SMALL_SIDE = 160
_CACHED_BYTES = 128 * 2**20


class Pictures:
    """Images by number, encoded when they are asked for; the last ones stay in memory."""

    def __init__(self, images: Sequence[Path]) -> None:
        self.images = tuple(images)
        self._encoded: LRU[int, bytes] = LRU(_CACHED_BYTES, len)

    def whole(self, number: int) -> bytes:
        """A picture as PNG, exact to the pixel up to `_SIDE`: a rater judges noise and blocks, too.

        DataError where the file can no longer be read.
        """
        content = self._encoded.get(number)
        if content is None:
            picture = load_image(self.images[number])
            picture.thumbnail((_SIDE, _SIDE))
            file = io.BytesIO()
            picture.save(file, "PNG", compress_level=1)
            content = file.getvalue()
            self._encoded.put(number, content)
        return content

    def small(self, number: int) -> bytes:
        """A picture for a list, as WebP; DataError as in `whole`."""
        return thumbnail(self.images[number], _SMALL_SIDE).content
