"""How often images are decoded: once each, in the cache itself and in whole commands."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.data import image_cache as cache_module
from mlxpref.data import images as images_module
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.disk_cache import DiskCache
from mlxpref.errors import DataError
from mlxpref.preferences import PackedImage
from tests.conftest import picture
from tests.data_layouts import write_zip


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was decoded, by its name."""
    counts: Counter[str] = Counter()
    original = images_module.read_image

    def counting(source: Any, *arguments: Any, **named: Any) -> Any:
        counts[Path(str(source)).name] += 1
        return original(source, *arguments, **named)

    for module in (images_module, cache_module):
        monkeypatch.setattr(module, "read_image", counting)
    return counts


def write_images(folder: Path, count: int, size: tuple[int, int] = (84, 84)) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        picture(i, size).save(path)
    return paths


def test_picture_is_decoded_once(tmp_path: Path, decodes: Counter[str]) -> None:
    paths = write_images(tmp_path, 5)
    images = ImageCache(84 * 84, memory=3 * 84 * 84 * 4)
    for _ in range(2):
        for path in paths:
            images.check(path)
    contents = [images.content(path, 84 * 84) for path in paths]
    assert len(set(contents)) == 5
    assert decodes == {path.name: 1 for path in paths}
    for path in paths:
        assert np.array_equal(np.asarray(images.picture(path, 84 * 84)), np.asarray(load_image(path)))
    assert images.size(paths[0]) == (84, 84)
    decodes.subtract(path.name for path in paths)  # those of `load_image` here
    assert sorted(decodes.values()) == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("expected", [10**6, 1000, 100])
def test_pictures_of_any_budget(tmp_path: Path, decodes: Counter[str], expected: int) -> None:
    (path,) = write_images(tmp_path, 1, (200, 130))
    images = ImageCache(expected)
    images.check(path)
    for budget in (1000, 200, 1000):
        assert np.array_equal(np.asarray(images.picture(path, budget)), np.asarray(load_image(path, budget)))
    assert images.content(path, 1000) != images.content(path, 200)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 1)
    images = ImageCache(1000)
    before = images.content(path, 84 * 84)
    picture(7).save(path)
    assert images.content(path, 84 * 84) != before
    path.unlink()
    with pytest.raises(DataError, match=r"0\.png: cannot be opened"):
        images.content(path, 84 * 84)


def test_equal_pixels_have_one_name(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 1)
    packed = PackedImage(write_zip(tmp_path / "a.zip", {"1.png": path.read_bytes()}), "1.png")
    picture(0).save(tmp_path / "same.bmp")
    images = ImageCache(1000)
    assert len({images.content(image, 1000) for image in (path, packed, tmp_path / "same.bmp")}) == 1


def on_disk(folder: Path, memory: int = 1 << 28) -> ImageCache:
    """A cache of another run, with what others left on disk."""
    images = ImageCache(10_000, memory)
    images.disk = DiskCache(folder / "kept", 1 << 30)
    return images


def test_a_later_run_decodes_no_known_file(tmp_path: Path, decodes: Counter[str]) -> None:
    path, smaller = write_images(tmp_path, 2, (530, 530))
    packed = PackedImage(write_zip(tmp_path / "a.zip", {"1.png": smaller.read_bytes()}), "1.png")
    both = [(image, budget) for image in (path, packed) for budget in (10_000, 1000)]
    expected = {(image, budget): ImageCache(10_000).content(image, budget) for image, budget in both}
    for turn in range(2):
        decodes.clear()
        images = on_disk(tmp_path)
        for image in (path, packed):
            images.check(image)
        assert {(image, budget): images.content(image, budget) for image, budget in both} == expected
        assert images.size(path) == images.size(packed) == (530, 530)
        assert decodes.total() == (0 if turn else 4)
    assert np.array_equal(np.asarray(images.picture(path, 1000)), np.asarray(load_image(path, 1000)))


