"""Pick-a-Pic: labels and prompts by column, images left in their tables."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.data.pickapic import read_pickapic
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import PackedImage
from tests.data_layouts import make_layout
from tests.messages import messages

ROW = {"caption": "p", "has_label": True, "label_0": 1.0, "label_1": 0.0, "jpg_0": b"0", "jpg_1": b"1"}


def shard(folder: Path, rows: list[dict[str, Any]], name: str = "test_unique-00000-of-00001-ab.parquet") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / name)
    return folder / "data" / name


@pytest.mark.parametrize("name", ["pickapic", "pickapic_v1"])
@pytest.mark.parametrize(("split", "count"), [("train", 8), ("validation", 6), ("validation_unique", 6), ("test", 6)])
def test_the_hub_layout(name: str, split: str, count: int, tmp_path: Path) -> None:
    folder = make_layout(name, tmp_path)
    file = "test_unique" if split == "test" else split
    tables = {path: pq.read_table(path).to_pylist() for path in sorted((folder / "data").glob(f"{file}-*.parquet"))}
    expected = [
        (row["caption"], f"{path}/{i}/jpg_0", f"{path}/{i}/jpg_1", row["label_0"])
        for path, rows in tables.items()
        for i, row in enumerate(rows)
        if split == "train" or row["has_label"]
    ]
    preferences = load_preferences(name, split, data_dir=folder)
    assert len(preferences) == count
    assert [(p.prompt, str(p.a), str(p.b), p.p_people) for p in preferences] == expected
    assert sum(p.is_tie for p in preferences) == 1
    assert all(isinstance(p.a, PackedImage) and load_image(p.a).size == (84, 84) for p in preferences)
    assert {p.group for p in preferences} == {p.prompt for p in preferences}
    check_preferences(name, preferences, ImageCache(1000))


def test_images_are_not_read_with_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_layout("pickapic", tmp_path)
    reads: list[str] = []
    original = pq.ParquetFile.read

    def reading(self: pq.ParquetFile, columns: list[str]) -> pa.Table:
        reads.extend(columns)
        return original(self, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", reading)
    (preference,) = read_pickapic(folder, "train", lambda count: [5])
    assert reads == ["has_label", "label_0", "label_1"] * 2 + ["caption"]  # of two shards, the prompts of one
    assert str(preference.a).endswith("/1/jpg_0")


def test_draws_are_kept_in_order(tmp_path: Path) -> None:
    folder = make_layout("pickapic", tmp_path)
    everything = load_preferences("pickapic", "train", data_dir=folder)
    sample = load_preferences("pickapic", "train", 5, data_dir=folder)
    assert [everything.index(p) for p in sample] == sorted(everything.index(p) for p in sample)
    assert set(load_preferences("pickapic", "train", 2, data_dir=folder)) <= set(sample)


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    shard(
        tmp_path,
        [ROW, {**ROW, "has_label": False}, {**ROW, "has_label": None}, {**ROW, "label_0": 0.5, "label_1": 0.5}],
    )
    assert [p.p_people for p in read_pickapic(tmp_path, "test")] == [1.0, 0.5]
    shard(tmp_path, [ROW, {**ROW, "has_label": False, "label_0": None, "label_1": None}], "train-0.parquet")
    with messages() as lines:
        assert [p.p_people for p in read_pickapic(tmp_path, "train")] == [1.0]
    assert lines == []


@pytest.mark.parametrize("labels", [(1.0, 1.0), (0.0, 0.0), (-1.0, 2.0), (None, 0.0), (float("nan"), 1.0)])
def test_impossible_labels(labels: tuple[float | None, float], tmp_path: Path) -> None:
    path = shard(tmp_path, [ROW, {**ROW, "label_0": labels[0], "label_1": labels[1]}])
    with pytest.raises(DataError) as caught:
        read_pickapic(tmp_path, "test")
    assert str(caught.value).startswith(f"{path}: 1 of 2 rows cannot be used")
    assert "row 1: label_0 is" in str(caught.value)


def test_wrong_columns(tmp_path: Path) -> None:
    shard(tmp_path, [{key: value for key, value in ROW.items() if not key.startswith("jpg")}])
    with pytest.raises(DataError, match=r"it has no column jpg_0, jpg_1; download"):
        read_pickapic(tmp_path, "test")
    shard(tmp_path, [{"caption": "x"}])
    with pytest.raises(DataError, match="it has no column has_label, label_0, label_1, jpg_0, jpg_1"):
        read_pickapic(tmp_path, "test")


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no test_unique-\*\.parquet in .*`mlxpref data pickapic --split test_unique`"
    ):
        load_preferences("pickapic", "test", data_dir=tmp_path)
    folder = make_layout("pickapic", tmp_path)
    first, second = sorted((folder / "data").glob("train-*.parquet"))
    second.unlink()
    with messages() as lines:
        assert len(load_preferences("pickapic", "train", data_dir=folder)) == 4
    assert "pickapic, split train: 1 of 2 files are there; `mlxpref data pickapic --split train`" in lines[0]
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"train-00000-of-00002-.*\.parquet: it is damaged"):
        load_preferences("pickapic", "train", data_dir=folder)
