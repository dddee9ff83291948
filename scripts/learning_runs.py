"""One training run of the demo judge by one method, measured on pairs and briefs that it does not learn from.

Every method sees the same pairs of a seed, 5 % of them with a wrong label, in as many steps of as many completions; it
is measured on labels that are right.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxpref.cli.demo import Writing, demo_settings, written_about  # noqa: E402
from mlxpref.config import JudgeSettings, TrainSettings  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.preferences import demo_pairs, demo_preferences  # noqa: E402
from mlxpref.engine.lora import adapter_weights  # noqa: E402
from mlxpref.engine.vlm import VLM, load_vlm  # noqa: E402
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluate  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.strategies import compare_strategies, strategy_variants  # noqa: E402
from mlxpref.training.step_report import StepReport  # noqa: E402
from mlxpref.training.trainer import Trainer  # noqa: E402

__all__ = ["METHODS", "Plan", "Point", "Result", "Sizes", "add_bias", "run", "stages_of"]

METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "hard": ({"reward": "hard"},),
    "naive soft": ({"reward": f"{Path(__file__).parent / 'naive_soft.py'}:naive_soft"},),
    "soft": ({},),
    "brier": ({"reward": "brier"},),
    "soft, without thinking": ({"think": False},),
    "soft, read too": ({"read_weight": 1.0},),
    "soft, agreement": ({"agreement": 0.5},),
    "soft, listener": ({"listener_weight": 0.5},),
    "rejection": ({"method": "rejection"},),
    "rejection, then soft": ({"method": "rejection"}, {}),
}
"""The settings of each method, in one stage or several that share its steps."""
_TEST_SEED = 6
"""Of test pairs that are looked at here only."""
_EVERY = 10
"""Steps between two points of a curve."""


@dataclass(frozen=True)
class Plan:
    """What a run is: its method, the nats by which the judge favours the first image, its seed, and its steps."""

    method: str
    bias: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Point:
    """The greedy judge after so many steps, and the rollouts and seconds of training until then.

    `reward`, `sampled` (the share that agrees with the labels) and `tokens` are means over the rollouts since the last
    point, None before the first step and without thinking.
    """

    step: int
    seconds: float
    reward: float | None
    sampled: float | None
    tokens: float | None
    accuracy: float
    complete: float | None
    facts: float | None
    verdicts: float | None


@dataclass(frozen=True)
class Result:
    """What a run came to; `written` of greedy completions, `sampled` of sampled ones, `seconds` of training alone."""

    method: str
    bias: float
    seed: int
    steps: int
    accuracy: float
    select: float
    held_out: float
    four: float
    at_once: float
    both_orders: float
    position_consistency: float
    ece: float
    written: dict[str, Any]
    sampled: dict[str, Any]
    seconds: float
    curve: list[Point] = field(repr=False)


@dataclass(frozen=True)
class Sizes:
    """How many pairs a run is measured with: at its points, at its end, and on other splits."""

    points: int = 80
    test: int = 300
    others: int = 150


STANDARD = Sizes()


def stages_of(plan: Plan) -> list[TrainSettings]:
    """The settings of a plan's stages: the demo's, with what its method changes.

    By these nothing else is trained, and nothing holds the policy to its reference.
    """
    stages = METHODS[plan.method]
    return [demo_settings(**({"seed": plan.seed, "steps": plan.steps // len(stages)} | stage)) for stage in stages]


def add_bias(vlm: VLM, nats: float) -> None:
    """Give the model a head that adds nats to the logit of the first image's label; its weights are in float32."""
    weight = vlm.decoder.embed_tokens.weight
    vlm.language_model.lm_head = head = nn.Linear(weight.shape[1], weight.shape[0])
    first = mx.array(vlm.tokenizer.label_ids[0])
    head.weight, head.bias = weight, mx.zeros(weight.shape[0]).at[first].add(nats)
    vlm.language_model.args.tie_word_embeddings = False


def loaded(bias: float, settings: TrainSettings) -> VLM:
    """The demo judge, leaning to the first image by so many nats."""
    vlm = load_vlm(JUDGE, settings.max_pixels, mx.float32)
    if bias:
        add_bias(vlm, bias)
    return vlm


