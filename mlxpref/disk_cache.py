"""What was computed, on disk for later runs: a folder of files, bounded and checksummed."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from mlxpref.files import free_bytes, replacing
from mlxpref.log import logger
from mlxpref.text import format_bytes

_SUFFIX = ".kept"
LEAST = 1 << 16
"""What a file counts at least, so that a bound of gigabytes is also one of some ten thousand files."""
_SHARE = 4
"""The folder takes at most this part of the space that its disk would have without it."""
_SPARE = 16
"""Removing files makes room for this part of the bound at once: a folder is not listed for every new file."""
_WRITING_SECONDS = 3600
"""So long another program may be writing a file that has no name yet."""


class DiskCache:
    """Bytes by key in the files of a folder, `limit` bytes at most; several programs may use one folder at once.

    The least recently used files go first, but none that this object has read or written: where a run has more than
    fits, a plain order of use would drop each file just before the next run asks for it.

    A file is a SHA-256 and what it is of. One that does not match is a warning, the first time, and as if it were not
    there. So is a folder that cannot be used: the work goes on without it.

    With `waits`, what is put waits in memory until `start`: a command that is refused leaves nothing.
    """

    def __init__(self, folder: Path, limit: int, waits: bool = False) -> None:
        self.folder, self._limit = folder, limit
        self._waiting: dict[str, bytes] | None = {} if waits else None
        self._used: set[str] = set()
        self._total: int | None = None  # bytes of all files, without those of other programs since they were counted
        self._since = 0  # bytes that were written since then
        self._writes, self._warned = True, False

    def has(self, key: str) -> bool:
        """Whether there is a file for a key, damaged or not."""
        with suppress(OSError):
            if self._path(key).is_file():
                self._used.add(_name(key))
                return True
        return False

    def get(self, key: str) -> bytes | None:
        """The bytes of a key, or None."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):  # writing says what is in the folder's place
            return None
        except OSError as error:
            self._warn(f"{path}: cannot be read ({error.strerror}); what it holds is computed again")
            return None
        body = content[32:]
        if content[:32] != _digest(key, body):
            self._warn(f"{path}: damaged; what it holds is computed again")
            return None
        self._used.add(path.name)
        with suppress(OSError):
            os.utime(path)  # its time of use
        return body

    def put(self, key: str, body: bytes) -> None:
        """Keep the bytes of a key if there is room, or room can be made."""
        if self._waiting is not None:
            self._waiting[key] = body
        elif self._writes:
            self._write(key, body)

    @property
    def room(self) -> int:
        """The bytes that all files may take together, of which each counts 64 KiB at least."""
        with suppress(OSError):
            return self._most(sum(nbytes for _, nbytes, _ in self._files()) if self.folder.is_dir() else 0)
        return 0

    def start(self) -> None:
        """Write what waits, and do not wait any more."""
        waiting, self._waiting = self._waiting or {}, None
        for key, body in waiting.items():
            self.put(key, body)

    def _write(self, key: str, body: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._make_room(32 + len(body)):
                self._used.add(_name(key))
                with replacing(self._path(key), durable=False) as temporary:  # after a power failure the checksum tells
                    temporary.write_bytes(_digest(key, body) + body)
        except OSError as error:
            self._writes = False
            self._warn(f"{self.folder}: nothing is kept there ({error.strerror}); the next run computes it again")

    def _make_room(self, size: int) -> bool:
        """Remove files until there is room for one of `size` bytes; False if there is none without those in use."""
        size = max(LEAST, size)
        self._since += size
        if self._total is None or self._total + size > self._limit or self._since > self._limit // _SPARE:
            files = self._files()
            self._total, self._since = sum(nbytes for _, nbytes, _ in files), size
            most = self._most(self._total)
            goal = most - most // _SPARE if self._total + size > most else most
            for _, nbytes, path in files:
                if self._total + size > goal and path.name not in self._used:
                    path.unlink(missing_ok=True)
                    self._total -= nbytes
            if self._total + size > most:
                self._writes = False
                logger.info(f"{self.folder}: full; what is beyond {format_bytes(most)} is not kept")
                return False
        self._total += size
        return True

    def _most(self, total: int) -> int:
        """The bytes that all files may take, which take `total` now."""
        return min(self._limit, (total + free_bytes(self.folder)) // _SHARE)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of use, counted bytes and path of every file, also of one that a program left half written long ago."""
        files = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another program has just removed it
                status = entry.stat()
                is_new = entry.name.startswith(".") and status.st_mtime > time.time() - _WRITING_SECONDS
                if entry.name.endswith(_SUFFIX) and entry.is_file() and not is_new:
                    files.append((status.st_mtime, max(LEAST, status.st_size), Path(entry.path)))
        return sorted(files)

    def _path(self, key: str) -> Path:
        return self.folder / _name(key)

    def _warn(self, text: str) -> None:
        """Warn the first time: a disk that fails would say the same of every file."""
        if not self._warned:
            logger.warning(text)
        self._warned = True


def _name(key: str) -> str:
    """The name of a key's file."""
    return hashlib.sha256(key.encode()).hexdigest() + _SUFFIX


def _digest(key: str, body: bytes) -> bytes:
    """The checksum of a file's body and key, so that a file under another name does not match."""
    return hashlib.sha256(key.encode() + body).digest()
