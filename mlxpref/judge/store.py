"""The store: an SQLite file of all judged comparisons, so that none is judged twice, and of judges' noise.

The judge makes the keys, which are bytes here; values are the exact verdicts, or JSON about a ranking. Beside them are
names: what a comparison of files was of, so that pairs can be made of a store.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from mlxpref.checkpoints.bounds import FEATURE_FILE_BYTES
from mlxpref.data.image_stamp import absolute_name, find_stamped, stamp_of
from mlxpref.disk_cache import DiskCache
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import cache_dir
from mlxpref.log import logger
from mlxpref.preferences import PackedImage
from mlxpref.verdict import Verdict, verdicts_from_json, verdicts_to_json

_APPLICATION = int.from_bytes(b"mlxp", "big")
_SCHEMA = 1
_TABLE = "CREATE TABLE comparisons (key BLOB PRIMARY KEY, verdicts TEXT NOT NULL)"
_NOISE_TABLE = (
    "CREATE TABLE IF NOT EXISTS noises (judge BLOB, ranking BLOB, noise TEXT NOT NULL, PRIMARY KEY (judge, ranking))"
)
"""Made in a store of an earlier version, too, which does not look at it."""
_NAME_TABLES = (
    "CREATE TABLE IF NOT EXISTS texts (id INTEGER PRIMARY KEY, text BLOB NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS names (key BLOB PRIMARY KEY, judge INTEGER, prompt INTEGER, first INTEGER, "
    "second INTEGER) WITHOUT ROWID",
)
"""As the noises'. A prompt or a path is kept once, as bytes, since names of files need not be text."""
_ADD_NAMES = f"INSERT OR REPLACE INTO names VALUES (?{', (SELECT id FROM texts WHERE text = ?)' * 4})"
_NAMED = (
    "j.text, p.text, a.text, b.text FROM names JOIN texts j ON j.id = names.judge "
    "JOIN texts p ON p.id = names.prompt JOIN texts a ON a.id = names.first JOIN texts b ON b.id = names.second"
)
_KEYS_A_QUERY = 500
"""Some builds of SQLite allow only 999."""
Names = tuple[str, str, str, str]
"""What a comparison was of: the judge and how it was asked, as JSON; the prompt; the images shown, `stamped`."""
REMEDY = "choose another file with --store FILE, or none with --no-store"


