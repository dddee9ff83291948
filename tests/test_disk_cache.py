"""What is kept on disk: the same bytes or nothing, in bounded space, for several programs at once."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxpref import disk_cache as module
from mlxpref.disk_cache import DiskCache
from tests.conftest import start_together
from tests.messages import messages

LEAST = module.LEAST
MUCH = 1 << 30
WRITER = """
import sys
from pathlib import Path
from mlxpref.disk_cache import DiskCache

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    disk = DiskCache(folder, limit=6 << 16)  # a new one may remove what the one before used
    for number in range(10):
        key = str((seed * 7 + turn * 3 + number) % 10)
        assert disk.get(key) in (None, 20_000 * key.encode()), key
        disk.put(key, 20_000 * key.encode())
"""


def kept(folder: Path) -> list[int]:
    """The numbers that are there."""
    return [number for number in range(10) if path_of(folder, number).exists()]


def path_of(folder: Path, number: int) -> Path:
    return DiskCache(folder, MUCH)._path(f"{number}")


def put(disk: DiskCache, *numbers: int) -> None:
    for number in numbers:
        disk.put(f"{number}", bytes(100))


def age(folder: Path, *numbers: int) -> None:
    """Make files the older the earlier they stand here."""
    for place, number in enumerate(numbers):
        os.utime(path_of(folder, number), (place + 1, place + 1))


def test_no_changed_byte_is_read(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "new" / "folder", MUCH)
    assert disk.get("1") is None
    disk.put("1", b"some bytes")
    assert DiskCache(tmp_path / "new" / "folder", MUCH).get("1") == b"some bytes"
    path = path_of(disk.folder, 1)
    whole = path.read_bytes()
    changed = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    with messages() as lines:
        for content in [*changed, b"", whole[:31], whole[:-1], whole + b"0", bytes(len(whole))]:
            path.write_bytes(content)
            assert disk.get("1") is None
    assert lines == [f"{path}: damaged; what it holds is computed again"]
    disk.put("1", b"some bytes")
    path.rename(path_of(disk.folder, 2))
    assert disk.get("2") is None
    disk.put("2", b"others")
    assert disk.get("2") == b"others"


def test_nothing_is_written_before_the_start(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "new", MUCH, waits=True)
    put(disk, 1, 2)
    assert not disk.folder.exists()
    disk.start()
    put(disk, 3)
    assert kept(disk.folder) == [1, 2, 3]


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    put(DiskCache(tmp_path, 4 * LEAST), 0, 1, 2, 3)
    age(tmp_path, 2, 0, 1, 3)
    (tmp_path / "notes.txt").write_text("somebody's own")
    later = DiskCache(tmp_path, 4 * LEAST)
    assert later.get("2") is not None  # now the most recently used
    assert later.has("0")  # this run will ask for it
    put(later, 4)
    assert kept(tmp_path) == [0, 2, 4]
    put(later, 5)
    assert kept(tmp_path) == [0, 2, 4, 5]
    with messages() as lines:
        put(later, 6, 7)
    assert kept(tmp_path) == [0, 2, 4, 5]
    assert len(lines) == 1
    assert "full" in lines[0]
    assert (tmp_path / "notes.txt").read_text() == "somebody's own"


def test_several_programs_share_a_bound(tmp_path: Path) -> None:
    """Each counts anew before it has written much."""
    caches = [DiskCache(tmp_path, 32 * LEAST) for _ in range(4)]
    with messages() as lines:
        for number in range(100):
            put(caches[number % 4], number)
    assert len(list(tmp_path.iterdir())) <= 32 + 4 * 32 // module._SPARE
    assert all("full" in line for line in lines)
    assert DiskCache(tmp_path, 32 * LEAST).room == 32 * LEAST
    assert DiskCache(tmp_path / "new", 32 * LEAST).room == 32 * LEAST


def test_what_is_asked_for_in_vain_takes_no_memory(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, MUCH)
    put(disk, 1)
    for number in range(100):
        disk.get(f"{number}")
        disk.has(f"{number}")
    assert len(disk._used) == 1


def test_what_a_killed_program_left_goes(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{number}.x.kept" for number in range(2))
    for path in (old, new):
        path.write_bytes(bytes(3 * LEAST))
    os.utime(old, (1, 1))
    put(DiskCache(tmp_path, 3 * LEAST), 2)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, path_of(tmp_path, 2).name}


def test_a_disk_with_little_space_keeps_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(DiskCache(tmp_path, MUCH), 0, 1, 2, 3)
    age(tmp_path, 0, 1, 2, 3)
    monkeypatch.setattr(module, "free_bytes", lambda path: 8 * LEAST)
    put(DiskCache(tmp_path, MUCH), 4)
    assert kept(tmp_path) == [3, 4]  # less than a quarter of 12


@contextmanager
def disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def failing(path: Path, durable: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module, "replacing", failing)
        yield


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    disk = DiskCache(tmp_path / "file", MUCH)
    with messages() as lines:
        put(disk, 0, 1)
        assert not disk.has("0")
        assert disk.get("0") is None
    assert len(lines) == 1
    assert str(tmp_path / "file") in lines[0]
    disk = DiskCache(tmp_path / "folder", MUCH)
    put(disk, 1)
    with messages() as lines, disk_that_fails(monkeypatch):
        put(disk, 2, 3)
    assert len(lines) == 1
    assert "No space left" in lines[0]
    assert disk.get("1") is not None
    assert kept(tmp_path / "folder") == [1]


def test_programs_write_read_and_remove_at_once(tmp_path: Path) -> None:
    arguments = [[sys.executable, "-c", WRITER, str(tmp_path), str(seed)] for seed in range(2)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(each, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for each in arguments]
    start_together(processes)
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert 0 < len(kept(tmp_path)) <= 6 + len(processes)
    assert [errors for _, errors in results] == ["", ""]
