"""The public data sets in their layouts: official counts, images in archives, and what can be wrong with them."""

import json
import tarfile
import zipfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.data.public_sets import UnpackedImages, unpack_images
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import PackedImage, Preference
from tests.data_layouts import make_layout, write_split
from tests.messages import messages

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAMPLE = FIXTURES / "hpdv2-sample-test.json"
RANKINGS = (FIXTURES / "imagereward-test-rankings.txt").read_text().split()


def read(name: str, split: str, folder: Path) -> list[Preference]:
    """The preferences in a list whose images need not be there."""
    return load_preferences(name, split, data_dir=folder, needs_images=False)


def names(*preferences: Preference) -> list[tuple[str, str]]:
    return [(Path(str(p.a)).name, Path(str(p.b)).name) for p in preferences]


def listed(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path.parent


def official_list(folder: Path) -> Path:
    groups = [
        {
            "id": f"{n:06d}-0001",
            "prompt": f"prompt {n}",
            "generations": [f"part-{n}/images/{i}.webp" for i in range(len(ranks))],
            "ranking": [int(rank) for rank in ranks],
        }
        for n, ranks in enumerate(RANKINGS)
    ]
    return listed(folder / "test.json", *groups)


def test_official_counts_of_imagereward(tmp_path: Path) -> None:
    rows = read("imagereward", "test", official_list(tmp_path))
    scored = [row for row in rows if row.p_people != 0.5]
    assert len({row.group for row in rows}) == 466
    assert (len(rows), len(rows) - len(scored), len(scored)) == (7230, 831, 6399)
    assert sum(row.p_people for row in scored) == 3777  # "always the first image" is right so often: 59.0 %
    sizes = Counter(Counter(row.group for row in rows).values())
    assert sizes == {6: 194, 10: 2, 15: 45, 21: 159, 28: 43, 36: 23}  # of 4, 5, 6, 7, 8 and 9 images
    first = [row for row in rows if row.group == "000000-0001"]
    assert names(*first) == [(f"{i}.webp", f"{j}.webp") for i, j in combinations(range(4), 2)]


def groups_of(preferences: list[Any]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for preference in preferences:
        result.setdefault(preference.group, []).append(preference.p_people)
    return result


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_hub_layout_of_imagereward(split: str, tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path)
    table = pq.read_table(folder / f"metadata-{split}.parquet").to_pylist()
    ranks = {row["image_path"]: row["rank"] for row in table}
    preferences = load_preferences("imagereward", split, data_dir=folder)
    assert len(preferences) == 4 * 6
    assert all(sorted(p_a).count(0.5) == 1 for p_a in groups_of(preferences).values())
    for preference in preferences:
        assert isinstance(preference.a, PackedImage)
        assert isinstance(preference.b, PackedImage)
        a, b = (ranks[f"images/{split}/{image.member}"] for image in (preference.a, preference.b))
        assert preference.p_people == (1.0 if a < b else 0.0 if a > b else 0.5)
        assert load_image(preference.a).size == (84, 84)
    check_preferences("imagereward", preferences, ImageCache(1000))
    order = {path: i for i, path in enumerate(ranks)}
    places = [[order[f"images/{split}/{i.member}"] for i in (p.a, p.b)] for p in preferences]  # type: ignore[union-attr]
    in_order = sum(a < b for a, b in places)
    # The order of the file tells the label: it is kept for the official baseline, and drawn for training.
    assert in_order == 24 if split != "train" else 4 <= in_order <= 20


def test_the_list_on_github_finds_its_images(tmp_path: Path) -> None:
    folder = make_layout("imagereward-list", tmp_path / "a")
    preferences = load_preferences("imagereward", "test", data_dir=folder)
    assert len(preferences) == 24
    assert all(isinstance(p.a, Path) and p.a.is_file() for p in preferences)
    (folder / "images").mkdir()
    for part in folder.glob("part-*"):
        part.rename(folder / "images" / part.name)
    assert len(load_preferences("imagereward", "test", data_dir=folder)) == 24


def test_the_list_on_github_with_the_hubs_zips(tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path)
    table = pq.read_table(folder / "metadata-test.parquet").to_pylist()
    names = [f"part-1/images/{Path(row['image_path']).name}" for row in table[:4]]
    (folder / "test.json").write_text(
        json.dumps([{"id": "1", "prompt": "x", "generations": names, "ranking": [2, 1, 3, 3]}])
    )
    preferences = load_preferences("imagereward", "test", data_dir=folder)
    assert [p.p_people for p in preferences] == [0, 1, 1, 1, 1, 0.5]
    assert str(preferences[0].a) == f"{folder}/{table[0]['image_path']}".replace("/test_1/", "/test_1.zip/test_1/")


def test_only_present_files_are_read(tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path)
    (folder / "images" / "train" / "train_2.zip").unlink()
    with messages() as lines:
        preferences = load_preferences("imagereward", "train", data_dir=folder)
    assert len(preferences) == 12
    assert "the images of 12 of 24 pairs are in" in (note := lines[0])
    assert "`mlxpref data imagereward --split train`" in note
    sample = load_preferences("imagereward", "train", 5, data_dir=folder)
    assert len(sample) == 5
    assert all(p in preferences for p in sample)
    (folder / "images" / "train" / "train_1.zip").unlink()
    with pytest.raises(ConfigError, match=r"none of its images .* `mlxpref data imagereward --split train`"):
        load_preferences("imagereward", "train", data_dir=folder)
    (folder / "metadata-train.parquet").unlink()
    with pytest.raises(ConfigError, match=r"there is neither .*metadata-train\.parquet"):
        load_preferences("imagereward", "train", data_dir=folder)
    with pytest.raises(ConfigError, match="imagereward has train, validation, test"):
        load_preferences("imagereward", "dev", data_dir=folder)


def test_images_missing_from_an_archive(tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path)
    path = folder / "images" / "test" / "test_1.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    gone, cut = [name for name in members if name.endswith(".webp")][:2]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name != gone:
                archive.writestr(name, content[:100] if name == cut else content)
    preferences = load_preferences("imagereward", "test", data_dir=folder)
    with pytest.raises(DataError) as caught:
        check_preferences("imagereward", preferences, ImageCache(1000))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("imagereward: 2 of 16 images cannot be read")
    assert lines[1] == f"  {path}/{gone}: is not there: the archive has no {gone}"
    assert lines[2].startswith(f"  {path}/{cut}: is damaged")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"8 of 16 images cannot be read.*\n.*test_1\.zip/.*damaged or not whole"):
        check_preferences("imagereward", load_preferences("imagereward", "test", data_dir=folder), ImageCache(1000))


def test_archives_that_hold_none_of_the_images(tmp_path: Path) -> None:
    ranking = {"id": "1", "prompt": "a hat", "generations": ["elsewhere/a.webp", "elsewhere/b.webp"], "ranking": [1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([ranking]))
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "test_1.zip").touch()
    with messages() as lines, pytest.raises(ConfigError, match=r"none of its images .*; download them"):
        load_preferences("imagereward", "test", data_dir=tmp_path)
    assert "test_1.zip: its archive is damaged or not whole" in lines[0]


def test_real_sample_of_hpdv2(tmp_path: Path) -> None:
    entries = json.loads(SAMPLE.read_text())
    (tmp_path / "test.json").write_bytes(SAMPLE.read_bytes())
    rows = read("hpdv2", "test", tmp_path)
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
    assert [(*names(row)[0], row.p_people, row.label) for row in rows] == expected
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


def test_pairs_of_hpdv2(tmp_path: Path) -> None:
    entries = [
        {"prompt": f"p{i // 2}", key: [f"{i}.jpg", f"{i}b.jpg"], "human_preference": [i % 3 % 2, 1 - i % 3 % 2]}
        for key in ("file_path", "image_path")
        for i in range(20)
    ]
    rows = read("hpdv2", "train", listed(tmp_path / "train.json", *entries[:20]))
    assert [row.p_people for row in rows] == [float(i % 3 % 2) for i in range(20)]
    assert {row.votes for row in rows} == {1}
    assert [row.group for row in rows] == [f"p{i // 2}" for i in range(20)]
    assert rows[0].prompt is rows[1].prompt  # in memory once
    assert rows == read("hpdv2", "train", listed(tmp_path / "train.json", *entries[20:]))


def test_rankings_of_one_prompt_stay_apart(tmp_path: Path) -> None:
    ranking = {"prompt": "p", "image_path": ["1.jpg", "2.jpg"], "rank": [1, 2]}
    first, second = read("hpdv2", "test", listed(tmp_path / "test.json", ranking, {**ranking, "rank": [2, 2]}))
    assert (first.group, second.group) == ("p", "p (2)")
    assert (first.prompt, second.prompt) == ("p", "p")
    assert (second.p_people, second.votes, second.better) == (0.5, 1, "tie")


ROW = {"prompt": "p", "path1": "images/1.jpg", "path2": "images/2.jpg", "choice_dist": [7, 2], "confidence": 0.9}


@pytest.mark.parametrize("split", ["train", "test"])
def test_hub_layout_of_hpdv3(split: str, tmp_path: Path) -> None:
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
    entries = [{**ROW, "path1": f"{i}.jpg", "path2": f"{i}b.jpg"} for i in range(1000)]
    rows = read("hpdv3", "train", listed(tmp_path / "train.json", *entries))
    assert 440 < sum(row.p_people > 0.5 for row in rows) < 560
    assert all((row.p_people > 0.5) == ("b" not in Path(str(row.a)).name) for row in rows)
    assert read("hpdv3", "train", listed(tmp_path / "train.json", *entries[:600])) == rows[:600]


def test_votes(tmp_path: Path) -> None:
    votes: list[Any] = [[7, 2], [2, 7], None, [], [0.6, 0.4], [3, 3]]
    rows = read("hpdv3", "train", listed(tmp_path / "train.json", *({**ROW, "choice_dist": each} for each in votes)))
    first = [one == "1.jpg" for one, _ in names(*rows)]
    shares = [row.p_people if one else 1 - row.p_people for row, one in zip(rows, first, strict=True)]
    assert shares == pytest.approx([7 / 9, 7 / 9, 1, 1, 0.6, 0.5])
    assert [row.votes for row in rows] == [9, 9, 1, 1, 1, 6]
    assert [row.label for row in rows[:5]] == [None] * 5
    assert rows[5].label == ("a" if first[5] else "b")  # as many votes for each, but the test counts path1 as better


def test_names_outside_the_folder(tmp_path: Path) -> None:
    folder = make_layout("hpdv3", tmp_path / "in")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    listed(folder / "train.json", {**ROW, "path1": "../secret.jpg"}, {**ROW, "path1": str(tmp_path / "secret.jpg")})
    with pytest.raises(DataError, match=r"\.\./secret\.jpg: is not a name of a file below a folder"):
        load_preferences("hpdv3", "train", data_dir=folder)


@pytest.mark.parametrize("name", ["pickapic", "pickapic_v1"])
@pytest.mark.parametrize(("split", "count"), [("train", 8), ("validation", 6), ("validation_unique", 6), ("test", 6)])
def test_hub_layout_of_pickapic(name: str, split: str, count: int, tmp_path: Path) -> None:
    folder = make_layout(name, tmp_path)
    file = "test_unique" if split == "test" else split
    tables = {path: pq.read_table(path).to_pylist() for path in sorted((folder / "data").glob(f"{file}-*.parquet"))}
    expected = [
        (row["caption"], f"{path}/{i}/jpg_0", f"{path}/{i}/jpg_1", row["label_0"])
        for path, rows in tables.items()
        for i, row in enumerate(rows)
        if row["has_label"]
    ]
    preferences = load_preferences(name, split, data_dir=folder)
    assert len(preferences) == count
    assert [(p.prompt, str(p.a), str(p.b), p.p_people) for p in preferences] == expected
    assert sum(p.is_tie for p in preferences) == 1
    assert all(isinstance(p.a, PackedImage) and load_image(p.a).size == (84, 84) for p in preferences)
    assert {p.group for p in preferences} == {p.prompt for p in preferences}
    check_preferences(name, preferences, ImageCache(1000))


@pytest.mark.parametrize("split", ["test_v1", "test"])
def test_hub_layout_of_genai_bench(split: str, tmp_path: Path) -> None:
    """Both names mean the official list; left and right are as in the file."""
    folder = make_layout("genai_bench", tmp_path)
    path = folder / "image_generation/test_v1-00000-of-00001.parquet"
    share = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
    expected = [
        (row["prompt"], f"{path}/{i}/left_image", f"{path}/{i}/right_image", share[row["vote_type"]], row["prompt"])
        for i, row in enumerate(pq.read_table(path).to_pylist())
    ]
    preferences = load_preferences("genai_bench", split, data_dir=folder)
    assert [(p.prompt, str(p.a), str(p.b), p.p_people, p.group) for p in preferences] == expected
    assert Counter(p.better for p in preferences) == {"a": 4, "b": 8, "tie": 4}
    check_preferences("genai_bench", preferences, ImageCache(1000))


def test_the_hubs_longer_list_of_genai_bench(tmp_path: Path) -> None:
    folder = make_layout("genai_bench", tmp_path)
    longer = load_preferences("TIGER-Lab/GenAI-Bench/image_generation", "test", data_dir=folder)
    assert len(longer) == 2 * len(load_preferences("genai_bench", "test", data_dir=folder))


def test_a_vote_that_is_none(tmp_path: Path) -> None:
    path = make_layout("genai_bench", tmp_path) / "image_generation/test_v1-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3]["vote_type"] = "midvote"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"1 of 16 rows cannot be used(.|\n)*row 4: \"vote_type\" is 'midvote', which"):
        load_preferences("genai_bench", "test", data_dir=tmp_path)


