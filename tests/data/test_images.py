import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, features

from mlxpref.data import images
from mlxpref.data.images import load_image, read_image
from mlxpref.data.thumbnails import thumbnail, try_thumbnail
from mlxpref.errors import DataError

RED = (200, 30, 40)


def save_image(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    (image or Image.new("RGB", (24, 16), RED)).save(path, **options)
    return path


def problem(path: Path) -> str:
    """The message of the error that reading this file gives: one line that begins with the path."""
    with pytest.raises(DataError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size that has hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")])


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm", "avif"])
def test_every_format_is_read_as_rgb(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = load_image(save_image(tmp_path / f"a.{suffix}"))
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert np.abs(np.asarray(image, int) - RED).max() <= 4


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert load_image(path).getpixel((0, 0)) == RED
    assert load_image(str(path)).getpixel((0, 0)) == RED


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 255, 0))]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
    assert load_image(path).getpixel((3, 3)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_honoured(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.new("L", (32, 16), 255)
    upright.paste(0, (0, 0, 8, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the orientation takes back
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(save_image(tmp_path / f"a.{suffix}", turned, exif=exif))
    assert image.size == (32, 16)
    assert np.abs(np.asarray(image.convert("L"), int) - np.asarray(upright, int)).max() <= 8


def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12rubbish")
    assert load_image(path).size == (24, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 102)])
    if mode == "PA":
        image = Image.new("PA", (3, 1))
        image.putpalette([0, 0, 0])
        image.putdata([(0, 0), (0, 255), (0, 102)])
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    pixels = list(np.asarray(load_image(image))[0, :, 1])
    assert pixels == [255, 0, 153]


def test_transparency_of_files_is_composited_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, *RED])
    palette.putdata([0, 1])
    grey = Image.new("L", (2, 1))
    grey.putdata([7, 30])
    deep = Image.fromarray(np.array([[7, 7710]], np.uint16))
    for number, (image, transparency) in enumerate([(palette, 0), (palette, b"\x00\xff"), (grey, 7), (deep, 7)]):
        path = save_image(tmp_path / f"{number}.png", image, transparency=transparency)
        assert load_image(path).getpixel((0, 0)) == (255, 255, 255)
        assert load_image(path).getpixel((1, 0)) == (RED if image is palette else (30, 30, 30))
    path = save_image(tmp_path / "a.gif", palette, transparency=0)
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)
    rgb = Image.new("RGB", (2, 1), RED)
    rgb.putpixel((0, 0), (1, 2, 3))
    path = save_image(tmp_path / "rgb.png", rgb, transparency=(1, 2, 3))
    assert [load_image(path).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]


def test_cmyk_is_not_inverted(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for suffix in ("jpg", "tif"):  # Pillow writes CMYK JPEGs inverted, as Adobe does
        red, green, blue = load_image(save_image(tmp_path / f"a.{suffix}", image)).getpixel((8, 8))
        assert red > 245
        assert green < 10
        assert blue < 10


def test_values_beyond_8_bit_are_scaled(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256), (4, 1))
    expected = np.tile(np.arange(256), (4, 1))
    sources = {
        "I;16 PNG": save_image(tmp_path / "16.png", Image.fromarray(ramp.astype(np.uint16))),
        "I;16 TIFF": save_image(tmp_path / "16.tif", Image.fromarray(ramp.astype(np.uint16))),
        "I;16B": Image.frombytes("I;16B", (256, 4), ramp.astype(">u2").tobytes()),
        "I, 16 bit": Image.fromarray(ramp.astype(np.int32)),
        "I, 32 bit": save_image(tmp_path / "32.tif", Image.fromarray((ramp * 32768).astype(np.int32))),
        "I, 8 bit": Image.fromarray(expected.astype(np.int32)),
        "F to 1": save_image(tmp_path / "f.tif", Image.fromarray((ramp / 65535).astype(np.float32))),
        "F to 255": Image.fromarray(expected.astype(np.float32)),
        "F to 65535": Image.fromarray(ramp.astype(np.float32)),
    }
    for name, source in sources.items():
        assert np.abs(np.asarray(load_image(source).convert("L"), int) - expected).max() <= 1, name


