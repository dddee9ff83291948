"""Files that lose nothing: replaced at once, locked by one writer, appended to line by line; and where caches lie."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from mlxpref.errors import ConfigError, DataError


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes the name `path` when the block ends without an error.

    A reader of `path` sees the old file or the new one, never a part. A `durable` file is on the disk before it takes
    the name. After an error nothing is left of the new file. Raises OSError where the file cannot be renamed.
    """
    # It ends as `path` does: MLX and matplotlib look at the ending.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file by this content at once, text as UTF-8; raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[bytes]) -> bool:
    """Keep other processes from locking an open file until it is closed; False if one has locked it already."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


@contextmanager
def open_for_append(path: Path) -> Iterator[BinaryIO]:
    """A file to append to; an error of its last flush is passed over, as `append_record` has raised it before."""
    file = path.open("ab")
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


def append_record(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """Append a record as one line of JSON to a file of a run; ConfigError where it cannot be written."""
    try:
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
    except OSError as error:
        raise ConfigError(
            f"{file.name}: cannot be written ({error.strerror}); correct that, and continue with --resume "
            f"--output {Path(file.name).parent}"
        ) from error


def truncate_lines(file: BinaryIO, size: int) -> None:
    """Keep the first `size` bytes of a file of lines; of a shorter file, its complete lines."""
    if os.fstat(file.fileno()).st_size < size:
        size = Path(file.name).read_bytes().rfind(b"\n") + 1
    file.truncate(size)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal digits; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """The free bytes of the disk on which a path lies or would lie; raises OSError."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def cache_dir() -> Path:
    """The folder of what can be made again: $MLXPREF_CACHE, else `mlxpref` in the user's cache folder.

    DataError for a user without a home folder.
    """
    if folder := os.environ.get("MLXPREF_CACHE"):
        return Path(folder).expanduser()
    try:
        home = Path.home()
    except RuntimeError as error:
        raise DataError("this user has no home folder for caches; set MLXPREF_CACHE to a folder") from error
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mlxpref"
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard says to ignore a path that is not absolute.
    return (caches if caches.is_absolute() else home / ".cache") / "mlxpref"
