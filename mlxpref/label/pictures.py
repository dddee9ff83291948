"""The pictures as a page shows them: upright pixels on white and nothing else of the file, no EXIF, no name."""

import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from mlxpref.data.images import load_image
from mlxpref.report.html import thumbnail

__all__ = ["Pictures"]

_SIDE = 2048
"""The longer side of what is shown, at most: as many pixels as a large screen gives one of two pictures."""
_SMALL_SIDE = 160
_KEPT_BYTES = 128 * 2**20


class Pictures:
    """Images by number, encoded when they are asked for; the last ones are kept, up to a number of bytes."""

    def __init__(self, images: Sequence[Path]) -> None:
        self.images = tuple(images)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = Lock()

    def whole(self, number: int) -> bytes:
        """A picture as PNG, exact to the pixel up to `_SIDE`: a rater judges noise and blocks, too.

        DataError where the file can no longer be read.
        """
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        picture = load_image(self.images[number])
        picture.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        with self._lock:
            self._kept[number] = file.getvalue()
            while sum(map(len, self._kept.values())) > _KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return file.getvalue()

    def small(self, number: int) -> bytes:
        """A picture for a list, as WebP; DataError as above."""
        return thumbnail(self.images[number], _SMALL_SIDE).content
