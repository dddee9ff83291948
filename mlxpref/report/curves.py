"""Curves over steps as inline drawings."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#2a78d6", "#1a936f", "#b3541e", "#8b5fd6", "#a8800c", "#c9417f")  # visible on white and on dark

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, so that the page's own fonts and colours apply to it
    "svg.hashsalt": "mlxpref",  # the same curves become the same drawing
    "font.family": "sans-serif",
    "path.simplify_threshold": 1.0,  # pixels: thousands of steps stay small, and their spikes stay visible
}
# Names that nothing in a drawing refers to; the path of a collection begins with C and a digit.
_PART_NAME = re.compile(r' id="(?!C\d)[\w.]+_\d+"')
_MAX_DOTS = 60  # up to this many dots and bars have their full size
_MAX_MARKED = 30  # up to this many values each gets a dot: a value between two gaps draws no line


@dataclass(frozen=True)
class Dots:
    """Measurements of some steps, drawn as points with a bar from `low` to `high`; NaN there draws no bar."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curve_svg(
    curves: Mapping[str, Sequence[float]],
    smoothing: int = 5,
    *,
    label: str = "",
    steps: Sequence[float] | None = None,
    dots: Mapping[str, Dots] = MappingProxyType({}),
    share: bool = False,
    size: tuple[float, float] = (7, 2.8),
) -> Any:
    """Curves over steps as an inline SVG for a template: values thin, the mean of the last `smoothing` thick.

    `steps` is 1, 2, ... by default, `size` is in inches, a `share` is shown in percent. Values that are not finite are
    gaps. Curves, then dots, take COLOURS in turn. A `label` of the values adds a legend; without it the drawing has no
    names, so these may be anything.
    """
    import matplotlib as mpl
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        axes, colours = figure.subplots(), itertools.cycle(COLOURS)
        for name, values in curves.items():
            raw, colour = np.asarray(values, float), next(colours)
            at = np.arange(1.0, len(raw) + 1) if steps is None else np.asarray(steps, float)
            marker, columns = "." if len(raw) <= _MAX_MARKED else None, int(72 * size[0])
            axes.plot(*_thinned(at, raw, columns), color=colour, alpha=0.3, linewidth=1, marker=marker)
            mean = _thinned(at, _running_mean(raw, smoothing), columns)
            axes.plot(*mean, color=colour, linewidth=2, label=name)
        for name, dot in dots.items():
            colour, part = next(colours), min(1.0, _MAX_DOTS / max(1, len(dot.steps)))  # more would hide each other
            axes.vlines(dot.steps, dot.low, dot.high, color=colour, linewidth=1.5 * part, alpha=0.7)
            axes.plot(dot.steps, dot.values, "o", color=colour, markersize=4.5 * part**0.5, label=name)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}\u00a0%")
        if label:
            axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.patch.set_alpha(0)
        figure.patch.set_alpha(0)
        figure.tight_layout(pad=0.6)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    # The drawing takes the page's colours and drops the names of parts, which other drawings have, too. It holds only
    # our own numbers and names, so it needs no escaping.
    return Markup(_PART_NAME.sub("", svg[svg.index("<svg") :].replace("#000000", "currentColor")))


def _thinned(
    at: NDArray[np.float64], values: NDArray[np.float64], columns: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(T,), (T,) -> what a drawing of so many columns shows of them: both ends, the least and the largest of each."""
    if len(values) <= 2 * columns:
        return at, values
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), columns):
        finite = part[np.isfinite(values[part])]
        of_part = values[finite]
        kept |= {finite[of_part.argmin()], finite[of_part.argmax()]} if len(finite) else {part[0]}  # a gap stays one
    places = sorted(kept)
    return at[places], values[places]


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """(T,) -> (T,): the mean of the finite values among the last `window`; NaN without any."""
    finite, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), ones)[: len(values)]
    counts = np.rint(np.convolve(finite.astype(float), ones)[: len(values)])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
