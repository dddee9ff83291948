from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.data import load
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.load import ALL_ROWS, DEMO_COUNTS, check_preferences, load_outside_test, load_preferences
from mlxpref.demo.preferences import SPLITS, demo_pairs, demo_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import Preference
from tests.data.own_rows import GOOD, write_rows


def test_data_without_splits_are_all_rows(folder: Path) -> None:
    """The default split of a command means all rows there; a split that was asked for must exist."""
    path = str(write_rows(folder, GOOD, GOOD))
    preferences = load_preferences(path, "test")
    assert (len(preferences), preferences.split) == (2, ALL_ROWS)
    with pytest.raises(DataError, match=r'no split "val", as it has no splits; leave out --split'):
        load_preferences(path, "val", needs_split=True)
    write_rows(folder, {**GOOD, "split": "test"}, {**GOOD, "split": "other"})
    assert load_preferences(path, "test", needs_split=True).split == "test"
    with pytest.raises(DataError, match='no rows of split "train"; there are other, test'):
        load_preferences(path, "train")
    assert load_preferences("demo", "heldout", 2).split == "heldout"


@pytest.mark.parametrize(
    ("splits", "has_learned", "chosen"),
    [
        (("train", "validation", "test"), True, "validation"),
        (("train", "test"), False, "train"),
        (("train", "test"), True, "test"),
        (("test",), False, "test"),
        ((None,), False, ALL_ROWS),
    ],
)
def test_a_split_beside_the_test(folder: Path, splits: tuple[str | None, ...], has_learned: bool, chosen: str) -> None:
    path = write_rows(folder, *({**GOOD, "split": split} for split in splits))
    assert load_outside_test(lambda split: load_preferences(str(path), split), has_learned).split == chosen
    assert load_outside_test(lambda split: load_preferences("demo", split, 2), has_learned).split == "heldout"


def test_a_file_is_loaded_by_its_name(folder: Path) -> None:
    path = write_rows(folder, *({**GOOD, "p_a": i / 50} for i in range(50)))
    everything = load_preferences(str(path), "test", None, 0)
    assert [p.p_people for p in everything] == [i / 50 for i in range(50)]
    sample = load_preferences(str(path), "test", 10, 0)
    assert [p.p_people for p in sample] == sorted(p.p_people for p in sample)
    assert len({p.p_people for p in sample}) == 10
    assert sample == load_preferences(str(path), "test", 10, 0)
    assert sample != load_preferences(str(path), "test", 10, 1)
    assert {p.p_people for p in sample} <= {p.p_people for p in load_preferences(str(path), "test", 20, 0)}
    assert len(load_preferences(str(path), "test", 1000, 0)) == 50


def test_the_demo_is_loaded_by_its_name() -> None:
    sample, rendered = load_preferences("demo", "heldout", 3, 5), demo_preferences("heldout", 3, 5)
    assert [(p.prompt, p.p_people) for p in sample] == [(p.prompt, p.p_people) for p in rendered]
    for one, other in zip(sample, rendered, strict=True):
        assert isinstance(one.a, Image.Image)
        assert isinstance(other.a, Image.Image)
        assert np.array_equal(np.asarray(one.a), np.asarray(other.a))
    assert [p.prompt for p in sample] == [pair.prompt for pair in demo_pairs("heldout", 3, 5)]
    assert set(DEMO_COUNTS) == set(SPLITS)


def test_the_demo_has_a_default_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEMO_COUNTS, "test", 4)
    assert len(load_preferences("demo", "test")) == 4


@pytest.mark.parametrize(
    ("data", "split", "limit", "problem"),
    [
        ("demo", "validation", None, "split 'validation': the demo has train, test, heldout, four"),
        ("demo", "test", 0, "limit 0"),
        ("hpdv2", "test", None, "its files are not here; download them with `mlxpref data hpdv2 --split test`"),
        ("imagereward", "dev", None, "split 'dev': imagereward has train, validation, test"),
        ("dmeo", "test", None, "unknown --data dmeo: known are demo, imagereward, hpdv2, pickapic, pickapic_v1, hpdv3"),
        ("gone.jsonl", "test", None, "--data gone.jsonl: no such file"),
        ("some/folder.csv", "test", None, "--data some/folder.csv: no such file or folder"),
        ("long" * 100, "test", None, "unknown --data long"),
    ],
)
def test_unknown_names_are_errors(
    data: str, split: str, limit: int | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # not what the user has there
    with pytest.raises(ConfigError) as caught:
        load_preferences(data, split, limit, 0)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"a\.txt: not a file of \.jsonl, "):
        load_preferences(str(tmp_path / "a.txt"), "test")


@pytest.fixture
def many(tmp_path: Path) -> list[Preference]:
    """60 pairs of 120 images."""
    for i in range(120):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return [Preference("p", tmp_path / f"{i}.png", tmp_path / f"{i + 1}.png", 1.0) for i in range(0, 120, 2)]


def test_sample_of_images_is_decoded(many: list[Preference], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    images = ImageCache(1000)
    monkeypatch.setattr(images, "check", decoded.append)
    check_preferences("x", many, images)
    assert len(decoded) == 120
    decoded.clear()
    monkeypatch.setattr(load, "DECODED_IMAGES", 40)
    check_preferences("x", many, images)
    assert len(decoded) == len(set(decoded)) == 40
    for i in range(0, 24, 2):
        image = many[i].a
        assert isinstance(image, Path)
        image.unlink()
    with pytest.raises(DataError) as caught:
        check_preferences("x", many, ImageCache(1000))
    lines = str(caught.value).splitlines()
    assert lines[0] == "x: 12 of 120 images cannot be read; correct them or remove their rows:"
    assert len(lines) == 12
    assert lines[-1] == "  and 2 more"
