"""The store: every finished comparison kept in an SQLite file, so that it is judged once.

What names a comparison is the judge's affair: here a key is bytes, and a value is the verdicts, exactly as they were.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mlxpref.distributed import ProcessGroup
from mlxpref.errors import DataError
from mlxpref.files import cache_dir
from mlxpref.verdict import Verdict, verdicts_from_json, verdicts_to_json

__all__ = ["BroadcastStore", "Store", "default_store_path"]

_APPLICATION = int.from_bytes(b"mlxp", "big")
_SCHEMA = 1
_TABLE = "CREATE TABLE comparisons (key BLOB PRIMARY KEY, verdicts TEXT NOT NULL)"
_AT_ONCE = 500
"""Keys in one question; SQLite may be built to take no more than 999."""
_ELSEWHERE = "choose another file with --store FILE, or none with --no-store"
_NO_PLACE = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS,
}


class Store:
    """Comparisons that were judged, by key; several processes may use one file at once.

    A file that cannot be used is a DataError and stays as it is. Others who write are waited for, `patience` seconds
    at most. What `put_many` was given is kept when it returns, whatever happens to the process after that.
    """

    def __init__(self, path: Path, patience: float = 60.0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path}: the store's folder cannot be made ({error.strerror}); {_ELSEWHERE}") from error
        with _translated(path):
            # Transactions are begun by hand; the module's own would begin by reading, and two such cannot both write.
            self._connection = sqlite3.connect(path, timeout=patience, isolation_level=None)
        try:
            with _translated(path):
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Verdict, ...]]:
        """The verdicts under those of the keys that are there."""
        found = {}
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            places = ",".join("?" * len(part))
            with _translated(self.path):
                asked = f"SELECT key, verdicts FROM comparisons WHERE key IN ({places})"
                found.update({key: _read(text) for key, text in self._connection.execute(asked, part)})
        return found

    def put_many(self, items: Mapping[bytes, Sequence[Verdict]]) -> None:
        """Keep verdicts by key, all or none of them; what another process kept under a key before stays."""
        rows = [(key, _written(verdicts)) for key, verdicts in items.items()]
        with _translated(self.path), self._writing():
            self._connection.executemany("INSERT OR IGNORE INTO comparisons VALUES (?, ?)", rows)

    def count(self) -> int:
        """How many comparisons are kept."""
        with _translated(self.path):
            return int(self._connection.execute("SELECT COUNT(*) FROM comparisons").fetchone()[0])

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        """Make the table in a file that is new; refuse one that is not ours, before anything in it changes."""
        with self._writing():
            application, version = (self._pragma(name) for name in ("application_id", "user_version"))
            empty = not self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if application == 0 and version == 0 and empty:
                self._connection.execute(_TABLE)
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            elif application != _APPLICATION:
                raise DataError(f"{self.path}: an SQLite file of another program, not a store; {_ELSEWHERE}")
            elif version != _SCHEMA:
                raise DataError(
                    f"{self.path}: a store of another version of mlxpref (form {version}, this one reads {_SCHEMA}); "
                    f"{_ELSEWHERE}"
                )
            # Every time: a file that can only be read is found out now, not when the first batch is done.
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA}")
        # A log beside the file: nobody waits for readers, and a batch costs no wait for the disk. Not every network
        # folder can have one, and another process may be in the way just now: all works without, only slower.
        with suppress(sqlite3.OperationalError):
            self._pragma("journal_mode = WAL")
        self._pragma("synchronous = NORMAL")

    def _pragma(self, text: str) -> object:
        found = self._connection.execute(f"PRAGMA {text}").fetchone()
        return found[0] if found else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that may write from its beginning: done as a whole or not at all."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield


class BroadcastStore:
    """A store for several processes, which ask for the same keys in the same order; only the main process opens it.

    So the file does not depend on how many processes there are, and no two machines have half of it each.
    """

    def __init__(self, store: Store | None, processes: ProcessGroup) -> None:
        self._store, self._processes = store, processes

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Verdict, ...]]:
        """The verdicts under those of the keys that the main process's store has."""
        stored = self._store.get_many(keys) if self._store else {}
        rows = self._processes.broadcast([verdicts_to_json(stored[key]) if key in stored else None for key in keys])
        # By position, not by key: an image that decodes to other bits on one machine has another key there.
        return {key: verdicts_from_json(row) for key, row in zip(keys, rows, strict=True) if row is not None}

    def put_many(self, items: Mapping[bytes, Sequence[Verdict]]) -> None:
        """Keep verdicts by key, once for all processes."""
        if self._store:
            self._store.put_many(items)


def default_store_path() -> Path:
    """Where comparisons are kept unless asked otherwise: in $MLXPREF_CACHE, else in the user's cache folder."""
    return cache_dir() / "comparisons.sqlite"


def _written(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as JSON, which holds every float exactly and half a surrogate pair as an escape."""
    return json.dumps(verdicts_to_json(verdicts))


def _read(text: str) -> tuple[Verdict, ...]:
    return verdicts_from_json(json.loads(text))


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """What SQLite says about a file, as a DataError with what to do about it."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a mistake of ours, such as using a store that was closed
    except (sqlite3.Error, ValueError, TypeError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # what is above says it more closely
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what = f"another program keeps the store to itself; wait for it, {_ELSEWHERE}"
        elif code == sqlite3.SQLITE_FULL:
            what = f"no space left for the store; free some, {_ELSEWHERE}"
        elif code in _NO_PLACE:
            what = f"the store cannot be read and written there ({error}); {_ELSEWHERE}"
        else:
            what = f"damaged, or not a store ({error}); move it away or delete it, {_ELSEWHERE}"
        raise DataError(f"{path}: {what}") from error