def overwrite(path: Path, content: bytes) -> None:
    """Write other bytes into a file that looks the same from outside."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (before.st_size, before.st_ino)


def test_a_file_that_changes_unseen(tmp_path: Path) -> None:
    path, other = tmp_path / "a.bmp", tmp_path / "b.bmp"
    picture(1, (530, 530)).save(path)
    picture(2, (530, 530)).save(other)
    whole, changed = path.read_bytes(), other.read_bytes()
    of_path, of_other = (ImageCache(10_000).content(each, 1000) for each in (path, other))
    images = on_disk(tmp_path, memory=0)
    images.check(path)
    images.check(other)  # now the bytes of `path` are not in memory
    overwrite(path, changed)
    assert images.content(path, 1000) == of_other
    overwrite(path, whole)
    assert on_disk(tmp_path).content(path, 1000) == of_path  # never of the other's pixels
    overwrite(path, changed)
    assert on_disk(tmp_path).content(path, 1000) == of_other


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("store", [True, False])
def test_rank_decodes_each_image_once(tmp_path: Path, decodes: Counter[str], store: bool) -> None:
    paths = write_images(tmp_path / "pictures", 4)
    bad = tmp_path / "pictures" / "bad.png"
    bad.write_bytes(paths[0].read_bytes()[:300])
    options = ["--model", "demo", "--no-think", "--json", "--html", tmp_path / "a.html"]
    options += [] if store else ["--no-store"]
    result = json.loads(run("rank", tmp_path / "pictures", "--prompt", "a red cube", *options))
    assert [Path(skip["path"]).name for skip in result["skipped"]] == ["bad.png"]
    assert decodes == {path.name: 1 for path in [*paths, bad]}


def test_a_second_command_decodes_only_what_it_cannot_know(tmp_path: Path, decodes: Counter[str]) -> None:
    paths = write_images(tmp_path / "pictures", 4, (530, 530))
    bad = tmp_path / "pictures" / "bad.png"
    bad.write_bytes(paths[0].read_bytes()[:300])
    command = ("rank", tmp_path / "pictures", "--prompt", "a red cube", "--model", "demo", "--no-think", "--json")
    first = json.loads(run(*command))
    decodes.clear()
    again = json.loads(run(*command, "--pairs", "all"))
    assert decodes == {"bad.png": 1}
    assert first["vision_runs"] == 4
    assert again["vision_runs"] == 0
    assert 0 < again["recalled"] <= 2 * len(again["pairs"])
    assert again["skipped"] == first["skipped"]


def test_a_model_for_small_pictures_decodes_twice(tmp_path: Path, decodes: Counter[str]) -> None:
    """Its own budget is smaller than the one that was expected: another reduction, and so other pixels."""
    write_images(tmp_path / "pictures", 2, (530, 530))
    run("rank", tmp_path / "pictures", "--prompt", "x", "--model", "demo", "--no-think", "--max-pixels", 10_000)
    assert set(decodes.values()) == {2}


@pytest.mark.parametrize("command", ["eval", "train"])
def test_eval_and_train_decode_each_image_once(tmp_path: Path, decodes: Counter[str], command: str) -> None:
    paths = write_images(tmp_path, 4)
    pairs = [(paths[i].name, paths[j].name) for i, j in ((0, 1), (2, 3), (0, 3))]
    rows = [{"prompt": "a red cube", "a": a, "b": b, "p_a": 1.0} for a, b in pairs]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    training = ["--output", tmp_path / "run", "--fraction", 1, "--comparisons", 3, "--no-think"]
    options = {"eval": ["--no-think"], "train": training}
    run(command, "--data", data, "--model", "demo", *options[command])
    assert decodes == {path.name: 1 for path in paths}


def test_a_very_large_picture_is_decoded_once(
    tmp_path: Path, decodes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reduced while it is read, also for the page, and keeps its own size."""
    (path,) = write_images(tmp_path, 1, (400, 300))
    monkeypatch.setattr("mlxpref.data.images.PIXEL_LIMIT", 50_000)
    images = ImageCache(10**6)
    images.check(path)
    assert images.size(path) == (400, 300)
    assert images.load(path).size == images.picture(path, 10**6).size == (200, 150)
    assert images.content(path, 10**6) == images.content(path, 10**6)
    assert decodes == {"0.png": 1}
    assert np.array_equal(np.asarray(images.load(path)), np.asarray(load_image(path)))
