"""The unreadable images of preferences: left out by name and count, where they may be."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from mlxpref.data.catalog import CATALOG, catalog_name
from mlxpref.data.find_images import locate
from mlxpref.data.hub_tables import hub_name
from mlxpref.data.preference_table import TOLERATED
from mlxpref.errors import DataError
from mlxpref.log import logger
from mlxpref.preferences import Preference
from mlxpref.text import first_ten


def is_public(data: str) -> bool:
    """Whether `--data` names a public data set, which its user cannot mend."""
    return catalog_name(data) in CATALOG or (hub_name(data) is not None and locate(data) is None)


class LeftOut:
    """The images of a command's preferences that cannot be read, by name, with the reasons.

    Nobody can mend a public data set: up to one in a hundred of its images may be left out, or one of fewer. Of a
    user's own files any number may, once the work has begun.
    """

    def __init__(self, data: str, preferences: Sequence[Preference]) -> None:
        self.data, self._preferences = data, preferences
        self.reasons: dict[str, str] = {}

    def add(self, reasons: Mapping[str, str], share: float | None = None) -> None:
        """Name and count images that are not known yet; DataError for too many of a public data set.

        `share` estimates how many of the images are such, where only a sample was looked at.
        """
        new = {name: reason for name, reason in reasons.items() if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        lines = [f"{name}: {reason}" for name, reason in new.items()]
        count = f"{self.data}: {len(self.reasons)} of {self.images} images cannot be read"
        if is_public(self.data) and len(self.reasons) > 1 and (share or len(self.reasons) / self.images) > TOLERATED:
            raise DataError(
                f"{count}, more than one in a hundred: the download is damaged; `mlxpref data NAME` with the same "
                f"--split checks the files of a public data set and downloads the damaged ones again:\n  "
                + first_ten(lines)
            )
        logger.warning(f"{count}; their pairs are left out: {first_ten(lines, '; ')}")

    @cached_property
    def images(self) -> int:
        """The number of all images in files."""
        return len({image for p in self._preferences for image in (p.a, p.b) if not isinstance(image, Image.Image)})

    @property
    def pairs(self) -> int:
        """The number of preferences with an image that is left out."""
        if not self.reasons:
            return 0
        return sum(any(str(image) in self.reasons for image in (p.a, p.b)) for p in self._preferences)

    def __str__(self) -> str:
        return f"{len(self.reasons)} of {self.images} images cannot be read: {self.pairs} pairs are left out"

    def to_json(self) -> dict[str, Any]:
        """The numbers of images and pairs that are left out, and the reasons by image."""
        return {"images": len(self.reasons), "pairs": self.pairs, "reasons": dict(self.reasons)}
