"""Pages that show what happened: HTML with everything inside, from templates that escape whatever they are given."""

import base64
import io
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.files import write_text
from mlxpref.images import load_image
from mlxpref.preferences import ImageLike

__all__ = ["Thumbnail", "curve_svg", "picture_uri", "short_names", "thumbnail", "write_page"]

_THUMBNAIL_BYTES = 48_000
"""What a thumbnail may take: 200 of them are 12.8 MB as data addresses."""
_EXACT_SIDE = 128
"""Pictures this small stay exact: they are shown enlarged, and their pixels are what is judged."""


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


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from one of the templates in `mlxpref/pages`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlxpref", "pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    write_text(path, environment.get_template(template).render(**values))


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


def curve_svg(curves: dict[str, Sequence[float]], label: str, smoothing: int = 5) -> Any:
    """Curves over steps as an inline SVG, each thin as it is and thick as a running mean; for a template."""
    import matplotlib as mpl
    from markupsafe import Markup

    mpl.use("svg")
    import numpy as np
    from matplotlib import pyplot

    # Text stays text, so that the page's own fonts and colours apply to it.
    with pyplot.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "mlxpref"}):
        figure, axes = pyplot.subplots(figsize=(7, 2.8))
        for (name, values), colour in zip(curves.items(), ("#2a78d6", "#1a936f", "#b3541e"), strict=False):
            steps = np.arange(1, len(values) + 1)
            window = np.minimum(steps, smoothing)
            sums = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, (sums[steps] - sums[steps - window]) / window, color=colour, linewidth=2, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, loc="lower right")
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        figure.tight_layout()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    drawing = file.getvalue()
    # Only our own numbers and names went into the drawing.
    return Markup(drawing[drawing.index("<svg") :].replace("#000000", "currentColor"))
