"""Test-time compute as a curve: a judge's accuracy against the tokens that it writes about a pair."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxpref.judge.compare_judges import JudgeComparison
from mlxpref.judge.compute_curve import ComputePoint, frontier, lines, settings_of_marks
from mlxpref.judge.strategies import StrategyComparison
from mlxpref.report.curves import COLOURS
from mlxpref.report.drawing import drawing

_SIZE = (5.4, 3.3)  # inches of a panel
_FONT, _SMALL = 9, 8.5
_GREY = "#777777"
_SHAPES = "os^Dv*Ph"


def draw_compute(comparison: StrategyComparison | JudgeComparison, path: Path) -> None:
    """Draw the rows of every judge by every strategy as a panel; tools' scores, which write nothing, have none."""
    if isinstance(comparison, StrategyComparison):
        judged = [("", row) for row in comparison.rows]
    else:
        judged = [(each.name, each.judged) for each in comparison if each.judged]
    panels: dict[str, list[ComputePoint]] = {}
    strategies = {row.variant.strategy for _, row in judged}
    for name, row in judged:
        title = ", ".join([*filter(None, [name]), *([row.variant.strategy] if len(strategies) > 1 else [])])
        panels.setdefault(title, []).append(ComputePoint.of(row))
    draw_curves(panels, path)


def draw_curves(panels: Mapping[str, Sequence[ComputePoint]], path: Path) -> None:
    """Draw points as panels with a title, below each other, on the same axes, into a file (see `drawing`).

    Colours are numbers of samples and shapes bounds on their tokens; with one bound, shapes are numbers of samples.
    """
    names = dict.fromkeys(name for panel in panels.values() for name in lines(panel))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    marks = settings_of_marks([point for panel in panels.values() for point in panel])
    shapes = {mark: _SHAPES[place % len(_SHAPES)] for place, mark in enumerate(dict.fromkeys(marks.values()))}
    with drawing(path, (_SIZE[0], _SIZE[1] * len(panels) + 1.1)) as figure:
        every: Any = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, panel) in zip(every, panels.items(), strict=True):
            _draw_panel(axes, panel, colours, {variant: shapes[mark] for variant, mark in marks.items()})
            axes.set_title(title, fontsize=_FONT)
            axes.set_ylabel("accuracy, with 95 % intervals", fontsize=_FONT)
        width = every[0].get_xlim()  # of all panels together
        for axes, panel in zip(every, panels.values(), strict=True):
            _draw_best(axes, panel, width)
        every[-1].set_xlabel("tokens written about a pair, in both orders", fontsize=_FONT)
        drawn = {name: handle for axes in every for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        columns = [
            {name: drawn.pop(name) for name in names},
            {mark: every[0].plot([], [], shape, color=_GREY, markersize=5)[0] for mark, shape in shapes.items()},
            drawn,
        ]
        _add_legend(figure, [column for column in columns if column])


def _add_legend(figure: Any, columns: Sequence[Mapping[str, Any]]) -> None:
    """Explain handles, by their names, in columns below the drawing."""
    from matplotlib.lines import Line2D

    longest = max(map(len, columns))
    blank = Line2D([], [], alpha=0)  # matplotlib fills one column after the other
    entries = [
        (name, each) for column in columns for name, each in [*column.items(), *[("", blank)] * longest][:longest]
    ]
    names, handles = zip(*entries, strict=True)
    figure.legend(handles, names, loc="outside lower center", ncols=len(columns), frameon=False, fontsize=_SMALL)


def _draw_panel(
    axes: Any, points: Sequence[ComputePoint], colours: Mapping[str, str], shapes: Mapping[Any, str]
) -> None:
    """Draw a judge's points: its lines, and across the whole width what writes nothing."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    for name, line in lines(points).items():
        colour = colours[name]
        axes.plot([p.tokens for p in line], [p.accuracy for p in line], color=colour, linewidth=1.6, label=name)
        for p in line:
            axes.vlines(p.tokens, p.low, p.high, color=colour, linewidth=1.2, alpha=0.45)
            axes.plot(p.tokens, p.accuracy, shapes.get(p.variant, "o"), color=colour, markersize=5)
    for p in points:
        if p.tokens == 0:  # it has no place on a logarithmic axis
            axes.axhline(p.accuracy, color=_GREY, linewidth=1.2, linestyle="--", label="no tokens, at once")
            axes.axhspan(p.low, p.high, color=_GREY, alpha=0.1, linewidth=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}\u00a0%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelsize=_SMALL)


def _draw_best(axes: Any, points: Sequence[ComputePoint], width: tuple[float, float]) -> None:
    """Draw behind a judge's points what it reaches with at most so many tokens, from end to end of the axis."""
    left, right = width
    best = frontier(points)
    tokens, accuracy = [max(p.tokens, left) for p in best], [p.accuracy for p in best]
    axes.step(
        [*tokens, right], [*accuracy, accuracy[-1]], where="post", color=COLOURS[4], linewidth=5, alpha=0.3, zorder=0,
        label="best so far",
    )  # fmt: skip
    axes.set_xlim(left, right)
