"""What people hand over in Python for images: the same picture in every form, advice for anything else."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.inputs import check_pair, check_prompt, find_given, image_from, preferences_from
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike, Preference
from tests.conftest import picture

PIXELS = np.asarray(picture(1, (9, 6)))
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)


class Tensor:
    """An array of another library, which NumPy reads through `__array__`."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.array = array

    def __array__(self, *args: Any, **named: Any) -> np.ndarray:
        if self.array is None:
            raise RuntimeError("can't convert a tensor\nthat requires grad")
        return self.array


@pytest.fixture
def cache() -> ImageCache:
    return ImageCache(512 * 512)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the pixels, in the current folder, which is the home folder, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


FORMS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": lambda file: file,
    "relative": lambda file: "a.png",
    "home": lambda file: "~/a.png",
    "Path of home": lambda file: Path("~/a.png"),
    "NumPy's str": lambda file: np.str_("a.png"),
    "bytes": Path.read_bytes,
    "bytearray": lambda file: bytearray(file.read_bytes()),
    "memoryview": lambda file: memoryview(file.read_bytes()),
    "file in memory": lambda file: io.BytesIO(file.read_bytes()),
    "written file": lambda file: written(file.read_bytes()),
    "PIL": lambda file: Image.open(file),
    "array": lambda file: PIXELS,
    "reversed": lambda file: np.ascontiguousarray(PIXELS[:, ::-1])[:, ::-1],
    "floats": lambda file: PIXELS / 255,
    "rounded floats": lambda file: np.where(PIXELS.max() == PIXELS, 1.0000002, PIXELS / 255),
    "half floats": lambda file: (PIXELS / 255).astype(np.float16),
    "transparent": lambda file: np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]),
    "MLX": lambda file: mx.array(PIXELS),
    "MLX floats": lambda file: mx.array(PIXELS.astype(np.float32)) / 255,
    "tensor": lambda file: Tensor(PIXELS),
}


def written(content: bytes) -> io.BytesIO:
    """A file in memory at its end, as after `image.save(file)`."""
    file = io.BytesIO()
    file.write(content)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(file: Path, form: str) -> None:
    assert np.array_equal(np.asarray(load_image(image_from(FORMS[form](file)))), PIXELS)


@pytest.mark.parametrize("grey", [PIXELS[:, :, 0], PIXELS[:, :, :1], PIXELS[:, :, 0] / 255])
def test_grey_arrays(grey: np.ndarray) -> None:
    assert np.array_equal(np.asarray(load_image(image_from(grey))), np.repeat(PIXELS[:, :, :1], 3, axis=2))


def test_masks_are_black_and_white() -> None:
    mask = PIXELS[:, :, 0] > 100
    assert np.array_equal(np.asarray(load_image(image_from(mask)))[:, :, 0], np.where(mask, 255, 0))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(cache: ImageCache, mode: str) -> None:
    given = Image.new(mode, (30, 20))
    assert check_pair(given, given, cache) == (given, given)
    assert find_given([given, given], cache)[0][1] is given


SEVERAL: dict[str, Callable[[Path], Any]] = {
    "list": lambda file: [file, "a.png"],
    "generator": lambda file: (PIXELS for _ in range(2)),
    "glob": lambda file: [*file.parent.glob("*.png"), *file.parent.glob("*.png")],
    "batch": lambda file: np.stack([PIXELS, PIXELS]),
    "batch of floats": lambda file: np.stack([PIXELS, PIXELS]) / 255,
    "batch of MLX": lambda file: mx.array(np.stack([PIXELS, PIXELS])),
    "array of names": lambda file: np.array(["a.png", "a.png"]),
    "mixed": lambda file: [PIXELS, file.read_bytes()],
    "folder": lambda file: two_files(file).parent,
    "folder's name": lambda file: str(two_files(file).parent),
    "folder in a list": lambda file: [two_files(file).parent],
}


def two_files(file: Path) -> Path:
    Image.open(file).save(file.parent / "b.png")
    return file


@pytest.mark.parametrize("form", SEVERAL)
def test_every_form_of_several(file: Path, cache: ImageCache, form: str) -> None:
    images, skipped = find_given(SEVERAL[form](file), cache)
    assert len(images) == 2
    assert not skipped
    assert all(np.array_equal(np.asarray(load_image(image)), PIXELS) for image in images)


def test_a_folder_keeps_its_order_and_leaves_out_the_unreadable(file: Path, cache: ImageCache) -> None:
    for number in (10, 9, 2):
        Image.fromarray(PIXELS).save(file.parent / f"{number}.png")
    (file.parent / "9.png").write_bytes(b"no picture")
    (file.parent / "notes.txt").write_text("x")
    images, skipped = find_given(str(file.parent), cache)
    assert [Path(str(image)).name for image in images] == ["2.png", "10.png", "a.png"]
    assert [each.path.name for each in skipped] == ["9.png"]


