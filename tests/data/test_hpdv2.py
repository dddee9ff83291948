"""HPDv2: real rankings of ten people, pairs to train with, and what can be wrong in lists and archives."""

import json
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from mlxpref.data.hpdv2 import ranking_rows, read_hpdv2, train_rows
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.errors import ConfigError, DataError
from tests.data_layouts import make_layout, write_split
from tests.messages import messages

SAMPLE = Path(__file__).parents[1] / "fixtures" / "hpdv2-sample-test.json"


def test_the_real_sample() -> None:
    entries = json.loads(SAMPLE.read_text())
    rows = ranking_rows(SAMPLE)
    assert len(rows) == 540
    assert Counter(row.group for row in rows) == {entry["prompt"]: 36 for entry in entries}
    assert {row.votes for row in rows} == {10}
    expected = [
        (
            entry["image_path"][i],
            entry["image_path"][j],
            sum(rater["rank"][i] < rater["rank"][j] for rater in entry["raw_annotations"]) / 10,
            "a" if entry["rank"][i] < entry["rank"][j] else "b",
        )
        for entry in entries
        for i, j in combinations(range(9), 2)
    ]
    assert [(row.a, row.b, row.p_people, row.label) for row in rows] == expected
    # The label is the official ranking's, also where as many people say the one as the other, or more the other.
    assert sum(row.p_people == 0.5 for row in rows) == 28
    assert all(row.label in ("a", "b") for row in rows)


