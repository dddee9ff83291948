"""How far a download is, on stderr: a bar on a terminal, a line now and then in a file."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from mlxpref.hub import HubFile, Progress, shown_bytes
from mlxpref.log import note
from mlxpref.text import plain

__all__ = ["shown_progress"]

_PLAIN_INTERVAL = 10.0
"""Seconds between two lines where stderr is a file."""


@contextmanager
def shown_progress(files: Sequence[HubFile]) -> Iterator[Progress]:
    """Show how much of some files is here; what it gives is told the bytes of each."""
    here = dict[str, int]()
    shown = time.monotonic()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), disable=not sys.stderr.isatty())

    def tell(file: HubFile, done: int) -> None:
        nonlocal shown
        here[file.path] = done
        doing = "checking " if done == file.size else ""
        bar.update(task, completed=sum(here.values()), description=doing + plain(Path(file.path).name))
        if bar.disable and time.monotonic() - shown >= _PLAIN_INTERVAL:
            note(f"{file.path}: {shown_bytes(done)} of {shown_bytes(file.size)}, all {shown_bytes(sum(here.values()))}")
            shown = time.monotonic()

    with bar:
        task = bar.add_task("", total=sum(file.size for file in files))
        yield tell
