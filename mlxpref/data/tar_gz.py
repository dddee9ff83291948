"""Unpacks chosen members of a tar.gz, which has no random access, into a folder in one pass.

Archives are not trusted: it unpacks only ordinary files, only the wanted ones, of bounded size, from a bounded number
of members, and writes nothing outside the folder.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from mlxpref.data.archives import MEMBER_BYTES
from mlxpref.errors import DataError
from mlxpref.files import replacing

MEMBER_LIMIT = 10_000_000
"""The most members of a tar: more than any data set's images, so that reading always ends."""
_BLOCK = 2**20
_LETTERS = re.compile("[a-z]{2}")


def parts_of(archive: Path) -> list[Path]:
    """The files of an archive: itself, or its parts NAME.00, NAME.01 ... or NAME.aa, NAME.ab ..., in order.

    Empty if there is no archive. DataError for a missing part between others, or before them.
    """
    if archive.is_file():
        return [archive]
    if not archive.parent.is_dir():
        return []
    suffixes = {p.name.removeprefix(f"{archive.name}."): p for p in archive.parent.glob(f"{archive.name}.*")}
    endings = sorted(filter(str.isdecimal, suffixes), key=int) or sorted(filter(_LETTERS.fullmatch, suffixes))
    if not endings:
        return []
    # 07 is 7, ac is 2; .01, too, is a common first part.
    numbers = [int(s) if s.isdecimal() else 26 * (ord(s[0]) - ord("a")) + ord(s[1]) - ord("a") for s in endings]
    first = 1 if endings[0].isdecimal() and numbers[0] == 1 else 0
    if numbers != list(range(first, first + len(endings))):
        raise DataError(f"{archive}: a part is missing, there are only .{', .'.join(endings)}; download the others")
    return [suffixes[suffix] for suffix in endings]


def unpack(parts: Sequence[Path], wanted: Iterable[str], target: Path) -> Iterator[tuple[str, str | None]]:
    """Write the wanted members of an archive into a folder, and yield each with its error, if any.

    A name may be the end of a member's path: `1.jpg` is `test/1.jpg`, and becomes `target/1.jpg`. It skips existing
    files and stops after the last wanted member. Memory does not grow with the archive. DataError for an archive that
    is damaged or ends early.
    """
    target.mkdir(parents=True, exist_ok=True)
    waiting = {}
    for name in dict.fromkeys(wanted):
        if problem := _problem(name):
            yield name, problem
        elif (target / name).is_file():
            yield name, None
        else:
            waiting[name] = target / name
    if not waiting:
        return
    count = len(waiting)
    whole = _Joined(parts)
    # Not GzipFile.read: what can be read before an error would be lost.
    stream: Any = SimpleNamespace(read=gzip.GzipFile(fileobj=whole).read1) if _is_gzip(parts[0]) else whole  # type: ignore[call-overload]
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK) as archive:
            for member in _members(archive):
                if wanted_name := _wanted_name(member.name, waiting):
                    yield wanted_name, _write(archive, member, waiting.pop(wanted_name), target)
                if not waiting:
                    return
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{parts[-1]}: the archive is damaged or ends early ({error}); {count - len(waiting)} of {count} images "
            "were found before that; download it again, all its parts"
        ) from error
    finally:
        whole.close()
    for name in waiting:
        yield name, f"is not in {parts[0].name}"


class _Joined:
    """Files one after the other, read like one."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._left = iter(parts)
        self._file: IO[bytes] = io.BytesIO()

    def read(self, size: int = -1) -> bytes:
        while not (content := self._file.read(size)) and (part := next(self._left, None)):
            self._file.close()
            self._file = part.open("rb")
        return content

    def close(self) -> None:
        self._file.close()


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, one by one, none kept; ReadError for one that leads back, or for too many."""
    end = -1
    for _ in range(MEMBER_LIMIT):
        member = archive.next()
        if member is None:
            return
        archive.members.clear()  # type: ignore[attr-defined]
        if archive.offset <= end:
            raise tarfile.ReadError("a member of negative length")
        end = archive.offset
        yield member
    raise tarfile.ReadError(f"more than {MEMBER_LIMIT:,} members")


def _problem(name: str) -> str | None:
    """The error of a name that cannot be a file below a folder, if any."""
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
        return "is not a name of a file below a folder"
    return None


def _wanted_name(member: str, waiting: dict[str, Path]) -> str | None:
    """The wanted name of a member: its path, or the end of it."""
    parts = PurePosixPath(member).parts
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in waiting), None)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, target: Path) -> str | None:
    """Write a member, first under a temporary name; returns its error, if any."""
    if not member.isreg() or member.issparse():
        return "is a link or a device in the archive, not a file"
    if member.size > MEMBER_BYTES:
        return f"has {member.size:,} bytes, more than {MEMBER_BYTES:,}, the most that is read"
    source = archive.extractfile(member)
    assert source is not None
    content = source.read()
    if len(content) < member.size:
        raise EOFError("a member is cut off")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(target.resolve()):
            return f"would be written outside {target}"
        with replacing(path, durable=False) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room, or set MLXPREF_CACHE") from error
    return None
