"""Reliability: whether people agree as often as a judge's probabilities say, in bins and as a drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.errors import ConfigError
from mlxpref.files import replacing
from mlxpref.judge.metrics import Floats, calibration_error
from mlxpref.report.curves import COLOURS

__all__ = ["FORMATS", "Bins", "Panel", "draw_reliability", "reliability"]

FORMATS = (".svg", ".png")  # the endings of drawings
_BINS = 10
_MAX_DOT = 90.0  # square points
_SIZE = (2.5, 2.9)  # inches of a panel


@dataclass(frozen=True)
class Bins:
    """Equally wide bins of probability (B,): how many fall in each, their mean, and the mean share of people.

    Means are NaN where nothing falls.
    """

    count: Floats
    p: Floats
    share: Floats


@dataclass(frozen=True)
class Panel:
    """What one part of a drawing shows: preferences for a (N,), and the shares of people who prefer a (N,)."""

    title: str
    p: Floats
    p_people: Floats

    @property
    def sides(self) -> tuple[Floats, Floats]:
        """Both sides of every pair (2 N,), so that nothing depends on which image is called a."""
        return np.concatenate([self.p, 1 - self.p]), np.concatenate([self.p_people, 1 - self.p_people])


def reliability(p: Floats, p_people: Floats, bins: int = _BINS) -> Bins:
    """Probabilities (N,) and shares of people (N,) in equally wide bins, 1 in the last of them."""
    place = np.minimum((p * bins).astype(int), bins - 1)
    count, p_sum, people_sum = (np.bincount(place, each, bins) for each in (np.ones_like(p), p, p_people))
    with np.errstate(invalid="ignore"):
        return Bins(count.astype(np.float64), p_sum / count, people_sum / count)


def draw_reliability(panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Draw panels, `columns` in a line, into a file whose name ends as one of FORMATS.

    A dot stands where a bin's mean probability and its share of people meet: on the diagonal people agree as often as
    the judge says. Below are the counts. ConfigError for another ending or where the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lines = -(-len(panels) // columns)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path}: a drawing's name ends with {' or '.join(FORMATS)}")
    # Text stays text, so that it can be found; without a fixed salt no two drawings would be the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxpref", "font.size": 8}):
        figure = Figure(figsize=(_SIZE[0] * columns + 0.4, _SIZE[1] * lines + 0.3), layout="constrained")
        cells: Any = figure.subfigures(lines, columns, squeeze=False)
        for cell, panel in zip(cells.flat, panels, strict=False):
            _draw_panel(cell, panel)
        figure.supxlabel("probability that an image is preferred; dots as large as their bin", fontsize=8)
        figure.supylabel("share of people who prefer it", fontsize=8)
        try:
            with replacing(path) as temporary:
                figure.savefig(temporary, format=kind[1:], dpi=150, metadata={"Date": None} if kind == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"{path}: the drawing cannot be written there ({error.strerror})") from error


def _draw_panel(cell: Any, panel: Panel) -> None:
    above, below = cell.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    sides = panel.sides
    bins = reliability(*sides)
    above.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle="--", zorder=1)
    filled = bins.count > 0
    above.vlines(bins.p[filled], bins.p[filled], bins.share[filled], color=COLOURS[2], linewidth=1, zorder=2)
    size = 6 + _MAX_DOT * bins.count[filled] / bins.count.max()
    above.scatter(bins.p[filled], bins.share[filled], s=size, color=COLOURS[0], alpha=0.85, linewidth=0, zorder=3)
    above.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), yticks=(0, 0.5, 1), xticks=(0, 0.5, 1))
    above.set_title(f"{panel.title}\ncalibration error {calibration_error(*sides):.3f}", fontsize=8)
    middles = (np.arange(len(bins.count)) + 0.5) / len(bins.count)
    bars = below.bar(middles, bins.count, width=0.9 / len(bins.count), color=COLOURS[0], alpha=0.5, linewidth=0)
    below.bar_label(bars, [f"{count:.0f}" if count else "" for count in bins.count], fontsize=5.5, padding=1)
    below.set(yticks=(), ylabel="images", ylim=(0, 1.25 * bins.count.max()))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.yaxis.label.set_size(7)
    above.grid(alpha=0.25)
