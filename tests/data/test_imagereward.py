"""ImageRewardDB: the official counts, and the hub's layout with everything that can be wrong in it."""

import json
import zipfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.imagereward import list_rows, read_imagereward
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import PackedImage
from tests.data_layouts import make_layout
from tests.messages import messages

RANKINGS = (Path(__file__).parents[1] / "fixtures" / "imagereward-test-rankings.txt").read_text().split()


def official_list(path: Path) -> Path:
    groups = [
        {
            "id": f"{n:06d}-0001",
            "prompt": f"prompt {n}",
            "generations": [f"part-{n}/images/{i}.webp" for i in range(len(ranks))],
            "ranking": [int(rank) for rank in ranks],
        }
        for n, ranks in enumerate(RANKINGS)
    ]
    path.write_text(json.dumps(groups))
    return path


def test_the_official_counts(tmp_path: Path) -> None:
    rows = list_rows(official_list(tmp_path / "test.json"))
    scored = [row for row in rows if row.p_people != 0.5]
    assert len({row.group for row in rows}) == 466
    assert (len(rows), len(rows) - len(scored), len(scored)) == (7230, 831, 6399)
    assert sum(row.p_people for row in scored) == 3777  # "always the first image" is right so often: 59.0 %
    sizes = Counter(Counter(row.group for row in rows).values())
    assert sizes == {6: 194, 10: 2, 15: 45, 21: 159, 28: 43, 36: 23}  # of 4, 5, 6, 7, 8 and 9 images
    first = [row for row in rows if row.group == "000000-0001"]
    assert [(row.a[-6], row.b[-6]) for row in first] == [(str(i), str(j)) for i, j in combinations(range(4), 2)]


def groups_of(preferences: list[Any]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for preference in preferences:
        result.setdefault(preference.group, []).append(preference.p_people)
    return result


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_hub_layout(split: str, tmp_path: Path) -> None:
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
        json.dumps([{"id": "1", "prompt": "x", "generations": names, "ranking": [1, 2, 3, 3]}])
    )
    preferences = load_preferences("imagereward", "test", data_dir=folder)
    assert [p.p_people for p in preferences] == [1, 1, 1, 1, 1, 0.5]
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
    with pytest.raises(ConfigError, match=r"no archive of its images .* `mlxpref data imagereward --split train`"):
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


GOOD = {"id": "1", "prompt": "x", "generations": ["a", "b"], "ranking": [1, 2]}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({**GOOD, "id": "0"}, "the id '0' is no text, or that of another one"),
        ({**GOOD, "id": 3}, "the id 3"),
        ({**GOOD, "prompt": None}, "1: no prompt, or two"),
        ({**GOOD, "generations": ["a", "a"]}, "1: 2 images, perhaps one twice, and 2 ranks"),
        ({**GOOD, "ranking": [1]}, "1: 2 images, perhaps one twice, and 1 ranks"),
        ({**GOOD, "ranking": [1, "2"]}, "ranks that are no numbers"),
        ({"id": "1", "prompt": "x"}, 'has no "generations"'),
        ([1], "not subscriptable"),
    ],
)
def test_rankings_that_cannot_be_used(entry: object, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps([{**GOOD, "id": "0"}, entry]))
    with pytest.raises(DataError) as caught:
        list_rows(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 1 of 2 rows cannot be used; download the data set again:"
    assert lines[1].startswith("  row 2: ")
    assert problem in lines[1]
    # One among very many is left out, and said.
    path.write_text(json.dumps([{**GOOD, "id": str(i)} for i in range(200)] + [entry]))
    with messages() as lines:
        assert len(list_rows(path)) == 200
    assert "1 of 201 rows cannot be used and are left out" in lines[0]


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metadata-test.parquet"
    pq.write_table(pa.table({"image_path": ["a"], "prompt": ["x"]}), path)
    with pytest.raises(DataError, match="it has no column prompt_id, rank"):
        read_imagereward(tmp_path, "test")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="it is damaged"):
        read_imagereward(tmp_path, "test")
    rows = [{"image_path": str(i), "prompt_id": "1", "prompt": f"p{i}", "rank": i} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match="1: no prompt, or two"):
        read_imagereward(tmp_path, "test")


def test_archives_that_hold_none_of_the_images(tmp_path: Path) -> None:
    ranking = {"id": "1", "prompt": "a hat", "generations": ["elsewhere/a.webp", "elsewhere/b.webp"], "ranking": [1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([ranking]))
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "test_1.zip").touch()
    with pytest.raises(ConfigError, match=r"in the archives of .*, 1 in number, which may be damaged; download them"):
        read_imagereward(tmp_path, "test")
