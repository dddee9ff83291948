"""The report of a step: a line of log.jsonl, and its rollouts."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.config import TrainSettings
from mlxpref.distributed import ProcessGroup
from mlxpref.engine.image_features import FeatureStore
from mlxpref.judge.evaluation import Evaluation
from mlxpref.preferences import image_name
from mlxpref.text import format_duration
from mlxpref.training.group_rewards import GroupRewards
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup

_SUMMED = (
    "updated", "tokens", "skipped", "groups", "resampled", "left_out", "rollout_seconds", "score_seconds",
    "update_seconds", "evaluation_seconds", "vision_runs",
)  # fmt: skip
"""The fields of a report whose totals the log has."""


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout as in rollouts.jsonl; `first` and `second` are names by `image_name`."""

    step: int
    prompt: str
    first: str
    second: str
    y: float
    text: str
    p_first: float | None
    label_mass: float | None
    reward: float
    advantage: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The report of one step: shares from 0 to 1, seconds, natural logarithms; NaN where nothing was measured.

    Of all rollouts, with resampled groups: the means `reward` and `reward_parts`, its unweighted parts; `accuracy`, the
    share of rollouts that agree with the majority; `truncated`, the share that ran out of tokens; `entropy` of the
    policy a token, the mean of minus its tokens' log-probabilities; `kept`, the share that rejection sampling learns.
    `read_accuracy` is the share of the answers read at once that agree with the majority, where these are trained, too.
    `mismatch` is the mean distance between the log-probabilities of sampling and of scoring, `rerouted` the share of
    the experts that the update would not have chosen for the tokens that were written with them, `skipped` the number
    of `groups` whose rollouts have no gradient, `resampled` that of replaced groups, `left_out` that of comparisons
    with an image that could not be read. The seconds of rollout, score (the reference), update and evaluation add up to
    `seconds`; `tokens_per_second` is of the rollout alone. `held_out` are the metrics of `eval` on the held-out
    preferences. Of several processes, this one sent `sent_bytes` in the step and spent `wait_seconds` of it in
    exchanges, and ran `vision_runs` images through the vision tower.
    """

    step: int
    steps: int
    reward: float
    reward_parts: Mapping[str, float]
    accuracy: float
    format_rate: float
    label_mass: float
    truncated: float
    entropy: float
    kept: float
    loss: float
    grad_norm: float
    kl: float
    clip_fraction: float
    mismatch: float
    read_accuracy: float
    rerouted: float
    skipped: int
    resampled: int
    groups: int
    left_out: int = 0
    updated: bool
    tokens: int
    tokens_per_second: float
    learning_rate: float
    rollout_seconds: float
    score_seconds: float
    update_seconds: float
    evaluation_seconds: float
    seconds: float
    seconds_left: float = 0.0
    peak_bytes: int
    held_out: Mapping[str, float] | None
    sent_bytes: int
    wait_seconds: float
    vision_runs: int
    rollouts: tuple[RolloutRecord, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        held_out = f", held-out accuracy {self.held_out['accuracy']:.3f}" if self.held_out else ""
        figures = f"reward {self.reward:.3f}, accuracy {self.accuracy:.3f}{held_out}, {format_duration(self.seconds)}"
        return f"StepReport(step {self.step} of {self.steps}: {figures})"

    def to_json(self) -> dict[str, Any]:
        """Return the report as a line of log.jsonl, with null for numbers that are not finite."""
        return {f.name: json_value(getattr(self, f.name)) for f in fields(self) if f.name != "rollouts"}


def measured_shares(
    groups: Sequence[RolloutGroup], rewards: GroupRewards, mix: RewardMix, settings: TrainSettings
) -> dict[str, Any]:
    """Return a report's means and sums over all groups of a step."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    logprobs = [logprob for rollout in rollouts for logprob in rollout.logprobs]
    labels_are_read = mix.form == "choice"
    return {
        "reward": float(rewards.rewards.mean()),
        "reward_parts": {name: float(values.mean()) for name, values in rewards.components.items()},
        "accuracy": float(rewards.correct.mean()),
        "format_rate": float(rewards.well_formed.mean()),
        "label_mass": float(np.mean([r.verdict.label_mass for r in rollouts])) if labels_are_read else math.nan,
        "truncated": float(np.mean([group.truncated for group in groups])),
        "entropy": -float(np.mean(logprobs)) if logprobs else math.nan,
        "kept": float((rewards.advantages > 0).mean()) if settings.method == "rejection" else math.nan,
        "tokens": sum(rollout.verdict.tokens for rollout in rollouts),
    }


def rollout_records(
    step: int, groups: Sequence[RolloutGroup], rewards: GroupRewards, mix: RewardMix
) -> tuple[RolloutRecord, ...]:
    """Return the records of all rollouts of groups."""
    return tuple(
        RolloutRecord(
            step=step,
            prompt=group.comparison.prompt,
            first=first,
            second=second,
            y=group.comparison.y,
            text=verdict.text,
            p_first=verdict.p_first(mix.strategy),
            label_mass=verdict.label_mass if mix.form == "choice" else None,
            reward=float(rewards.rewards[i, j]),
            advantage=float(rewards.advantages[i, j]),
        )
        for i, group in enumerate(groups)
        for first, second in [(image_name(group.comparison.first), image_name(group.comparison.second))]
        for j, verdict in enumerate(group.verdicts)
    )


class StepMeter:
    """Measures a step: the seconds of its phases, its memory, its vision, and this process's exchanges with others."""

    def __init__(self, processes: ProcessGroup, features: FeatureStore) -> None:
        mx.reset_peak_memory()
        self._processes, self._features = processes, features
        self._before = processes.sent_bytes, processes.wait_seconds, features.runs
        self._last = time.perf_counter()
        self._seconds = dict.fromkeys(("rollout", "score", "update", "evaluation"), 0.0)

    def end_phase(self, phase: str) -> None:
        """Count the time since the last phase's end as this one's, and free cached memory."""
        mx.clear_cache()  # the next phase needs other sizes
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def fields(self, tokens: int) -> dict[str, Any]:
        """Return this meter's fields of a report, for a step of `tokens` tokens."""
        seconds = {f"{phase}_seconds": round(seconds, 4) for phase, seconds in self._seconds.items()}
        sent_bytes, wait_seconds, vision_runs = self._before
        return seconds | {
            "seconds": round(sum(seconds.values()), 4),
            "tokens_per_second": tokens / seconds["rollout_seconds"] if tokens else math.nan,
            "peak_bytes": int(mx.get_peak_memory()),
            "sent_bytes": self._processes.sent_bytes - sent_bytes,
            "wait_seconds": round(self._processes.wait_seconds - wait_seconds, 4),
            "vision_runs": self._features.runs - vision_runs,
        }


def with_totals(totals: Mapping[str, float], report: StepReport) -> dict[str, float]:
    """The totals of a run up to a report's step, from those before it: sums, and the peak of memory."""
    sums = {name: totals.get(name, 0) + getattr(report, name) for name in _SUMMED}
    rounded = {name: round(value, 4) if isinstance(value, float) else int(value) for name, value in sums.items()}
    return rounded | {"peak_bytes": max(totals.get("peak_bytes", 0), report.peak_bytes)}


def held_out_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return a report's field `held_out`."""
    return asdict(evaluation.metrics) | {"unreadable": evaluation.unreadable}


def json_value(value: Any) -> Any:
    """Return a value as JSON has it, with null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: json_value(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
