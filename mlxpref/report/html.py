"""Self-contained pages from templates that escape all texts; their thumbnails, names and axes."""

import base64
import hashlib
import io
import math
import os.path
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mlxpref.data.images import load_image
from mlxpref.errors import DataError
from mlxpref.files import write_file
from mlxpref.preferences import ImageLike

_THUMBNAIL_BYTES = 48_000  # 200 thumbnails of this size are 12.8 MB as data addresses
_EXACT_SIDE = 128  # pages enlarge smaller pictures, and people judge their pixels: these stay exact
_AXIS_STEPS = 6  # about

LoadImage = Callable[[ImageLike], Image.Image]
"""Reads an image: `load_image`, or a cache of decoded images."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as WebP, and its size in pixels."""

    content: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The picture as a data address."""
        return "data:image/webp;base64," + base64.b64encode(self.content).decode()

    @property
    def exact(self) -> bool:
        """Whether it has the picture's exact pixels."""
        return max(self.width, self.height) <= _EXACT_SIDE


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
    """A script of `report/templates` for a template: its `script`, and the `script_hash` for the page's policy."""
    from markupsafe import Markup

    script = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": f"sha256-{digest}"}


def thumbnail(image: ImageLike, side: int = 320, load: LoadImage = load_image) -> Thumbnail:
    """An image at most `side` pixels wide and high, without EXIF or profile; DataError where it cannot be read.

    `load` reads it. A lower quality keeps it to `_THUMBNAIL_BYTES`.
    """
    picture = load(image).copy()
    picture.thumbnail((side, side))
    lossless = max(picture.size) <= _EXACT_SIDE
    for quality in (80, 60, 40, 20):
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=quality, lossless=lossless)
        if lossless or file.tell() <= _THUMBNAIL_BYTES:
            break
    return Thumbnail(file.getvalue(), *picture.size)


def try_thumbnail(image: ImageLike | None, side: int = 320, load: LoadImage = load_image) -> Thumbnail | None:
    """As `thumbnail`, but None for no image or an unreadable one: a page is never lost for a picture."""
    # A path may be a pipe, whose reading would wait forever.
    if image is None or (isinstance(image, Path) and not image.is_file()):
        return None
    with suppress(DataError, OSError):
        return thumbnail(image, side, load)
    return None


def short_names(paths: Sequence[str]) -> list[str]:
    """The file names of images; if two are equal, the paths without the folders that all share."""
    names = [Path(path).name for path in paths]
    if len(set(names)) == len(names):
        return names
    try:
        return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    except ValueError:  # absolute and relative paths together
        return list(paths)


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers in even steps, the first at or below `low`, the last at or above `high`."""
    least = max(high - low, 1e-6) / _AXIS_STEPS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least)
    first = math.floor(low / step)
    return [step * i for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
