"""Safe files: atomic replacement, a lock for one writer, appending line by line; and the places of caches."""

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

LEARNED = "learned.digests"
"""What an adapter, or a model with one in its weights, learned from; see `data/learned.py`."""


def expand(path: str | os.PathLike[str]) -> str:
    """A path or a name as a shell would hand it over: `~` is the home folder; ConfigError for what is neither."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"{type(path).__name__} {str(path)[:40]!r} is no path and no name; give text or a Path")
    return os.path.expanduser(path)  # noqa: PTH111  a Path would change names such as ./demo


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path for a file, which is renamed to `path` if the block ends without an error.

    A reader of `path` sees the old file or the new one, never a part. A `durable` file is on the disk before the
    renaming. After an error the new file is removed. Raises OSError if the file cannot be renamed.
    """
    # With the ending of `path`, which MLX and matplotlib use.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Atomically replace a file's content, text as UTF-8; raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def open_file(path: Path) -> BinaryIO:
    """A file to read; DataError, which continues its name, if it cannot be opened."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait forever
            raise DataError("is a folder or a device, not a file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened ({getattr(error, 'strerror', error)}); check the name") from error


def read_file(path: Path, limit: int = -1) -> bytes:
    """The first `limit` bytes of a file, or all; DataError, which continues its name, if it cannot be read."""
    with open_file(path) as file:
        try:
            return file.read(limit)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror}); check the disk") from error


def write_output(path: Path, text: str) -> None:
    """Atomically write a file that the user named, with escapes of what UTF-8 lacks; ConfigError where that fails."""
    try:
        write_file(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


@contextmanager
def open_for_append(path: Path) -> Iterator[BinaryIO]:
    """A file to append to; ignores an error of its last flush, which `append_record` has already raised."""
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
    """The free bytes of a path's disk, even if the path does not exist; raises OSError."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def cache_dir() -> Path:
    """The folder for caches: $MLXPREF_CACHE, else `mlxpref` in the user's cache folder.

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
    # The XDG standard ignores paths that are not absolute.
    return (caches if caches.is_absolute() else home / ".cache") / "mlxpref"
