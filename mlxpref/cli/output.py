"""The command line's output: messages and progress on stderr, tables and JSON on stdout."""

import codecs
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mlxpref.log import Progress, logger, showing, track
from mlxpref.text import CONTROL, UNDECODED, plain

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from mlxpref.training.step_report import StepReport

T = TypeVar("T")

_ESCAPED_IN_JSON = re.compile(rf"(?!\n)(?:{CONTROL.pattern}|{UNDECODED.pattern})")
_NO_WIDTH = 10_000
PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress if stderr is a file."""


def note(line: str) -> None:
    """Print one line on stderr."""
    print(plain(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def show_on_stderr() -> Iterator[None]:
    """Show the library's messages and progress on stderr: bars on a terminal, a line now and then in a file."""
    handler, level, silence = _Notes(), logger.level, logging.NullHandler()
    pillow = logging.getLogger("PIL")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    pillow.addHandler(silence)  # our errors report damaged images
    try:
        with showing(_Shown()):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        pillow.removeHandler(silence)


def print_json(value: Any) -> None:
    """Print a result as JSON on stdout; escapes characters that a terminal would not show."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    text = json.dumps(value, ensure_ascii=not is_utf8, indent=2)
    _print(_ESCAPED_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_text(line: str) -> None:
    """Print one line of a result on stdout."""
    _print(plain(line))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table on stdout; columns whose name begins with `>` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        print_text(title)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            Text(column.lstrip(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    # A file or a pipe has no width: give it room, so that no cell is folded.
    console = Console(width=None if sys.stdout.isatty() else _NO_WIDTH)
    with console.capture() as capture:
        console.print(table)
    _print("\n".join(line.rstrip() for line in capture.get().split("\n")).rstrip("\n"))


def track_steps(reports: "Iterable[StepReport]", count: int) -> "Iterator[StepReport]":
    """Pass on the reports of `count` training steps; show reward, accuracy, speed and the time left."""
    latest: StepReport | None = None

    def name() -> str:
        if latest is None:
            return "training"
        speed = f", {latest.tokens_per_second:.0f} tokens/s" if latest.tokens_per_second > 0 else ""
        return f"training: step {latest.step}, reward {latest.reward:.2f}, accuracy {latest.accuracy:.2f}{speed}"

    for latest in track(reports, count, name):
        yield latest


def _print(text: str) -> None:
    """Write to stdout and flush; escapes characters outside its encoding, raises errors such as a full disk."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        # Python flushes again at exit, and would fail there with its own message and exit code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class _Notes(logging.Handler):
    """Prints every message as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


class _Shown(Progress):
    """Shows progress on stderr."""

    def track(self, work: Iterable[T], count: int, what: str | Callable[[], str]) -> Iterator[T]:
        name = what if callable(what) else lambda: what
        if sys.stderr.isatty():
            with _bar() as bar:
                task = bar.add_task(plain(name()), total=count)
                for item in work:
                    yield item
                    bar.update(task, advance=1, description=plain(name()))
            return
        start = last_note = time.monotonic()
        number = 0
        for number, item in enumerate(work, start=1):
            yield item
            now = time.monotonic()
            if now - last_note >= PLAIN_INTERVAL and number < count:
                note(f"{name()}: {number} of {count}, about {(now - start) / number * (count - number):.0f} s left")
                last_note = now
        note(f"{name()}: {number} of {count} in {time.monotonic() - start:.1f} s")


def _bar() -> "Bar":
    """A bar with counts and times, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    name, left = TextColumn("{task.description}", markup=False), TextColumn("left")
    columns = name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, TimeRemainingColumn()
    return Progress(*columns, console=Console(file=sys.stderr))
