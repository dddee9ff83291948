"""Image features on disk: the same bits or nothing, in bounded space, for several programs at once."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.engine import feature_files as module
from mlxpref.engine.feature_files import FeatureFiles
from tests.messages import messages

LEAST = module._LEAST
WRITER = """
import sys
from pathlib import Path
import mlx.core as mx
from mlxpref.engine.feature_files import FeatureFiles

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(200):
    files = FeatureFiles(folder, limit=6 << 16)  # a new one may remove what the one before used
    for number in range(10):
        key = f"{(seed * 7 + turn * 3 + number) % 10:064}"
        arrays = files.get(key)
        assert arrays is None or bool((arrays["merged"] == int(key)).all()), key
        files.put(key, {"merged": mx.full((5000,), int(key))})
"""


def key(number: int) -> str:
    return f"{number:064x}"


def array(number: int) -> dict[str, mx.array]:
    return {"merged": mx.full((7, 3), number)}


def kept(folder: Path) -> list[int]:
    """The numbers of the files there are."""
    return sorted(int(path.name.split(".")[0], 16) for path in folder.glob("*.arrays"))


def age(folder: Path, *numbers: int) -> None:
    """Make files the older the earlier they stand here."""
    for place, number in enumerate(numbers):
        os.utime(folder / f"{key(number)}.arrays", (place + 1, place + 1))


def test_bits_of_every_type_come_back(tmp_path: Path) -> None:
    bits = mx.array(np.random.default_rng(0).integers(0, 1 << 32, (6, 40), np.uint32))  # with NaNs of every kind
    arrays = {f"{kind}": bits.view(kind) for kind in (mx.float32, mx.bfloat16, mx.float16, mx.int32)}
    arrays |= {"empty": mx.zeros((0, 3)), "grid": mx.array((2, 3))}
    FeatureFiles(tmp_path / "new" / "folder").put(key(1), arrays)
    again = FeatureFiles(tmp_path / "new" / "folder").get(key(1))
    assert again is not None
    assert again.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert (again[name].dtype, again[name].shape) == (expected.dtype, expected.shape)
        assert np.array_equal(again[name].view(mx.uint8), expected.view(mx.uint8))
    assert FeatureFiles(tmp_path).get(key(1)) is None
    assert FeatureFiles(tmp_path / "new" / "folder").get(key(2)) is None


def test_no_changed_byte_is_read(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path)
    files.put(key(1), array(1))
    path = tmp_path / f"{key(1)}.arrays"
    whole = path.read_bytes()
    changed = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    with messages() as lines:
        for content in [*changed, b"", whole[:31], whole[:-1], whole + b"0", bytes(len(whole))]:
            path.write_bytes(content)
            assert files.get(key(1)) is None
    assert lines == [f"{path}: damaged; its image is encoded again"]
    files.put(key(1), array(1))
    path.rename(tmp_path / f"{key(2)}.arrays")
    assert files.get(key(2)) is None
    files.put(key(2), array(2))
    again = files.get(key(2))
    assert again is not None
    assert np.array_equal(again["merged"], array(2)["merged"])


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    before = FeatureFiles(tmp_path, 4 * LEAST)
    for number in range(4):
        before.put(key(number), array(number))
    age(tmp_path, 2, 0, 1, 3)
    (tmp_path / "notes.txt").write_text("somebody's own")
    later = FeatureFiles(tmp_path, 4 * LEAST)
    assert later.get(key(2)) is not None  # now the most recently used
    assert later.has(key(0))  # this run will ask for it
    for number in (4, 5):
        later.put(key(number), array(number))
    assert kept(tmp_path) == [0, 2, 4, 5]
    with messages() as lines:
        later.put(key(6), array(6))
        later.put(key(7), array(7))
    assert kept(tmp_path) == [0, 2, 4, 5]
    assert len(lines) == 1
    assert "full" in lines[0]
    assert (tmp_path / "notes.txt").read_text() == "somebody's own"


def test_what_a_killed_program_left_goes(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{number}.{key(1)}.arrays" for number in range(2))
    for path in (old, new):
        path.write_bytes(bytes(3 * LEAST))
    os.utime(old, (1, 1))
    FeatureFiles(tmp_path, 3 * LEAST).put(key(2), array(2))
    assert {path.name for path in tmp_path.iterdir()} == {new.name, f"{key(2)}.arrays"}


def test_a_disk_with_little_space_keeps_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        FeatureFiles(tmp_path).put(key(number), array(number))
    age(tmp_path, 0, 1, 2, 3)
    monkeypatch.setattr(module, "free_bytes", lambda path: 8 * LEAST)
    FeatureFiles(tmp_path).put(key(4), array(4))
    assert kept(tmp_path) == [2, 3, 4]  # a quarter of 12


@contextmanager
def disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def failing(path: Path, durable: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module, "replacing", failing)
        yield


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    files = FeatureFiles(tmp_path / "file")
    with messages() as lines:
        for number in range(3):
            files.put(key(number), array(number))
            assert not files.has(key(number))
            assert files.get(key(number)) is None
    assert len(lines) == 1
    assert str(tmp_path / "file") in lines[0]
    files = FeatureFiles(tmp_path / "folder")
    files.put(key(1), array(1))
    with messages() as lines, disk_that_fails(monkeypatch):
        files.put(key(2), array(2))
        files.put(key(3), array(3))
    assert len(lines) == 1
    assert "No space left" in lines[0]
    assert files.get(key(1)) is not None
    assert kept(tmp_path / "folder") == [1]


def test_programs_write_read_and_remove_at_once(tmp_path: Path) -> None:
    arguments = [[sys.executable, "-c", WRITER, str(tmp_path), str(seed)] for seed in range(2)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(each, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for each in arguments]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert 0 < len(kept(tmp_path)) <= 6 + len(processes)
    assert [errors for _, errors in results] == ["", ""]
