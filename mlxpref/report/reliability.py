"""Reliability diagrams: whether people agree as often as a judge's probabilities say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.judge.compare_judges import JudgeComparison
from mlxpref.judge.metrics import Floats, calibration_bins, calibration_error
from mlxpref.judge.strategies import StrategyComparison
from mlxpref.report.curves import COLOURS
from mlxpref.report.drawing import drawing

_MAX_COLUMNS = 4
_MAX_DOT = 90.0  # square points
_SIZE = (2.5, 2.9)  # inches of a panel


@dataclass(frozen=True)
class Panel:
    """One panel of a drawing: preferences for a (N,), and the shares of people who prefer a (N,)."""

    title: str
    p: Floats
    p_people: Floats

    @property
    def sides(self) -> tuple[Floats, Floats]:
        """Both sides of every pair (2 N,), so that the choice of a makes no difference."""
        return np.concatenate([self.p, 1 - self.p]), np.concatenate([self.p_people, 1 - self.p_people])


def draw_reliability(panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Draw panels, `columns` in a line, into a file (see `drawing`).

    A dot stands where a bin's mean probability and its share of people meet: on the diagonal people agree as often as
    the judge says. Bars below show the counts.
    """
    lines = -(-len(panels) // columns)
    with drawing(path, (_SIZE[0] * columns + 0.4, _SIZE[1] * lines + 0.3)) as figure:
        cells: Any = figure.subfigures(lines, columns, squeeze=False)
        for cell, panel in zip(cells.flat, panels, strict=False):
            _draw_panel(cell, panel)
        figure.supxlabel("probability that an image is preferred; dots as large as their bin", fontsize=8)
        figure.supylabel("share of people who prefer it", fontsize=8)


def draw_strategies(comparison: StrategyComparison | JudgeComparison, path: Path) -> None:
    """Draw the reliability of every row's probabilities, one column a strategy; scores have no probabilities."""
    if isinstance(comparison, StrategyComparison):
        rows = {str(row.variant): row for row in comparison.rows}
    else:
        rows = {f"{each.name}\n{each.judged.variant}": each.judged for each in comparison if each.judged}
    decided = [p.better != "tie" for p in comparison.preferences]
    p_people = np.array([p.p_people for p in comparison.preferences])[decided]
    panels = [
        Panel(title, np.array([verdict.p_a for verdict in row.evaluation.verdicts])[decided], p_people)
        for title, row in rows.items()
    ]
    strategies = len({row.variant.strategy for row in rows.values()})
    draw_reliability(panels, strategies if strategies > 1 else min(_MAX_COLUMNS, len(panels)), path)


def _draw_panel(cell: Any, panel: Panel) -> None:
    above, below = cell.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    count, p, people = calibration_bins(*panel.sides)  # (B,) each
    filled = count > 0
    p, people = p[filled] / count[filled], people[filled] / count[filled]
    above.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle="--", zorder=1)
    above.vlines(p, p, people, color=COLOURS[2], linewidth=1, zorder=2)
    size = 6 + _MAX_DOT * count[filled] / count.max()
    above.scatter(p, people, s=size, color=COLOURS[0], alpha=0.85, linewidth=0, zorder=3)
    above.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), yticks=(0, 0.5, 1), xticks=(0, 0.5, 1))
    above.set_title(f"{panel.title}\ncalibration error {calibration_error(*panel.sides):.3f}", fontsize=8)
    middles = (np.arange(len(count)) + 0.5) / len(count)
    bars = below.bar(middles, count, width=0.9 / len(count), color=COLOURS[0], alpha=0.5, linewidth=0)
    below.bar_label(bars, [f"{each:.0f}" if each else "" for each in count], fontsize=5.5, padding=1)
    below.set(yticks=(), ylabel="images", ylim=(0, 1.25 * count.max()))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.yaxis.label.set_size(7)
    above.grid(alpha=0.25)
