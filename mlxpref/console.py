"""What a person sees: progress and notes on stderr, tables and JSON on stdout."""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["note", "plain", "print_json", "print_table", "print_text", "track"]

T = TypeVar("T")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress where stderr is a file."""


def plain(text: object) -> str:
    """Text that does nothing to a terminal but show: control and direction characters are left out."""
    return _CONTROL.sub("", str(text))


def note(line: str) -> None:
    """Say something beside the results, on stderr."""
    print(plain(line), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a result as JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_text(line: str) -> None:
    """Print one line of a result on stdout."""
    print(plain(line))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table on stdout; columns whose name begins with `>` are aligned to the right."""
    table = Table(title=Text(plain(title)) if title else None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    # A file or a pipe has no width: give it room, so that no cell is folded there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def track(work: Iterable[T], count: int, what: str) -> Iterator[T]:
    """Pass on `count` things and show the time left: a bar on a terminal, a line now and then in a file."""
    if sys.stderr.isatty():
        yield from _bar(work, count, what)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(work, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= _PLAIN_INTERVAL and done < count:
            note(f"{what}: {done} of {count}, about {(now - started) / done * (count - done):.0f} s left")
            shown = now
    note(f"{what}: {count} of {count} in {time.monotonic() - started:.1f} s")


def _bar(work: Iterable[T], count: int, what: str) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(what, total=count)
        for item in work:
            yield item
            progress.advance(task)
