"""Images in zip archives and in tables, good ones and those that somebody made to do harm."""

import io
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mlxpref.data import archives
from mlxpref.data.archives import ArchiveCache, named_image
from mlxpref.data.images import load_image
from mlxpref.errors import DataError
from mlxpref.judge.ranking_result import image_names
from mlxpref.preferences import PackedImage, image_name
from tests.conftest import picture
from tests.data_layouts import write_zip


def png(seed: int) -> bytes:
    content = io.BytesIO()
    picture(seed, (24, 16)).save(content, "PNG")
    return content.getvalue()


def write_table(path: Path, cells: list[object], rows_a_group: int = 2) -> Path:
    pq.write_table(pa.table({"caption": ["x"] * len(cells), "jpg_0": cells}), path, row_group_size=rows_a_group)
    return path


def problem(image: PackedImage) -> str:
    """The message of the error that loading gives: one line that begins with archive and member."""
    with pytest.raises(DataError) as caught:
        load_image(image)
    message = str(caught.value)
    assert message.startswith(f"{image.archive}/{image.member}: ")
    assert "\n" not in message
    return message


MAKERS: dict[str, Callable[[Path], list[PackedImage]]] = {
    "zip": lambda folder: [
        PackedImage(write_zip(folder / "a.zip", {f"a/{i}.png": png(i) for i in range(5)}), f"a/{i}.png")
        for i in range(5)
    ],
    "parquet": lambda folder: [
        PackedImage(write_table(folder / "a.parquet", [png(i) for i in range(5)]), "jpg_0", i) for i in range(5)
    ],
    "parquet of structs": lambda folder: [
        PackedImage(write_table(folder / "b.parquet", [{"bytes": png(i), "path": None} for i in range(5)]), "jpg_0", i)
        for i in range(5)
    ],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_images_are_read_in_any_order(kind: str, tmp_path: Path) -> None:
    images, cache = MAKERS[kind](tmp_path), ArchiveCache()
    for i in (4, 0, 2, 2, 1, 3):
        assert np.array_equal(np.asarray(load_image(images[i])), np.asarray(picture(i, (24, 16))))
        assert cache.read(images[i]) == png(i)
        assert not [*cache.absent([images[i]])]
        assert named_image(image_name(images[i])) == images[i]
        assert image_names(images)[i] == str(images[i]) == f"{images[i].archive}/{images[i].member}"
    missing = PackedImage(images[0].archive, "jpg_0", 9)
    assert [*cache.absent([*images, missing])] == [missing]
    assert "is not there: the archive has no 9/jpg_0" in problem(missing)
    assert len(list(tmp_path.iterdir())) == 1  # nothing was written


def test_a_name_inside_no_archive_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "folder.zip").mkdir()
    for name in (f"{tmp_path}/folder.zip/1.png", "a/b.png", "nu\0ll.zip/a", "x" * 5000 + ".zip/a.png"):
        assert named_image(name) == Path(name)


def test_an_archive_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    image, cache = PackedImage(write_zip(tmp_path / "a.zip", {"1.png": png(1)}), "1.png"), ArchiveCache()
    assert cache.read(image) == png(1)
    write_zip(tmp_path / "new.zip", {"1.png": png(2), "2.png": png(3)}).replace(image.archive)
    assert cache.read(image) == png(2)


def test_more_archives_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "OPEN_ARCHIVES", 3)
    images = [PackedImage(write_zip(tmp_path / f"{i}.zip", {"1.png": png(i)}), "1.png") for i in range(6)]
    cache = ArchiveCache()
    for i in (0, 1, 2, 3, 4, 5, 0):
        assert cache.read(images[i]) == png(i)


@pytest.mark.parametrize("kind", MAKERS)
def test_threads(kind: str, tmp_path: Path) -> None:
    images, cache = MAKERS[kind](tmp_path), ArchiveCache()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cache.read, images * 20)) == [png(i) for i in range(5)] * 20


