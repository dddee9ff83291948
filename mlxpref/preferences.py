"""A preference: two images of one prompt and the share of people who prefer the first of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

__all__ = ["ImageLike", "PackedImage", "Preference", "Side", "digest_of", "image_name"]

Side = Literal["a", "b", "tie"]


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An image inside an archive or a table, read from there when it is needed.

    `member` is its path in a zip or tar file, or "row/column" in a parquet file.
    """

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"


ImageLike = Path | PackedImage | Image.Image
"""A file or a part of one, read when it is needed, or an image in memory."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A labelled pair as it stands in the data.

    `a` and `b` are identities, not places on the screen: which one is shown first is decided later, never by
    the file. `p_a` is the share of people who prefer a (1 or 0 for a hard label, 0.5 for a tie), `votes` how many
    people were asked, `group` the prompt or ranking that the pair was taken from. `label` is what the data set's own
    test counts as better, where that does not follow from the votes.
    """

    prompt: str
    a: ImageLike
    b: ImageLike
    p_a: float
    votes: int = 1
    group: str = ""
    label: Side | None = None

    @property
    def is_tie(self) -> bool:
        """Whether as many people prefer a as prefer b."""
        return self.p_a == 0.5

    @property
    def better(self) -> Side:
        """The side that counts as right in a test: the data set's own label, else the majority's."""
        return self.label or ("tie" if self.is_tie else "a" if self.p_a > 0.5 else "b")


def image_name(image: ImageLike) -> str:
    """What an image of the data is called in records: where it is, or its pixels where it is in memory."""
    return hashlib.sha256(image.tobytes()).hexdigest() if isinstance(image, Image.Image) else str(image)


def digest_of(preferences: Sequence[Preference]) -> str:
    """What preferences are, wherever their images lie: the same on every machine that has the same files."""
    rows = [
        [p.prompt, *(image_name(image).rpartition("/")[2] for image in (p.a, p.b)), p.p_a, p.votes, p.group]
        for p in preferences
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
