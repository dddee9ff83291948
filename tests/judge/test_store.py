"""The store: verdicts come back exactly, from many processes at once, after a crash; bad files are named and kept."""

import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import DataError
from mlxpref.judge.store import Store, image_of, stamped
from mlxpref.preferences import PackedImage
from mlxpref.verdict import Verdict
from tests.conftest import start_together
from tests.messages import messages

WRITER = """
import sys
from pathlib import Path
from mlxpref.judge.store import Store
from mlxpref.verdict import Verdict

path, name, batches, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
with Store(path) as store:
    for batch in range(batches):
        own = {f"{name} {batch} {i}".encode(): (Verdict(name * 200, batch / 7, i / 3),) for i in range(size)}
        store.put_many(own | {f"both {batch}".encode(): (Verdict("either"),)})
        print(batch, flush=True)
"""
"""Keeps batches of its own, each with a comparison that others keep too, and says so after each."""

OPENER = "import sys, pathlib; from mlxpref.judge.store import Store; Store(pathlib.Path(sys.argv[1]))"
SOMEBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
"""What runs a command as somebody who may not write anywhere, where that is not so already."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "comparisons.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store


@pytest.fixture
def writer(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another process that keeps batches as soon as it is written a line."""
    started = []

    def start(name: str, batches: int, size: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name, str(batches), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def bits(verdicts: tuple[Verdict, ...]) -> list[tuple[object, ...]]:
    """Verdicts such that equal means the same bits and the same types."""
    return [(v.text, struct.pack("dd", v.p_label_first, v.p_label_second), v.closed, v.tokens) for v in verdicts]


def count(store: Store) -> int:
    """How many comparisons a store holds, read by another connection."""
    with closing(sqlite3.connect(store.path)) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM comparisons").fetchone()[0])


def make_verdicts(number: int) -> tuple[Verdict, ...]:
    return (Verdict(f"<think>{number}</think><answer>", 1 / (number + 3), 0.1, False, number),)


def check_refusal(path: Path, *words: str, timeout: float = 0.05) -> str:
    """The error of opening a file: one line that names it, says what is asked, and how to do without."""
    with pytest.raises(DataError) as caught:
        Store(path, timeout)
    return check_error(caught.value, path, *words)


def check_error(error: DataError, path: Path, *words: str) -> str:
    line = str(error)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert "--no-store" in line
    assert all(word in line for word in words), line
    return line


def test_verdicts_come_back_bit_by_bit(path: Path) -> None:
    awkward = [0.1 + 0.2, 1 / 3, -0.0, 0.0, 1.0, 5e-324, float("inf"), float("nan")]
    numbers = [*awkward, *np.random.default_rng(0).random(500).tolist()]
    texts = ["", "<think>é 画\n</think>", "half \ud83d", "\x00", '"quoted\\', "word " * 3000]
    verdicts = [Verdict(texts[i % len(texts)], number, numbers[-i], i % 3 == 0, i) for i, number in enumerate(numbers)]
    items = {bytes([i]): tuple(verdicts[2 * i : 3 * i]) for i in range(150)}
    with Store(path) as store:
        store.put_many(items)
    with Store(path) as store:
        result = store.get_many(list(items))
    assert {key: bits(kept) for key, kept in result.items()} == {key: bits(kept) for key, kept in items.items()}
    assert all(type(v.closed) is bool and type(v.p_label_first) is float for kept in result.values() for v in kept)


def test_many_keys_at_once(store: Store) -> None:
    items = {f"{i}".encode(): make_verdicts(i) for i in range(1201)}
    store.put_many(items)
    assert store.get_many([*items, b"other"]) == items
    assert store.get_many([]) == {}
    assert count(store) == 1201


def test_first_verdict_stays(store: Store) -> None:
    store.put_many({b"a": make_verdicts(1)})
    store.put_many({b"a": make_verdicts(2), b"b": make_verdicts(3)})
    assert store.get_many([b"a", b"b"]) == {b"a": make_verdicts(1), b"b": make_verdicts(3)}


def test_names_come_back(path: Path, tmp_path: Path) -> None:
    """Also of files whose names are no text; a name is replaced, and what is there already is not written again."""
    odd = os.fsdecode(b"\xff.png")
    names = {b"a": ("{}", "p \ud83d", "1", odd), b"b": ("{}", "p \ud83d", odd, "1"), b"c": ("other", "q", "1", "2")}
    with Store(path) as store:
        store.put_many({key: make_verdicts(i) for i, key in enumerate(names)}, names)
        store.put_names({b"unknown": ("{}", "p", "1", "2")})
        assert store.judges() == {"{}": 3, "other": 1}
        assert list(store.named(["{}"])) == [(names[b"a"], make_verdicts(0)), (names[b"b"], make_verdicts(1))]
        assert [each for each, _ in store.named(["other", "{}"])] == list(names.values())
        with closing(sqlite3.connect(path)) as other:  # a writer: what is not written does not wait for it
            other.execute("BEGIN IMMEDIATE")
            store.put_names(names)
        store.put_names({b"a": ("{}", "p \ud83d", "moved", odd)})
        assert next(store.named(["{}"]))[0][2] == "moved"


def test_a_stamped_image_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = Path("a b.png")
    image.write_bytes(b"one")
    name = stamped(image)
    assert image_of(name) == tmp_path / image
    image.write_bytes(b"three")
    assert image_of(name) is None
    packed = PackedImage(Path("all.zip"), "in/1.png")
    packed.archive.write_bytes(b"zip")
    assert image_of(stamped(packed)) == PackedImage(tmp_path / "all.zip", "in/1.png")


def test_file_names_its_program(path: Path, store: Store) -> None:
    with sqlite3.connect(path) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    assert application.to_bytes(4, "big") == b"mlxp"
    assert version == 1


def test_a_new_folder_is_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "own.sqlite"
    Store(path).close()
    assert path.exists()


def test_two_processes_write_at_once(path: Path, writer: Callable[..., subprocess.Popen[str]]) -> None:
    batches, size = 150, 8
    processes = [writer(name, batches, size) for name in "ab"]
    start_together(processes)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
    with Store(path) as store:
        assert count(store) == 2 * batches * size + batches
        assert store.get_many([b"b 149 7"]) == {b"b 149 7": (Verdict("b" * 200, 149 / 7, 7 / 3),)}


@pytest.mark.parametrize("after", [1, 40])
def test_killed_process_loses_one_batch(path: Path, writer: Callable[..., subprocess.Popen[str]], after: int) -> None:
    size = 300
    process = writer("a", 100_000, size)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    lines = [process.stdout.readline() for _ in range(1 + after)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    finished = len([line for line in lines if line.endswith("\n")]) - 1
    assert finished >= after
    with Store(path) as store:
        assert count(store) in {finished * (size + 1), (finished + 1) * (size + 1)}
        assert len(store.get_many([f"a {finished - 1} {i}".encode() for i in range(size)])) == size
        store.put_many({b"afterwards": make_verdicts(1)})
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_file_without_database_stays(path: Path) -> None:
    path.write_text("my notes\n" * 100)
    check_refusal(path, "damaged, or not a store", "move it away or delete it", "--store FILE")
    assert path.read_text() == "my notes\n" * 100
    assert list(path.parent.iterdir()) == [path]


def test_database_of_another_program_stays(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE comparisons (key BLOB PRIMARY KEY, verdicts TEXT)")
    connection.close()
    before = path.read_bytes()
    check_refusal(path, "another program", "--store FILE")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_store_of_another_version_stays(path: Path, store: Store) -> None:
    store.put_many({b"a": make_verdicts(1)})
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    check_refusal(path, "another version of mlxpref", "form 2", "reads 1")


def test_damage_inside_is_named(path: Path) -> None:
    with Store(path) as store:
        store.put_many({f"{i}".encode(): make_verdicts(i) for i in range(2000)})
    damaged = bytearray(path.read_bytes())
    damaged[4096 * 2 :] = os.urandom(len(damaged) - 4096 * 2)
    path.write_bytes(damaged)
    with Store(path) as store, pytest.raises(DataError) as caught:
        store.get_many([f"{i}".encode() for i in range(2000)])
    check_error(caught.value, path, "damaged", "delete it")


@pytest.mark.parametrize("text", ["[[1", "7", '[["a", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]'])
def test_malformed_verdict_is_damage(path: Path, store: Store, text: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO comparisons VALUES (?, ?)", (b"a", text))
    connection.close()
    with pytest.raises(DataError) as caught:
        store.get_many([b"a"])
    check_error(caught.value, path, "damaged")


def test_locked_store_is_named(path: Path, store: Store) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    check_refusal(path, "another program keeps the store to itself")
    other.execute("ROLLBACK")
    with Store(path, timeout=0.05) as impatient:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataError) as caught:
            impatient.put_many({b"a": make_verdicts(1)})
        check_error(caught.value, path, "another program")
        assert impatient.get_many([b"a"]) == {}  # readers are not kept waiting
        other.execute("ROLLBACK")
        impatient.put_many({b"a": make_verdicts(1)})
    other.close()


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    check_refusal(tmp_path / "folder", "cannot be read and written", "--store FILE")
    (tmp_path / "file").write_text("")
    check_refusal(tmp_path / "file" / "comparisons.sqlite", "folder cannot be made", "--store FILE")


@pytest.mark.skipif(bool(SOMEBODY) and not shutil.which("setpriv"), reason="root may write anywhere")
@pytest.mark.parametrize("exists", [False, True])
def test_unwritable_folder_is_named(exists: bool) -> None:
    # Not pytest's own folder: nobody but the user may look into that one.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparisons.sqlite"
        if exists:
            Store(path).close()
            with sqlite3.connect(path) as connection:  # as in a folder that can have no log
                connection.execute("PRAGMA journal_mode = DELETE")
            connection.close()
            path.chmod(0o444)
        path.parent.chmod(0o555)
        result = subprocess.run([*SOMEBODY, sys.executable, "-c", OPENER, str(path)], capture_output=True, text=True)
        path.parent.chmod(0o700)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"mlxpref.errors.DataError: {path}: the store cannot be read and written there")
    assert "--no-store" in line
    assert ("readonly" in line) == exists


def test_a_disk_that_fails_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if not sql.startswith("SELECT key"):
                return super().execute(sql, *values)
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
            raise error

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Failing))
    with Store(path) as store, pytest.raises(DataError) as caught:
        store.get_many([b"a"])
    check_error(caught.value, path, "cannot be read and written", "disk I/O error")