def test_floats_out_of_range() -> None:
    image = Image.fromarray(np.array([[0.5, 1.3, -1, np.nan, np.inf]], np.float32))
    assert list(np.asarray(load_image(image))[0, :, 0]) == [128, 255, 0, 0, 0]
    assert load_image(Image.new("F", (4, 4), 0)).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "HSV", "YCbCr", "RGBX"])
def test_other_modes_are_read(mode: str) -> None:
    image = load_image(Image.new("RGB", (5, 5), "white").convert(mode))
    assert (image.mode, image.getpixel((2, 2))) == ("RGB", (255, 255, 255))


def test_image_in_memory_is_unchanged() -> None:
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.info["dpi"] = (72, 72)
    image.getexif()[0x0112] = 6
    assert load_image(image).size == (4, 6)
    assert (image.mode, image.size, image.info["dpi"]) == ("RGBA", (6, 4), (72, 72))
    plain = Image.new("RGB", (6, 4))
    assert load_image(plain) is not plain


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("png", {}),
        ("webp", {}),
        ("gif", {}),
        ("bmp", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("tif", {"compression": "jpeg"}),
        ("avif", {}),
    ],
)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95])
def test_truncated_files_are_errors(
    tmp_path: Path, suffix: str, options: dict[str, object], share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    path = save_image(tmp_path / f"a.{suffix}", Image.fromarray(noise), **options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "remove it" in problem(path) or "again" in problem(path)
    assert capfd.readouterr() == ("", "")


def test_files_that_are_no_images_are_errors(tmp_path: Path) -> None:
    text, empty, pipe = tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "pipe.png"
    text.write_text("a red cube")
    empty.touch()
    os.mkfifo(pipe)
    assert "not an image" in problem(text)
    assert "empty" in problem(empty)
    assert "folder" in problem(tmp_path)
    assert "device" in problem(pipe)
    assert "No such file" in problem(tmp_path / "missing.png")
    assert "cannot be opened" in problem(tmp_path / ("long" * 100))
    assert "cannot be opened" in problem(tmp_path / "nu\0ll")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "not an image" in problem(path)


def test_images_that_take_too_much_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for side in (27_000, 60_000):
        path.write_bytes(png_header(side, side))
        with patch.object(Image.Image, "load", side_effect=AssertionError("decoded")):
            assert f"is {side} x {side} pixels, which takes more than 4 GiB" in problem(path)
    assert Image.MAX_IMAGE_PIXELS == images.PIXEL_LIMIT  # Pillow's own bound is as it was


def test_an_image_above_pillows_limit_is_read(tmp_path: Path) -> None:
    image = Image.new("L", (9_600, 9_600), 255)
    image.paste(0, (0, 0, 4_800, 9_600))
    for suffix, file in (("png", image.convert("1")), ("jpg", image)):
        path = save_image(tmp_path / f"a.{suffix}", file)
        picture, whole = read_image(path, 512 * 512)
        assert whole == (9_600, 9_600)
        assert picture.size == (1_067, 1_067)
        assert picture.resize((2, 1), Image.Resampling.BOX).getpixel((0, 0)) == (0, 0, 0)
        assert picture.getpixel((600, 1_066)) == (255, 255, 255)
    assert load_image(path).size == (4_800, 4_800)  # without a budget, too
    assert thumbnail(path).width == 320


@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        ("jpg", "RGB", {"quality": 95}),
        ("jpg", "RGB", {"quality": 95, "progressive": True}),
        ("png", "RGB", {}),
        ("png", "P", {}),
        ("png", "RGBA", {}),
        ("tif", "F", {}),
        ("tif", "I;16", {}),
        ("webp", "RGB", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_images_are_reduced_while_they_are_read(
    tmp_path: Path, suffix: str, mode: str, options: dict[str, object], orientation: int
) -> None:
    scene = gradients((401, 307))
    deep = np.asarray(scene.convert("L"), np.float32)
    image = {
        "F": Image.fromarray(deep / 255),
        "I;16": Image.fromarray((deep * 257).astype(np.uint16)),
        "RGBA": Image.merge("RGBA", (*scene.split(), scene.getchannel(0))),
    }.get(mode) or scene.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save_image(tmp_path / f"a.{suffix}", image, exif=exif, **options)
    expected = load_image(path).resize((67, 52) if orientation == 1 else (52, 67), Image.Resampling.BICUBIC)
    with patch.object(images, "PIXEL_LIMIT", 100_000), patch.object(images, "_STRIP", 5_000):
        result, whole = read_image(path, 850)
        assert max(load_image(path).size) == 201  # not even a picture without a budget is too large
    assert whole == ((401, 307) if orientation == 1 else (307, 401))
    assert result.size == expected.size
    assert np.abs(np.asarray(result, float) - np.asarray(expected, float)).mean() < 1


def test_extreme_shapes_are_refused(tmp_path: Path) -> None:
    assert "2010 x 10" in problem(save_image(tmp_path / "wide.png", Image.new("RGB", (2010, 10))))
    assert "200:1" in problem(save_image(tmp_path / "tall.png", Image.new("RGB", (10, 2010))))
    assert load_image(save_image(tmp_path / "just.png", Image.new("RGB", (2000, 10)))).size == (2000, 10)
    with pytest.raises(DataError, match=r"^an image in memory: is 201 x 1 "):
        load_image(Image.new("RGB", (201, 1)))


def test_missing_decoders_are_named(tmp_path: Path) -> None:
    heic, avif, jxl = tmp_path / "a.heic", tmp_path / "a.avif", tmp_path / "a.jxl"
    heic.write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40))
    avif.write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40))
    jxl.write_bytes(b"\xff\x0a" + bytes(40))
    without = [name for name in images.FORMATS if name != "AVIF"]
    with patch.object(images, "FORMATS", without):
        assert "HEIC" in problem(heic)
        assert "AVIF" in problem(avif)
        assert "JPEG XL" in problem(jxl)
        for path in (heic, avif, jxl):
            assert "sips -s format jpeg" in problem(path)
        assert "pip install pillow-heif" in problem(heic)


