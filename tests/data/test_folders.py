"""One's own preferences as two folders."""

from pathlib import Path

import pytest

from mlxpref.data.columns import WINNERS
from mlxpref.data.folders import read_folders
from mlxpref.data.load import ALL_ROWS, load_preferences
from mlxpref.errors import DataError


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


PAIRS = {f"{side}/{i}.png": "" for side in ("preferred", "rejected") for i in range(30)}


@pytest.mark.parametrize("names", WINNERS)
def test_equal_names_are_pairs(names: tuple[str, str], tmp_path: Path) -> None:
    better, worse = names
    write_files(
        tmp_path, {f"{better}/cat.png": "", f"{worse}/cat.JPG": "", f"{worse}/.DS_Store": "", "prompt.txt": " a cat \n"}
    )
    (preference,) = read_folders(tmp_path)
    images = [tmp_path / better / "cat.png", tmp_path / worse / "cat.JPG"]
    assert [preference.a, preference.b] == images[:: 1 if preference.p_people == 1.0 else -1]
    assert (preference.prompt, preference.group, preference.votes) == ("a cat", "a cat", 1)


def test_sides_are_drawn_and_labels_follow(tmp_path: Path) -> None:
    preferences = load_preferences(str(write_files(tmp_path, {**PAIRS, "prompt.txt": "x"})), "test")
    assert len(preferences) == 30
    assert 5 < sum(p.p_people for p in preferences) < 25
    assert all((p.p_people == 1.0) == ("preferred" in str(p.a)) and p.a != p.b for p in preferences)
    assert len(load_preferences(str(tmp_path), "test", 7)) == 7


@pytest.mark.parametrize("place", ["preferred/0.txt", "rejected/0.txt", "prompts/0.txt", "0.txt"])
def test_own_prompt_file_comes_first(place: str, tmp_path: Path) -> None:
    write_files(tmp_path, {**PAIRS, "prompt.txt": "for all", place: "its own"})
    assert sorted({p.prompt for p in read_folders(tmp_path)}) == ["for all", "its own"]


def test_a_split_is_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{s}/{side}/{s}.png": "" for s in ("train", "test") for side in ("preferred", "rejected")})
    write_files(tmp_path, {"train/prompt.txt": "to learn", "test/prompt.txt": "to test"})
    assert [p.prompt for p in load_preferences(str(tmp_path), "test")] == ["to test"]
    with pytest.raises(DataError, match='no split "dev"; there are test, train; give one with --split'):
        load_preferences(str(tmp_path), "dev")
    with pytest.raises(DataError, match="holds no two folders preferred/ and rejected/ or chosen/ and rejected/"):
        load_preferences(str(tmp_path / "train" / "preferred"), "dev")
    pairs = load_preferences(str(tmp_path / "train"), "dev")
    assert (len(pairs), pairs.split) == (1, ALL_ROWS)
    with pytest.raises(DataError, match="it has no splits"):
        load_preferences(str(tmp_path / "train"), "dev", needs_split=True)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, {**PAIRS, "preferred/alone.png": "", "0.txt": " ", "1.txt": "x" * 100_000, "2.txt": "good"})
    with pytest.raises(DataError) as caught:
        read_folders(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 30 of 31 pairs cannot be used; correct or remove them:"
    assert lines[1] == "  0: 0.txt has an empty prompt"
    assert lines[2] == "  1: 1.txt has a prompt of 100,000 characters, more than 10,000; shorten it"
    assert lines[3] == "  3: has no prompt: neither 3.txt nor prompt.txt is there"
    assert lines[-1] == "  and 20 more"
    write_files(tmp_path, {"prompt.txt": "x", "0.txt": "y", "1.txt": "z"})
    with pytest.raises(DataError, match="alone: is only in preferred"):
        read_folders(tmp_path)
    write_files(tmp_path, {"rejected/alone.png": "", "rejected/alone.jpg": ""})
    with pytest.raises(DataError, match=r"alone\.jpg and alone\.png have the same name"):
        read_folders(tmp_path)
