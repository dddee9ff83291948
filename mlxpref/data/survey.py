"""What the rows of a table say about its layout, as they are read."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxpref.data.columns import NUMBERED, Layout, first_number, layout_of, whole
from mlxpref.data.tables import NumberedRow
from mlxpref.errors import DataError
from mlxpref.log import logger

NumberedLayout = tuple[Layout, int | None]
"""A layout, and the number of the first image in labels that are numbers."""
EXAMPLE = '{"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}'


def filled(rows: Iterable[NumberedRow]) -> Iterator[NumberedRow]:
    """The rows without empty cells."""
    for number, row in rows:
        if isinstance(row, dict) and "" in row.values():
            yield number, {name: cell for name, cell in row.items() if cell != ""}
        else:
            yield number, row


class Survey:
    """What rows say about the columns of their table: each with its first value, and the numbers in those of labels."""

    def __init__(self, path: Path) -> None:
        self._path, self._count, self._error = path, 0, ""
        self._columns: dict[str, Any] = {}
        self._labels = set[str]()
        self._numbers: dict[str, set[int]] = defaultdict(set)

    def watch(self, rows: Iterable[NumberedRow]) -> Iterator[NumberedRow]:
        """Pass on rows, and take them into account."""
        for number, row in filled(rows):
            self._count += 1
            if isinstance(row, DataError):
                self._error = self._error or str(row)
            else:
                if row.keys() - self._columns.keys():
                    self._columns |= {name: cell for name, cell in row.items() if name not in self._columns}
                    self._labels = self._columns.keys() & NUMBERED
                for name in self._labels:
                    if (label := whole(row.get(name))) is not None:
                        self._numbers[name].add(label)
            yield number, row

    def layout(self, rows: Iterable[NumberedRow] = ()) -> NumberedLayout:
        """The layout by all rows so far, with more of them; DataError where they say too little."""
        for _ in self.watch(rows):
            pass
        if not self._count:
            example = f"write rows like {EXAMPLE}, or a table of these columns"
            raise DataError(f"{self._path}: no preferences in this file; {example}")
        try:
            layout = layout_of(self._columns)
        except DataError as error:
            # Without a good row, the errors of the rows say more.
            named = f"; its columns are {', '.join(self._columns)}" if self._columns else ""
            problem = f"none of {self._count} rows can be used: {self._error or error}{named}"
            raise DataError(f"{self._path}: {problem}") from error
        return layout, first_number(self._numbers, layout) if layout.kind == "pair" else None


def say_first(path: Path, layout: Layout, first: int | None) -> None:
    """Log how numbers in labels are read."""
    if first is not None:
        names = layout.images if len(layout.images) == 2 else tuple(f"{layout.images[0]}[{i}]" for i in (0, 1))
        logger.info(f'{path}: "{layout.labels[0]}" {first} is read as {names[0]}, {first + 1} as {names[1]}')
