"""Images of files by name, size and date, so that another picture of the same name is not taken for them later."""

import os
from pathlib import Path

from mlxpref.data.archives import named_image
from mlxpref.preferences import PackedImage

GONE = "gone"
"""The stamp of a file that is not there."""


def stamp_of(image: Path | PackedImage) -> str:
    """The size in bytes and the date in nanoseconds of an image's file, or of the one that holds it: `1234-1790`."""
    try:
        status = (image.archive if isinstance(image, PackedImage) else image).stat()
    except (OSError, ValueError):
        return GONE
    return f"{status.st_size}-{status.st_mtime_ns}"


def absolute_name(image: Path | PackedImage) -> str:
    """The name of an image from the root of the file system."""
    return os.path.join(os.getcwd(), str(image))  # noqa: PTH109, PTH118  Path takes thrice as long


def find_stamped(name: str, stamp: str, is_moved: bool = False) -> Path | PackedImage | None:
    """The image of a name; None where its file is gone, or has changed since it had this stamp.

    A file that `is_moved` may have been copied, which keeps its size but not its date.
    """
    image = named_image(name)
    now = stamp_of(image)
    if is_moved:
        now, stamp = now.partition("-")[0], stamp.partition("-")[0]
    return image if now == stamp != GONE else None
