"""Notes and progress, on stderr."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlxpref.text import plain

__all__ = ["PLAIN_INTERVAL", "note", "progress_bar", "track"]

T = TypeVar("T")

PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress where stderr is a file."""


def note(line: str) -> None:
    """Say something beside the results, on stderr."""
    print(plain(line), file=sys.stderr, flush=True)


def track(work: Iterable[T], count: int, what: str | Callable[[], str]) -> Iterator[T]:
    """Pass on at most `count` things and show the time left: a bar on a terminal, a line now and then in a file.

    `what` is being done; a function is asked again whenever it is shown.
    """
    say = what if callable(what) else lambda: what
    if sys.stderr.isatty():
        yield from _bar(work, count, say)
        return
    started = shown = time.monotonic()
    done = 0
    for done, item in enumerate(work, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= PLAIN_INTERVAL and done < count:
            note(f"{say()}: {done} of {count}, about {(now - started) / done * (count - done):.0f} s left")
            shown = now
    note(f"{say()}: {done} of {count} in {time.monotonic() - started:.1f} s")


def _bar(work: Iterable[T], count: int, say: Callable[[], str]) -> Iterator[T]:
    with progress_bar() as progress:
        task = progress.add_task(plain(say()), total=count)
        for item in work:
            yield item
            progress.update(task, advance=1, description=plain(say()))


def progress_bar() -> Progress:
    """A bar with counts and times, on stderr."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
