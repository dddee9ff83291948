"""The stand-in generator of `scripts/reward_loop.py`, and how good it is: exactly, by all pictures that it can draw."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxpref.demo.briefs import Brief, count_met, draw_brief
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec
from mlxpref.demo.preferences import value_of

__all__ = ["TASKS", "Floats", "Generator", "Ints", "Task", "all_right", "true_order", "true_preference"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHOICES = (*[len(COLOURS)] * len(SHAPES), len(QUALITIES))
_EVERY = np.array(list(product(*map(range, _CHOICES))))  # (3888, 5)
_RATE = 2.0


class Task(NamedTuple):
    """What a generator is asked for: a brief, and a clean picture that meets it all."""

    brief: Brief
    wanted: PictureSpec

    def look(self, choices: Sequence[int]) -> PictureSpec:
        """The picture of five choices: how far each shape's colour is from the wanted one, and the quality."""
        names = list(COLOURS)
        *steps, quality = choices
        colours = [
            names[(names.index(colour) + step) % len(names)] for colour, step in zip(self.wanted, steps, strict=False)
        ]
        return PictureSpec(*(*colours, QUALITIES[quality]))


def _draw_tasks(count: int) -> list[Task]:
    """So many tasks; of briefs that contradict themselves there are none."""
    rng, tasks = np.random.default_rng(3), list[Task]()
    pictures = [PictureSpec(*(*colours, QUALITIES[0])) for colours in product(COLOURS, repeat=len(SHAPES))]
    while len(tasks) < count:
        brief = draw_brief(rng)
        wanted = [each for each in pictures if count_met(brief, each) == len(brief)]
        if wanted:
            tasks.append(Task(brief, wanted[int(rng.integers(len(wanted)))]))
    return tasks


TASKS = _draw_tasks(12)


@dataclass
class Generator:
    """Draws the colours of the four shapes and the quality by logits; choice 0 of each is as wanted, or clean.

    It is told the wanted colours of a task. All that it learns is to keep to them, and to draw clean pictures.
    """

    logits: list[Floats] = field(default_factory=lambda: [np.zeros(count) for count in _CHOICES])

    @property
    def chances(self) -> list[Floats]:
        """The probabilities of the choices of each shape's colour, and of the quality."""
        return [np.exp(each) / np.exp(each).sum() for each in self.logits]

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """The choices (N, 5) of so many pictures."""
        return np.stack([rng.choice(len(p), count, p=p) for p in self.chances], axis=1)

    def learn(self, choices: Ints, advantages: Floats) -> None:
        """One step of REINFORCE, by choices (N, 5) and advantages (N,)."""
        for logits, p, chosen in zip(self.logits, self.chances, choices.T, strict=True):
            logits += _RATE * advantages @ (np.eye(len(p))[chosen] - p) / len(choices)


def true_order(brief: Brief, looks: Sequence[PictureSpec]) -> Floats:
    """The places (N,) of pictures by the demo's rule, a larger number is better."""
    return np.array([float(value_of(brief, look)) for look in looks])


def true_preference(generator: Generator) -> float:
    """The probability that its picture is preferred to one of an untrained generator, a tie being half, over TASKS."""
    own, first = (_shares_of_places(each) for each in (generator, Generator()))
    wins = np.tri(own.shape[1], k=-1) + np.eye(own.shape[1]) / 2
    return float(np.mean(np.einsum("ti,ij,tj->t", own, wins, first)))


def all_right(generator: Generator) -> float:
    """The probability of a clean picture that meets all of its brief, over TASKS."""
    return float(np.mean(_shares_of_places(generator)[:, -1]))


def _shares_of_places(generator: Generator) -> Floats:
    """The probability (tasks, places) of each place by `value_of`: the sum over all choices."""
    p = np.prod([each[chosen] for each, chosen in zip(generator.chances, _EVERY.T, strict=True)], axis=0)
    return np.stack([np.bincount(places, p, _places().max() + 1) for places in _places()])


@cache
def _places() -> Ints:
    """The place (tasks, choices) of the picture of all possible choices for each task."""
    return np.array([[value_of(task.brief, task.look(chosen)) for chosen in _EVERY.tolist()] for task in TASKS])
