"""The demo's preferences: a picture that matches the prompt wins; between equals, quality decides.

Training and test pictures come from different random streams, so none is in both. Five per cent of the training labels
are wrong, no test label is. No training comparison has a prompt of HELD_OUT, neither in the demo nor in the judge's
warm-up.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render
from mlxpref.preferences import Preference

Aspect = Literal["colour", "shape", "quality"]
ASPECTS: tuple[Aspect, ...] = ("colour", "shape", "quality")
HELD_OUT = (("red", "triangle"), ("green", "square"), ("blue", "cross"), ("yellow", "circle"))
TRAIN_PROMPTS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
SPLITS = ("train", "test", "heldout")
LABEL_NOISE = 0.05
_STREAMS = {"train": 1, "test": 2, "heldout": 3}


@dataclass(frozen=True)
class PairSpec:
    """Two pictures for one prompt's colour and shape, with the deciding aspect and the better one."""

    colour: str
    shape: str
    a: PictureSpec
    b: PictureSpec
    aspect: Aspect
    better: Literal["a", "b"]

    @property
    def prompt(self) -> str:
        """The prompt of both pictures."""
        return prompt_text(self.colour, self.shape)


def prompt_text(colour: str, shape: str) -> str:
    """The prompt for a shape of a colour."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def draw_pair(
    rng: np.random.Generator,
    prompts: tuple[tuple[str, str], ...] = TRAIN_PROMPTS,
    aspect: Aspect | None = None,
) -> PairSpec:
    """A random pair: a prompt, the deciding aspect, and two pictures that differ in it.

    Where colour or shape decides, quality misleads more often than it helps. Where quality decides, a quarter of
    the pairs show the same wrong thing twice.
    """
    colour, shape = prompts[int(rng.integers(len(prompts)))]
    aspect = aspect or ASPECTS[int(rng.integers(3))]
    wrong_colour = _other(rng, tuple(COLOURS), colour)
    wrong_shape = _other(rng, SHAPES, shape)
    low_quality = QUALITIES[int(rng.integers(1, len(QUALITIES)))]
    good, bad = (colour, shape), (colour, shape)
    good_quality, bad_quality = "clean", low_quality
    chance = rng.random()
    if aspect == "quality":
        if chance < 0.25:
            good = bad = (wrong_colour, shape) if rng.random() < 0.5 else (colour, wrong_shape)
    else:
        bad = (wrong_colour, shape) if aspect == "colour" else (colour, wrong_shape)
        if chance < 0.5:
            good_quality, bad_quality = low_quality, "clean"
        elif chance >= 0.75:
            bad_quality = "clean"
    better, worse = PictureSpec(*good, good_quality), PictureSpec(*bad, bad_quality)
    if rng.random() < 0.5:
        return PairSpec(colour, shape, better, worse, aspect, "a")
    return PairSpec(colour, shape, worse, better, aspect, "b")


def demo_preferences(split: str, count: int, seed: int = 0) -> list[Preference]:
    """The first `count` preferences of a split (`train`, `test` or `heldout`), rendered.

    The i-th preference depends on split, seed and i alone, so a longer list begins with the shorter one.
    """
    prompts = HELD_OUT if split == "heldout" else TRAIN_PROMPTS
    return [_preference(np.random.default_rng([_STREAMS[split], seed, i]), prompts, split) for i in range(count)]


def _preference(rng: np.random.Generator, prompts: tuple[tuple[str, str], ...], split: str) -> Preference:
    pair = draw_pair(rng, prompts)
    p_people = 1.0 if pair.better == "a" else 0.0
    if split == "train" and rng.random() < LABEL_NOISE:
        p_people = 1.0 - p_people
    return Preference(pair.prompt, render(pair.a, rng), render(pair.b, rng), p_people, group=pair.prompt)


def _other(rng: np.random.Generator, names: tuple[str, ...], name: str) -> str:
    return names[(names.index(name) + int(rng.integers(1, len(names)))) % len(names)]
