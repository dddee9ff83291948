"""The log of a training run as columns, and what came of the run in words and numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxpref.report.html import Dots, Scale
from mlxpref.text import plain

__all__ = ["PHASES", "FirstLast", "MetricChange", "RunLog", "format_number", "number", "size_of"]

Record = dict[str, Any]

PHASES = {
    "rollout_seconds": "writing",
    "score_seconds": "scoring",
    "update_seconds": "updating",
    "evaluation_seconds": "held-out evaluation",
}
"""Where the seconds of a step go, in the order of their time."""
_ENDS = 10
"""Of how many steps at either end means are compared."""
_MOST_PARTS = 20
_MOST_DOTS = 200
"""How many parts of a reward are told, and how many held-out evaluations are drawn."""
_HUGE = 1e100


@dataclass(frozen=True)
class FirstLast:
    """The means of a curve's first and last `count` finite values, with their standard errors."""

    count: int
    first: float
    last: float
    first_error: float
    last_error: float

    @property
    def error(self) -> float:
        """The standard error of the change."""
        return math.hypot(self.first_error, self.last_error)


@dataclass(frozen=True)
class MetricChange:
    """One row of the table of what changed, in words."""

    name: str
    first: str
    last: str
    change: str


class RunLog:
    """The lines of log.jsonl in the order of their steps; of a step with several lines, what the later ones say.

    A number that is missing, null, too large or none at all is NaN.
    """

    def __init__(self, lines: Sequence[Record]) -> None:
        by_step: dict[float, Record] = {}
        for line in lines:
            step = number(line.get("step"))
            by_step[step] = by_step.get(step, {}) | line
        self.steps = sorted(step for step in by_step if math.isfinite(step))
        self.records = [by_step[step] for step in self.steps]

    @property
    def ends(self) -> int:
        """Of how many steps at either end means are compared."""
        return min(_ENDS, max(1, len(self.steps) // 2))

    def column(self, *names: str) -> list[float]:
        """The numbers of a field, or of a field of a field, one a step."""
        return [number(_at(record, names)) for record in self.records]

    def reward_parts(self) -> dict[str, list[float]]:
        """The columns of what the reward was made of, if of more than one part; at most `_MOST_PARTS`."""
        parts = [part for record in self.records if isinstance(part := record.get("reward_parts"), dict)]
        names = list(dict.fromkeys(name for part in parts for name in part))
        if len(names) < 2:
            return {}
        return {f"part: {plain(name)[:60]}": self.column("reward_parts", name) for name in names[:_MOST_PARTS]}

    def held_out(self, name: str) -> Dots:
        """A metric of the held-out evaluations, with its interval where there is one."""
        values = self.column("held_out", name)
        low, high = (self.column("held_out", name + end) for end in ("_low", "_high"))
        rows = [row for row in zip(self.steps, values, low, high, strict=True) if math.isfinite(row[1])]
        rows = rows[:: -max(1, math.ceil(len(rows) / _MOST_DOTS))][::-1]  # thinned so that the last one stays
        return Dots(*([row[i] for row in rows] for i in range(4)))

    def not_finite(self) -> list[float]:
        """The steps that changed nothing because loss or gradient was not finite, and not as nothing was taught."""
        rows = zip(self.steps, self.column("updated"), self.column("loss"), self.column("grad_norm"), strict=True)
        return [step for step, updated, loss, norm in rows if updated == 0 and not math.isfinite(loss + norm)]

    def headlines(self) -> list[str]:
        """What came of the run, in words."""
        lines = self._held_out_lines()
        changes = []
        means: list[tuple[str, str, Scale]] = [
            ("the mean reward", "reward", "number"),
            ("the share of rollouts that agree with people", "accuracy", "share"),
        ]
        for words, name, scale in means:
            if (ends := self.ends_of(self.column(name))) and len(self.steps) > 1:
                change = f"{words} went from {format_number(ends.first, scale)} to {format_number(ends.last, scale)}"
                unclear = ends.count > 1 and abs(ends.last - ends.first) < 2 * ends.error
                changes.append(change + (" (within two standard errors: perhaps by chance)" if unclear else ""))
        if changes:
            lines.append(f"From the first {_steps(self.ends)} to the last, {' and '.join(changes)}.")
        return lines

    def facts(self) -> list[tuple[str, str]]:
        """What the run did and cost, as names and values."""
        if not self.steps:
            return []
        planned, tokens = number(self.records[-1].get("steps")), _sum(self.column("tokens"))
        skipped, groups = _sum(self.column("skipped")), _sum(self.column("groups"))
        peak = max((peak for peak in self.column("peak_bytes") if peak > 0), default=0)
        updated = self.column("updated")
        kept = updated.count(0)
        facts = [
            ("steps", f"{self.steps[-1]:g}" + (f" of {planned:g}" if planned > 0 else "")),
            ("time", _duration(_sum(*map(self.column, PHASES)))),
            ("of it held-out evaluation", _duration(_sum(self.column("evaluation_seconds")))),
            ("tokens written", f"{tokens:,.0f}" if tokens else ""),
            ("tokens a second of writing", format_number(tokens / (_sum(self.column("rollout_seconds")) or math.nan))),
            ("most memory", size_of(peak) if peak else ""),
            ("groups that taught nothing", f"{skipped:,.0f} of {groups:,.0f}" if groups else ""),
            ("steps without update", f"{kept} of {len(updated)}"),
            ("of them not finite", str(len(self.not_finite())) if kept else ""),
        ]
        return [(name, value) for name, value in facts if value]

    def changes(self) -> list[MetricChange]:
        """The means of the first and the last steps, with standard errors, of what should move or should not."""
        if len(self.steps) < 2:
            return []
        rows: list[tuple[str, list[float], Scale]] = [("reward", self.column("reward"), "number")]
        rows += [(name, column, "number") for name, column in self.reward_parts().items()]
        rows += [
            ("rollouts that agree", self.column("accuracy"), "share"),
            ("right form", self.column("format_rate"), "share"),
            ("mass on the labels", self.column("label_mass"), "share"),
            ("ran out of tokens", self.column("truncated"), "share"),
            ("entropy", self.column("entropy"), "number"),
        ]
        found = [(name, self.ends_of(column), scale) for name, column, scale in rows]
        return [_change(name, ends, scale) for name, ends, scale in found if ends]

    def ends_of(self, values: Sequence[float]) -> FirstLast | None:
        """Means over the two ends of a column; None where nothing in it is finite."""
        finite = np.array([value for value in values if math.isfinite(value)])
        if not len(finite):
            return None
        count = min(_ENDS, max(1, len(finite) // 2))
        first, last = finite[:count], finite[-count:]
        errors = [float(end.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0 for end in (first, last)]
        return FirstLast(count, float(first.mean()), float(last.mean()), *errors)

    def _held_out_lines(self) -> list[str]:
        """The best held-out accuracy with its interval, and where it stands among the others."""
        held = self.held_out("accuracy")
        if not held.steps:
            return []
        count, best = len(held.steps), max(range(len(held.steps)), key=held.values.__getitem__)
        if count == 1:
            return [f"Held-out accuracy was {self._measured(held, 0)}."]
        first, last = (f"{format_number(held.values[i], 'share')} after step {held.steps[i]:g}" for i in (0, -1))
        return [
            f"Held-out accuracy was at best {self._measured(held, best)}; it was {first} and {last}. As the best of "
            f"{count} measurements it flatters a little."
        ]

    def _measured(self, dots: Dots, place: int) -> str:
        """A held-out accuracy in words, with its interval."""
        low, high, step = dots.low[place], dots.high[place], dots.steps[place]
        pairs = self.column("held_out", "pairs")[self.steps.index(step)]
        about = (
            [f"95 % interval {format_number(low, 'share')} to {format_number(high, 'share')}"]
            if math.isfinite(low + high)
            else []
        )
        about += [f"{pairs:,.0f} pairs"] if pairs > 0 else []
        return f"{format_number(dots.values[place], 'share')} after step {step:g}" + (
            f" ({', '.join(about)})" if about else ""
        )


def number(value: object) -> float:
    """A number as it was logged; NaN for what is none, or so large that arithmetic with it fails."""
    return float(value) if isinstance(value, int | float) and abs(value) < _HUGE else math.nan


def format_number(value: float, scale: Scale = "number") -> str:
    """A number as a person reads it; nothing for NaN."""
    if not math.isfinite(value):
        return ""
    if scale == "share":
        return f"{100 * value:.3g}\u00a0%" if abs(value) >= 1 else f"{100 * value:.1f}\u00a0%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _at(value: Any, names: Sequence[str]) -> Any:
    """A value of a table within a table; None where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _sum(*columns: Sequence[float]) -> float:
    return math.fsum(value for column in columns for value in column if math.isfinite(value))


def size_of(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _change(name: str, ends: FirstLast, scale: Scale) -> MetricChange:
    unit = 100 if scale == "share" else 1
    change, error = unit * (ends.last - ends.first), unit * ends.error
    if error:  # as many places as its two leading digits take, and no more of the change
        places = min(12, max(0, 1 - math.floor(math.log10(error))))
        shown = f"{change:+.{places}f} ± {error:.{places}f}"
    else:
        shown = f"{change:+.3g}" if change else "0"
    return MetricChange(
        name, format_number(ends.first, scale), format_number(ends.last, scale), shown.replace("-", "−")
    )


def _steps(count: int) -> str:
    return f"{count} steps" if count > 1 else "step"


def _duration(seconds: float) -> str:
    """Seconds as a person reads them; nothing for none."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds > 0 else ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