def test_a_full_disk_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(sqlite3.Connection):
        def __init__(self, *place: Any, **options: Any) -> None:
            super().__init__(*place, **options)
            self.execute("PRAGMA max_page_count = 20")

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Small))
        store = Store(path)
    with store:
        with pytest.raises(DataError) as caught:
            store.put_many({f"{i}".encode(): make_verdicts(i) for i in range(5000)})
        check_error(caught.value, path, "cannot be read and written", "full")
        assert count(store) == 0


def test_a_store_that_is_not_required_is_left_off(tmp_path: Path) -> None:
    items = {b"key": (Verdict("text", 0.25, 0.5),)}
    (tmp_path / "file").write_text("x")
    with messages() as lines, Store(tmp_path / "file" / "kept.sqlite", required=False) as store:
        store.put_many(items)
        assert store.get_many(list(items)) == {}
    assert len(lines) == 1
    path = tmp_path / "kept.sqlite"
    with (
        messages() as lines,
        Store(path, timeout=0.0, required=False) as store,
        closing(sqlite3.connect(path)) as other,
    ):
        store.put_many(items)
        other.execute("DROP TABLE comparisons")
        assert store.get_many(list(items)) == {}
        store.put_many(items)
    assert len(lines) == 1
    assert lines[0].startswith(f"comparisons are not kept: {path}")
