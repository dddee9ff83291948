"""Pictures with damage beside their pixels are read, and pictures without all their pixels are not."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.data.containers import parts
from mlxpref.data.images import load_image
from mlxpref.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
JUNK = np.random.default_rng(1).bytes(200)


def encoded(format_: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(file, format_, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, right: bool = True) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ (not right))


def turned() -> bytes:
    """EXIF that turns an image upside down."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif.tobytes()[6:]


def read(path: Path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    return np.asarray(load_image(path))


def is_damaged(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"again|remove it"):
        load_image(path)
    return True


ANCILLARY = [
    (b"tEXt", b"parameters\0a red cube"),
    (b"zTXt", b"a\0\0" + zlib.compress(b"x")),
    (b"iTXt", b"a\0\0\0\0\0x"),
    (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 100)),
    (b"pHYs", bytes(9)),
    (b"tIME", bytes(7)),
    (b"gAMA", bytes(4)),
    (b"cHRM", bytes(32)),
    (b"sRGB", b"\0"),
    (b"acTL", bytes(8)),
    (b"vpAg", bytes(9)),
]


@pytest.mark.parametrize(("kind", "data"), ANCILLARY, ids=lambda value: value[:4].decode("latin-1"))
def test_ancillary_chunks_of_a_png(tmp_path: Path, kind: bytes, data: bytes) -> None:
    png = encoded("PNG")
    for extra in (chunk(kind, data, False), chunk(kind, b""), chunk(kind, data[:3])):
        for place in (33, len(png) - 12):
            assert np.array_equal(read(tmp_path / "a.png", png[:place] + extra + png[place:]), NOISE)


def test_texts_and_profiles_of_any_size(tmp_path: Path) -> None:
    png = encoded("PNG")
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20)))
    workflow = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(JUNK * 20_000))
    for extra in (profile, workflow, workflow * 20):
        assert np.array_equal(read(tmp_path / "a.png", png[:33] + extra + png[33:]), NOISE)


def test_exif_with_a_wrong_checksum_turns_the_picture(tmp_path: Path) -> None:
    png = encoded("PNG")
    data = png[:33] + chunk(b"eXIf", turned(), False) + png[33:]
    assert np.array_equal(read(tmp_path / "a.png", data), NOISE[::-1, ::-1])
    grey = encoded("PNG", Image.new("L", (2, 2), 7), transparency=7)
    data = grey.replace(chunk(b"tRNS", b"\0\7"), chunk(b"tRNS", b"\0\7", False))
    assert data != grey
    assert read(tmp_path / "a.png", data).min() == 255


def test_pixels_of_a_png(tmp_path: Path) -> None:
    path, png = tmp_path / "a.png", encoded("PNG")
    header, (pixels,) = png[:33], [part.content for part in parts(png) if part.name == b"IDAT"]
    for end in (12, 8, 1):  # without IEND, or with a part of it
        assert np.array_equal(read(path, png[:-end]), NOISE)
    assert np.array_equal(read(path, png + JUNK), NOISE)
    text, flipped = chunk(b"tEXt", b"a\0b", False), bytearray(pixels)
    flipped[len(flipped) // 2] ^= 16
    for data in (pixels[:-50], bytes(flipped), pixels[:100]):
        for extra in (b"", text):
            assert is_damaged(path, header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    assert is_damaged(path, png[:29] + b"abcd" + png[33:])  # the checksum of the size
    assert is_damaged(path, header + chunk(b"IDAT", pixels, False) + png[-12:])
    two = chunk(b"IDAT", pixels[:100]), chunk(b"IDAT", pixels[100:], False)
    assert is_damaged(path, header + b"".join(two) + png[-12:])
    smooth = encoded("PNG", SMOOTH)
    assert is_damaged(path, smooth[:-400] + bytes(400))  # which Pillow decodes
    assert is_damaged(path, (header + text + png[33:])[:-60])


def segment(kind: int, data: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(data) + 2) + data


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12rub"),
        segment(0xE1, b"Exif\0\0" + JUNK),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xm" + JUNK),
        segment(0xE2, b"ICC_PROFILE\0\x03\x01" + JUNK),
        segment(0xE2, b"MPF\0" + JUNK),
        segment(0xED, b"Photoshop 3.0\x008BIM" + JUNK[:5]),
        segment(0xEE, b"Adobe"),
        segment(0xFE, JUNK),
        b"\xff\xe5\0\0",
    ],
)
def test_segments_of_a_jpeg(tmp_path: Path, extra: bytes) -> None:
    jpeg = encoded("JPEG")
    expected = read(tmp_path / "b.jpg", jpeg)
    for data in (jpeg[:2] + extra + jpeg[2:], jpeg[:2] + extra + jpeg[2:] + JUNK, jpeg[:2] + extra + jpeg[2:-2]):
        assert np.array_equal(read(tmp_path / "a.jpg", data), expected)


@pytest.mark.parametrize("orientation", [3])
def test_a_rotation_beside_garbled_tags(tmp_path: Path, orientation: int) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\3\0\0\0\1\0\3\0\0\x01\x31\0\2\0\0\0\x50\0\0\xff\xff"
    jpeg = encoded("JPEG")
    expected = read(tmp_path / "b.jpg", jpeg)
    assert np.array_equal(read(tmp_path / "a.jpg", jpeg[:2] + segment(0xE1, exif) + jpeg[2:]), expected[::-1, ::-1])


