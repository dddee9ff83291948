import os
from pathlib import Path
from unittest.mock import patch

from mlxpref.data.duplicates import find_duplicates, same_content


def test_duplicates_are_files_of_the_same_bytes(tmp_path: Path) -> None:
    contents = {"x": b"one", "y": b"two", "z": b"one", "short": b"on", "v": b"two", "w": b"six", "u": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    paths = [tmp_path / name for name in (*contents, "gone", "folder", "pipe")]
    x, y, z, _, v, _, u = paths[:7]
    assert find_duplicates([*paths, x]) == [(x, z, u), (y, v)]
    assert find_duplicates(paths[::-1]) == [(u, z, x), (v, y)]
    assert find_duplicates([]) == []
    assert same_content(x, z)
    assert same_content(x, x)
    assert not same_content(x, y)
    assert not same_content(x, tmp_path / "gone")
    assert not same_content(tmp_path / "folder", tmp_path / "folder")


def test_only_files_of_equal_size_are_read(tmp_path: Path) -> None:
    for size in range(5):
        (tmp_path / str(size)).write_bytes(bytes(size))
    with patch("mlxpref.data.duplicates._digest", side_effect=AssertionError("read")):
        assert find_duplicates(sorted(tmp_path.iterdir())) == []
