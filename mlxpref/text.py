"""Text for people: safe in a terminal; sizes, durations, errors and long lists in one form."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that control a terminal or the direction of text."""
UNDECODED = re.compile(r"[\ud800-\udfff]")
"""Python's characters for bytes of a file name that are not UTF-8; they cannot be printed."""


def plain(text: object) -> str:
    """Text on one line without control characters.

    Control and direction characters are removed, line breaks become blanks, undecoded bytes are written as \\xff.
    """
    clean = CONTROL.sub(lambda match: " " if match[0].isspace() else "", str(text))
    return UNDECODED.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", clean)


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units, such as `4.7 GB`, `120 MB` or `512 bytes`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.{0 if count >= 100 * unit else 1}f} {name}"
    return f"{count:.0f} bytes"


def counted(count: int, noun: str) -> str:
    """A number and its noun, such as `1 pair` or `2 pairs`."""
    return f"{count} {noun if count == 1 else f'{noun}s'}"


def format_duration(seconds: float) -> str:
    """A time such as `2.4 s`, `45 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 59.5:
        return f"{max(seconds, 0.1):.{0 if seconds >= 9.95 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def one_line(error: BaseException, limit: int = 300) -> str:
    """The type and the message of an exception on one line of at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit].removesuffix(":")


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as few as no other path ends with; `./` marks a whole path that another has."""
    parts = [PurePath(path).parts for path in paths]
    depth = max(map(len, parts), default=0)
    tails = Counter(each[-length:] for each in set(parts) for length in range(1, min(depth, len(each)) + 1))
    names = []
    for path, each in zip(paths, parts, strict=True):
        length = next((n for n in range(1, len(each) + 1) if tails[each[-n:]] == 1), 0)
        names.append(str(PurePath(*each[-length:])) if length else f"./{path}")
    return names


def shorten(text: object, limit: int = 40) -> str:
    """Text on one line of at most `limit` characters, cut in the middle: names and paths differ at both ends."""
    line = plain(text)
    half = (limit - 1) // 2
    return line if len(line) <= limit else f"{line[: limit - 1 - half]}…{line[-half:]}"


def few(items: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The first items, joined, and how many more there are; one more stands for itself."""
    most = len(items) if len(items) == most + 1 else most
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def first_ten(items: Sequence[str], separator: str = "\n  ") -> str:
    """The first ten items, joined, and how many more there are."""
    return few(items, separator=separator)