SMOOTH = Image.fromarray(NOISE[:6, :8]).resize((75, 53), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("image", [Image.fromarray(NOISE), SMOOTH, SMOOTH.convert("L"), SMOOTH.convert("CMYK")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 100, "subsampling": 0},
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"restart_marker_blocks": 3, "quality": 98},
        {"restart_marker_rows": 1, "quality": 20},
    ],
    ids=str,
)
def test_a_jpeg_without_its_end_is_read_if_it_has_all_its_pixels(
    tmp_path: Path, image: Image.Image, options: dict[str, object]
) -> None:
    path, data = tmp_path / "a.jpg", encoded("JPEG", image, **options)
    whole = read(path, data)
    for cut in (1, 2):
        assert np.array_equal(read(path, data[:-cut]), whole)
        assert np.array_equal(read(path, data[:-cut] + bytes(900)), whole)
    refused = 0
    for cut in [*range(3, 24), 60, len(data) // 3]:
        for fill in (b"", bytes(900)):  # a download of which the rest is zeros
            try:
                assert np.array_equal(read(path, data[:-cut] + fill), whole)
            except DataError:
                refused += 1
    assert refused >= 40  # of 46: the last bytes may only fill up
    assert is_damaged(path, data[: len(data) // 2])


def test_a_progressive_jpeg_without_its_last_scan_is_damaged(tmp_path: Path) -> None:
    data = encoded("JPEG", progressive=True)
    assert is_damaged(tmp_path / "a.jpg", data[: data.rindex(b"\xff\xda")])
    assert is_damaged(tmp_path / "a.jpg", data[: data.rindex(b"\xff\xc4")])


def riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"WEBP" + b"".join(k + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for k, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("lossless", [True, False])
def test_chunks_of_a_webp(tmp_path: Path, lossless: bool) -> None:
    path = tmp_path / "a.webp"
    data = encoded("WEBP", lossless=lossless, exif=b"Exif\0\0" + turned(), icc_profile=JUNK)
    expected, plain = read(path, data), read(path, encoded("WEBP", lossless=lossless))
    assert np.array_equal(expected, plain[::-1, ::-1])
    chunks = [(part.name, part.content) for part in parts(data)]
    exif = next(content for name, content in chunks if name == b"EXIF")
    assert np.array_equal(read(path, data + JUNK), expected)
    assert np.array_equal(read(path, data[:4] + b"\xff\xff\0\0" + data[8:]), expected)  # longer than the file
    longer = data.replace(b"EXIF" + struct.pack("<I", len(exif)), b"EXIF\xff\xff\0\0")
    assert np.array_equal(read(path, longer), expected)
    for kind in (b"EXIF", b"ICCP"):
        broken = [(name, JUNK if name == kind else content) for name, content in chunks]
        assert np.array_equal(read(path, riff(broken)), plain if kind == b"EXIF" else expected)
    assert np.array_equal(read(path, data[:-4]), expected)  # cut in EXIF, behind what turns the picture
    assert is_damaged(path, data[: data.index(b"EXIF") - 9])


def test_the_first_frame_of_a_cut_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])]
    for format_, options in (("WEBP", {"lossless": True}), ("GIF", {})):
        data = encoded(format_, frames[0], save_all=True, append_images=frames[1:], duration=9, **options)
        expected = read(tmp_path / "a", data)
        assert np.array_equal(read(tmp_path / "a", data[:-99]), expected)
        assert is_damaged(tmp_path / "a", data[: len(data) // 3])


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_of_a_tiff(tmp_path: Path, compression: str, order: str) -> None:
    path, image = tmp_path / "a.tif", Image.fromarray(NOISE)
    if order == ">":
        image, compression = Image.frombytes("I;16B", (80, 90), NOISE.tobytes()), "raw"
    data = encoded("TIFF", image, tiffinfo={270: "x" * 99, 305: "y" * 9}, compression=compression)
    expected = read(path, data)
    start = struct.unpack(order + "I", data[4:8])[0]
    for number in range(struct.unpack(order + "H", data[start : start + 2])[0]):
        entry = start + 2 + 12 * number
        if struct.unpack(order + "H", data[entry : entry + 2])[0] in (270, 305):
            away = data[: entry + 8] + struct.pack(order + "I", 10**8) + data[entry + 12 :]  # not in the file
            assert np.array_equal(read(path, away), expected)
    assert is_damaged(path, data[: len(data) // 2] if start < len(data) // 2 else data[:start])


def test_avif_and_jpeg_2000(tmp_path: Path) -> None:
    exif = b"Exif\0\0" + turned()
    avif = encoded("AVIF", exif=exif)
    assert read(tmp_path / "a.avif", avif.replace(turned()[:20], JUNK[:20])).shape == (60, 80, 3)
    jp2 = encoded("JPEG2000")
    assert np.array_equal(read(tmp_path / "a.jp2", jp2[:-2]), NOISE)
    assert is_damaged(tmp_path / "a.jp2", jp2[:-300])
