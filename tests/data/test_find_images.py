import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import pytest

from mlxpref.data.find_images import check_images, find_duplicates, find_images, locate
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.errors import DataError
from mlxpref.log import showing
from tests.data.test_images import save_image
from tests.messages import Tracked


def test_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    good = [save_image(tmp_path / name) for name in ("1.png", "3.jpg")]
    bad = tmp_path / "2.jpg"
    bad.write_bytes(good[1].read_bytes()[:300])
    readable, skipped = check_images([good[0], bad, good[1]], ImageCache(1000))
    assert readable == good
    assert [skip.path for skip in skipped] == [bad]
    assert skipped[0].error.startswith("is damaged")


def test_many_images_show_progress(tmp_path: Path) -> None:
    paths, shown = [save_image(tmp_path / f"{i}.png") for i in range(4)], list[tuple[int, str]]()

    def through(work: Iterable[Path], count: int, what: str) -> Iterable[Path]:
        shown.append((count, what))
        return work

    for most in (4, 3):
        with showing(Tracked(through)), patch("mlxpref.data.find_images._MANY", most):
            assert check_images(iter(paths), ImageCache(1000))[0] == paths
    assert shown == [(4, "reading images")]


def test_fewer_than_two_images_are_an_error(tmp_path: Path) -> None:
    good, bad = save_image(tmp_path / "1.png"), tmp_path / "2.png"
    bad.touch()
    images = ImageCache(1000)
    with pytest.raises(DataError, match=r"1 of 2 can be read: .*2\.png is empty"):
        check_images([good, bad], images)
    with pytest.raises(DataError, match=r"0 of 12 can be read: each of .* and 9 more is empty"):
        check_images([bad] * 12, images)
    with pytest.raises(DataError, match=r"1 of 1 can be read$"):
        check_images([good], images)


def test_folders_are_listed_in_natural_order(tmp_path: Path) -> None:
    names = ["img2.png", "img10.png", "IMG1.JPG", "éa.png", "z.webp"]
    for name in names:
        (tmp_path / name).touch()
    for name in [".DS_Store", "._img2.png", ".hidden.png", "img2.txt", "notes.json", "scores.csv", "png"]:
        (tmp_path / name).touch()
    for name in ["sub", ".thumbnails"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "below.png").touch()
    top = [tmp_path / name for name in ["IMG1.JPG", "img2.png", "img10.png", "z.webp", "éa.png"]]
    assert find_images([tmp_path]) == top
    assert find_images([tmp_path], recursive=True) == [*top[:3], tmp_path / "sub" / "below.png", *top[3:]]


def test_files_and_folders_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.png", "b.heic"):
        (folder / name).touch()
    odd = tmp_path / ".odd.txt"
    odd.touch()
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    paths = [folder, odd, folder / "a.png", folder / ".." / "folder" / "b.heic", tmp_path / "link.png"]
    result = find_images(paths)
    assert result == find_images(paths[::-1])
    assert len(result) == 3
    assert odd in result
    assert (folder / "a.png") in result
    monkeypatch.chdir(folder)
    assert find_images(["a.png", folder / "a.png", "."]) == [folder / "a.png", Path("b.heic")]


def test_both_unicode_forms_of_a_name_are_found(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    save_image(tmp_path / decomposed)
    for name in (composed, decomposed):
        result = locate(name, tmp_path)
        assert result is not None
        assert load_image(result).size == (24, 16)
        assert len(find_images([tmp_path / name, tmp_path])) == 1
    assert locate("missing.png", tmp_path) is None
    assert locate("long" * 100, tmp_path) is None
    assert locate("nu\0ll", tmp_path) is None


def test_names_that_differ_in_case(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    if (tmp_path / "A.PNG").exists():
        pytest.skip("this file system ignores case")
    save_image(tmp_path / "A.PNG")
    assert find_images([tmp_path]) == [tmp_path / "A.PNG", tmp_path / "a.png"]


def test_circular_and_broken_links(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_image(inner / "a.png")
    (inner / "back").symlink_to(tmp_path)
    (inner / "broken.png").symlink_to(tmp_path / "gone.png")
    (inner / "self.png").symlink_to(inner / "self.png")
    result = find_images([tmp_path, inner], recursive=True)
    assert result == [inner / name for name in ("a.png", "broken.png", "self.png")]
    with pytest.raises(DataError, match="1 of 3 can be read"):
        check_images(result, ImageCache(1000))


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: no such file or folder; check the name"):
        find_images([tmp_path / "missing"])
    with pytest.raises(DataError, match=r"no images, like \.jpg"):
        find_images([tmp_path])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.png").touch()
    with pytest.raises(DataError, match="no images; its subfolders do: add --recursive"):
        find_images([tmp_path])


def test_duplicates_are_files_of_the_same_bytes(tmp_path: Path) -> None:
    contents = {"x": b"one", "y": b"two", "z": b"one", "short": b"on", "v": b"two", "w": b"six", "u": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    paths = [tmp_path / name for name in (*contents, "gone", "folder", "pipe")]
    x, y, z, _, v, _, u = paths[:7]
    assert find_duplicates([*paths, x]) == [(x, z, u), (y, v)]
    assert find_duplicates(paths[::-1]) == [(u, z, x), (v, y)]
    assert find_duplicates([]) == []


def test_only_files_of_equal_size_are_read(tmp_path: Path) -> None:
    for size in range(5):
        (tmp_path / str(size)).write_bytes(bytes(size))
    with patch("mlxpref.data.find_images.sha256_of", side_effect=AssertionError("read")):
        assert find_duplicates(sorted(tmp_path.iterdir())) == []
