"""The demo's prompts: briefs of several requirements, each about the colour of one shape."""

from collections.abc import Container
from typing import NamedTuple

import numpy as np

from mlxpref.demo.pictures import COLOURS, SHAPES, PictureSpec


class Requirement(NamedTuple):
    """A shape is to have a colour, or the colour of another shape: `wanted` names either."""

    shape: str
    wanted: str

    @property
    def is_like(self) -> bool:
        """Whether another shape says the colour."""
        return self.wanted in SHAPES

    def colour_in(self, picture: PictureSpec) -> str:
        """The colour that the shape must have in a picture."""
        return picture.colour(self.wanted) if self.is_like else self.wanted

    def is_met(self, picture: PictureSpec) -> bool:
        """Whether a picture shows it."""
        return picture.colour(self.shape) == self.colour_in(picture)


Brief = tuple[Requirement, ...]
REQUIREMENTS = 3
"""How many requirements a brief of the demo has."""
HELD_OUT = (
    *map(Requirement, ("triangle", "square", "cross", "circle"), ("red", "green", "blue", "yellow")),
    *(Requirement("circle", "cross"), Requirement("cross", "circle")),
)
"""The requirements of no brief that is learned from: four colours of shapes, and two shapes that are compared."""
ALL = (
    *(Requirement(shape, colour) for shape in SHAPES for colour in COLOURS),
    *(Requirement(shape, other) for shape in SHAPES for other in SHAPES if shape != other),
)
TAUGHT = tuple(requirement for requirement in ALL if requirement not in HELD_OUT)
"""All other requirements."""


def prompt_text(brief: Brief) -> str:
    """The brief as a prompt: `a green circle, a cross like the triangle`, which is to have the same colour."""
    return ", ".join(map(_words, brief))


def _words(requirement: Requirement) -> str:
    shape, wanted = requirement
    if requirement.is_like:
        return f"a {shape} like the {wanted}"
    return f"{'an' if wanted[0] in 'aeiou' else 'a'} {wanted} {shape}"


def count_met(brief: Brief, picture: PictureSpec) -> int:
    """How many requirements a picture meets."""
    return sum(requirement.is_met(picture) for requirement in brief)


def draw_brief(
    rng: np.random.Generator,
    size: int = REQUIREMENTS,
    held_out: bool = False,
    likes: int | None = None,
    colours: Container[str] = COLOURS,
) -> Brief:
    """A random brief of taught requirements, or of all with at least one that is held out.

    No shape gets two colours, and no two shapes are compared twice. `likes` of the requirements compare shapes, the
    others ask for some `colours` only, of which there must be two.
    """
    known = [each for each in (ALL if held_out else TAUGHT) if each.is_like or each.wanted in colours]
    kinds = [[each for each in known if each.is_like == is_like] for is_like in (True, False)]
    while True:
        count = int(rng.binomial(size, 0.5)) if likes is None else likes
        chosen = [kind[int(rng.integers(len(kind)))] for kind in (kinds[i >= count] for i in range(size))]
        is_one = len({frozenset(each) if each.is_like else each.shape for each in chosen}) == size
        if is_one and (not held_out or any(each in HELD_OUT for each in chosen)):
            return tuple(chosen[int(i)] for i in rng.permutation(size))
