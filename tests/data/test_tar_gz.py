"""What is wanted of a tar.gz, whole or in parts, is written into a folder, and nothing else is written anywhere."""

import io
import struct
import tarfile
from pathlib import Path

import pytest

from mlxpref.data import tar_gz
from mlxpref.data.tar_gz import parts_of, unpack
from mlxpref.errors import DataError
from tests.data_layouts import write_split, write_tar

MEMBERS = {f"test/{i}.jpg": bytes([i]) * (700 + i) for i in range(20)}
NAMES = [f"{i}.jpg" for i in range(20)]


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("parts", [1, 3])
def test_wanted_members_are_unpacked(name: str, parts: int, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / name, MEMBERS)
    cut = write_split(archive, parts) if parts > 1 else [archive]
    assert parts_of(archive) == cut
    done = dict(unpack(cut, ["3.jpg", "test/7.jpg", "3.jpg", "99.jpg"], tmp_path / "out"))
    assert done == {"3.jpg": None, "test/7.jpg": None, "99.jpg": f"is not in {cut[0].name}"}
    assert files_in(tmp_path / "out") == {"3.jpg", "test/7.jpg"}
    assert (tmp_path / "out" / "3.jpg").read_bytes() == MEMBERS["test/3.jpg"]


def test_existing_files_are_not_rewritten(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", MEMBERS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "3.jpg").write_bytes(b"mine")
    assert dict(unpack([archive], ["3.jpg", "4.jpg"], tmp_path / "out")) == {"3.jpg": None, "4.jpg": None}
    assert (tmp_path / "out" / "3.jpg").read_bytes() == b"mine"
    archive.unlink()  # it is not even opened where all is there
    assert dict(unpack([archive], ["3.jpg", "4.jpg"], tmp_path / "out")) == {"3.jpg": None, "4.jpg": None}


def test_interrupted_pass_continues(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", MEMBERS)
    work = unpack([archive], NAMES, tmp_path / "out")
    for _ in range(5):
        next(work)
    work.close()
    assert files_in(tmp_path / "out") == set(NAMES[:5])
    assert len(dict(unpack([archive], NAMES, tmp_path / "out"))) == 20
    assert files_in(tmp_path / "out") == set(NAMES)


def test_reading_ends_with_the_last_member(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", MEMBERS)
    archive.write_bytes(archive.read_bytes()[:-40])
    assert dict(unpack([archive], ["0.jpg"], tmp_path / "out")) == {"0.jpg": None}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_truncated_archives_are_errors(share: float, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", MEMBERS)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"a\.tar\.gz: the archive is damaged or ends early .* of 20 images were found"):
        list(unpack([archive], NAMES, tmp_path / "out"))
    for name in files_in(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == MEMBERS[f"test/{name}"]


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    cut = write_split(write_tar(archive, MEMBERS), 4)
    cut[1].rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"a part is missing, there are only \.00, \.02, \.03"):
        parts_of(archive)
    (tmp_path / "elsewhere").rename(cut[1])
    cut[0].rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"there are only \.01, \.02, \.03|damaged") as caught:
        list(unpack(parts_of(archive), NAMES, tmp_path / "out"))
    assert "a.tar.gz" in str(caught.value)
    (tmp_path / "elsewhere").rename(cut[0])
    cut[3].unlink()
    with pytest.raises(DataError, match=r"a\.tar\.gz\.02: the archive is damaged or ends early"):
        list(unpack(parts_of(archive), NAMES, tmp_path / "out"))


def test_names_of_parts(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    assert parts_of(archive) == []
    assert parts_of(tmp_path / "gone" / "a.tar.gz") == []
    cut = write_split(write_tar(archive, MEMBERS), 30)
    (tmp_path / "a.tar.gz.sha256").touch()
    (tmp_path / "a.tar.gz.txt").touch()
    assert parts_of(archive) == cut
    for i, part in enumerate(cut):
        part.rename(tmp_path / f"a.tar.gz.{'abc'[i // 26]}{chr(ord('a') + i % 26)}")
    assert [part.name[-2:] for part in parts_of(archive)][24:28] == ["ay", "az", "ba", "bb"]
    assert len(dict(unpack(parts_of(archive), NAMES, tmp_path / "out"))) == 20


EVIL = ["../evil.jpg", "/mlxpref-evil.jpg", "a/../../evil.jpg", "..", "", "a/\0.jpg"]


@pytest.mark.parametrize("name", EVIL)
def test_nothing_is_written_outside_the_folder(name: str, tmp_path: Path) -> None:
    """Neither where the list asks for it, nor where the archive has such a member."""
    archive = write_tar(tmp_path / "in" / "a.tar.gz", {name: b"evil", "good.jpg": b"good"})
    before = files_in(tmp_path)
    done = dict(unpack([archive], [name, "good.jpg", "evil.jpg"], tmp_path / "in" / "out"))
    assert done[name] == "is not a name of a file below a folder"
    assert done["good.jpg"] is None
    assert files_in(tmp_path) - before <= {"in/out/good.jpg", "in/out/evil.jpg"}
    assert not Path("/mlxpref-evil.jpg").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_not_unpacked(kind: bytes, tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        link = tarfile.TarInfo("folder")
        link.type, link.linkname = kind, str(tmp_path / "outside")
        archive.addfile(link)
        inside = tarfile.TarInfo("folder/1.jpg")
        inside.size = 4
        archive.addfile(inside, io.BytesIO(b"evil"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(content.getvalue())
    done = dict(unpack([tmp_path / "a.tar.gz"], ["folder", "folder/1.jpg"], tmp_path / "out"))
    assert done["folder"] == "is a link or a device in the archive, not a file"
    assert files_in(tmp_path / "outside") == set()
    assert files_in(tmp_path / "out") == {"folder/1.jpg"}


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", {"sub/1.jpg": b"evil"})
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "outside")
    done = dict(unpack([archive], ["sub/1.jpg"], tmp_path / "out"))
    assert "would be written outside" in str(done["sub/1.jpg"])
    assert files_in(tmp_path / "outside") == set()


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_gz, "MEMBER_BYTES", 10_000)
    archive = write_tar(tmp_path / "a.tar.gz", {"bomb.jpg": bytes(50_000), "1.jpg": b"x"})
    done = dict(unpack([archive], ["bomb.jpg", "1.jpg"], tmp_path / "out"))
    assert done == {"bomb.jpg": "has 50,000 bytes, more than 10,000, the most that is read", "1.jpg": None}
    monkeypatch.setattr(tar_gz, "MEMBER_LIMIT", 1)
    with pytest.raises(DataError, match=r"damaged or ends early \(more than 1 members\)"):
        list(unpack([archive], ["2.jpg"], tmp_path / "other"))


def test_members_of_negative_length(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": bytes(700), "2.png": bytes(700)})
    content = bytearray(path.read_bytes())
    header = content.index(b"2.png")
    content[header + 124 : header + 136] = b"\xff" * 10 + struct.pack(">h", -512)  # its size, in base 256
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged or ends early"):
        list(unpack([path], ["3.png"], tmp_path / "out"))


def test_unwritable_folder(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", {"sub/1.jpg": b"x"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").touch()
    with pytest.raises(DataError, match="cannot be written"):
        list(unpack([archive], ["sub/1.jpg"], tmp_path / "out"))
