"""The record files of a run: lines that are only ever added, by one process at a time."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlxpref.errors import ConfigError
from mlxpref.files import lock

__all__ = ["append", "claim", "cut", "opened"]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, of which nothing is left to write when it is closed."""
    file = path.open("ab")
    try:
        yield file
    finally:
        with suppress(OSError):  # a line that could not be written has been said; it is tried once more here
            file.close()


def claim(file: BinaryIO, folder: Path) -> None:
    """Keep other processes from training into a folder for as long as a file in it is open."""
    if not lock(file):
        raise ConfigError(f"{folder}: another process is training there; wait for its end, or end it")


def cut(file: BinaryIO, size: int) -> None:
    """Leave the first `size` bytes of a file of lines; of one that is shorter, its whole lines."""
    if os.fstat(file.fileno()).st_size < size:
        size = Path(file.name).read_bytes().rfind(b"\n") + 1
    file.truncate(size)


def append(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """Write a record as one line of JSON."""
    try:
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
    except OSError as error:
        raise ConfigError(
            f"{file.name}: cannot be written ({error.strerror}); correct that, and go on with --resume "
            f"--output {Path(file.name).parent}"
        ) from error
