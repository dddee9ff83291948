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
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from mlxpref.log import Progress, logger, showing, track
from mlxpref.text import CONTROL, UNDECODED, format_duration, plain

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from mlxpref.training.step_report import StepReport

T = TypeVar("T")

_ESCAPED_IN_JSON = re.compile(rf"(?!\n)(?:{CONTROL.pattern}|{UNDECODED.pattern})")
PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress if stderr is a file."""
_PARTS = 10_000
"""The number of parts of JSON, each a value or a mark, that are written together."""


def note(line: str) -> None:
    """Print one line on stderr, which a terminal shows wrapped between words."""
    print(_lines(line, sys.stderr), file=sys.stderr, flush=True)


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
    """Print a result as JSON on stdout; escapes characters that a terminal would not show.

    An iterator in it becomes a list, whose items are made and written one after another.
    """
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    parts = json.JSONEncoder(ensure_ascii=not is_utf8, indent=2, default=_lazy).iterencode(value)
    texts = iter(lambda: "".join(islice(parts, _PARTS)), "")
    _write(chain((_ESCAPED_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text) for text in texts), "\n"))


def print_text(line: str) -> None:
    """Print a result on stdout: one line, which a terminal shows wrapped between words."""
    _print(_lines(line, sys.stdout))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    shorten: str | None = None,
    drop: Sequence[str] = (),
) -> None:
    """Print a table on stdout, on a terminal at its width; see `table_text`."""
    from mlxpref.cli.layout import table_text, terminal_width

    if title:
        print_text(title)
    cells = [[plain(cell) for cell in row] for row in rows]
    text, dropped = table_text(columns, cells, terminal_width(sys.stdout), shorten, drop)
    _print(text)
    if dropped:
        print_text(f"(no room for {', '.join(dropped)}: widen the terminal, or see --json)")


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


def _lines(line: str, stream: TextIO) -> str:
    """A line without control characters, wrapped to the width of a terminal."""
    text = plain(line)
    if not stream.isatty():
        return text
    from mlxpref.cli.layout import terminal_width, wrapped

    return wrapped(text, terminal_width(stream) or len(text))


class _LazyList(list[Any]):
    """A list as far as an encoder asks: the first item says that it is not empty, and all are made as it goes on."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._rest = iter(items)
        super().__init__(islice(self._rest, 1))

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        yield from self._rest


def _lazy(value: Any) -> _LazyList:
    """What JSON has no form for: an iterator as a list; TypeError for all else."""
    if isinstance(value, Iterator):
        return _LazyList(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _print(text: str) -> None:
    """Write a line to stdout; see `_write`."""
    _write([text, "\n"])


def _write(texts: Iterable[str]) -> None:
    """Write to stdout and flush; escapes characters outside its encoding, raises errors such as a full disk."""
    encoding = sys.stdout.encoding or "utf-8"
    for text in texts:  # making one may fail, too, which says nothing of stdout
        with _given_up():
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    with _given_up():
        sys.stdout.flush()


@contextlib.contextmanager
def _given_up() -> Iterator[None]:
    """After an OSError within, which is raised again, nothing more goes to stdout."""
    try:
        yield
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
                left = format_duration((now - start) / number * (count - number))
                note(f"{name()}: {number} of {count}, about {left} left")
                last_note = now
        note(f"{name()}: {number} of {count} in {format_duration(time.monotonic() - start)}")


def _bar() -> "Bar":
    """A bar with counts and times, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Name(TextColumn):
        """The text that changes: it comes last, and is cut where the terminal ends."""

        def render(self, task: Task) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    whole = [Column(no_wrap=True) for _ in range(5)]
    return Progress(
        BarColumn(20, table_column=whole[0]),
        MofNCompleteColumn(table_column=whole[1]),
        TimeElapsedColumn(table_column=whole[2]),
        TextColumn("left", table_column=whole[3]),
        TimeRemainingColumn(table_column=whole[4]),
        Name("", table_column=Column()),
        console=Console(file=sys.stderr),
    )
