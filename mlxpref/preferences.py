"""A preference: two images of one prompt and the share of people who prefer the first of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

__all__ = ["ImageLike", "Preference", "image_name"]

ImageLike = Path | Image.Image
"""A file, read when it is needed, or an image in memory."""


@dataclass(frozen=True)
class Preference:
    """A labelled pair as it stands in the data.

    `a` and `b` are identities, not places on the screen: which one is shown first is decided later, never by
    the file. `p_a` is the share of people who prefer a (1 or 0 for a hard label, 0.5 for a tie), `votes` how many
    people were asked, `group` the prompt or ranking that the pair was taken from.
    """

    prompt: str
    a: ImageLike
    b: ImageLike
    p_a: float
    votes: int = 1
    group: str = ""

    @property
    def is_tie(self) -> bool:
        """Whether as many people prefer a as prefer b."""
        return self.p_a == 0.5


def image_name(image: ImageLike) -> str:
    """What an image of the data is called in records: its path, or its pixels where it has none."""
    return str(image) if isinstance(image, Path) else hashlib.sha256(image.tobytes()).hexdigest()
