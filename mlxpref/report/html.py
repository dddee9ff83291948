"""Pages that show what happened: HTML with everything inside, from templates that escape whatever they are given."""

import base64
import hashlib
import io
import itertools
import math
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mlxpref.data.images import load_image
from mlxpref.files import write_file
from mlxpref.preferences import ImageLike

__all__ = [
    "COLOURS",
    "Dots",
    "Scale",
    "Thumbnail",
    "curve_svg",
    "even_ticks",
    "page_script",
    "picture_uri",
    "render_page",
    "short_names",
    "thumbnail",
    "write_page",
]

Scale = Literal["number", "share", "log"]
COLOURS = ("#2a78d6", "#1a936f", "#b3541e", "#8b5fd6", "#a8800c", "#c9417f")
"""What curves are drawn in, each seen on white and on the dark card."""

_THUMBNAIL_BYTES = 48_000
"""What a thumbnail may take: 200 of them are 12.8 MB as data addresses."""
_EXACT_SIDE = 128
"""Pictures this small stay exact: they are shown enlarged, and their pixels are what is judged."""
_MOST_STEPS = 6
"""How many steps the axis of strengths has, about."""
_MOST_POINTS = 400
"""How many points of a curve are drawn: a screen shows no more."""
_MOST_MARKED = 30
"""Up to so many values each is marked: a value between two gaps is no line."""
_PART_NAME = re.compile(r' id="(?!C\d)[\w.]+_\d+"')
"""Names that nothing in a drawing refers to; the path of a collection begins with C and a digit."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data address, and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def exact(self) -> bool:
        """Whether it has the picture's own pixels, none of them blurred."""
        return max(self.width, self.height) <= _EXACT_SIDE


@dataclass(frozen=True)
class Dots:
    """Measurements of some steps, drawn as points with a bar from `low` to `high`; NaN there draws no bar."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from one of the templates in `report/templates`."""
    write_file(path, render_page(template, **values))


def render_page(template: str, **values: Any) -> str:
    """A page from one of the templates in `report/templates`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlxpref.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template(template).render(**values)


def page_script(name: str) -> dict[str, Any]:
    """A script of `report/templates` for a template: its `script`, and the `script_hash` by which a policy knows it."""
    from markupsafe import Markup

    script = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": f"sha256-{digest}"}


def picture_uri(image: ImageLike, side: int = 256) -> str:
    """An image as a data address, at most `side` pixels wide and high."""
    picture = load_image(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail(image: ImageLike, side: int = 320) -> Thumbnail:
    """An image at most `side` pixels wide and high, as small as it can be with details still seen.

    WebP without EXIF or profile. Its quality goes down where the picture would take more than `_THUMBNAIL_BYTES`.
    """
    picture = load_image(image)
    picture.thumbnail((side, side))
    lossless = max(picture.size) <= _EXACT_SIDE
    for quality in (80, 60, 40, 20):
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=quality, lossless=lossless)
        if lossless or file.tell() <= _THUMBNAIL_BYTES:
            break
    return Thumbnail("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), *picture.size)


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells images apart: their names, or where these are the same, paths without the folders in common."""
    names = [Path(path).name for path in paths]
    if len(set(names)) == len(names):
        return names
    try:
        return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    except ValueError:  # some begin at the root, some do not
        return list(paths)


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers in even steps, the first at or below `low`, the last at or above `high`."""
    least = max(high - low, 1e-6) / _MOST_STEPS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least)
    first = math.floor(low / step)
    return [step * i for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


def curve_svg(
    curves: Mapping[str, Sequence[float]],
    label: str,
    smoothing: int = 5,
    *,
    steps: Sequence[float] | None = None,
    dots: Mapping[str, Dots] = MappingProxyType({}),
    scale: Scale = "number",
    stacked: bool = False,
    legend: bool = True,
    size: tuple[float, float] = (7, 2.8),
) -> Any:
    """Curves over steps as an inline SVG, each thin as it is and thick as a running mean; for a template.

    `steps` is 1, 2, ... where it is not given, `size` is in inches. What is not finite is a gap. Long curves are
    thinned to `_MOST_POINTS`, spikes kept. Curves that are `stacked` are areas of their running means, one upon the
    other. Curves, then dots, have COLOURS in turn. Without a `legend`, names do not reach the drawing and may be
    anything.
    """
    import matplotlib as mpl

    mpl.use("svg")
    import numpy as np
    from matplotlib import pyplot

    # Text stays text, so that the page's own fonts and colours apply to it.
    with pyplot.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "mlxpref"}):
        figure, axes = pyplot.subplots(figsize=size)
        upon: Any = 0.0
        for (name, values), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
            raw = np.asarray(values, float)
            at = np.arange(1, len(raw) + 1) if steps is None else np.asarray(steps, float)
            mean = _running_mean(raw, smoothing)
            if stacked:
                upon = _draw_area(axes, at, mean, upon, colour, name)
            else:
                _draw_line(axes, at, raw, mean, colour, name)
        for (name, dot), colour in zip(dots.items(), itertools.cycle(COLOURS[len(curves) :] or COLOURS), strict=False):
            _draw_dots(axes, dot, colour, name)
        _dress(axes, label, scale, legend)
        if stacked:
            axes.set_ylim(bottom=0)
        figure.patch.set_alpha(0)
        figure.tight_layout(pad=0.6)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        pyplot.close(figure)
    return _inline(file.getvalue())


def _draw_line(axes: Any, at: Any, raw: Any, mean: Any, colour: str, name: str) -> None:
    spikes, even = _thinned(raw), _evenly(len(raw))
    marker = "." if len(raw) <= _MOST_MARKED else None
    axes.plot(at[spikes], raw[spikes], color=colour, alpha=0.3, linewidth=1, marker=marker)
    axes.plot(at[even], mean[even], color=colour, linewidth=2, label=name, marker="o" if len(raw) == 1 else None)


def _draw_area(axes: Any, at: Any, mean: Any, upon: Any, colour: str, name: str) -> Any:
    """Draw a mean upon what lies below, and return what is the next one's below."""
    import numpy as np

    even, height = _evenly(len(mean)), np.nan_to_num(mean)
    low, high = np.broadcast_to(upon, mean.shape), upon + height
    if len(mean) > 1:
        axes.fill_between(at[even], low[even], high[even], color=colour, alpha=0.8, linewidth=0, label=name)
    else:  # a single step is a bar: its area would have no width
        axes.bar(at, height, bottom=low, color=colour, alpha=0.8, width=0.2, label=name)
    return high


