"""Lays out text and tables for the width of a terminal; a file or a pipe has no width."""

import re
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NO_WIDTH = 10_000
_GAP = 2
_LEAST = 20
"""A terminal too narrow for all columns loses some before its flexible column is narrower than this."""


def terminal_width(stream: TextIO) -> int | None:
    """The width of a terminal in cells; None for a file or a pipe."""
    return Console(file=stream).width if stream.isatty() else None


def wrapped(line: str, width: int) -> str:
    """A line wrapped between words, each part indented as its beginning; longer words stay whole, to be copied."""
    indent = line[: len(line) - len(line.lstrip())]
    parts: list[list[str]] = [[]]
    for word in re.split(r" (?!%)", line.strip()):
        if parts[-1] and cell_len(indent + " ".join([*parts[-1], word])) > width:
            parts.append([])
        parts[-1].append(word)
    return "\n".join(indent + " ".join(words) for words in parts)


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Names of at most `width` cells with an ellipsis, in the middle or where all names stay different."""
    cuts = [[_cut(name, width, share) for name in names] for share in (0.5, 0.25, 0.75, 0.0, 1.0)]
    return max(cuts, key=lambda each: len(set(each)))  # the first of the best


def table_text(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    shorten: str | None = None,
    drop: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """A table's lines, and the names of the columns that `width` has no room for, in the order of `drop`.

    Columns whose name begins with `>` are aligned to the right. What is too long in the column `shorten` gets an
    ellipsis; without such a column, the widest one is wrapped between words.
    """
    kept = list(range(len(columns)))
    names = [column.lstrip(">") for column in columns]
    cells = [[row[i] for row in rows] for i in kept]
    data = [max(map(cell_len, each), default=0) for each in cells]
    heads = [cell_len(name) for name in names]
    natural = [max(pair) for pair in zip(data, heads, strict=True)]
    flexible = names.index(shorten) if shorten else natural.index(max(natural))

    def room() -> int:
        """The cells that the other columns leave for the flexible one."""
        others = [widths[i] for i in kept if i != flexible]
        return (width or _NO_WIDTH) - sum(others) - _GAP * len(others)

    widths, dropped = natural, list[str]()
    if room() < natural[flexible]:  # names of columns may take several lines
        words = [max(map(cell_len, name.split()), default=0) for name in names]
        widths = [max(pair) for pair in zip(data, words, strict=True)]
    while room() < min(natural[flexible], _LEAST) and len(dropped) < len(drop):
        dropped.append(drop[len(dropped)])
        kept.remove(names.index(dropped[-1]))
    size = min(natural[flexible], max(room(), _LEAST // 2))
    if shorten:
        cells[flexible] = shortened(cells[flexible], size)
    table = Table(box=None, pad_edge=False)
    for i in kept:
        align = "right" if columns[i].startswith(">") else "left"
        table.add_column(Text(names[i]), justify=align, width=size if i == flexible else widths[i], overflow="fold")  # type: ignore[arg-type]
    for row in range(len(rows)):
        table.add_row(*(Text(cells[i][row]) for i in kept))
    console = Console(width=_NO_WIDTH)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().split("\n")).rstrip("\n"), dropped


def _cut(name: str, width: int, share: float) -> str:
    """A name with an ellipsis after `share` of its cells."""
    if cell_len(name) <= width:
        return name
    start = set_cell_size(name, int((width - 1) * share)).rstrip()
    end = set_cell_size(name[::-1], width - 1 - cell_len(start))[::-1]
    return f"{start}…{end.strip()}"
