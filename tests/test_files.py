"""Files are replaced as a whole or not at all, and caches lie where the system keeps them."""

import hashlib
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mlxpref.files import cache_dir, free_bytes, lock, open_for_append, replacing, sha256_of, truncate_lines, write_file


def test_replacing_a_file_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "ö")
    write_file(tmp_path / "b.bin", b"\xff")
    assert (path.read_bytes(), (tmp_path / "b.bin").read_bytes()) == ("ö".encode(), b"\xff")
    for durable in (True, False):
        for error in (KeyError(), None):
            with suppress(KeyError), replacing(path, durable) as temporary:
                temporary.write_text("half" if error else "ö")
                assert path.read_text() == "ö"
                assert temporary.suffix == ".txt"
                if error:
                    raise error
    assert path.read_text() == "ö"
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "b.bin"}
    assert sha256_of(path) == hashlib.sha256("ö".encode()).hexdigest()
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_appended_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"1\n2\n3")
    with open_for_append(path) as file:
        assert lock(file)
        with path.open("rb") as other:
            assert not lock(other)
        truncate_lines(file, 9)  # longer than the file is: its complete lines stay
        assert path.read_bytes() == b"1\n2\n"
        truncate_lines(file, 2)
    assert path.read_bytes() == b"1\n"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLXPREF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == tmp_path / ".cache" / "mlxpref"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "mlxpref"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_dir() == tmp_path / "caches" / "mlxpref"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == tmp_path / "Library" / "Caches" / "mlxpref"
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert list(tmp_path.iterdir()) == []
