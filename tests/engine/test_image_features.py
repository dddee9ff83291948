"""Image features: one run of the vision tower an image, and never another image's features."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.checkpoints import bounds
from mlxpref.data.image_cache import content_of
from mlxpref.disk_cache import DiskCache
from mlxpref.engine import image_features as module
from mlxpref.engine.image_features import FeatureStore
from mlxpref.engine.vision import VisionEncoder
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.preferences import PackedImage
from tests.conftest import FAMILIES, GOLDEN, picture, tiny_model
from tests.data_layouts import write_zip
from tests.tolerance import assert_equal_sums


def fresh(vlm: VLM, memory: int = 1 << 30, max_pixels: int = 512 * 512) -> FeatureStore:
    return FeatureStore(vlm.model.vision_tower, vlm.features.processor, max_pixels, memory)


def test_encoded_together_equals_encoded_alone(tiny_vlm: VLM) -> None:
    sizes = [(84, 84), (140, 84), (84, 84), (168, 140), (140, 84), (84, 84)]
    images = [picture(i, size) for i, size in enumerate(sizes)]
    together = fresh(tiny_vlm).get_all(images)
    for image, features in zip(images, together, strict=True):
        alone = fresh(tiny_vlm).get(image)
        assert features.grid == alone.grid
        pairs = zip((features.merged, *features.deepstack), (alone.merged, *alone.deepstack), strict=True)
        for ours, expected in pairs:
            assert_equal_sums(ours, expected, 1176, layers=3)
    assert len({np.array(features.merged).tobytes() for features in together}) == len(images)


def test_images_of_one_size_run_together(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    encode = VisionEncoder.encode

    def counting(encoder: VisionEncoder, patches: mx.array, grid: tuple[int, int]) -> tuple[mx.array, list[mx.array]]:
        merged, levels = encode(encoder, patches, grid)
        sizes.append(merged.shape[:2])
        return merged, levels

    monkeypatch.setattr(VisionEncoder, "encode", counting)
    store = fresh(tiny_vlm)
    images = [picture(i, (224, 224)) for i in range(5)]
    one = store.get(images[0]).tokens
    fresh(tiny_vlm).get_all([*images, picture(5, (448, 224))])
    assert sizes == [(1, one), (5, one), (1, 2 * one)]
    monkeypatch.setattr(bounds, "VISION_TOKENS", 2 * one)
    fresh(tiny_vlm).get_all(images)
    assert sizes[3:] == [(2, one), (2, one), (1, one)]


def test_image_is_encoded_once(tiny_vlm: VLM, tmp_path: Path) -> None:
    store = fresh(tiny_vlm)
    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "copy.png")
    paths = [tmp_path / "a.png", tmp_path / "copy.png"]
    store.get_all([picture(1), *paths, picture(1)])
    store.get_all(paths)
    assert store.runs == 1
    store.get(picture(2))
    assert store.runs == 2


def test_hashing_encodes_nothing(tiny_vlm: VLM, tmp_path: Path) -> None:
    store = fresh(tiny_vlm)
    picture(1).save(tmp_path / "a.png")
    images = [picture(2), tmp_path / "a.png", picture(1)]
    contents = store.contents(images)
    assert store.runs == 0
    assert contents[1] == contents[2] != contents[0]
    assert contents == [features.content for features in store.get_all(images)]


def test_a_file_that_changes_is_read_again(tiny_vlm: VLM, tmp_path: Path) -> None:
    store = fresh(tiny_vlm)
    picture(1).save(tmp_path / "a.png")
    before = store.get(tmp_path / "a.png")
    picture(2, (140, 84)).save(tmp_path / "a.png")
    assert store.get(tmp_path / "a.png").grid != before.grid


def test_an_image_in_an_archive_is_decoded_once(tiny_vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fresh(tiny_vlm)
    picture(1).save(tmp_path / "a.png")
    packed = PackedImage(write_zip(tmp_path / "a.zip", {"1": (tmp_path / "a.png").read_bytes(), "2": b""}), "1")
    assert store.get(packed).content == store.get(tmp_path / "a.png").content
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_image", None)
        store.get(packed)
    picture(2).save(tmp_path / "b.png")
    write_zip(tmp_path / "a.zip", {"1": (tmp_path / "b.png").read_bytes()})
    assert store.get(packed).content == store.get(picture(2)).content


def test_memory_is_bounded(tiny_vlm: VLM) -> None:
    one = fresh(tiny_vlm).get(picture(0)).nbytes
    store = fresh(tiny_vlm, memory=3 * one)
    for seed in (0, 1, 2, 0, 3):
        store.get(picture(seed))
    assert store.runs == 4
    store.get(picture(0))
    assert store.runs == 4
    store.get(picture(1))
    assert store.runs == 5


def test_the_pixel_budget_keeps_the_aspect_ratio(tiny_vlm: VLM) -> None:
    store = fresh(tiny_vlm, max_pixels=128 * 128)
    patch = store.processor.patch_size * store.processor.merge_size
    for size in ((1000, 250), (250, 1000), (640, 480), (3000, 2000)):
        height, width = store.get(picture(0, size)).grid
        assert height * width * patch**2 <= 128 * 128
        assert 0.5 < (width / height) / (size[0] / size[1]) < 2
    assert fresh(tiny_vlm).get(picture(0, (84, 84))).tokens <= 9


@pytest.mark.parametrize(("family", "dtype"), [*((name, None) for name in FAMILIES), ("qwen3_vl", mx.bfloat16)])
def test_features_on_disk_are_the_same_bits(family: str, dtype: mx.Dtype | None, tmp_path: Path) -> None:
    vlm = load_vlm(GOLDEN / family, 512 * 512, dtype) if dtype else tiny_model(family)
    images = [picture(i, size) for i, size in enumerate([(84, 84), (140, 84), (84, 84)])]
    first, again = fresh(vlm), fresh(vlm)
    first.keep_in(DiskCache(tmp_path, 1 << 30), "tower")
    again.keep_in(DiskCache(tmp_path, 1 << 30), "tower")
    assert len(first.missing([*images, images[0]])) == len(images)
    encoded = first.get_all(images)
    assert again.missing(images) == []
    recalled = again.get_all(images)
    assert (first.runs, again.runs) == (3, 0)
    for ours, expected in zip(recalled, encoded, strict=True):
        assert (ours.grid, ours.content, ours.tokens) == (expected.grid, expected.content, expected.tokens)
        assert bool(ours.deepstack) == family.startswith("qwen3_vl")
        for a, b in zip((ours.merged, *ours.deepstack), (expected.merged, *expected.deepstack), strict=True):
            assert a.dtype == b.dtype == (dtype or mx.float32)
            assert np.array_equal(a.view(mx.uint8), b.view(mx.uint8))


def test_other_conditions_have_features_of_their_own(tiny_vlm: VLM, tmp_path: Path) -> None:
    image = picture(0, (168, 168))
    for runs, (max_pixels, tower) in enumerate([(512 * 512, "one"), (512 * 512, "other"), (84 * 84, "one")], start=1):
        store = fresh(tiny_vlm, max_pixels=max_pixels)
        store.keep_in(DiskCache(tmp_path, 1 << 30), tower)
        assert store.missing([image]) == [image]
        alone = fresh(tiny_vlm, max_pixels=max_pixels).get(image)
        assert np.array_equal(store.get(image).merged, alone.merged)
        assert len(list(tmp_path.iterdir())) == runs


def test_features_never_stand_under_the_name_of_other_pixels(
    tiny_vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    picture(1).save(path)
    picture(2).save(other)
    store, again = fresh(tiny_vlm), fresh(tiny_vlm)
    for each in (store, again):
        each.keep_in(DiskCache(tmp_path / "kept", 1 << 30), "tower")
    before = store.images.picture
    # As if the file changed between its name and its pixels.
    monkeypatch.setattr(store.images, "picture", lambda image, max_pixels: before(other, max_pixels))
    assert store.get(path).content == content_of(picture(2))
    assert again.missing([path, other]) == [path]
    assert np.array_equal(again.get(path).merged, fresh(tiny_vlm).get(path).merged)


def test_damaged_features_are_encoded_again(tiny_vlm: VLM, tmp_path: Path) -> None:
    first, again, last = (fresh(tiny_vlm) for _ in range(3))
    for store in (first, again, last):
        store.keep_in(DiskCache(tmp_path, 1 << 30), "tower")
    expected = first.get(picture(0))
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert np.array_equal(again.get(picture(0)).merged, expected.merged)
    assert again.runs == 1
    assert np.array_equal(last.get(picture(0)).merged, expected.merged)
    assert last.runs == 0


def test_a_share_is_the_same_in_any_order(tiny_vlm: VLM, tmp_path: Path) -> None:
    images = [picture(i, (84, 84)) for i in range(20)]
    kept = []
    for order in (1, -1):
        store = fresh(tiny_vlm)
        store.keep_in(DiskCache(tmp_path / f"{order}", 1 << 30), "tower", 0.5)
        store.get_all(images[::order])
        kept.append({path.name for path in (tmp_path / f"{order}").iterdir()})
    assert kept[0] == kept[1]
    assert 0 < len(kept[0]) < 20
    again = fresh(tiny_vlm)
    again.keep_in(DiskCache(tmp_path / "1", 1 << 30), "tower", 0.5)
    again.get_all(images)
    assert again.runs == 20 - len(kept[0])
