"""Preferences, pairs and comparisons: two images by identity (a, b) or in the order shown (first, second).

Only this file and `judge/pair_verdict.py` turn identities into places on the screen and places into identities.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from mlxpref.errors import DataError
from mlxpref.text import shorten

T = TypeVar("T")

Side = Literal["a", "b", "tie"]
_SWAPPED: dict[Side | None, Side] = {"a": "b", "b": "a", "tie": "tie"}
_NUMBERS = (float, int, Real)  # the last one, which is slow to ask, for those of NumPy


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An image inside an archive or a table, read on demand.

    `name` is its path in a zip or tar file, or its column in the `row` of a parquet file, counted from 0; `known_as`
    another path by which a user may name it, if any.
    """

    archive: Path
    name: str
    row: int | None = None
    known_as: str = field(default="", compare=False)

    @property
    def member(self) -> str:
        """The path in a zip or tar file, or "row/column" in a parquet file."""
        return self.name if self.row is None else f"{self.row}/{self.name}"

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"


ImageLike = Path | PackedImage | Image.Image
"""A file or a part of one, read on demand, or an image in memory."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A labelled pair in the data.

    `a` and `b` are identities, not places on the screen: the file never decides which one is shown first. `p_people` is
    the share of people who prefer a (1 or 0 for a hard label, 0.5 for a tie), `votes` the number of people, `group` the
    prompt or ranking of the pair. `label` is the better side in the data set's own test, if it does not follow from the
    votes. DataError for another `p_people`.
    """

    prompt: str
    a: ImageLike
    b: ImageLike
    p_people: float
    votes: int = 1
    group: str = ""
    label: Side | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.p_people, _NUMBERS) or not 0 <= self.p_people <= 1:
            raise DataError(
                f"{shorten(self.prompt)!r}: p_people must be a number from 0 to 1, not {self.p_people!r:.40}"
            )

    def __repr__(self) -> str:
        a, b = ("image in memory" if isinstance(x, Image.Image) else shorten(str(x)) for x in (self.a, self.b))
        return f"Preference({shorten(self.prompt)!r}, a={a}, b={b}, p_people={self.p_people:g}, votes={self.votes})"

    @property
    def is_tie(self) -> bool:
        """Whether equally many people prefer a and b."""
        return self.p_people == 0.5

    @property
    def better(self) -> Side:
        """The right side in a test: the data set's own label, else the majority's."""
        return self.label or ("tie" if self.is_tie else "a" if self.p_people > 0.5 else "b")

    def swapped(self) -> "Preference":
        """The same preference with a and b exchanged."""
        label = _SWAPPED.get(self.label)
        return Preference(self.prompt, self.b, self.a, 1 - self.p_people, self.votes, self.group, label)

    def with_images(self, a: ImageLike, b: ImageLike) -> "Preference":
        """The same preference of other images."""
        return Preference(self.prompt, a, b, self.p_people, self.votes, self.group, self.label)


@dataclass(frozen=True)
class Pair:
    """Two images by identity, and their prompt."""

    a: ImageLike
    b: ImageLike
    prompt: str


@dataclass(frozen=True)
class Comparison:
    """Two images in the order shown, and their prompt."""

    first: ImageLike
    second: ImageLike
    prompt: str

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The images in the order shown."""
        return self.first, self.second


@dataclass(frozen=True)
class SingleImage:
    """One image and its prompt, as a judge of single images sees them."""

    image: ImageLike
    prompt: str

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The image."""
        return (self.image,)


Question = Comparison | SingleImage
"""What a judge is asked about."""


def placed(a: T, b: T, a_first: bool) -> tuple[T, T]:
    """The first and the second one on the screen."""
    return (a, b) if a_first else (b, a)


def shown(pair: Pair) -> tuple[Comparison, Comparison]:
    """A pair in both orders: with a shown first, then with a shown second."""
    return Comparison(pair.a, pair.b, pair.prompt), Comparison(pair.b, pair.a, pair.prompt)


def share_for_first(p_people: float, a_first: bool) -> float:
    """The share of people who prefer the first image; from that share, the share for a."""
    return p_people if a_first else 1.0 - p_people


def image_name(image: ImageLike) -> str:
    """The name of an image in records: its place, or a digest of its pixels for an image in memory."""
    return hashlib.sha256(image.tobytes()).hexdigest() if isinstance(image, Image.Image) else str(image)


def images_of(pairs: "Sequence[Preference | Pair]") -> list[ImageLike]:
    """The images of pairs, each once, those of the first pair first."""
    images = [image for pair in pairs for image in (pair.a, pair.b)]
    return list({id(image) if isinstance(image, Image.Image) else image: image for image in images}.values())


def data_fingerprint(preferences: Sequence[Preference]) -> str:
    """Return a hash of preferences and their images' names, the same in any folder."""
    digest = hashlib.sha256(b"[")
    for number, p in enumerate(preferences):  # row by row, as a million of them are long
        a, b = (image_name(image).rpartition("/")[2] for image in (p.a, p.b))
        row = json.dumps([p.prompt, a, b, p.p_people, p.votes, p.group])
        digest.update(f"{', ' if number else ''}{row}".encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]