def test_unpacked_folder(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_bytes(SAMPLE.read_bytes())
    names = {name for entry in json.loads(SAMPLE.read_text()) for name in entry["image_path"]}
    (tmp_path / "test").mkdir()
    for name in names:
        (tmp_path / "test" / name).touch()
    preferences = load_preferences("hpdv2", "test", data_dir=tmp_path)
    assert len(preferences) == 540
    assert {p.a for p in preferences} | {p.b for p in preferences} == {tmp_path / "test" / name for name in names}
    assert preferences[0].better == "b"  # the first two of the first prompt are fourth and first
    assert len(load_preferences("hpdv2", "test", 50, data_dir=tmp_path)) == 50


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_hub_layout_is_unpacked_once(split: str, tmp_path: Path) -> None:
    folder = make_layout("hpdv2", tmp_path)
    with messages() as lines:
        preferences = load_preferences("hpdv2", split, data_dir=folder)
    assert "are read once, and 16 images" in lines[0]
    assert len(preferences) == (16 if split == "train" else 24)
    assert all(isinstance(p.a, Path) and load_image(p.a).size == (84, 84) for p in preferences)
    check_preferences("hpdv2", preferences, ImageCache(1000))
    (folder / f"{split}.tar.gz").touch()  # another time of change: it might be another archive
    assert load_preferences("hpdv2", split, data_dir=folder)[0].a != preferences[0].a
    with messages() as lines:
        again = load_preferences("hpdv2", split, data_dir=folder)
    assert len(again) == len(preferences)
    assert lines == []


def test_only_drawn_pairs_are_unpacked(tmp_path: Path) -> None:
    with messages() as lines:
        preferences = load_preferences("hpdv2", "train", 1, data_dir=make_layout("hpdv2", tmp_path))
    assert "2 images" in lines[0]
    (image,) = {p.a for p in preferences}
    assert isinstance(image, Path)
    assert len(list(image.parent.iterdir())) == 2


def test_an_uncompressed_tar_is_unpacked_too(tmp_path: Path) -> None:
    folder = make_layout("hpdv2", tmp_path)
    with tarfile.open(folder / "test.tar.gz") as old, tarfile.open(folder / "test.tar", "w") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
    (folder / "test.tar.gz").unlink()
    preferences = load_preferences("hpdv2", "test", data_dir=folder)
    assert all(isinstance(p.a, Path) and load_image(p.a).size == (84, 84) for p in preferences)


def test_pairs_have_one_vote_and_sides_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(
        json.dumps(
            [
                {"prompt": f"p{i // 2}", "file_path": [f"{i}.jpg", f"{i}b.jpg"], "human_preference": [1, 0]}
                for i in range(400)
            ]
        )
    )
    rows = train_rows(path)
    assert [row.p_people for row in rows] == [float("b" not in row.a) for row in rows]
    assert 150 < sum(row.p_people for row in rows) < 250
    assert rows == train_rows(path)
    assert {row.votes for row in rows} == {1}
    assert [row.group for row in rows] == [f"p{i // 2}" for i in range(400)]
    assert rows[0].prompt is rows[1].prompt  # in memory once


def test_other_key_of_the_images(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[{"prompt": "p", "image_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]}]')
    (row,) = train_rows(path)
    assert (row.a, row.p_people) in (("1.jpg", 0.0), ("2.jpg", 1.0))


def test_damaged_images_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    entries = [{"prompt": "p", "file_path": [f"{i}.jpg", "b.jpg"], "human_preference": [0, 1]} for i in range(200)]
    entries[7]["file_path"] = ["00006811.jpg", "b.jpg"]
    path.write_text(json.dumps(entries))
    with messages() as lines:
        assert len(train_rows(path)) == 199
    assert "row 8: 00006811.jpg is known to be damaged" in lines[1]


PAIR = {"prompt": "p", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]}
RANKING = {"prompt": "p", "image_path": ["1.jpg", "2.jpg"], "rank": [1, 2], "raw_annotations": [{"rank": [1, 2]}]}


@pytest.mark.parametrize(
    ("name", "entry", "text"),
    [
        ("train", {**PAIR, "human_preference": [0.3, 1]}, 'row 1: "human_preference" is 0.3 and 1, not 1 and 0'),
        ("train", {**PAIR, "human_preference": [1]}, "row 1: "),
        ("train", {**PAIR, "human_preference": "no"}, "row 1: "),
        ("train", {**PAIR, "file_path": ["1.jpg"]}, "row 1: not enough values"),
        ("train", {**PAIR, "file_path": ["1.jpg", 2]}, "row 1: prompt and images must be text"),
        ("train", {**PAIR, "file_path": ["1.jpg", "1.jpg"]}, "row 1: names 1.jpg twice"),
        ("train", {"prompt": "p"}, 'row 1: has no "image_path"'),
        ("train", 3, "row 1: "),
        ("test", {**RANKING, "rank": [1]}, "row 1: 2 images, but the ranks [1]"),
        ("test", {**RANKING, "rank": [1, "2"]}, "row 1: 2 images, but the ranks [1, '2']"),
        ("test", {**RANKING, "image_path": ["1.jpg", "1.jpg"]}, "row 1: names an image twice"),
        ("test", {**RANKING, "raw_annotations": [{"rank": [1, 2, 3]}]}, "row 1: 2 images, but the ranks [1, 2, 3]"),
        ("test", {**RANKING, "raw_annotations": [{}]}, 'row 1: has no "rank"'),
        ("test", {"prompt": "p", "rank": [1]}, 'row 1: has no "image_path"'),
        ("test", "text", "row 1: "),
    ],
)
def test_rows_that_cannot_be_used(name: str, entry: object, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(DataError) as caught:
        read_hpdv2(tmp_path, name)
    assert str(caught.value).startswith(f"{path}: 1 of 1 rows cannot be used; download the data set again:\n  {text}")


def test_rankings_of_one_prompt_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    without = {key: value for key, value in RANKING.items() if key != "raw_annotations"}
    path.write_text(json.dumps([RANKING, {**without, "rank": [2, 2]}]))
    first, second = ranking_rows(path)
    assert (first.group, second.group) == ("p", "p (2)")
    assert (first.prompt, second.prompt) == ("p", "p")
    assert (second.p_people, second.votes, second.label) == (0.5, 1, "tie")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "it has no rows"),
        ("[]", "it has no rows"),
        ("[", "it ends early"),
        ('[{"prompt": "p"', "row 1"),
        (f"[{json.dumps(PAIR)}, ", "row 2 (it ends early)"),
        (f"[{json.dumps(PAIR)}, oops]", "row 2"),
        ("[" * 100_000, "it ends early"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("\xff", "not UTF-8"),
    ],
)
def test_lists_that_are_no_json(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_hpdv2(tmp_path, "train")
    assert error in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_files_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no .*test\.json; download them with `mlxpref data hpdv2 --split test`"
    ):
        load_preferences("hpdv2", "test", data_dir=tmp_path)
    (tmp_path / "test.json").write_bytes(SAMPLE.read_bytes())
    with pytest.raises(ConfigError, match=r"neither test\.tar\.gz, whole or in parts, nor its images "):
        load_preferences("hpdv2", "test", data_dir=tmp_path)


def test_incomplete_archive(tmp_path: Path) -> None:
    folder = make_layout("hpdv2", tmp_path)
    entries = json.loads((folder / "test.json").read_text())
    entries[0]["image_path"][0] = "99999.jpg"
    (folder / "test.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"99999\.jpg: is not in test\.tar\.gz"):
        load_preferences("hpdv2", "test", data_dir=folder)
    write_split(folder / "test.tar.gz", 3)[2].unlink()
    with pytest.raises(DataError, match=r"test\.tar\.gz\.01: the archive is damaged or ends early"):
        load_preferences("hpdv2", "test", data_dir=folder)
