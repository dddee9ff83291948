"""Near-duplicates: a burst is one group, other pictures are not in it, and nothing is decoded twice for it."""

import io
import itertools
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.sparse.csgraph import connected_components

import mlxpref
from mlxpref.data import similar
from mlxpref.data.images import read_image
from mlxpref.data.prompts import PromptGroup
from mlxpref.data.similar import HashedImageCache, near_duplicates, perceptual_hash, split_by_similarity
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import ImageLike
from tests.messages import messages


def scene(seed: int, size: tuple[int, int] = (360, 240)) -> Image.Image:
    """A smooth picture: pHash looks at coarse shapes, and noise has none."""
    colours = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def burst(seed: int, count: int) -> list[Image.Image]:
    """A scene while the camera moves by 1 % of the width a frame, and the light changes."""
    frames = []
    for i, light in zip(range(count), itertools.cycle((1.0, 0.8, 1.2))):
        picture = scene(seed).resize((300, 200), box=(3.6 * i, 2 * i, 300 + 3.6 * i, 200 + 2 * i))
        content = io.BytesIO()
        ImageEnhance.Brightness(picture).enhance(light).save(content, "JPEG", quality=60)
        frames.append(Image.open(content))
    return frames


def numbered(groups: list[list[ImageLike]], images: list[Image.Image]) -> list[list[int]]:
    return [[next(i for i, x in enumerate(images) if x is each) for each in group] for group in groups]


def test_a_burst_is_one_group() -> None:
    images = [*burst(1, 6), scene(2), *burst(3, 2), scene(4), *burst(1, 1)]
    assert numbered(mlxpref.group_similar(images), images) == [[0, 1, 2, 3, 4, 5, 10], [6], [7, 8], [9]]
    ends = int(perceptual_hash(images[0]) ^ perceptual_hash(images[5])).bit_count()
    assert ends > similar.DISTANCE, "the ends of a burst are only similar by the frames between them"
    assert numbered(mlxpref.group_similar([images[0], images[5]]), images) == [[0], [5]]
    assert len(mlxpref.group_similar(images, distance=0)) > 6
    assert len(mlxpref.group_similar(images, distance=similar.LARGEST_DISTANCE)) < 4


@pytest.mark.parametrize("distance", [0, 3, 10, 30])
def test_groups_are_connected_components(distance: int) -> None:
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2**64, 12, np.uint64)
    hashes = np.array([rng.choice(centres) ^ np.uint64(1 << int(rng.integers(64))) for _ in range(80)])
    hashes = np.concatenate([hashes, hashes[:5], centres])
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)
    near = (bits[:, None] != bits[None]).sum(2) <= distance
    count, labels = connected_components(near, directed=False)
    groups = near_duplicates(hashes, distance)
    assert groups == [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]
    assert len(groups) == count


def test_hashes_are_those_of_imagehash() -> None:
    picture = scene(5, (96, 64))
    assert f"{perceptual_hash(picture):016x}" == str(imagehash.phash(picture))


def test_a_photograph_is_read_roughly(tmp_path: Path) -> None:
    path, turned = tmp_path / "photo.jpg", tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(6, (2400, 1600)).save(path, quality=95)
    scene(6, (2400, 1600)).save(turned, quality=95, exif=exif)
    for file in (path, turned):
        whole, rough = (read_image(file, 128 * 128, rough=rough) for rough in (False, True))
        assert whole[1] == rough[1]
        assert whole[0].size == rough[0].size
        difference = np.abs(np.asarray(whole[0], np.int16) - np.asarray(rough[0], np.int16))
        assert 0 < difference.mean() < 2
    full = imagehash.phash(Image.open(path))
    assert int(perceptual_hash(path) ^ np.uint64(int(str(full), 16))).bit_count() <= 2
    scene(6, (2400, 1600)).save(tmp_path / "photo.png")
    png = tmp_path / "photo.png"
    assert read_image(png, 128 * 128, rough=True)[0] == read_image(png, 128 * 128)[0]
    cut = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(cut)
    with pytest.raises(DataError, match="is damaged"):
        read_image(path, 128 * 128, rough=True)


def test_a_folder_without_its_broken_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, picture in enumerate([*burst(1, 3), scene(2)]):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "4.jpg").write_bytes(b"\xff\xd8\xff cut")
    (tmp_path / "5.png").touch()
    with messages() as lines:
        groups = mlxpref.group_similar(tmp_path)
    assert [[Path(str(each)).name for each in group] for group in groups] == [["0.png", "1.png", "2.png"], ["3.png"]]
    assert "4.jpg" in lines[0]
    assert "5.png is empty" in lines[0]
    with pytest.raises(DataError, match=r"image 1: .*4\.jpg"):
        mlxpref.group_similar([tmp_path / "0.png", tmp_path / "4.jpg"])
    cache = HashedImageCache(512 * 512)
    cache.check(tmp_path / "0.png")
    monkeypatch.setattr(similar, "read_image", None)
    cache.check(tmp_path / "0.png")


@pytest.mark.parametrize("distance", [-1, 33, 2.0, "10", None])
def test_a_distance_is_a_number_of_bits(distance: Any) -> None:
    with pytest.raises(ConfigError, match="give a whole number from 0 to 32"):
        mlxpref.group_similar([scene(1), scene(2)], distance)


def test_prompts_are_kept_apart(tmp_path: Path) -> None:
    files = ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png")
    for name, picture in zip(files, [*burst(1, 2), scene(2), *burst(1, 2)], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
    cache, paths = HashedImageCache(512 * 512), [tmp_path / name for name in files]
    for path in paths:
        cache.check(path)
    groups = [PromptGroup("a", tuple(paths[:3])), PromptGroup("b", tuple(paths[3:]))]
    together, alone = split_by_similarity(groups, 10, cache)
    names = [str(Path(name)) for name in ("a/1.png", "b/1.png")]
    assert together == [PromptGroup("a", tuple(paths[:2]), names[0]), PromptGroup("b", tuple(paths[3:]), names[1])]
    assert alone == [PromptGroup("a", (paths[2],), "3.png")]
    apart = int(perceptual_hash(paths[1]) ^ perceptual_hash(paths[2])).bit_count()
    with pytest.raises(DataError, match=f"no two of 2 images are similar: the nearest differ in {apart} of 64 bits"):
        split_by_similarity([PromptGroup("a", tuple(paths[1:3]))], 10, cache)
