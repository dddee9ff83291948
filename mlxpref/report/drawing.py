"""Drawings as files of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlxpref.errors import ConfigError
from mlxpref.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
"""The endings of drawings."""


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator["Figure"]:
    """A figure, (width, height) in inches, that is written to a file whose name ends as one of FORMATS.

    ConfigError for another ending or where the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path}: a drawing's name ends with {' or '.join(FORMATS)}")
    # Text stays text, so that it can be searched; a fixed salt makes equal drawings equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxpref", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        try:
            with replacing(path) as temporary:
                figure.savefig(temporary, format=kind[1:], dpi=150, metadata={"Date": None} if kind == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"{path}: the drawing cannot be written there ({error.strerror})") from error