@pytest.mark.parametrize("kind", ["zip", "parquet"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_truncated_archives_are_named(kind: str, share: float, tmp_path: Path) -> None:
    images = MAKERS[kind](tmp_path)
    content = images[0].archive.read_bytes()
    images[0].archive.write_bytes(content[: int(share * len(content))])
    messages = []
    for i, image in enumerate(images):
        try:
            assert np.array_equal(np.asarray(load_image(image)), np.asarray(picture(i, (24, 16))))
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert all(str(images[0].archive) in message and "\n" not in message for message in messages)


def test_malformed_archives_are_named(tmp_path: Path) -> None:
    for name in ("a.zip", "a.parquet"):
        (tmp_path / name).write_bytes(b"no archive" * 100)
        assert "its archive is damaged or not whole" in problem(PackedImage(tmp_path / name, "0/jpg_0"))
    assert "its archive cannot be opened (No such file" in problem(PackedImage(tmp_path / "gone.zip", "a"))
    (tmp_path / "a.rar").touch()
    assert "no archive that is read in place" in problem(PackedImage(tmp_path / "a.rar", "a"))
    (tmp_path / "folder.zip").mkdir()
    assert "no archive that is read in place" in problem(PackedImage(tmp_path / "folder.zip", "a"))


def test_a_corrupt_image_inside_an_archive_is_named(tmp_path: Path) -> None:
    members = {"good.png": png(0), "cut.png": png(1)[:-400], "text.png": b"no image", "empty.png": b""}
    path = write_zip(tmp_path / "a.zip", members)
    assert load_image(PackedImage(path, "good.png")).size == (24, 16)
    assert "is damaged" in problem(PackedImage(path, "cut.png"))
    assert "not an image" in problem(PackedImage(path, "text.png"))
    assert "is empty" in problem(PackedImage(path, "empty.png"))
    content = bytearray(path.read_bytes())
    content[content.index(b"no image")] ^= 1  # the checksum of the member no longer holds
    path.write_bytes(bytes(content))
    assert "is damaged in its archive (Bad CRC-32" in problem(PackedImage(path, "text.png"))


def test_zip_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MEMBER_BYTES", 1000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(100_000))
    bomb = PackedImage(path, "bomb.png")
    assert "100,000 bytes unpacked, more than 1,000" in problem(bomb)
    # It declares to be small: its directory says 500, and so does its own header.
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 100_000), struct.pack("<I", 500)))
    assert zipfile.ZipFile(path).getinfo("bomb.png").file_size == 500
    assert "is damaged in its archive" in problem(bomb)


def test_other_ways_to_pack_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("1.png", png(1))
    assert "is packed by method 12" in problem(PackedImage(tmp_path / "a.zip", "1.png"))


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": png(1)})
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    path.write_bytes(bytes(content))
    assert "is encrypted" in problem(PackedImage(path, "1.png"))


@pytest.mark.parametrize("member", ["0", "0/", "-1/jpg_0", "2/jpg_0", "9" * 6000 + "/jpg_0", "x/jpg_0", "0/jpg_1", ""])
def test_missing_cells(member: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [png(0), None])
    assert [*ArchiveCache().absent([PackedImage(path, member)])]
    assert "is not there" in problem(PackedImage(path, member))


def test_cells_without_an_image_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [png(0), None])
    assert "the cell is empty" in problem(PackedImage(path, "jpg_0", 1))
    assert "the cell is empty" in problem(PackedImage(path, "caption", 1))


def test_one_row_group_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet", [png(i) for i in range(6)])
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counting(self: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    cache = ArchiveCache()
    for row in (0, 1, 1, 0, 4, 5, 2):
        assert cache.read(PackedImage(path, "jpg_0", row)) == png(row)
    assert read == [0, 2, 1]


def test_packed_image_is_prepared_like_a_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    picture(0, (400, 200)).save(content, "PNG", exif=exif)
    (tmp_path / "1.png").write_bytes(content.getvalue())
    image = PackedImage(write_zip(tmp_path / "a.zip", {"1.png": content.getvalue()}), "1.png")
    for budget in (None, 1000):
        assert np.array_equal(np.asarray(load_image(image, budget)), np.asarray(load_image(tmp_path / "1.png", budget)))
    assert load_image(image).size == (200, 400)
