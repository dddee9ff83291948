"""One's own preferences: a JSONL file, one preference a line, its images beside it."""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlxpref.errors import DataError
from mlxpref.images import locate
from mlxpref.preferences import Preference

__all__ = ["EXAMPLE", "read_jsonl"]

EXAMPLE = '{"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}'
_REQUIRED = ("prompt", "a", "b", "p_a")
_OPTIONAL = ("votes", "group", "split")
_KNOWN = (*_REQUIRED, *_OPTIONAL)
_SHOWN = 10


def read_jsonl(path: Path, split: str | None = None) -> list[Preference]:
    """The preferences of a file, in its order.

    A row has `prompt`, `a` and `b` (image files, relative to this file) and `p_a` (the share of people who
    prefer a, from 0 to 1); it may have `votes` (how many people, default 1), `group` (default the prompt) and
    `split`. Other keys are ignored, unless one looks like one of these misspelt. If rows name a split, those
    of `split` are taken. Images are not opened, only looked for. Raises one DataError for all bad rows: their
    count and the first ten.
    """
    preferences: list[tuple[str | None, Preference]] = []
    bad: list[str] = []
    for number, line in _lines(path):
        try:
            preferences.append(_preference(_row(line), path.parent))
        except DataError as error:
            bad.append(f"\n  line {number}: {error}")
    if bad:
        count = f"{len(bad)} of {len(bad) + len(preferences)} rows cannot be used"
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(f"{path}: {count}; correct or remove them:{''.join(bad[:_SHOWN])}{more}")
    if not preferences:
        raise DataError(f"{path}: no preferences in this file; write one a line, like {EXAMPLE}")
    return _of_split(preferences, split, path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, counted from 1; only a line feed ends one: JSON text may hold U+2028."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, line


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
    absent = [key for key in _KNOWN if key not in row]
    for key in row:
        if key not in _KNOWN and (meant := get_close_matches(key.casefold(), absent, 1, 0.8)):
            raise DataError(f'unknown key "{key}"; "{meant[0]}" may be meant: rename it')
    if missing := [f'"{key}"' for key in absent if key in _REQUIRED]:
        raise DataError(f"{' and '.join(missing)} missing")
    return {key: value for key, value in row.items() if value is not None or key in _REQUIRED}


def _preference(row: dict[str, Any], folder: Path) -> tuple[str | None, Preference]:
    """A row as split and preference; DataError with everything that is wrong in it."""
    prompt, p_a, votes = row["prompt"], row["p_a"], row.get("votes", 1)
    problems = [f'"{key}" must be text, not empty' for key in ("prompt", "a", "b") if not _is_text(row[key])]
    problems += [f'"{key}" must be text' for key in ("group", "split") if not isinstance(row.get(key, ""), str)]
    if isinstance(p_a, bool) or not isinstance(p_a, int | float) or not 0 <= p_a <= 1:
        problems.append(f'"p_a" must be a number from 0 to 1, not {json.dumps(p_a)[:40]}')
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
    return row.get("split"), Preference(prompt, images["a"], images["b"], float(p_a), votes, group)


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
