"""How often images are decoded: once each, in the cache itself and in whole commands."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlxpref.cli import main
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.errors import DataError
from mlxpref.preferences import PackedImage
from tests.conftest import picture
from tests.data_layouts import write_zip


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened as an image, by its name."""
    counts: Counter[str] = Counter()
    original = Image.open

    def counting(source: Any, *arguments: Any, **options: Any) -> Image.Image:
        counts[Path(getattr(source, "name", "packed")).name] += 1
        return original(source, *arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
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
