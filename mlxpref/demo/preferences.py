"""The demo's preferences: the picture that meets more of its brief wins; between equals, quality decides.

Both pictures of a pair show the same four colours on different shapes, and quality is right in half of all pairs: no
statistic of one picture tells which wins, so a judge must check one requirement after another in both.

Training and test pictures come from different random streams, so none is in both. Five per cent of the training labels
are wrong, no test label is. No training comparison has a requirement of HELD_OUT, neither in the demo nor in the
judge's warm-up; the briefs of `heldout` have no other. The briefs of `four` have one requirement more.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxpref.demo.briefs import HELD_OUT, REQUIREMENTS, TAUGHT, Brief, count_met, draw_brief, prompt_text
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render
from mlxpref.preferences import Preference

SPLITS = ("train", "test", "heldout", "four")
LABEL_NOISE = 0.05
_STREAMS = {"train": 1, "test": 2, "heldout": 3, "four": 4}
_MET = 0.42
"""How often a requirement is made to hold in one of the pictures; some hold by chance."""
_QUALITY_DECIDES = 0.2
_QUALITY_SAME, _QUALITY_HELPS = 0.25, 0.25
"""Shares of the pairs in which the brief decides: over all pairs, the better looking picture wins half of the time."""


@dataclass(frozen=True)
class PairSpec:
    """Two pictures for one brief, and the better one."""

    brief: Brief
    a: PictureSpec
    b: PictureSpec

    @property
    def prompt(self) -> str:
        """The prompt of both pictures."""
        return prompt_text(self.brief)

    @property
    def swapped(self) -> "PairSpec":
        """The same pair with a and b exchanged."""
        return PairSpec(self.brief, self.b, self.a)

    @property
    def better(self) -> Literal["a", "b"]:
        """The picture that people prefer."""
        return "a" if value_of(self.brief, self.a) > value_of(self.brief, self.b) else "b"


def value_of(brief: Brief, picture: PictureSpec) -> int:
    """The place of a picture among all that a brief may get: its requirements count first, then its quality."""
    return len(QUALITIES) * (count_met(brief, picture) + 1) - QUALITIES.index(picture.quality) - 1


def draw_pair(rng: np.random.Generator, brief: Brief) -> PairSpec:
    """A random pair for a brief: the same colours on different shapes, one better than the other."""
    is_equal = bool(rng.random() < _QUALITY_DECIDES)
    while True:
        colours = _draw_colours(rng, brief)
        dealt = [colours, tuple(colours[int(i)] for i in rng.permutation(len(colours)))]
        met = [count_met(brief, PictureSpec(*each)) for each in dealt]
        if dealt[0] != dealt[1] and (met[0] == met[1]) == is_equal:
            break
    best_first = dealt if met[0] > met[1] else dealt[::-1]
    better, worse = (
        PictureSpec(*each)._replace(quality=quality)
        for each, quality in zip(best_first, _draw_qualities(rng, is_equal), strict=True)
    )
    return PairSpec(brief, better, worse) if rng.random() < 0.5 else PairSpec(brief, worse, better)


def _draw_colours(rng: np.random.Generator, brief: Brief) -> tuple[str, ...]:
    """A colour for each of SHAPES, such that about half of the requirements hold."""
    names = list(COLOURS)
    colours = [names[int(i)] for i in rng.integers(0, len(names), len(SHAPES))]
    for requirement in brief:
        if rng.random() < _MET:
            colours[SHAPES.index(requirement.shape)] = requirement.colour_in(PictureSpec(*colours))
    return tuple(colours)


def _draw_qualities(rng: np.random.Generator, is_equal: bool) -> tuple[str, str]:
    """The qualities of the better and the worse picture."""
    high, low = (QUALITIES[int(i)] for i in np.sort(rng.permutation(len(QUALITIES))[:2]))
    chance = rng.random()
    if is_equal or chance < _QUALITY_HELPS:
        return high, low
    return (high, high) if chance < _QUALITY_HELPS + _QUALITY_SAME else (low, high)


def demo_preferences(split: str, count: int, seed: int = 0) -> list[Preference]:
    """The first `count` preferences of a split (`train`, `test`, `heldout` or `four`), rendered.

    The i-th preference depends on split, seed and i alone, so a longer list begins with the shorter one.
    """
    return [_preference(_stream(split, seed, i), split) for i in range(count)]


def demo_pairs(split: str, count: int, seed: int = 0) -> list[PairSpec]:
    """The content of the first `count` preferences of a split, with the same seed."""
    return [draw_pair_of(split, _stream(split, seed, i)) for i in range(count)]


def draw_pair_of(split: str, rng: np.random.Generator) -> PairSpec:
    """A random pair of a split."""
    size, requirements = REQUIREMENTS + (split == "four"), HELD_OUT if split == "heldout" else TAUGHT
    return draw_pair(rng, draw_brief(rng, size, requirements))


def _stream(split: str, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([_STREAMS[split], seed, number])


def _preference(rng: np.random.Generator, split: str) -> Preference:
    pair = draw_pair_of(split, rng)
    p_people = 1.0 if pair.better == "a" else 0.0
    if split == "train" and rng.random() < LABEL_NOISE:
        p_people = 1.0 - p_people
    return Preference(pair.prompt, render(pair.a, rng), render(pair.b, rng), p_people, group=pair.prompt)
