"""The demo's preferences: the picture that meets more of its brief wins; between equals, quality decides.

Both pictures of a pair show the same colours on different shapes, and by its brief either could be the better one:
without the brief nothing in the pictures tells which wins, and quality is right in half of all pairs. So a judge must
check one requirement after another in both.

Training and test pictures come from different random streams, so none is in both. Five per cent of the training labels
are wrong, no test label is. No training comparison has a requirement of HELD_OUT, neither in the demo nor in the
judge's warm-up; the briefs of `heldout` have at least one. The briefs of `four` have one requirement more.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxpref.demo.briefs import REQUIREMENTS, Brief, count_met, draw_brief, prompt_text
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render
from mlxpref.preferences import Preference

SPLITS = ("train", "test", "heldout", "four")
LABEL_NOISE = 0.05
_STREAMS = {"train": 1, "test": 2, "heldout": 3, "four": 4}
_PALETTE = 3
"""How many colours the shapes of a pair choose from: so about a third of all requirements hold."""
_TRIES = 30
"""How many briefs are drawn for two pictures, until each of them wins by one and neither by a third."""
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
    """The place of a picture for a brief, see `place_of`."""
    return place_of(count_met(brief, picture), picture.quality)


def place_of(met: int, quality: str) -> int:
    """The place of pictures that meet so many requirements and have a quality, which counts last; larger is better."""
    return len(QUALITIES) * (met + 1) - QUALITIES.index(quality) - 1


def draw_pair(
    rng: np.random.Generator, size: int = REQUIREMENTS, held_out: bool = False, likes: int | None = None
) -> PairSpec:
    """A random pair: the same colours on different shapes, and a brief that decides, or leaves it to quality.

    See `draw_brief` for what the brief is drawn from. Of two pictures either wins, as chance has it, by a brief of its
    own: so without the brief both are as likely to be the better one.
    """
    briefs: dict[int, Brief] = {}
    while len(briefs) < 3:  # one by which the first picture wins, one for the second, one that leaves it to quality
        names = rng.permutation(list(COLOURS))[:_PALETTE]
        colours = [str(each) for each in names[rng.integers(0, _PALETTE, len(SHAPES))]]
        dealt = [PictureSpec(*(colours[int(i)] for i in rng.permutation(len(colours)))) for _ in range(2)]
        briefs = {}
        for _ in range(_TRIES if dealt[0] != dealt[1] else 0):
            brief = draw_brief(rng, size, held_out, likes, set(colours))
            difference = count_met(brief, dealt[0]) - count_met(brief, dealt[1])
            briefs.setdefault(int(np.sign(difference)), brief)
    is_equal = bool(rng.random() < _QUALITY_DECIDES)
    first_wins = bool(rng.random() < 0.5)
    qualities = _draw_qualities(rng, is_equal)[:: 1 if first_wins else -1]
    first, second = (picture._replace(quality=quality) for picture, quality in zip(dealt, qualities, strict=True))
    return PairSpec(briefs[0 if is_equal else 1 if first_wins else -1], first, second)


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
    return draw_pair(rng, REQUIREMENTS + (split == "four"), held_out=split == "heldout")


def _stream(split: str, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([_STREAMS[split], seed, number])


def _preference(rng: np.random.Generator, split: str) -> Preference:
    pair = draw_pair_of(split, rng)
    p_people = 1.0 if pair.better == "a" else 0.0
    if split == "train" and rng.random() < LABEL_NOISE:
        p_people = 1.0 - p_people
    return Preference(pair.prompt, render(pair.a, rng), render(pair.b, rng), p_people, group=pair.prompt)
