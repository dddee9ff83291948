"""A user's preferences: a JSONL file, one preference a line, with image files next to it."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlxpref.data.find_images import locate
from mlxpref.data.label_file import merge_answers
from mlxpref.errors import DataError
from mlxpref.preferences import Preference
from mlxpref.text import first_ten

EXAMPLE = '{"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}'
_REQUIRED = ("prompt", "a", "b", "p_a")
_KNOWN = (*_REQUIRED, "votes", "group", "split")
NumberedRow = tuple[int, dict[str, Any] | DataError]
"""The number of a line, and its keys and values, or its error."""


def read_jsonl(path: Path, split: str | None = None) -> list[Preference]:
    """The preferences of a file, in its order.

    A row has `prompt`, `a` and `b` (image files, relative to this file) and `p_a` (the share of people who prefer a,
    from 0 to 1); it may have `votes` (how many people, default 1), `group` (default the prompt) and `split`. Other keys
    are ignored, but a likely misspelling of these is an error. It takes those of `split`, None takes all; NoSplitsError
    if no row has one. For the
    clicks of `mlxpref label` see `label_file.merge_answers`. It checks that image files exist, without opening them.
    One DataError for all bad rows: their count and the first ten.
    """
    rows = merge_answers(_rows(path), path)
    return preferences_of_rows(path, rows, split, f"one a line, like {EXAMPLE}")


class NoSplitsError(DataError):
    """A split was asked for, and the data have none; with all their preferences."""

    def __init__(self, path: Path, split: str, preferences: list[Preference]) -> None:
        super().__init__(f'{path}: no split "{split}", as it has no splits; leave out --split')
        self.preferences = preferences


def preferences_of_rows(path: Path, rows: Iterable[NumberedRow], split: str | None, form: str) -> list[Preference]:
    """The preferences in the rows of a file; DataError for all bad rows together, and for a file without rows."""
    preferences: list[tuple[str | None, Preference]] = []
    errors: list[str] = []
    for number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            preferences.append(_preference(row, path.parent))
        except DataError as error:
            errors.append(f"line {number}: {error}")
    if errors:
        count = f"{len(errors)} of {len(errors) + len(preferences)} rows cannot be used"
        raise DataError(f"{path}: {count}; correct or remove them:\n  {first_ten(errors)}")
    if not preferences:
        raise DataError(f"{path}: no preferences in this file; write {form}")
    names, rows_of_all = {name for name, _ in preferences}, [preference for _, preference in preferences]
    if split is None:
        return rows_of_all
    if names == {None}:
        raise NoSplitsError(path, split, rows_of_all)
    if None in names:
        without = sum(name is None for name, _ in preferences)
        raise DataError(f'{path}: {without} of {len(preferences)} rows have no "split"; give it to all or to none')
    if split not in names:
        raise DataError(f'{path}: no rows of split "{split}"; there are {", ".join(sorted(filter(None, names)))}')
    return [preference for name, preference in preferences if name == split]


def read_file(path: Path) -> bytes:
    """The bytes of a file without a byte order mark."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name") from error


def check_keys(keys: Collection[str]) -> None:
    """DataError for a row without all required keys, or with a likely misspelling of a key."""
    absent = [key for key in _KNOWN if key not in keys]
    for key in keys:
        if key not in _KNOWN and (meant := get_close_matches(key.casefold(), absent, 1, 0.8)):
            raise DataError(f'unknown key "{key}"; "{meant[0]}" may be meant: rename it')
    if missing := [f'"{key}"' for key in absent if key in _REQUIRED]:
        raise DataError(f"{' and '.join(missing)} missing")


def _rows(path: Path) -> Iterator[NumberedRow]:
    """The lines that are not blank, counted from 1; only line feeds separate them, as JSON may hold U+2028."""
    for number, line in enumerate(read_file(path).split(b"\n"), 1):
        if line.strip():
            try:
                yield number, _row(line)
            except DataError as error:
                yield number, error


def _row(line: bytes) -> dict[str, Any]:
    """The keys and values of a line: all required keys, and no optional one without a value."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"not a JSON object like {EXAMPLE}")
    check_keys(row)
    return {key: value for key, value in row.items() if value is not None or key in _REQUIRED}


def _preference(row: dict[str, Any], folder: Path) -> tuple[str | None, Preference]:
    """A row as split and preference; DataError with all its errors."""
    prompt, p_people, votes = row["prompt"], row["p_a"], row.get("votes", 1)
    problems = [f'"{key}" must be text, not empty' for key in ("prompt", "a", "b") if not _is_text(row[key])]
    problems += [f'"{key}" must be text' for key in ("group", "split") if not isinstance(row.get(key, ""), str)]
    if isinstance(p_people, bool) or not isinstance(p_people, int | float) or not 0 <= p_people <= 1:
        problems.append(f'"p_a" must be a number from 0 to 1, not {json.dumps(p_people)[:40]}')
    if isinstance(votes, bool) or not isinstance(votes, int) or votes < 1:
        problems.append(f'"votes" must be a whole number from 1 on, not {json.dumps(votes)[:40]}')
    images = [locate(row[key], folder) if _is_text(row[key]) else None for key in ("a", "b")]
    for key, image in zip(("a", "b"), images, strict=True):
        if _is_text(row[key]) and (image is None or not image.is_file()):
            problems.append(f'"{key}" is {json.dumps(row[key], ensure_ascii=False)}: no such file')
    a, b = images
    if a and b and a.samefile(b):
        problems.append('"a" and "b" are the same file')
    if problems or a is None or b is None:
        raise DataError("; ".join(problems))
    return row.get("split"), Preference(prompt, a, b, float(p_people), votes, row.get("group") or prompt)


def _is_text(value: object) -> bool:
    """Whether this is text that is not blank and has no half of a surrogate pair, which JSON allows."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)
