"""The demo's prompts: briefs of several requirements, each about the colour of one shape."""

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
"""The requirements of no brief that is learned from: four colours of shapes, and one pair of shapes."""
_ALL = (
    *(Requirement(shape, colour) for shape in SHAPES for colour in COLOURS),
    *(Requirement(shape, other) for shape in SHAPES for other in SHAPES if shape != other),
)
TAUGHT = tuple(requirement for requirement in _ALL if requirement not in HELD_OUT)
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
    requirements: tuple[Requirement, ...] = TAUGHT,
    likes: int | None = None,
) -> Brief:
    """A random brief: no shape gets two colours, no two shapes are compared twice; `likes` of them compare shapes."""
    kinds = {True: [r for r in requirements if r.is_like], False: [r for r in requirements if not r.is_like]}
    while True:
        count = int(rng.binomial(size, 0.5)) if likes is None else likes
        chosen = [kinds[i < count][int(rng.integers(len(kinds[i < count])))] for i in range(size)]
        if len({frozenset(r) if r.is_like else r.shape for r in chosen}) == size:
            return tuple(chosen[int(i)] for i in rng.permutation(size))
