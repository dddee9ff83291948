"""Damaged images: left out of a public data set up to one in a hundred, and an error among a user's own files."""

from pathlib import Path

import pytest
from PIL import Image

from mlxpref.data import load
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.left_out import LeftOut
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.errors import DataError, ImageError
from mlxpref.preferences import Preference
from tests.data_layouts import DAMAGES, damage_member, make_layout
from tests.messages import messages


def of_images(count: int, data: str = "imagereward") -> LeftOut:
    return LeftOut(data, [Preference("p", Path(f"{i}.png"), Path(f"{i + 1}.png"), 1.0) for i in range(count - 1)])


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_kinds_of_damage(kind: str, tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path)
    name = damage_member(folder / "images/test/test_1.zip", kind)
    preferences = load_preferences("imagereward", "test", data_dir=folder)
    with messages() as lines:
        left_out = check_preferences("imagereward", preferences, ImageCache(1000))
    assert list(left_out.reasons) == [name]
    assert left_out.to_json() == {"images": 1, "pairs": 3, "reasons": left_out.reasons}
    (line,) = lines
    assert line.startswith(f"imagereward: 1 of 16 images cannot be read; their pairs are left out: {name}: ")


@pytest.mark.parametrize(
    ("images", "damaged", "refused"), [(16, 1, False), (16, 2, True), (300, 3, False), (300, 4, True)]
)
def test_a_share_is_tolerated(images: int, damaged: int, refused: bool) -> None:
    left_out = of_images(images)
    for i in range(damaged - 1):
        left_out.add({f"{i}.png": "is damaged"})
    if refused:
        with pytest.raises(DataError, match="more than one in a hundred: the download is damaged"):
            left_out.add({"9.png": "is damaged"})
    else:
        left_out.add({"9.png": "is damaged"})
        assert f"{damaged} of {images} images cannot be read" in str(left_out)


def test_an_image_is_named_once() -> None:
    left_out = of_images(400)
    with messages() as lines:
        for _ in range(3):
            left_out.add({"1.png": "is damaged"})
    assert len(lines) == 1
    assert left_out.pairs == 2


def test_any_number_of_own_images(tmp_path: Path) -> None:
    left_out = of_images(4, "mine.jsonl")
    left_out.add({f"{i}.png": "is gone" for i in range(4)})
    assert left_out.pairs == 3


def test_a_sample_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 120 images 40 are decoded: one of them may be damaged; two would be five in a hundred."""
    monkeypatch.setattr(load, "DECODED_IMAGES", 40)
    for i in range(120):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    preferences = [Preference("p", tmp_path / f"{i}.png", tmp_path / f"{i + 1}.png", 1.0) for i in range(0, 120, 2)]
    decoded = sorted(load._drawn_runs(120))  # type: ignore[type-var]
    (tmp_path / f"{decoded[0]}.png").write_bytes(b"")
    assert len(check_preferences("hpdv2", preferences, ImageCache(1000)).reasons) == 1
    (tmp_path / f"{decoded[1]}.png").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 120 images cannot be read, more than one in a hundred"):
        check_preferences("hpdv2", preferences, ImageCache(1000))


def test_own_files_are_strict_before_the_work(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"")
    preferences = [Preference("p", tmp_path / "1.png", tmp_path / "2.png", 1.0)]
    with pytest.raises(
        DataError, match=r"2 of 2 images cannot be read; correct them .*\n.*1\.png: is empty.*\n.*2\.png"
    ):
        check_preferences("mine.jsonl", preferences, ImageCache(1000))
    assert len(check_preferences("mine.jsonl", preferences, ImageCache(1000), begun=True).reasons) == 2


def test_a_damaged_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "1.png", ImageCache(1000)
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="is damaged"):
        cache.check(path)
    monkeypatch.setattr("mlxpref.data.image_cache.read_image", None)
    with pytest.raises(ImageError, match="is damaged"):
        cache.content(path, 1000)
    monkeypatch.undo()
    Image.new("RGB", (8, 8)).save(path)  # mended, it is read again
    assert cache.size(path) == (8, 8)