def test_draws_are_kept_in_order(tmp_path: Path) -> None:
    folder = make_layout("pickapic", tmp_path)
    everything = load_preferences("pickapic", "train", data_dir=folder)
    sample = load_preferences("pickapic", "train", 5, data_dir=folder)
    assert [everything.index(p) for p in sample] == sorted(everything.index(p) for p in sample)
    assert set(load_preferences("pickapic", "train", 2, data_dir=folder)) <= set(sample)


GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "imagereward": ("test", {"id": "1", "prompt": "x", "generations": ["a", "b"], "ranking": [1, 2]}),
    "hpdv2": ("train", {"prompt": "p", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]}),
    "hpdv3": ("train", ROW),
}


@pytest.mark.parametrize(
    ("name", "wrong", "problem"),
    [
        ("imagereward", {"prompt": None}, '"prompt" missing'),
        ("imagereward", {"generations": ["a", "a"]}, '"generations" names an image twice'),
        ("imagereward", {"ranking": [1]}, "must be lists of images and of their ranks, equally long"),
        ("imagereward", {"ranking": [1, "x"]}, "must be lists of images and of their ranks, equally long"),
        ("imagereward", {"raw_annotations": [{"rank": [1, 2, 3]}]}, "must be lists of images and of their ranks"),
        ("hpdv2", {"human_preference": [1]}, "are no two numbers of votes"),
        ("hpdv2", {"human_preference": [1, 1]}, '"human_preference" prefers both images'),
        ("hpdv2", {"human_preference": "no"}, "which names none of the two images"),
        ("hpdv2", {"file_path": ["1.jpg"]}, '"file_path" must be a list of two images'),
        ("hpdv2", {"file_path": ["1.jpg", 2]}, '"file_path[1]" must name an image'),
        ("hpdv2", {"file_path": ["1.jpg", "1.jpg"]}, "are the same file"),
        ("hpdv3", {"choice_dist": [0, 0]}, "0 and 0 prefer none of the two images"),
        ("hpdv3", {"choice_dist": [1, 2, 3]}, "[1, 2, 3] are no two numbers of votes"),
        ("hpdv3", {"path2": None}, '"path2" missing'),
    ],
)
def test_rows_that_cannot_be_used(name: str, wrong: dict[str, Any], problem: str, tmp_path: Path) -> None:
    split, good = GOOD[name]
    path = tmp_path / f"{split}.json"
    with pytest.raises(DataError) as caught:
        read(name, split, listed(path, good, {**good, **wrong}))
    text = str(caught.value)
    assert text.startswith(f"{path}: 1 of 2 rows cannot be used; download the data set again:\n  row 2: ")
    assert problem in text
    with messages() as lines:  # one among very many is left out, and said
        assert len(read(name, split, listed(path, *[good] * 200, {**good, **wrong}))) == 200
    assert "1 of 201 rows cannot be used and are left out" in lines[0]