REFUSED: list[tuple[Any, str]] = [
    (None, "None is no image"),
    (7, "an int is no image"),
    ([PIXELS], "a list is no image"),
    ({"bytes": b"x"}, "a dict is no image"),
    ("missing.png", "missing.png: no such file"),
    ("", "no such file"),
    ("iVBORw0KGgo" * 10_000, "no such file"),
    ("two\nlines.png", "two lines.png: no such file"),
    ("https://example.com/a.png", "download it first"),
    (b"", "empty"),
    (b"no picture", "damaged or not an image"),
    (io.StringIO("text"), "mode 'rb'"),
    (PIXELS.transpose(2, 0, 1), r"x.transpose\(1, 2, 0\)"),
    (mx.array(PIXELS).transpose(2, 0, 1), r"x.permute\(1, 2, 0\)"),
    (PIXELS[None], "it is a batch"),
    (PIXELS[:, :, :2], "1, 3 or 4"),
    (PIXELS[:0], "1, 3 or 4"),
    (PIXELS.astype(np.float32), r"x.astype\('uint8'\)"),
    (PIXELS.astype(np.int64), r"x.astype\('uint8'\)"),
    (PIXELS.astype(np.uint16) * 257, "x / 65535"),
    (PIXELS / 127.5 - 1, r"\(x \+ 1\) / 2"),
    (PIXELS * 1e6, "bring them to 0 to 1"),
    (np.where(PIXELS.max() == PIXELS, np.nan, PIXELS / 255), "nan_to_num"),
    (PIXELS * 1j, "no numbers of pixels"),
    (np.array("a.png"), "1, 3 or 4"),
    (mx.array(PIXELS / 255).astype(mx.bfloat16), r"x.astype\(mx.float32\)"),
    (Tensor(None), r"x.detach\(\)"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "advice"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_anything_else_is_one_line_of_advice(cache: ImageCache, given: Any, advice: str) -> None:
    good = picture(2)
    for ask in (lambda: check_pair(good, given, cache), lambda: find_given([good, given], cache)):
        with pytest.raises(DataError, match=advice) as error:
            ask()
        assert str(error.value).startswith(("b: ", "image 1: "))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


def test_all_unusable_images_are_named_together(file: Path, cache: ImageCache) -> None:
    with pytest.raises(DataError, match=r"image 1: x.png: no such file or folder; image 3: y.png: no such"):
        find_given([file, "x.png", PIXELS, Path("y.png")], cache)
    with pytest.raises(DataError, match=r"^a: x.png: no such file or folder; b: y.png: no such file or folder$"):
        check_pair("x.png", "y.png", cache)
    with pytest.raises(DataError, match=r"^image 0, image 1, image 2: an array"):
        find_given([PIXELS.transpose(2, 0, 1)] * 3, cache)
    with pytest.raises(DataError, match=r"image 9, and 990 more: an array") as error:
        find_given([PIXELS.transpose(2, 0, 1)] * 1000, cache)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("images", ["a.png", PIXELS, [PIXELS], [], iter([]), Image.fromarray(PIXELS), b"x", ["."]])
def test_one_image_is_not_enough(file: Path, cache: ImageCache, images: Any) -> None:
    if isinstance(images, bytes):
        images = file.read_bytes()
    with pytest.raises(DataError, match=r"two are needed, not [01]"):
        find_given(images, cache)


@pytest.mark.parametrize(
    ("images", "advice"),
    [
        (None, "None is no list"),
        (3, "an int is no list"),
        ({"a": PIXELS}, "a dict is no list"),
        ("missing", r"missing: no such file or folder; the order is \(images, prompt\)"),
        (np.stack([PIXELS, PIXELS]).transpose(0, 3, 1, 2), r"x.transpose\(0, 2, 3, 1\)"),
        ([["a.png", "b.png"]], "image 0: a list is no image"),
    ],
)
def test_what_is_no_list_of_images(cache: ImageCache, images: Any, advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        find_given(images, cache)


@pytest.mark.parametrize("prompt", [None, ["a hat"], Path("a hat"), picture(1), "\ud800"])
def test_a_prompt_is_text(prompt: Any) -> None:
    with pytest.raises(DataError, match="prompt is"):
        check_prompt(prompt, "the sharper eyes")


def test_open_files(file: Path) -> None:
    with file.open("rb") as opened:
        opened.read()
        assert np.array_equal(np.asarray(image_from(opened)), PIXELS)
    with file.open() as text, pytest.raises(DataError, match="mode 'rb'"):
        image_from(text)  # type: ignore[arg-type]


def test_files_stay_files(file: Path) -> None:
    image: ImageLike = image_from("a.png")
    assert image == Path("a.png")


@pytest.mark.parametrize("share", [float("nan"), 1.5, -0.1, "0.7", None])
def test_a_share_of_people_is_from_0_to_1(share: Any) -> None:
    with pytest.raises(DataError, match="'a hat': p_people must be a number from 0 to 1, not "):
        Preference("a hat", picture(1), picture(2), share)


def test_a_bad_preference_of_a_list_is_numbered() -> None:
    good, bad = (Preference("a hat", picture(1), b, 1.0) for b in (picture(2), Path("~/gone.png")))
    with pytest.raises(DataError, match=r"list of preferences, 1: .*gone\.png: no such file"):
        preferences_from([good, bad], None)


def test_a_pattern_is_no_file(cache: ImageCache) -> None:
    for images in ("pics/*.png", ["pics/*.png"]):
        with pytest.raises(DataError, match=r"give the files, sorted\(glob\.glob\(pattern\)\)$"):
            find_given(images, cache)


def test_the_rows_of_a_table_in_memory_are_named() -> None:
    class Table(list[str]):  # as a DataFrame, which gives the names of its columns
        columns = ("prompt", "a", "b", "p_a")

    with pytest.raises(DataError, match=r"give df\.to_dict\(\"records\"\)"):
        preferences_from(Table(Table.columns), None)  # type: ignore[arg-type]
