"""One training run of the demo judge, measured on pictures and prompts that it does not learn from.

Two kinds of labels: the demo's own, which are 0 or 1 and of which 5 % are wrong, and shares of votes, where the aspect
that decides a scene says how far people agree. Test labels have no noise: the demo's are right, and a share is the one
that the votes were drawn with.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mlxpref._blas import preload

preload()  # before MLX is first imported

from mlxpref.cli.demo import demo_settings  # noqa: E402
from mlxpref.config import JudgeSettings, TrainSettings  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.pictures import render  # noqa: E402
from mlxpref.demo.preferences import HELD_OUT, TRAIN_PROMPTS, Aspect, demo_preferences, draw_pair  # noqa: E402
from mlxpref.engine.vlm import load_vlm  # noqa: E402
from mlxpref.judge.evaluation import EvaluationSpec, evaluate  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.metrics import Metrics  # noqa: E402
from mlxpref.preferences import Preference  # noqa: E402
from mlxpref.training.trainer import Trainer  # noqa: E402

__all__ = ["AGREEMENT", "VOTES", "Labels", "Plan", "Point", "Result", "Sizes", "preferences_of", "run", "settings_of"]

Labels = Literal["labels", "votes"]

AGREEMENT: dict[Aspect, float] = {"colour": 0.95, "shape": 0.85, "quality": 0.7}
"""The share of people who prefer the better picture, by what tells the two apart."""
VOTES = 10
"""How many people vote on a pair that is learned from."""
_STREAMS = {"train": 11, "test": 12, "heldout": 13}
_TEST_SEED = 6
"""Of test pictures that are looked at here only."""
_EVERY = 10
"""Steps between two points of a curve."""
_REWARDS = {"naive soft": f"{Path(__file__).parent / 'naive_soft.py'}:naive_soft", "soft, votes": "soft"}
"""What `--reward` takes for the names of the table that are none."""


@dataclass(frozen=True)
class Plan:
    """What a run is: its reward, by the name that the table has for it, what it learns from, and for how long."""

    reward: str
    labels: Labels
    think: bool
    seed: int
    steps: int


@dataclass(frozen=True)
class Point:
    """The accuracy on some test pictures after so many steps, and so many seconds of training."""

    step: int
    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What a run came to; `ece` is against the share of people, `seconds` are of training alone."""

    reward: str
    labels: Labels
    think: bool
    seed: int
    steps: int
    accuracy: float
    held_out_prompts: float
    position_consistency: float
    ece: float
    held_out_ece: float
    judgements: int
    seconds: float
    curve: list[Point] = field(repr=False)


@dataclass(frozen=True)
class Sizes:
    """How many pairs a run is measured with: at its points, and at its end."""

    points: int = 200
    test: int = 1000
    held_out: int = 400


STANDARD = Sizes()
"""At the end both orders of 1,000 pairs: 2,000 judgements."""


def settings_of(plan: Plan) -> TrainSettings:
    """The demo's settings, with what a plan says; the learning rate falls over the plan's own steps.

    Rewards are compared alone: nothing else is trained, and nothing holds the policy to its reference.
    """
    return demo_settings(
        reward=_REWARDS.get(plan.reward, plan.reward),
        think=plan.think,
        seed=plan.seed,
        steps=plan.steps,
        read_weight=0.0,
        kl=0.0,
    )


def preferences_of(labels: Labels, split: str, count: int, seed: int) -> list[Preference]:
    """The first `count` preferences of a split (`train`, `test`, `heldout`) with labels of a kind."""
    if labels == "labels":
        return demo_preferences(split, count, seed)
    return [_voted(split, np.random.default_rng([_STREAMS[split], seed, i])) for i in range(count)]


def _voted(split: str, rng: np.random.Generator) -> Preference:
    scene = draw_pair(rng, HELD_OUT if split == "heldout" else TRAIN_PROMPTS)
    agree = AGREEMENT[scene.aspect]
    share = rng.binomial(VOTES, agree) / VOTES if split == "train" else agree
    p_people = share if scene.better == "a" else 1 - share
    return Preference(scene.prompt, render(scene.a, rng), render(scene.b, rng), p_people, group=scene.prompt)


def run(plan: Plan, sizes: Sizes = STANDARD) -> Result:
    """Train the demo judge as planned, and measure it."""
    settings = settings_of(plan)
    vlm = load_vlm(JUDGE, settings.max_pixels)
    judge = Judge(
        vlm,
        JudgeSettings(
            think=plan.think, max_tokens=settings.max_tokens, max_pixels=settings.max_pixels, rows=settings.rows
        ),
    )
    test = preferences_of(plan.labels, "test", sizes.test, _TEST_SEED)
    held_out = preferences_of(plan.labels, "heldout", sizes.held_out, _TEST_SEED)

    def measured(preferences: Sequence[Preference], split: str) -> Metrics:
        return evaluate(judge, preferences, EvaluationSpec(plan.labels, split)).metrics

    # Every run learns from pictures of its own seed.
    trainer = Trainer(vlm, preferences_of(plan.labels, "train", settings.limit, plan.seed), settings)
    curve = [Point(0, 0.0, measured(test[: sizes.points], "test").accuracy)]
    seconds, started = 0.0, time.perf_counter()
    for report in trainer.steps():
        seconds += time.perf_counter() - started
        if report.step % _EVERY == 0 or report.step == plan.steps:
            accuracy = measured(test[: sizes.points], "test").accuracy
            curve.append(Point(report.step, round(seconds, 2), accuracy))
        started = time.perf_counter()
    found, unseen = measured(test, "test"), measured(held_out, "heldout")
    return Result(
        **vars(plan),
        accuracy=found.accuracy,
        held_out_prompts=unseen.accuracy,
        position_consistency=found.position_consistency,
        ece=found.ece,
        held_out_ece=unseen.ece,
        judgements=2 * found.pairs,
        seconds=round(seconds, 1),
        curve=curve,
    )