@pytest.mark.parametrize("change", [{"label_0": 1.0, "label_1": 1.0}, {"label_0": None}, {"label_0": float("nan")}])
def test_impossible_labels_of_pickapic(change: dict[str, Any], tmp_path: Path) -> None:
    row = {"caption": "p", "has_label": True, "label_0": 1.0, "label_1": 0.0, "jpg_0": b"0", "jpg_1": b"1"}
    path = tmp_path / "data" / "test_unique-00000-of-00001-0123456789abcdef.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([row, {**row, **change}]), path)
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        load_preferences("pickapic", "test", data_dir=tmp_path)
    unlabelled = {**row, "has_label": False, "label_0": None, "label_1": None}
    pq.write_table(pa.Table.from_pylist([row, unlabelled, {**row, "label_0": 0.5, "label_1": 0.5}]), path)
    assert [p.is_tie for p in load_preferences("pickapic", "test", data_dir=tmp_path)] == [False, True]


@pytest.mark.parametrize(
    ("name", "split", "file", "problem"),
    [
        ("imagereward", "train", "metadata-train.parquet", "there is neither"),
        ("imagereward", "train", "images/train/*.zip", "none of its images is in a file or a zip"),
        ("hpdv2", "test", "test.json", "there is no .*test.json"),
        ("hpdv2", "test", "test.tar.gz", "neither test.tar.gz, whole or in parts, nor its images"),
        ("hpdv3", "test", "test.json", "there is no .*test.json"),
        ("hpdv3", "test", "images.tar.gz.*", "neither images.tar.gz, whole or in parts, nor its images"),
        ("pickapic", "test_unique", "data/test_unique-*", r"there is no test_unique-\*.parquet"),
        ("mmrb2", "test", "t2i/*", r"there is no \*.parquet in .*t2i"),
        ("genai_bench", "test_v1", "image_generation/test_v1-*", r"there is no test_v1-\*.parquet"),
    ],
)
def test_missing_files_name_the_command(name: str, split: str, file: str, problem: str, tmp_path: Path) -> None:
    folder = make_layout(name, tmp_path)
    for path in folder.glob(file):
        path.unlink()
    with pytest.raises(ConfigError, match=f"{problem}.*; download them with `mlxpref data {name} --split {split}`"):
        load_preferences(name, split, data_dir=folder)


