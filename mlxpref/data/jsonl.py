"""One's own preferences: a JSONL file, one preference a line, its images beside it."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from mlxpref.data.find_images import locate
from mlxpref.data.label_file import LABEL_KEYS, LabelRecord, active_records, pair_of, record_of
from mlxpref.errors import DataError
from mlxpref.log import logger
from mlxpref.preferences import Preference
from mlxpref.text import first_ten

__all__ = ["EXAMPLE", "check_keys", "content_of", "gather", "read_jsonl"]

EXAMPLE = '{"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}'
_REQUIRED = ("prompt", "a", "b", "p_a")
_OPTIONAL = ("votes", "group", "split")
_KNOWN = (*_REQUIRED, *_OPTIONAL)
NumberedRow = tuple[int, Callable[[], dict[str, Any]]]
"""The number of a line, and what reads it: a call that returns keys and values or raises a DataError."""


def read_jsonl(path: Path, split: str | None = None) -> list[Preference]:
    """The preferences of a file, in its order.

    A row has `prompt`, `a` and `b` (image files, relative to this file) and `p_a` (the share of people who
    prefer a, from 0 to 1); it may have `votes` (how many people, default 1), `group` (default the prompt) and
    `split`. Other keys are ignored, unless one looks like one of these misspelt. If rows name a split, those
    of `split` are taken. Of a file that `mlxpref label` wrote, answers about the
    same pair are one preference, with their mean and one vote, as one person gave them; what was undone or skipped is
    none, nor is one of which a picture is gone. Images are not opened, only looked for. Raises one
    DataError for all bad rows: their count and the first ten.
    """
    return gather(path, _answers_together(path), split, f"one a line, like {EXAMPLE}")


def gather(path: Path, rows: Iterable[NumberedRow], split: str | None, form: str) -> list[Preference]:
    """The preferences of numbered rows of a file, each read by a call; one DataError for all that cannot be used."""
    preferences: list[tuple[str | None, Preference]] = []
    bad: list[str] = []
    for number, read in rows:
        try:
            preferences.append(_preference(read(), path.parent))
        except DataError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        count = f"{len(bad)} of {len(bad) + len(preferences)} rows cannot be used"
        raise DataError(f"{path}: {count}; correct or remove them:\n  {first_ten(bad)}")
    if not preferences:
        raise DataError(f"{path}: no preferences in this file; write {form}")
    return _of_split(preferences, split, path)


def content_of(path: Path) -> bytes:
    """The bytes of a file without the mark that some editors begin it with."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name") from error


def check_keys(keys: Collection[str]) -> None:
    """Refuse a row without all required keys, or with one that looks like one of these misspelt."""
    absent = [key for key in _KNOWN if key not in keys]
    for key in keys:
        if key not in _KNOWN and (meant := get_close_matches(key.casefold(), absent, 1, 0.8)):
            raise DataError(f'unknown key "{key}"; "{meant[0]}" may be meant: rename it')
    if missing := [f'"{key}"' for key in absent if key in _REQUIRED]:
        raise DataError(f"{' and '.join(missing)} missing")


def _answers_together(path: Path) -> list[NumberedRow]:
    """The rows of a file, but of those of a labelling one for each pair that has an answer, with their mean.

    Whoever has chosen pictures deletes the others: pairs of which one is gone are counted and left out.
    """
    found: list[NumberedRow] = []
    records: list[LabelRecord] = []
    lines: dict[int, int] = {}
    for number, read in _rows(path):
        try:
            row = read()
            if row.keys() >= LABEL_KEYS:
                records.append(record_of(row))
                lines[id(records[-1])] = number
            else:
                found.append((number, partial(dict, row)))
        except DataError as error:
            found.append((number, partial(_raise, error)))
    answers: dict[tuple[str, ...], list[LabelRecord]] = {}
    for record in active_records(records):
        if record.p_people is not None:
            answers.setdefault((*pair_of(record), record.split), []).append(record)
    gone: list[str] = []
    for (prompt, a, b, split), said in answers.items():
        if missing := [name for name in (a, b) if locate(name, path.parent) is None]:
            gone += missing[:1]
            continue
        p_people = sum(record.p_people or 0.0 for record in said) / len(said)
        merged = {"prompt": prompt, "a": a, "b": b, "p_a": p_people, "split": split}
        found.append((lines[id(said[0])], partial(dict, merged)))
    if gone:
        logger.warning(
            f"{path}: {len(gone)} of {len(answers)} pairs are left out, as a picture is gone, such as {gone[0]}"
        )
    return sorted(found, key=lambda row: row[0])


def _raise(error: DataError) -> dict[str, Any]:
    raise error


def _rows(path: Path) -> Iterator[NumberedRow]:
    """The lines that are not blank, counted from 1; only a line feed ends one: JSON text may hold U+2028."""
    for number, line in enumerate(content_of(path).split(b"\n"), 1):
        if line.strip():
            yield number, partial(_row, line)


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
    """A row as split and preference; DataError with everything that is wrong in it."""
    prompt, p_people, votes = row["prompt"], row["p_a"], row.get("votes", 1)
    problems = [f'"{key}" must be text, not empty' for key in ("prompt", "a", "b") if not _is_text(row[key])]
    problems += [f'"{key}" must be text' for key in ("group", "split") if not isinstance(row.get(key, ""), str)]
    if isinstance(p_people, bool) or not isinstance(p_people, int | float) or not 0 <= p_people <= 1:
        problems.append(f'"p_a" must be a number from 0 to 1, not {json.dumps(p_people)[:40]}')
    if isinstance(votes, bool) or not isinstance(votes, int) or votes < 1:
        problems.append(f'"votes" must be a whole number from 1 on, not {json.dumps(votes)[:40]}')
    images: dict[str, Path] = {}
    for key in ("a", "b"):
        if _is_text(row[key]):
            image = locate(row[key], folder)
            if image is None or not image.is_file():
                problems.append(f'"{key}" is {json.dumps(row[key], ensure_ascii=False)}: no such file')
            else:
                images[key] = image
    if len(images) == 2 and images["a"].samefile(images["b"]):
        problems.append('"a" and "b" are the same file')
    if problems:
        raise DataError("; ".join(problems))
    group = row.get("group") or prompt
    return row.get("split"), Preference(prompt, images["a"], images["b"], float(p_people), votes, group)


def _is_text(value: object) -> bool:
    """Whether this is text with something in it; half of a surrogate pair, which JSON can spell, is not."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _of_split(preferences: list[tuple[str | None, Preference]], split: str | None, path: Path) -> list[Preference]:
    """The preferences of a split, or all if the rows name none."""
    names = {name for name, _ in preferences}
    if split is None or names == {None}:
        return [preference for _, preference in preferences]
    if None in names:
        without = sum(name is None for name, _ in preferences)
        raise DataError(f'{path}: {without} of {len(preferences)} rows have no "split"; give it to all or to none')
    if split not in names:
        raise DataError(f'{path}: no rows of split "{split}"; there are {", ".join(sorted(filter(None, names)))}')
    return [preference for name, preference in preferences if name == split]
