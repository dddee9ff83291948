"""What a person sees: progress and notes on stderr, tables and JSON on stdout."""

import codecs
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxpref.log import PLAIN_INTERVAL, note, progress_bar
from mlxpref.text import CONTROL, UNDECODED, plain

__all__ = ["print_json", "print_table", "print_text", "track_steps"]

T = TypeVar("T")

_ESCAPED_IN_JSON = re.compile(rf"(?!\n)(?:{CONTROL.pattern}|{UNDECODED.pattern})")
_NO_WIDTH = 10_000


def print_json(value: Any) -> None:
    """Print a result as JSON on stdout; what a terminal would not show is escaped, so nothing is lost."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    text = json.dumps(value, ensure_ascii=not is_utf8, indent=2)
    _print(_ESCAPED_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_text(line: str) -> None:
    """Print one line of a result on stdout."""
    _print(plain(line))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table on stdout; columns whose name begins with `>` are aligned to the right."""
    if title:
        print_text(title)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            Text(column.lstrip(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    # A file or a pipe has no width: give it room, so that no cell is folded there.
    console = Console(width=None if sys.stdout.isatty() else _NO_WIDTH)
    with console.capture() as captured:
        console.print(table)
    _print("\n".join(line.rstrip() for line in captured.get().split("\n")).rstrip("\n"))


def track_steps(reports: Iterable[Any], count: int) -> Iterator[Any]:
    """Pass on the reports of training steps (`training.StepReport`); show reward, accuracy, speed and the time left."""
    if sys.stderr.isatty():
        with progress_bar() as progress:
            task = progress.add_task("training", total=count)
            for report in reports:
                text = f"training: reward {report.reward:.2f}, accuracy {report.accuracy:.2f}{_speed(report)}"
                progress.update(task, completed=report.step, description=text)
                yield report
        return
    shown = time.monotonic()
    for report in reports:
        now = time.monotonic()
        if now - shown >= PLAIN_INTERVAL or report.step in (1, count):
            note(
                f"training: step {report.step} of {report.steps}, reward {report.reward:.3f}, "
                f"accuracy {report.accuracy:.3f}{_speed(report)}, about {report.seconds_left:.0f} s left"
            )
            shown = now
        yield report


def _speed(report: Any) -> str:
    """How fast completions were written; nothing where none were."""
    return f", {report.tokens_per_second:.0f} tokens/s" if report.tokens_per_second > 0 else ""


def _print(text: str) -> None:
    """Write to stdout now: what its encoding lacks is spelled out, and a full disk is noticed here."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        # Python flushes once more at its end, and would fail there with words and an exit code of its own.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
