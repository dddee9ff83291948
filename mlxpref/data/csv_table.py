"""A user's preferences in a spreadsheet: a CSV or TSV file with the columns of the JSONL rows."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxpref.data.jsonl import NumberedRow, check_keys, preferences_of_rows, read_file
from mlxpref.errors import DataError
from mlxpref.preferences import Preference


def read_table(path: Path, split: str | None = None) -> list[Preference]:
    """The preferences of a .csv or .tsv file, in its order; for the columns see `jsonl.read_jsonl`.

    The first line names the columns: `prompt`, `a`, `b`, `p_a`, and perhaps `votes`, `group` and `split`; others are
    ignored. An empty cell is a missing value. One DataError for all bad rows: their count and the first ten.
    """
    form = "a first line prompt,a,b,p_a and then one preference a line"
    return preferences_of_rows(path, _rows(path), split, form)


def _rows(path: Path) -> Iterator[NumberedRow]:
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from error
    first_line = text.partition("\n")[0]
    # Excel separates by semicolons where numbers have decimal commas.
    comma = ";" if ";" in first_line and "," not in first_line else ","
    delimiter = "\t" if path.suffix.lower() == ".tsv" else comma
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise DataError(f"{path}: a column is named twice in the first line: {', '.join(header)}")
        try:
            check_keys(header or ("prompt", "a", "b", "p_a"))
        except DataError as error:
            raise DataError(f"{path}: its first line names the columns {', '.join(header)}: {error}") from error
        for cells in reader:
            if any(cell.strip() for cell in cells):
                try:
                    yield reader.line_num, _row(header, cells)
                except DataError as error:
                    yield reader.line_num, error
    except csv.Error as error:  # for example a cell that is too long
        raise DataError(f"{path}: line {reader.line_num}: {error}; is a quote not closed?") from error


def _row(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(f"{len(cells)} cells under {len(header)} columns")
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    for name, kind in (("p_a", float), ("votes", int)):
        if name in row:
            try:
                row[name] = kind(row[name])
            except ValueError as error:
                raise DataError(f'"{name}" must be a number, not {row[name]!r:.40}') from error
    check_keys(list(row))
    return row