def test_missing_and_damaged_parts(tmp_path: Path) -> None:
    folder = make_layout("hpdv3", tmp_path / "hpdv3")
    (folder / "images.tar.gz.01").unlink()
    with pytest.raises(DataError, match=r"a part is missing, there are only \.00, \.02"):
        load_preferences("hpdv3", "test", data_dir=folder)
    folder = make_layout("pickapic", tmp_path / "pickapic")
    first, second = sorted((folder / "data").glob("train-*.parquet"))
    second.unlink()
    with messages() as lines:
        assert len(load_preferences("pickapic", "train", data_dir=folder)) == 4
    assert "pickapic: 1 of 2 tables of split train are here" in lines[0]
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"train-00000-of-00002-.*\.parquet: it is damaged"):
        load_preferences("pickapic", "train", data_dir=folder)


def test_a_link_to_a_part_that_is_gone(tmp_path: Path) -> None:
    """As in the hub's cache after its blob was deleted: only who needs the archive must know."""
    folder = make_layout("hpdv3", tmp_path)
    (folder / "images.tar.gz.01").unlink()
    (folder / "images.tar.gz.01").symlink_to("gone")
    assert read("hpdv3", "test", folder)
    with pytest.raises(DataError, match=r"images\.tar\.gz: cannot be read \(No such file.*; download it again"):
        load_preferences("hpdv3", "test", data_dir=folder)


