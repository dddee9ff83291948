"""HPDv3: the preferred image is always first in the file, and must not be so in what is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxpref.data.hpdv3 import pair_rows
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.errors import ConfigError, DataError
from tests.data_layouts import make_layout

ROW = {"prompt": "p", "path1": "images/1.jpg", "path2": "images/2.jpg", "choice_dist": [7, 2], "confidence": 0.9}


def listed(folder: Path, *rows: Any) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_hub_layout(split: str, tmp_path: Path) -> None:
    folder = make_layout("hpdv3", tmp_path)
    entries = json.loads((folder / f"{split}.json").read_text())
    preferences = load_preferences("hpdv3", split, data_dir=folder)
    assert len(preferences) == len(entries) == 12
    for preference, entry in zip(preferences, entries, strict=True):
        names = [str(image).rpartition("images-")[2].partition("/")[2] for image in (preference.a, preference.b)]
        assert sorted(names) == sorted([entry["path1"], entry["path2"]])
        votes = entry.get("choice_dist")
        share = max(votes) / sum(votes) if votes else 1.0
        assert preference.p_people == pytest.approx(share if names[0] == entry["path1"] else 1 - share)
        assert preference.votes == (9 if votes else 1)
        assert preference.group == entry["prompt"]
        assert load_image(preference.a).size == (84, 84)
    check_preferences("hpdv3", preferences, ImageCache(1000))


def test_sides_are_drawn_and_stay_the_same(tmp_path: Path) -> None:
    path = listed(tmp_path, *({**ROW, "path1": f"{i}.jpg", "path2": f"{i}b.jpg"} for i in range(1000)))
    rows = pair_rows(path)
    assert 440 < sum(row.p_people > 0.5 for row in rows) < 560
    assert all((row.p_people > 0.5) == ("b" not in row.a) for row in rows)
    assert rows == pair_rows(path)
    path = listed(tmp_path, *({**ROW, "path1": f"{i}.jpg", "path2": f"{i}b.jpg"} for i in range(600)))
    assert pair_rows(path) == rows[:600]


def test_votes(tmp_path: Path) -> None:
    votes: list[Any] = [[7, 2], [2, 7], None, [], [0.6, 0.4], [3, 3]]
    rows = pair_rows(listed(tmp_path, *({**ROW, "choice_dist": each} for each in votes)))
    shares = [row.p_people if row.a == "images/1.jpg" else 1 - row.p_people for row in rows]
    assert shares == pytest.approx([7 / 9, 7 / 9, 1, 1, 0.6, 0.5])
    assert [row.votes for row in rows] == [9, 9, 1, 1, 1, 6]
    assert [row.label for row in rows[:5]] == [None] * 5
    # As many votes for each, but the test counts path1 as better.
    assert rows[5].label == ("a" if rows[5].a == "images/1.jpg" else "b")


def test_lines_of_json_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("\n".join(json.dumps({**ROW, "prompt": f"p{i}"}) for i in range(3)) + "\n")
    assert [row.prompt for row in pair_rows(path)] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**ROW, "choice_dist": [0, 0]}, '"choice_dist" is [0, 0]'),
        ({**ROW, "choice_dist": [-1, 3]}, '"choice_dist" is [-1, 3]'),
        ({**ROW, "choice_dist": [1, 2, 3]}, "too many values"),
        ({**ROW, "choice_dist": 5}, "row 1: "),
        ({**ROW, "path2": "images/1.jpg"}, "must be text, the paths two"),
        ({**ROW, "path2": 7}, "must be text"),
        ({"prompt": "p", "path1": "x"}, 'has no "path2"'),
        ([1], "row 1: "),
    ],
)
def test_rows_that_cannot_be_used(row: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used") as caught:
        pair_rows(listed(tmp_path, row))
    assert problem in str(caught.value)


def test_names_outside_the_folder(tmp_path: Path) -> None:
    folder = make_layout("hpdv3", tmp_path / "in")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    listed(folder, {**ROW, "path1": "../secret.jpg"}, {**ROW, "path1": str(tmp_path / "secret.jpg")})
    with pytest.raises(DataError, match=r"\.\./secret\.jpg: is not a name of a file below a folder"):
        load_preferences("hpdv3", "train", data_dir=folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no .*test\.json; download them with `mlxpref data hpdv3 --split test`"
    ):
        load_preferences("hpdv3", "test", data_dir=tmp_path)
    folder = make_layout("hpdv3", tmp_path)
    (folder / "images.tar.gz.01").unlink()
    with pytest.raises(DataError, match=r"a part is missing, there are only \.00, \.02"):
        load_preferences("hpdv3", "test", data_dir=folder)
    for part in folder.glob("images.tar.gz.*"):
        part.unlink()
    with pytest.raises(ConfigError, match=r"neither images\.tar\.gz, whole or in parts, nor its images"):
        load_preferences("hpdv3", "test", data_dir=folder)
