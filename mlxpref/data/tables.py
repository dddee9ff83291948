"""Rows of a table that a user has: CSV, TSV, JSON, JSON lines or parquet, each row as keys and values."""

import ast
import csv
import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlxpref.errors import DataError
from mlxpref.files import open_file
from mlxpref.preferences import PackedImage
from mlxpref.text import first_ten, format_bytes, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

NumberedRow = tuple[int, dict[str, Any] | DataError]
"""The number of a line or row, from 1, and its keys and values without empty ones, or its error."""
_LIST_LIMIT = 10_000
"""The most characters of a list in a cell."""
_WRAPPED = ("data", "rows", "pairs", "preferences", "examples")
"""The key of an object that holds the rows of a JSON file."""
READ_CHARACTERS, ROW_LIMIT = 4 * 2**20, 16 * 2**20
"""Characters of JSON to read at a time, and the most of one row."""
_SEPARATORS = re.compile(r"[\s,\[\]]*")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_table(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[NumberedRow]:
    """The rows of a file, by its suffix; of a parquet file only the `wanted` columns are read.

    The names of these are lower case. Nulls are left out. Values of CSV files are text or lists. Images in parquet
    (bytes, or {bytes, path}) are not read, only named as a `PackedImage`; a list of them as a list. DataError for a
    file that cannot be read.
    """

    @cache
    def name_of(column: str) -> str:
        return column.lower() if wanted(column.lower()) else column

    match path.suffix.lower():
        case ".parquet":
            yield from _parquet_rows(path, wanted)
            return
        case ".csv" | ".tsv":
            rows = _csv_rows(path)
        case ".json":
            rows = _json_rows(path)
        case _:
            rows = _json_lines(path)
    for number, row in rows:
        if isinstance(row, dict):
            yield number, {name_of(key): cell for key, cell in row.items() if cell is not None}
        else:
            yield number, row


def use_rows(
    path: Path, rows: Iterable[NumberedRow], use: Callable[[int, dict[str, Any]], None]
) -> tuple[list[str], int]:
    """Use each row of a file; returns the errors of bad ones, with their places, and the number of rows."""
    word = "line" if path.suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv") else "row"
    errors, count = list[str](), 0
    for number, row in rows:
        count += 1
        try:
            if isinstance(row, DataError):
                raise row
            use(number, row)
        except DataError as error:
            errors.append(f"{word} {number}: {error}")
    return errors, count


def unusable(path: Path, errors: Sequence[str], count: int, what: str = "rows") -> DataError:
    """The error for bad rows of a user's file: their number, and the first ten."""
    text = f"{len(errors)} of {count} {what} cannot be used; correct or remove them"
    return DataError(f"{path}: {text}:\n  {first_ten(errors)}")


def _opened(path: Path) -> BinaryIO:
    """A file to read; DataError if it cannot be opened."""
    try:
        return open_file(path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _json_lines(path: Path) -> Iterator[NumberedRow]:
    """The lines that are not blank, one at a time; the rows of an array, if the file begins with one."""
    begins = False
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):  # only line feeds separate them, as JSON may hold U+2028
                line = line if number > 1 else line.removeprefix(BOM_UTF8)
                if not line.strip():
                    continue
                if not begins and line.lstrip().startswith(b"["):
                    yield from _json_rows(path)
                    return
                begins = True
                yield number, _parsed(line.removesuffix(b"\n"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def _parsed(line: bytes) -> dict[str, Any] | DataError:
    """The row in a line, or its error."""
    try:
        return _object(json.loads(line.decode()))
    except DataError as error:
        return error
    except UnicodeDecodeError:
        return DataError("not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON ({error})")


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    values = read_json_rows(path)
    first = next(values, None)
    fields = first if isinstance(first, dict) else {}
    rows = next((fields[key] for key in _WRAPPED if isinstance(fields.get(key), list)), None)
    for number, value in enumerate(rows or ([] if first is None else chain([first], values)), 1):
        try:
            yield number, _object(value)
        except DataError as error:
            yield number, error


def read_json_rows(path: Path) -> Iterator[Any]:
    """The objects in a file that holds a JSON array of them, or one after the other.

    Memory holds only a piece of the file. DataError for invalid JSON, and for a file that ends early.
    """
    decode = json.JSONDecoder().raw_decode
    text, place, number, closed = "", 0, 0, True
    try:
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig") as file:
            while True:
                gap = _SEPARATORS.match(text, place)
                assert gap is not None  # it may be empty
                place = gap.end()
                if number == 0 and "[" in gap[0]:
                    closed = False
                closed = closed or "]" in gap[0]
                try:
                    value, end = decode(text, place)
                except json.JSONDecodeError as error:
                    more = file.read(READ_CHARACTERS)
                    if not more and place == len(text) and closed:
                        return
                    if more and len(text) - place > ROW_LIMIT:
                        raise DataError(
                            f"{path}: row {number + 1} does not end within {format_bytes(ROW_LIMIT)}; is a quote not "
                            "closed? Rows stand in an array, or one in a line"
                        ) from error
                    if not more:
                        reason = error.msg if place < len(text) else "it ends early"
                        raise DataError(
                            f"{path}: not valid JSON at row {number + 1} ({reason}); correct it, or download it again"
                        ) from error
                    text, place = text[place:] + more, 0
                    continue
                number, place = number + 1, end
                yield value
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8; correct it, or download it again") from error
    except RecursionError as error:
        raise DataError(f"{path}: not valid JSON (nested too deeply); correct it, or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError('not a JSON object like {"key": "value"}')
    return value


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    line = 0
    try:
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
            file.seek(0)
            # Excel separates by semicolons where numbers have decimal commas.
            comma = ";" if ";" in first_line and "," not in first_line else ","
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else comma, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise DataError(f"{path}: a column is named twice in the first line: {', '.join(header)}")
            for cells in reader:
                line = reader.line_num
                if any(cell.strip() for cell in cells):
                    if any(cell.strip() for cell in cells[len(header) :]):
                        yield line, DataError(f"{len(cells)} cells under {len(header)} columns")
                    else:
                        yield line, dict(zip_longest(header, map(_cell, cells[: len(header)]), fillvalue=""))
    except csv.Error as error:  # for example a cell that is too long
        raise DataError(f"{path}: line {line + 1}: {error}; is a quote not closed?") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def _cell(text: str) -> Any:
    """The text of a cell, or the list that it writes in JSON or Python."""
    if text.startswith("[") and text.endswith("]") and len(text) < _LIST_LIMIT:
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(text)
    return text


def _parquet_rows(path: Path, wanted: Callable[[str], bool]) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            fields = [field for field in file.schema_arrow if wanted(field.name.lower())]
            names = [field.name.lower() for field in fields]
            rows = range(0)
            for group in range(file.metadata.num_row_groups):
                rows = range(rows.stop, rows.stop + file.metadata.row_group(group).num_rows)
                numbers = list(rows)  # one object each, for all images of a row
                columns = [_cells(path, file, group, numbers, field) for field in fields]
                for row, *cells in zip(numbers, *columns, strict=True):
                    yield row + 1, {name: x for name, x in zip(names, cells, strict=True) if x is not None}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: it is damaged ({one_line(error)}); download it again") from error


def _cells(path: Path, file: "pq.ParquetFile", group: int, rows: Sequence[int], field: "pa.Field") -> list[Any]:
    """The cells of a column in the group of these rows; images only by name."""
    name, kind = field.name, field.type
    inner = kind.value_type if hasattr(kind, "value_type") and not hasattr(kind, "index_type") else None  # of a list
    if not _holds_images(inner or kind):
        return list(file.read_row_group(group, columns=[name]).column(0).to_pylist())
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    leaves = [leaf for leaf in leaves if leaf == name or leaf.startswith(f"{name}.")]
    content = next((leaf for leaf in leaves if leaf.endswith(".bytes")), leaves[0])
    beside = next((leaf for leaf in leaves if leaf.endswith(".path")), None)
    about = file.metadata.row_group(group)
    # The bytes are read where one may be missing. Else the paths beside them are enough: they tell a list's length.
    whole = (inner is not None and beside is None) or _nulls(about, content) != 0
    leaf = name if whole else beside
    if leaf is None:
        return [PackedImage(path, name, row) for row in rows]
    values = file.read_row_group(group, columns=[leaf]).column(0).to_pylist()
    return [_named(path, name, row, value, whole) for row, value in zip(rows, values, strict=True)]


def _named(path: Path, name: str, row: int, cell: Any, whole: bool) -> Any:
    """An image of a table as a part of it, or as the path of a file where a `whole` cell has no bytes."""
    if isinstance(cell, list):
        return [_named(path, f"{name}/{i}", row, each, whole) for i, each in enumerate(cell)]
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if whole and content is None:
        return cell.get("path") if isinstance(cell, dict) else None
    return PackedImage(path, name, row)


def _nulls(group: "pq.RowGroupMetaData", leaf: str) -> int | None:
    """The number of nulls in a part of a column, None where the file does not count them."""
    chunk = next(c for c in (group.column(i) for i in range(group.num_columns)) if c.path_in_schema == leaf)
    return chunk.statistics.null_count if chunk.statistics and chunk.statistics.has_null_count else None


def _holds_images(kind: "pa.DataType") -> bool:
    """Whether cells are bytes, or {bytes, path}."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