def run(plan: Plan, sizes: Sizes = STANDARD) -> Result:
    """Train the demo judge as planned, and measure it."""
    stages = stages_of(plan)
    exam = Exam(loaded(plan.bias, stages[0]), stages[0])
    curve = [exam.point(0, 0.0, [], sizes.points)]
    seconds, recent, started = 0.0, list[StepReport](), time.perf_counter()
    for step, (vlm, report) in enumerate(_steps(plan, stages), start=1):
        seconds += time.perf_counter() - started
        recent.append(report)
        if step % _EVERY == 0 or step == plan.steps:
            exam = Exam(vlm, stages[-1])
            curve.append(exam.point(step, round(seconds, 2), recent, sizes.points))
            recent = []
        started = time.perf_counter()
    return Result(**vars(plan), **exam.end(sizes), seconds=round(seconds, 1), curve=curve)


def _steps(plan: Plan, stages: list[TrainSettings]) -> Iterator[tuple[VLM, StepReport]]:
    """The steps of all stages with the judge that learns; a stage goes on from the adapter of the one before."""
    weights: dict[str, mx.array] | None = None
    for settings in stages:
        vlm = loaded(plan.bias, settings)  # a trainer wants a judge without an adapter
        # Every seed has pictures of its own, the same for all methods.
        data = demo_preferences("train", settings.limit, plan.seed)
        for report in Trainer(vlm, data, settings, start=weights).steps():
            yield vlm, report
        weights = adapter_weights(vlm.model)


class Exam:
    """What a judge in training is measured by."""

    def __init__(self, vlm: VLM, settings: TrainSettings) -> None:
        self._judge = Judge(
            vlm,
            JudgeSettings(
                think=settings.think, max_tokens=settings.max_tokens, max_pixels=settings.max_pixels, rows=settings.rows
            ),
        )

    def point(self, step: int, seconds: float, reports: list[StepReport], pairs: int) -> Point:
        """A point of the curve, greedily."""
        evaluation = self._evaluated("test", pairs)
        truth = self._written(evaluation, pairs).truth
        thinks = reports and self._judge.settings.think
        return Point(
            step,
            seconds,
            float(np.mean([r.reward for r in reports])) if reports else None,
            float(np.mean([r.accuracy for r in reports])) if thinks else None,
            sum(r.tokens for r in reports) / sum(len(r.rollouts) for r in reports) if thinks else None,
            evaluation.metrics.accuracy,
            truth.complete,
            truth.facts,
            truth.verdicts,
        )

    def end(self, sizes: Sizes) -> dict[str, Any]:
        """The fields of a result that are measured at its end."""
        spec, think = EvaluationSpec("demo", "test"), self._judge.settings.think
        both = strategy_variants(("soft", "select"), [1], [think])  # of the same completions
        test = demo_preferences("test", sizes.test, _TEST_SEED)
        greedy, select = (row.evaluation for row in compare_strategies(self._judge, test, spec, both).rows)
        sampled = self._evaluated("test", sizes.others, samples=2)
        metrics = greedy.metrics
        return {
            "accuracy": metrics.accuracy,
            "select": select.metrics.accuracy,
            "held_out": self._evaluated("heldout", sizes.others).metrics.accuracy,
            "four": self._evaluated("four", sizes.others).metrics.accuracy,
            "at_once": self._evaluated("test", sizes.test, think=False).metrics.accuracy,
            "both_orders": metrics.both_orders_accuracy,
            "position_consistency": metrics.position_consistency,
            "ece": metrics.ece,
            "written": self._written(greedy, sizes.test).to_json(),
            "sampled": self._written(sampled, sizes.others).to_json(),
        }

    def _evaluated(self, split: str, pairs: int, **changes: Any) -> Evaluation:
        judge = replace(self._judge, settings=replace(self._judge.settings, **changes))
        return evaluate(judge, demo_preferences(split, pairs, _TEST_SEED), EvaluationSpec("demo", split))

    def _written(self, evaluation: Evaluation, pairs: int) -> Writing:
        return written_about(demo_pairs("test", pairs, _TEST_SEED), evaluation.verdicts)
