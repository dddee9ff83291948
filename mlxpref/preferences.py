"""Preferences, pairs and comparisons: two images by identity (a, b) and as they are shown (first, second).

Only this file and `judge/pair_verdict.py` turn identities into places on the screen and places into identities.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

T = TypeVar("T")

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
    the file. `p_people` is the share of people who prefer a (1 or 0 for a hard label, 0.5 for a tie), `votes` how many
    people were asked, `group` the prompt or ranking that the pair was taken from. `label` is what the data set's own
    test counts as better, where that does not follow from the votes.
    """

    prompt: str
    a: ImageLike
    b: ImageLike
    p_people: float
    votes: int = 1
    group: str = ""
    label: Side | None = None

    @property
    def is_tie(self) -> bool:
        """Whether as many people prefer a as prefer b."""
        return self.p_people == 0.5

    @property
    def better(self) -> Side:
        """The side that counts as right in a test: the data set's own label, else the majority's."""
        return self.label or ("tie" if self.is_tie else "a" if self.p_people > 0.5 else "b")


@dataclass(frozen=True)
class Pair:
    """Two images by identity, and the prompt they are judged for."""

    a: ImageLike
    b: ImageLike
    prompt: str


@dataclass(frozen=True)
class Comparison:
    """Two images as they are shown, and the prompt they are judged for."""

    first: ImageLike
    second: ImageLike
    prompt: str


def placed(a: T, b: T, a_first: bool) -> tuple[T, T]:
    """What stands first on the screen, and what stands second."""
    return (a, b) if a_first else (b, a)


def shown(pair: Pair) -> tuple[Comparison, Comparison]:
    """A pair in both orders: with a shown first, then with a shown second."""
    return Comparison(pair.a, pair.b, pair.prompt), Comparison(pair.b, pair.a, pair.prompt)


def share_for_first(p_people: float, a_first: bool) -> float:
    """The share of people who prefer the image that is shown first; given that share, the one who prefer a."""
    return p_people if a_first else 1.0 - p_people


def image_name(image: ImageLike) -> str:
    """What an image of the data is called in records: where it is, or its pixels where it is in memory."""
    return hashlib.sha256(image.tobytes()).hexdigest() if isinstance(image, Image.Image) else str(image)


def data_fingerprint(preferences: Sequence[Preference]) -> str:
    """Return a hash of preferences and the names of their images: the same wherever the same files lie."""
    rows = [
        [p.prompt, *(image_name(image).rpartition("/")[2] for image in (p.a, p.b)), p.p_people, p.votes, p.group]
        for p in preferences
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
