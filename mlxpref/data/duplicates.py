"""Files that are the same, byte for byte."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from mlxpref.files import sha256_of

__all__ = ["find_duplicates", "same_content"]


def find_duplicates(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Groups of files with identical bytes, in the order of their first one, each in the order given.

    Only files of equal size are read, a piece at a time. A file that cannot be read is in no group: whoever needs its
    content says why. An image saved again, in other bytes, is no duplicate here.
    """
    order = {path: i for i, path in enumerate(dict.fromkeys(paths))}
    groups = [same for alike in _grouped(order, _size) for same in _grouped(alike, _digest)]
    return sorted(groups, key=lambda group: order[group[0]])


def same_content(a: Path, b: Path) -> bool:
    """Whether two files can both be read and have identical bytes."""
    return _size(a) is not None and _size(a) == _size(b) and (digest := _digest(a)) is not None and digest == _digest(b)


def _grouped(paths: Iterable[Path], key: Callable[[Path], object]) -> list[tuple[Path, ...]]:
    """The files that share a key with another one; those whose key is None share it with none."""
    groups: dict[object, list[Path]] = {}
    for path in paths:
        if (value := key(path)) is not None:
            groups.setdefault(value, []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return path.stat().st_size if path.is_file() else None
    return None


def _digest(path: Path) -> str | None:
    with suppress(OSError):
        return sha256_of(path)
    return None
