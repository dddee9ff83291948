"""The log of a training run: its columns, its changes from the first to the last steps, and its cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxpref.report.curves import Dots
from mlxpref.text import format_bytes, format_duration, plain

Record = dict[str, Any]

PHASES = {
    "rollout_seconds": "rollouts",
    "score_seconds": "scoring",
    "update_seconds": "update",
    "evaluation_seconds": "held-out evaluation",
}  # the parts of a step's seconds, in the order of their time
_COMPARED = 10  # steps at either end
_MAX_PARTS = 5  # of a reward, with the whole


@dataclass(frozen=True)
class FirstLast:
    """The means of the first and the last finite values of a column, and the standard error of their difference."""

    first: float
    last: float
    error: float


@dataclass(frozen=True)
class MetricChange:
    """One row of the table of changes, in words."""

    name: str
    first: str
    last: str
    change: str


class RunLog:
    """The lines of log.jsonl in the order of their steps; later lines of a step override earlier ones.

    A missing, null or unusable value is NaN.
    """

    def __init__(self, lines: Sequence[Record]) -> None:
        by_step: dict[float, Record] = {}
        for line in lines:
            step = number(line.get("step"))
            by_step[step] = by_step.get(step, {}) | line
        self.steps = sorted(step for step in by_step if math.isfinite(step))
        self.records = [by_step[step] for step in self.steps]

    def column(self, *names: str) -> list[float]:
        """The numbers of a field or a nested field, one a step."""
        values: list[Any] = list(self.records)
        for name in names:
            values = [value.get(name) if isinstance(value, dict) else None for value in values]
        return [number(value) for value in values]

    @property
    def _totals(self) -> Record | None:
        """The totals of a log of every few steps; None of one by an earlier version, which has all steps."""
        totals = self.records[-1].get("totals") if self.records else None
        return totals if isinstance(totals, dict) else None

    def total(self, *names: str) -> float:
        """The sum of fields over all steps of the run."""
        if self._totals is not None:
            values = [number(self._totals.get(name)) for name in names]
        else:
            values = [value for name in names for value in self.column(name)]
        return math.fsum(value for value in values if math.isfinite(value))

    def reward_parts(self) -> dict[str, list[float]]:
        """The columns of the reward's parts, if it has several."""
        parts = [part for record in self.records if isinstance(part := record.get("reward_parts"), dict)]
        names = list(dict.fromkeys(name for part in parts for name in part))[:_MAX_PARTS]
        return {f"part: {plain(n)[:60]}": self.column("reward_parts", n) for n in names} if len(names) > 1 else {}

    def held_out(self, name: str) -> Dots:
        """A metric of the held-out evaluations, with its interval where there is one."""
        columns = [self.column("held_out", name + end) for end in ("", "_low", "_high")]
        rows = [row for row in zip(self.steps, *columns, strict=True) if math.isfinite(row[1])]
        return Dots(*([row[i] for row in rows] for i in range(4)))

    def first_last(self, values: Sequence[float]) -> FirstLast | None:
        """The means over both ends of a column, of ten values at most; None if no value is finite."""
        finite = np.array([value for value in values if math.isfinite(value)])
        if not len(finite):
            return None
        count = min(_COMPARED, max(1, len(finite) // 2))
        first, last = finite[:count], finite[-count:]
        variance = float(first.var(ddof=1) + last.var(ddof=1)) / count if count > 1 else 0.0
        return FirstLast(float(first.mean()), float(last.mean()), math.sqrt(variance))

    def changes(self) -> list[MetricChange]:
        """The table of changes: first and last means, and the standard error of their difference."""
        if len(self.steps) < 2:
            return []
        numbers = {"reward": self.column("reward"), **self.reward_parts(), "entropy": self.column("entropy")}
        shares = {
            "rollouts that agree with people": self.column("accuracy"),
            "answers read at once that agree with people": self.column("read_accuracy"),
            "held-out pairs that agree with people": self.column("held_out", "accuracy"),
            "right in both orders, and learned": self.column("kept"),
            "right form": self.column("format_rate"),
            "mass on the labels": self.column("label_mass"),
            "ran out of tokens": self.column("truncated"),
        }
        rows = [(name, self.first_last(values), False) for name, values in numbers.items()]
        rows += [(name, self.first_last(values), True) for name, values in shares.items()]
        return [_change(name, ends, share) for name, ends, share in rows if ends]

    def facts(self) -> list[tuple[str, str]]:
        """The run's work and cost, as names and values."""
        if not self.steps:
            return []

        total, step_count = self.total, number(self.records[-1].get("steps"))
        tokens, seconds = total("tokens"), total("rollout_seconds")
        peak = np.nanmax([0.0, *self.column("peak_bytes"), *self.column("totals", "peak_bytes")])
        idle = self.column("updated").count(0) if self._totals is None else self.steps[-1] - total("updated")
        facts = {
            "steps": f"{self.steps[-1]:g}" + (f" of {step_count:g}" if step_count > 0 else ""),
            "time": format_duration(total(*PHASES)),
            "tokens written": f"{tokens:,.0f}" if tokens else "",
            "tokens a second": format_number(tokens / seconds) if tokens and seconds else "",
            "peak memory": format_bytes(peak) if peak else "",
            "groups without a signal": f"{total('skipped'):,.0f} of {total('groups'):,.0f}" if total("groups") else "",
            "steps without an update": f"{idle:g}",
        }
        return [(name, value) for name, value in facts.items() if value]


def number(value: object) -> float:
    """A logged number as a float; NaN for anything else, or where arithmetic would overflow."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan


def format_number(value: float, share: bool = False) -> str:
    """A number as a person reads it, a share in percent; nothing for NaN."""
    number = f"{100 * value:.1f}\u00a0%" if share else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return number if math.isfinite(value) else ""


def _change(name: str, ends: FirstLast, share: bool) -> MetricChange:
    unit = 100 if share else 1
    change, error = unit * (ends.last - ends.first), unit * ends.error
    # As many places as the two leading digits of the error take.
    places = min(12, max(0, 1 - math.floor(math.log10(error)))) if error else 0
    text = f"{change:+.{places}f} ± {error:.{places}f}" if error else f"{change:+.3g}"
    return MetricChange(name, format_number(ends.first, share), format_number(ends.last, share), text)