def _draw_dots(axes: Any, dots: Dots, colour: str, name: str) -> None:
    bars = [bar for bar in zip(dots.steps, dots.low, dots.high, strict=True) if all(map(math.isfinite, bar))]
    for step, low, high in bars:
        axes.plot([step, step], [low, high], color=colour, linewidth=1.5, alpha=0.7)
    axes.plot(dots.steps, dots.values, "o", color=colour, markersize=4.5, label=name)


def _evenly(count: int) -> Any:
    """The places of at most `_MOST_POINTS` of `count` values, first and last among them."""
    import numpy as np

    return np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(int))


def _running_mean(values: Any, window: int) -> Any:
    """The mean of the finite ones among the last `window` values, at every value; NaN where there is none.

    Each mean is summed anew: in a difference of running sums one huge value would spoil all that follow.
    """
    import numpy as np

    finite, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), ones)[: len(values)]
    counts = np.rint(np.convolve(finite.astype(float), ones)[: len(values)])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _thinned(values: Any) -> Any:
    """The places of at most `_MOST_POINTS` values, among them the least and the greatest of every stretch."""
    import numpy as np

    if len(values) <= _MOST_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), _MOST_POINTS // 2 + 1).astype(int)
    low, high = np.where(np.isfinite(values), values, np.inf), np.where(np.isfinite(values), values, -np.inf)
    stretches = itertools.pairwise(edges.tolist())
    return np.unique([a + int(pick) for a, b in stretches for pick in (low[a:b].argmin(), high[a:b].argmax())])


def _dress(axes: Any, label: str, scale: Scale, legend: bool) -> None:
    """What stands around the curves: names, numbers, lines."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.set_ylabel(label)
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif scale == "share":
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}\u00a0%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.patch.set_alpha(0)
    if legend:
        axes.legend(frameon=False, loc="lower right")


def _inline(drawing: str) -> Any:
    """A drawing as a part of a page: in the page's colours, without the names of its parts, which others have too."""
    from markupsafe import Markup

    drawing = _PART_NAME.sub("", drawing[drawing.index("<svg") :].replace("#000000", "currentColor"))
    # Only our own numbers and names went into the drawing.
    return Markup(drawing)