def test_harmless_oddities_warn_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Warnings are errors in these tests, so Pillow's own are seen if they leak."""
    palette = Image.new("P", (2, 2))
    palette.putpalette([0, 0, 0, *RED])
    path = save_image(tmp_path / "a.png", palette, transparency=b"\x80\xff")
    filters = list(warnings.filters)
    assert load_image(path).getpixel((0, 0)) == (127, 127, 127)
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")


def test_images_near_the_budget_are_not_touched() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 110, 3), dtype=np.uint8))
    for budget in (90 * 110 // 16 + 1, 90 * 110, 10**9, None):
        assert np.array_equal(np.asarray(load_image(noise, budget)), np.asarray(noise))


@pytest.mark.parametrize("size", [(160, 160), (331, 173), (1000, 5), (7, 999)])
def test_images_far_above_the_budget_are_reduced(size: tuple[int, int]) -> None:
    budget, image = 100, Image.linear_gradient("L").resize(size).convert("RGB")
    reduced = load_image(image, budget)
    factor = round(max(size) / max(reduced.size))
    assert factor >= 2
    assert reduced.size == tuple(-(-side // factor) for side in size)  # whole blocks, the rest rounded up
    assert 4 * budget <= reduced.width * reduced.height < 16 * budget + sum(reduced.size)
    assert max(reduced.size) <= 200 * min(reduced.size)


@pytest.mark.parametrize("size", [(1200, 900), (1199, 899), (1203, 905), (907, 1201)])
def test_reducing_changes_little(size: tuple[int, int]) -> None:
    """Also where the factor does not divide the size: the picture is not stretched by part of a pixel."""
    photograph = gradients(size)
    target = tuple(side // 10 for side in size)
    directly = np.asarray(photograph.resize(target, Image.Resampling.BICUBIC), float)
    reduced = load_image(photograph, target[0] * target[1])
    assert max(reduced.size) < 250
    error = np.abs(np.asarray(reduced.resize(target, Image.Resampling.BICUBIC), float) - directly)
    assert error.mean() < 0.4
    assert error.max() < 6


def gradients(size: tuple[int, int]) -> Image.Image:
    """A picture with detail of several sizes."""
    rng, picture = np.random.default_rng(0), np.zeros((size[1], size[0], 3))
    for cells in (4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), float) / 3
    return Image.fromarray(picture.astype(np.uint8))


# transparency by colour, against the rules of the PNG specification


def keyed_png(values: np.ndarray, colour_type: int, depth: int, transparent: list[int]) -> bytes:
    """A PNG of these samples (H, W, channels) with one transparent colour."""
    height, width, channels = values.shape
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        bits = np.unpackbits(values.astype(np.uint8).reshape(height, -1, 1), axis=2)[:, :, 8 - depth :]
        rows = [np.packbits(row).tobytes() for row in bits.reshape(height, -1)]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    key = struct.pack(f">{channels}H", *transparent)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return png_file([(b"IHDR", header), (b"tRNS", key), (b"IDAT", data), (b"IEND", b"")])


@pytest.mark.parametrize(("colour_type", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)])
@pytest.mark.parametrize("garbage", [0, 0xFF00])
def test_a_transparent_colour_is_compared_in_the_depth_of_the_file(
    tmp_path: Path, colour_type: int, depth: int, garbage: int
) -> None:
    channels, rng = 3 if colour_type == 2 else 1, np.random.default_rng(depth)
    values = rng.integers(0, 2**depth, (5, 11, channels))
    if depth == 16:  # colours that have equal high bytes are different
        values = rng.choice([0x1200, 0x1201, 0x3412], (5, 11, channels))
    key = values[1, 2]
    path = tmp_path / "a.png"
    stray = garbage if depth < 16 else 0
    path.write_bytes(keyed_png(values, colour_type, depth, [int(value) | stray for value in key]))
    expected = np.where((values == key).all(2, keepdims=True), 255, values * 255 / (2**depth - 1))
    assert np.abs(np.asarray(load_image(path), float) - expected).max() <= 1
    with Image.open(path) as image:  # in memory, not decoded yet
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(load_image(path)))
        assert "transparency" in image.info


def test_thumbnail_pixels(tmp_path: Path) -> None:
    """A small picture keeps its pixels, unless it was made smaller or may not take the bytes for them."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(noise).save(path)

    exact, shrunk, bounded = thumbnail(path), thumbnail(path, side=64), thumbnail(path, limit=2000)
    assert (exact.exact, shrunk.exact, bounded.exact) == (True, False, False)
    assert (np.array(Image.open(io.BytesIO(exact.content)).convert("RGB")) == noise).all()
    assert len(bounded.content) < len(exact.content) / 4
    assert thumbnail(Image.new("RGB", (96, 96), RED), limit=2000).exact  # it takes far less than a byte a pixel


def test_thumbnails_that_cannot_be_made(tmp_path: Path) -> None:
    """Whatever the system says of a path, there is no picture."""
    assert try_thumbnail(None) is None
    assert try_thumbnail(tmp_path / ("long" * 100)) is None
    with patch.object(Path, "is_file", side_effect=OSError(5, "Input/output error")):
        assert try_thumbnail(save_image(tmp_path / "a.png")) is None
    assert try_thumbnail(tmp_path / "a.png") is not None
