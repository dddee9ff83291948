"""What is known of the public data sets, where their files are looked for, and which ones a limit needs."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlxpref.data.catalog import CATALOG, catalog_name, files_for_limit, folder_of
from mlxpref.data.load import load_preferences
from mlxpref.errors import ConfigError, DataError
from tests.data_layouts import LAYOUTS, make_layout

SPLITS = [(name, split.name) for name, data_set in CATALOG.items() for split in data_set.splits]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; huggingface_hub read the environment when it was imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(cache: Path, hub_id: str, commit: str, seconds: int = 0) -> Path:
    folder = cache / f"datasets--{hub_id.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    os.utime(folder, (1_000_000 + seconds,) * 2)
    return folder


def paths_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_catalogue() -> None:
    assert list(CATALOG) == ["imagereward", "hpdv2", "pickapic", "pickapic_v1", "hpdv3", "mmrb2", "genai_bench"]
    for name, data_set in CATALOG.items():
        assert (data_set.name, data_set.hub_id.count("/"), bool(data_set.licence)) == (name, 1, True)
        assert data_set.splits[-1].name == "test"
        for split in data_set.splits:
            assert split.images
            assert split.beside is None or data_set.split(split.beside)


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_patterns_match_the_layout(name: str, split: str, tmp_path: Path) -> None:
    """And of no other split, but for the archive that HPDv3's splits share."""
    files = paths_in(make_layout(name, tmp_path / "data", 2))
    part = CATALOG[name].split(split)
    for pattern in part.lists + part.images:
        matching = [path for path in files if fnmatchcase(path, pattern)]
        assert matching
        meant = {("pick", "test"): "test_unique", ("gena", "test"): "test_v1"}.get((name[:4], split), split)
        assert all(meant in path.replace("/", "-").replace(".", "-").split("-") or name == "hpdv3" for path in matching)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"split 'valid': imagereward has train, validation, test"):
        CATALOG["imagereward"].split("valid")


def test_own_folder_comes_first(cache: Path, tmp_path: Path) -> None:
    snapshot(cache, "ymhao/HPDv2", "1" * 40)
    assert folder_of("hpdv2", tmp_path) == tmp_path
    with pytest.raises(
        ConfigError, match=r"--data-dir \S+/none: no such folder; give the one that holds the files of hpdv2"
    ):
        folder_of("hpdv2", tmp_path / "none")


def test_the_snapshot_is_main_or_the_newest(cache: Path) -> None:
    older, newer = (snapshot(cache, "ymhao/HPDv2", number * 40, seconds=int(number)) for number in "12")
    assert folder_of("hpdv2") == newer
    main = cache / "datasets--ymhao--HPDv2" / "refs" / "main"
    main.parent.mkdir()
    for commit, expected in (("1" * 40, older), ("3" * 40, newer), ("", newer)):
        main.write_text(commit)
        assert folder_of("hpdv2") == expected


def test_files_of_the_other_name_are_found(cache: Path) -> None:
    other = snapshot(cache, "zai-org/ImageRewardDB", "1" * 40)
    assert folder_of("imagereward") == other
    assert folder_of("imagereward") != snapshot(cache, "THUDM/ImageRewardDB", "2" * 40) == folder_of("imagereward")


def test_missing_data_set_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for split, named in ((None, "test"), ("train", "train")):
        with pytest.raises(ConfigError, match=rf"^--data hpdv2, .* with `mlxpref data hpdv2 --split {named}`, which"):
            folder_of("hpdv2", None, split)


def portions_of(name: str, split: str, folder: Path, limit: int | None) -> list[list[str]]:
    """All portions, where every file is there."""
    part, files = CATALOG[name].split(split), paths_in(folder)
    lists, images = (
        [path for p in patterns for path in files if fnmatchcase(path, p)] for patterns in (part.lists, part.images)
    )
    return list(files_for_limit(part, lists, images, folder, limit))


@pytest.mark.parametrize("name", list(CATALOG))
def test_no_limit_needs_every_file(name: str, tmp_path: Path) -> None:
    folder = make_layout(name, tmp_path / "data", 2)
    part = CATALOG[name].splits[0]
    (portion,) = portions_of(name, part.name, folder, None)
    assert sorted(portion) == sorted(
        path for path in paths_in(folder) if any(fnmatchcase(path, p) for p in part.lists + part.images)
    )


