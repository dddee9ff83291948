"""The curves of a training run, each with what is written around it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlxpref.report.html import COLOURS, Dots, Scale, curve_svg
from mlxpref.report.run_log import PHASES, RunLog, format_number, number

__all__ = ["Figure", "Key", "figures"]

Record = dict[str, Any]

_PARTS = len(COLOURS) - 1
"""How many parts of a reward are drawn beside the whole."""
_SIZE = (4.6, 2.5)
_SPREAD = 50
"""How many times the median the greatest value is where a logarithmic scale is taken, if the curve may have one."""


@dataclass(frozen=True)
class Key:
    """What a curve's colour means, and its mean over the first and the last steps."""

    name: str
    colour: str
    dot: bool
    told: str


@dataclass(frozen=True)
class Figure:
    """A drawing with what is written around it."""

    title: str
    note: str
    drawing: Any
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class _Plot:
    title: str
    note: str
    curves: Mapping[str, Sequence[float]]
    scale: Scale = "number"
    dots: Mapping[str, Dots] = field(default_factory=dict)
    stacked: bool = False
    planned: bool = False
    """Whether the values follow a plan, so that no mean is wanted."""


def figures(log: RunLog, settings: Record) -> tuple[list[tuple[str, list[Figure]]], list[str], int]:
    """Curves under their headings, the titles of those that are zero throughout, and over how many steps means run.

    What was not logged has no figure.
    """
    smoothing = max(5, len(log.steps) // 40)
    groups, zero = [], []
    for heading, plots in (
        ("What was learned", _learned(log)),
        ("How the judge moved", _moved(log)),
        ("What it cost", _cost(log, number(settings.get("group")))),
    ):
        drawn = []
        for plot in plots:
            curves = {name: values for name, values in plot.curves.items() if any(map(math.isfinite, values))}
            if plot.stacked:
                curves = {name: values for name, values in curves.items() if np.nansum(values)}
            dots = {name: dots for name, dots in plot.dots.items() if dots.steps}
            if any(value and math.isfinite(value) for values in curves.values() for value in values) or dots:
                drawn.append(_figure(log, replace(plot, curves=curves, dots=dots), smoothing))
            elif curves:
                zero.append(plot.title)
        if drawn:
            groups.append((heading, drawn))
    return groups, zero, smoothing


def _learned(log: RunLog) -> list[_Plot]:
    parts = log.reward_parts()
    drawn = dict(list(parts.items())[:_PARTS])
    missing = f" {len(parts) - _PARTS} more parts are in log.jsonl." if len(parts) > _PARTS else ""
    return [
        _Plot("Reward", f"The mean of a step's rollouts.{missing}", {"reward": log.column("reward")} | drawn),
        _Plot(
            "Agreement with people",
            "Rollouts are samples in one order, of pairs that are learned from; held-out pairs are judged in both "
            "orders. A bar is a 95 % interval.",
            {"rollouts": log.column("accuracy")},
            "share",
            {"held-out pairs": log.held_out("accuracy")},
        ),
        _Plot(
            "Held-out: how steady, how calibrated",
            "The same image preferred in both orders, and the calibration error (ece), which should be small.",
            {},
            "share",
            {"position consistency": log.held_out("position_consistency"), "ece": log.held_out("ece")},
        ),
        _Plot(
            "Form",
            "Rollouts in the right form, and the probability that the two labels have where the answer is read.",
            {
                "right form": log.column("format_rate"),
                "mass on the labels": log.column("label_mass"),
                "ran out of tokens": log.column("truncated"),
            },
            "share",
        ),
    ]


def _moved(log: RunLog) -> list[_Plot]:
    taught = _ratio(log.column("skipped"), log.column("groups"))
    plots: list[tuple[str, str, str, str, Scale]] = [
        ("Divergence from the judge without adapter", "KL in nats a token.", "KL", "kl", "number"),
        ("Clipped tokens", "Share of tokens whose ratio was clipped in a step's last update.", "clipped",
         "clip_fraction", "share"),
        ("Entropy", "Near 0 every rollout is the same, and nothing is explored.", "entropy", "entropy", "number"),
        ("Mismatch of sampling and scoring", "Mean distance of a token's two log-probabilities; it should stay small.",
         "mismatch", "mismatch", "log"),
        ("Gradient norm", "Before it is clipped.", "norm", "grad_norm", "log"),
    ]  # fmt: skip
    found = [_Plot(title, note, {name: log.column(column)}, scale) for title, note, name, column, scale in plots]
    return [
        *found,
        _Plot("Learning rate", "", {"learning rate": log.column("learning_rate")}, planned=True),
        _Plot(
            "Groups that taught nothing",
            "No advantage, and nothing left to learn at the answer.",
            {"share": taught},
            "share",
        ),
    ]


def _cost(log: RunLog, group: float) -> list[_Plot]:
    tokens, seconds = log.column("tokens"), {name: log.column(field) for field, name in PHASES.items()}
    speed = log.column("tokens_per_second")
    if not any(map(math.isfinite, speed)):
        speed = _ratio(tokens, seconds["writing"])
    # Of versions that replace no group, none is logged as resampled.
    written = np.array(log.column("groups")) + np.nan_to_num(log.column("resampled"))
    peaks = np.array(log.column("peak_bytes"))
    size, unit = (1e9, "GB") if np.nanmax(np.append(peaks, 0)) >= 1e9 else (1e6, "MB")
    lengths = _ratio(tokens, (group * written).tolist())
    return [
        _Plot("Seconds a step", "Running means, one upon the other.", seconds, stacked=True),
        _Plot("Tokens a second", "Where it falls, the device may be throttled.", {"tokens": speed}),
        _Plot("Tokens a rollout", "", {"tokens": lengths}),
        _Plot(f"Most memory in {unit}", "", {"peak": (peaks / size).tolist()}),
    ]


def _figure(log: RunLog, plot: _Plot, smoothing: int) -> Figure:
    drawing = curve_svg(
        plot.curves,
        "",
        1 if plot.planned else smoothing,
        steps=log.steps,
        dots=plot.dots,
        scale="number" if plot.scale == "log" and not _spread(plot) else plot.scale,
        stacked=plot.stacked,
        legend=False,
        size=_SIZE,
    )
    keys = []
    for place, name in enumerate([*plot.curves, *plot.dots]):
        dots = name in plot.dots
        ends = log.ends_of(plot.dots[name].values if dots else plot.curves[name])
        words = ""
        if ends and dots:
            words = format_number(plot.dots[name].values[-1], plot.scale)
        elif ends:
            first, last = format_number(ends.first, plot.scale), format_number(ends.last, plot.scale)
            words = last if first == last else f"{first} → {last}"
        keys.append(Key(name, COLOURS[place % len(COLOURS)], dots, words))
    return Figure(plot.title, plot.note, drawing, tuple(keys))


def _spread(plot: _Plot) -> bool:
    """Whether values differ so much that only their logarithms can be seen together."""
    positive = [value for values in plot.curves.values() for value in values if value > 0]
    return bool(positive) and max(positive) > _SPREAD * float(np.median(positive))


def _ratio(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    return [a / b if b else math.nan for a, b in zip(upper, lower, strict=True)]