class Store:
    """The verdicts of comparisons by key; several programs may use one file at once.

    All methods raise DataError for an unusable file and leave it unchanged; a store that is not `required` warns
    instead, and is empty from then on. They wait at most `timeout` seconds for other writers. When `put_many` returns,
    its items survive the end of the process.

    Several `processes` must ask for the same keys in the same order; only the main one opens the file.
    """

    def __init__(
        self, path: Path, timeout: float = 60.0, processes: ProcessGroup = SINGLE_PROCESS, required: bool = True
    ) -> None:
        self.path, self._processes, self._required = path, processes, required
        self._connection: sqlite3.Connection | None = None
        if processes.is_main:
            with self._or_without():
                self._open(timeout)

    def _open(self, timeout: float) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.path}: the store's folder cannot be made ({error.strerror}); {REMEDY}") from error
        with _translated(self.path):
            # Transactions begin by hand: the module's own begin by reading, and two of these cannot both write.
            self._connection = sqlite3.connect(self.path, timeout=timeout, isolation_level=None)
        try:
            with _translated(self.path):
                self._prepare()
        except BaseException:
            self.close()
            raise

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Verdict, ...]]:
        """The verdicts of those keys that are in the store."""
        by_key: dict[bytes, list[list[Any]]] = {}
        if self._connection is not None:
            with self._or_without():
                by_key = self._query(keys)
        values = self._processes.broadcast([by_key.get(key) for key in keys])
        # By index, not by key: another machine may decode an image to other bits and so have another key.
        with _translated(self.path):
            return {key: verdicts_from_json(each) for key, each in zip(keys, values, strict=True) if each is not None}

    def put_many(
        self, items: Mapping[bytes, Sequence[Verdict]], names: Mapping[bytes, Names] = MappingProxyType({})
    ) -> None:
        """Store verdicts by key, and names of some, all or none; an existing key keeps its verdicts."""
        if self._connection is None:
            return
        rows = [(key, json.dumps(verdicts_to_json(verdicts))) for key, verdicts in items.items()]
        with self._or_without(), _translated(self.path), self._transaction():
            self._database.executemany("INSERT OR IGNORE INTO comparisons VALUES (?, ?)", rows)
            self._add_names(names)

    def put_names(self, names: Mapping[bytes, Names]) -> None:
        """Store the names of comparisons that have none, or had others: a file was moved. Else nothing is written."""
        if self._connection is None or not names:
            return
        with self._or_without(), _translated(self.path):
            rows = self._rows_of(f"SELECT names.key, {_NAMED} WHERE names.key", list(names))
            there = {key: tuple(map(_text, texts)) for key, *texts in rows}
            if missing := {key: each for key, each in names.items() if there.get(key) != each}:
                with self._transaction():
                    self._add_names(missing)

    def judges(self) -> dict[str, int]:
        """The judges in names, and how they were asked, with the numbers of their comparisons."""
        with _translated(self.path):
            query = "SELECT text, COUNT(*) FROM names JOIN texts ON texts.id = names.judge GROUP BY judge"
            return {_text(judge): count for judge, count in self._database.execute(query)}

    def named(self, judges: Sequence[str]) -> Iterator[tuple[Names, tuple[Verdict, ...]]]:
        """The comparisons of some judges that have names, prompt by prompt; memory holds one at a time."""
        query = (
            f"SELECT comparisons.verdicts, {_NAMED} JOIN comparisons ON comparisons.key = names.key "
            f"WHERE j.text IN ({','.join('?' * len(judges))}) ORDER BY names.prompt, names.key"
        )
        with _translated(self.path):
            for verdicts, *texts in self._database.execute(query, [_bytes(judge) for judge in judges]):
                judge, prompt, first, second = map(_text, texts)
                yield (judge, prompt, first, second), verdicts_from_json(json.loads(verdicts))

    def get_noises(self, judge: bytes) -> dict[bytes, dict[str, Any]]:
        """What is kept of a judge's rankings, by ranking."""
        rows: list[tuple[str, str]] = []
        if self._connection is not None:
            with self._or_without(), _translated(self.path):
                query = "SELECT hex(ranking), noise FROM noises WHERE judge = ?"
                rows = self._database.execute(query, (judge,)).fetchall()
        return {bytes.fromhex(ranking): json.loads(text) for ranking, text in self._processes.broadcast(rows)}

    def put_noise(self, judge: bytes, ranking: bytes, noise: Mapping[str, Any]) -> None:
        """Keep what a ranking showed of a judge, in place of what was kept of it before."""
        if self._connection is not None:
            with self._or_without(), _translated(self.path), self._transaction():
                row = (judge, ranking, json.dumps(noise))
                self._database.execute("INSERT OR REPLACE INTO noises VALUES (?, ?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def is_open(self) -> bool:
        """Whether this process keeps verdicts: the main one, unless the file could not be used."""
        return self._connection is not None

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """Go on without the file after a DataError, if it is not required."""
        try:
            yield
        except DataError as error:
            if self._required:
                raise
            self.close()
            logger.warning(f"comparisons are not kept: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _database(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _query(self, keys: Sequence[bytes]) -> dict[bytes, list[list[Any]]]:
        """The verdicts of keys as JSON."""
        with _translated(self.path):
            rows = self._rows_of("SELECT key, verdicts FROM comparisons WHERE key", keys)
            return {key: json.loads(text) for key, text in rows}

    def _rows_of(self, query: str, keys: Sequence[bytes]) -> list[Sequence[Any]]:
        """The rows of a query that ends in the name of its key."""
        parts = [keys[start : start + _KEYS_A_QUERY] for start in range(0, len(keys), _KEYS_A_QUERY)]
        queries = ((f"{query} IN ({','.join('?' * len(part))})", part) for part in parts)
        return [row for text, part in queries for row in self._database.execute(text, part)]

    def _add_names(self, names: Mapping[bytes, Names]) -> None:
        """Write names, inside a transaction."""
        rows = [(key, *map(_bytes, texts)) for key, texts in names.items()]
        texts = dict.fromkeys(text for _, *texts in rows for text in texts)
        self._database.executemany("INSERT OR IGNORE INTO texts (text) VALUES (?)", [(text,) for text in texts])
        self._database.executemany(_ADD_NAMES, rows)

    def _prepare(self) -> None:
        """Make the table in a new file; raise for another program's file before any change."""
        with self._transaction():
            application, version = (self._pragma(name) for name in ("application_id", "user_version"))
            empty = not self._database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if application == 0 and version == 0 and empty:
                self._database.execute(_TABLE)
                self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
            elif application != _APPLICATION:
                raise DataError(f"{self.path}: an SQLite file of another program, not a store; {REMEDY}")
            elif version != _SCHEMA:
                raise DataError(
                    f"{self.path}: a store of another version of mlxpref (form {version}, this one reads {_SCHEMA}); "
                    f"{REMEDY}"
                )
            for table in (_NOISE_TABLE, *_NAME_TABLES):
                self._database.execute(table)
            # Written every time, so that a read-only file fails now and not after the first batch.
            self._database.execute(f"PRAGMA user_version = {_SCHEMA}")
        # With a write-ahead log writers do not wait for readers, nor a batch for the disk. Some network folders do not
        # support it, and another process may hold the file now: without it the store is only slower.
        with suppress(sqlite3.OperationalError):
            self._pragma("journal_mode = WAL")
        self._pragma("synchronous = NORMAL")

    def _pragma(self, text: str) -> object:
        row = self._database.execute(f"PRAGMA {text}").fetchone()
        return row[0] if row else None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One write transaction: all or nothing."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield


def default_store_path() -> Path:
    """The default place of the store: in $MLXPREF_CACHE, else in the user's cache folder."""
    return cache_dir() / "comparisons.sqlite"


def features_beside(store: Path | None = None, waits: bool = False) -> DiskCache | None:
    """What is kept of images beside a store, by default the default one; None if nothing is, or there is no place.

    $MLXPREF_FEATURES_GB bounds it, 0 keeps nothing; ConfigError for what is no number.
    """
    text = os.environ.get("MLXPREF_FEATURES_GB")
    try:
        limit = int(1e9 * max(0.0, float(text))) if text else FEATURE_FILE_BYTES
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"MLXPREF_FEATURES_GB is {text!r}: give a number, 0 to keep no image features") from error
    with suppress(DataError):  # there is no place for a store, which says so itself
        store = store or default_store_path()
        return DiskCache(store.with_name(f"{store.name}.features"), limit, waits) if limit else None
    return None


def stamped(image: Path | PackedImage) -> str:
    """An image's path, after size and date of its file, by which another picture of that name is told from it."""
    return f"{stamp_of(image)} {absolute_name(image)}"


def image_of(name: str) -> Path | PackedImage | None:
    """The image of a `stamped` name; None where its file is gone, or has changed since."""
    stamp, _, path = name.partition(" ")
    return find_stamped(path, stamp)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Translate SQLite's errors about a file into a DataError that says what to do."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # our own mistake, such as a closed store
    except (sqlite3.Error, ValueError, TypeError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the higher bits are details
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what = "another program keeps the store to itself; wait for it"
        elif code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            what = f"damaged, or not a store ({error}); move it away or delete it"
        else:
            what = f"the store cannot be read and written there ({error})"
        raise DataError(f"{path}: {what}; {REMEDY}") from error