def test_one_archive_is_needed_whole(tmp_path: Path) -> None:
    for name, count in (("hpdv2", 2), ("hpdv3", 4)):
        (portion,) = portions_of(name, "test", make_layout(name, tmp_path / name, 2), 1)
        assert len(portion) == count


def test_imagereward_needs_both_images_of_a_pair(tmp_path: Path) -> None:
    """Four rankings of 1, 2, 2, 3, two in each zip: five pairs each are no ties."""
    folder = make_layout("imagereward", tmp_path / "data", 4)
    zips = ["images/test/test_1.zip", "images/test/test_2.zip"]
    for limit, files in ((1, zips[:1]), (10, zips[:1]), (11, zips), (20, zips), (1000, zips)):
        assert portions_of("imagereward", "test", folder, limit) == [["metadata-test.parquet"], files]


def test_archives_in_order_of_numbers(tmp_path: Path) -> None:
    """Of train_1 to train_32, train_10 is no early one; and a ranking over two archives needs both."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image_path": f"images/train/train_{part}/{i}.webp", "prompt_id": group, "rank": rank}
        for i, (part, group, rank) in enumerate([(10, "x", 1), (10, "x", 2), (2, "y", 1), (3, "y", 2), (3, "y", 2)])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
    zips = [f"images/train/train_{part}.zip" for part in (10, 2, 3)]
    split = CATALOG["imagereward"].split("train")
    for limit, parts in ((2, (2, 3)), (3, (2, 3, 10))):
        _, files = files_for_limit(split, ["metadata-train.parquet"], zips, tmp_path, limit)
        assert files == [f"images/train/train_{part}.zip" for part in parts]


@pytest.mark.parametrize("name", ["pickapic", "pickapic_v1"])
def test_pickapic_needs_one_table_after_the_other(name: str, tmp_path: Path) -> None:
    """Six rows, of which the fifth is a tie: three in the first table, two in the second."""
    folder = make_layout(name, tmp_path / "data", 3)
    assert [len(portions_of(name, "train", folder, limit)) for limit in (1, 3, 4, 100)] == [1, 1, 2, 2]
    assert [len(files) for files in portions_of(name, "train", folder, 100)] == [1, 1]


def test_mmrb2_needs_one_table_after_the_other(tmp_path: Path) -> None:
    """Two tables of four rows."""
    folder = make_layout("mmrb2", tmp_path / "data", 4)
    assert [len(portions_of("mmrb2", "test", folder, limit)) for limit in (1, 4, 5, 100)] == [1, 1, 2, 2]
    (folder / "t2i/test-00000-of-00002.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"test-00000-of-00002\.parquet: it is damaged"):
        portions_of("mmrb2", "test", folder, 5)


def test_other_ids_of_a_data_set(cache: Path) -> None:
    """Those of the same files are looked for in the cache; that of MMRB2's bare images only names it."""
    assert catalog_name("zai-org/ImageRewardDB") == "imagereward"
    assert catalog_name("facebook/MMRB2_image") == catalog_name("rl-research/multimodal-rewardbench-2") == "mmrb2"
    snapshot(cache, "facebook/MMRB2_image", "1" * 40)
    with pytest.raises(ConfigError, match="its files are not here"):
        folder_of("mmrb2")


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path / "data", 2)
    (folder / "metadata-test.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"metadata-test\.parquet: it is damaged"):
        portions_of("imagereward", "test", folder, 1)


@pytest.mark.parametrize(
    ("name", "split", "limit"),
    [
        ("imagereward", "train", 3),
        ("pickapic", "train", 2),
        ("hpdv2", "test", 4),
        ("hpdv3", "train", 2),
        ("mmrb2", "test", 3),
        ("genai_bench", "test", 3),
    ],
)
def test_needed_files_suffice_the_reader(name: str, split: str, limit: int, tmp_path: Path) -> None:
    whole = make_layout(name, tmp_path / "whole", 4)
    for path in {path for portion in portions_of(name, split, whole, limit) for path in portion}:
        (tmp_path / "part" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "part" / path).write_bytes((whole / path).read_bytes())
    assert len(load_preferences(name, split, limit, data_dir=tmp_path / "part")) == limit


def test_every_layout_has_an_entry() -> None:
    assert set(LAYOUTS) == {*CATALOG, "imagereward-list", "mmrb2-list"}