def test_images_below_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_layout("hpdv2", tmp_path)
    whole = load_preferences("hpdv2", "test", data_dir=folder)
    (folder / "test").mkdir()
    monkeypatch.chdir(folder / "test")
    with tarfile.open(folder / "test.tar.gz") as file:
        for member in file:
            Path(Path(member.name).name).write_bytes(file.extractfile(member).read())  # type: ignore[union-attr]
    (folder / "test.tar.gz").unlink()
    found = load_preferences("hpdv2", "test", data_dir=Path(".."))
    assert names(*found) == names(*whole)
    assert all(isinstance(p.a, Path) and p.a.is_file() for p in found)


def test_a_list_that_nobody_labelled(tmp_path: Path) -> None:
    folder = make_layout("hpdv2", tmp_path)
    rows = json.loads((folder / "test.json").read_text())
    listed(folder / "test.json", *(row | {"has_label": False} for row in rows))
    with pytest.raises(DataError, match="hpdv2, split test: nobody labelled any of its rows"):
        load_preferences("hpdv2", "test", data_dir=folder)


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


def test_few_missing_images_are_left_out(tmp_path: Path) -> None:
    files = [f"{i}.png" for i in range(201)]
    for name in files[:-1]:
        (tmp_path / name).touch()

    def pair(a: str, b: str) -> Preference:
        return Preference("p", finder.find(a), finder.find(b), 1.0)

    archive = tmp_path / "a.tar.gz"
    finder = UnpackedImages(tmp_path / "test.json", tmp_path, archive)
    with messages() as lines:
        preferences = unpack_images("hpdv2", "test", [pair(name, files[0]) for name in files[1:]], tmp_path, archive)
    assert [p.a for p in preferences] == [tmp_path / name for name in files[1:-1]]
    assert "1 of 201 images cannot be used and are left out:\n  200.png: is not in" in "\n".join(lines)
    with pytest.raises(DataError, match="3 of 4 images cannot be used"):
        unpack_images("hpdv2", "test", [pair("1.png", "x"), pair("y", "z")], tmp_path, archive)
