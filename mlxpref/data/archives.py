"""Images inside zip and tar archives and parquet tables, read where they are: nothing is written by this module.

Archives come from elsewhere, so nothing in them is believed: a member is bounded in size whatever it declares, and what
cannot be read is a DataError that says why. What cannot be read at random, tar.gz, is for `mlxpref.data.tar_gz`.
"""

import atexit
import io
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlxpref.errors import DataError
from mlxpref.preferences import PackedImage

__all__ = ["HEADER_LIMIT", "MEMBER_LIMIT", "has_member", "members_of", "named_image", "read_member"]

MEMBER_LIMIT = 200_000_000
"""The most bytes of a member that are read: many times the largest image, far below memory."""
HEADER_LIMIT = 16 * 2**20
"""The most bytes that a tar's headers may take between two members."""
_TABLE_LIMIT = 4 * 2**30
"""The most bytes of one column that a row group of a table may have."""
_OPEN = 40
"""How many archives are kept open: more than ImageRewardDB's 32, far below a Mac's limit of 256 files."""


class _Archive(Protocol):
    def has(self, member: str) -> bool:
        """Whether it is there, by the list of members."""

    def read(self, member: str) -> bytes:
        """Its content; DataError, without the archive's name, for what cannot be read."""

    def close(self) -> None: ...


class _Zip:
    def __init__(self, path: Path) -> None:
        try:
            self._file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _damaged(path, error) from error

    def has(self, member: str) -> bool:
        return member in self._file.NameToInfo

    def read(self, member: str) -> bytes:
        try:
            information = self._file.getinfo(member)
        except KeyError as error:
            raise _absent(member) from error
        if information.flag_bits & 1:
            raise DataError("is encrypted in its archive; unpack it with its password")
        # Other methods unpack whatever a block holds at once: a bomb would be noticed too late.
        if information.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"is packed by method {information.compress_type}, which is not read; pack it as usual")
        _check_size(information.file_size)
        try:
            with self._file.open(information) as file:
                return file.read(MEMBER_LIMIT)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"is damaged in its archive ({error}); download the archive again") from error

    def close(self) -> None:
        self._file.close()


class _Tar:
    """An uncompressed tar: where its files begin and how long they are, by name."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=_Bounded(self._file), mode="r:") as archive:
                for member in members_of(archive):
                    if member.isreg() and not member.issparse():
                        self._places[member.name.removeprefix("./")] = member.offset_data, member.size
        except (tarfile.TarError, ValueError, RecursionError, DataError) as error:
            self._file.close()
            raise _damaged(path, error) from error

    def has(self, member: str) -> bool:
        return member in self._places

    def read(self, member: str) -> bytes:
        if member not in self._places:
            raise _absent(member)
        start, size = self._places[member]
        _check_size(size)
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) < size:
            raise DataError("is cut off by the end of its archive; download the archive again")
        return content

    def close(self) -> None:
        self._file.close()


class _Bounded(io.RawIOBase):
    """A file of which only so much is read at once: a tar's header may claim any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_LIMIT:
            raise DataError("its headers are too long")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Table:
    """A parquet file; its last row group is kept, of each column that was read."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._errors = (pa.ArrowException, OSError)
        try:
            self._file = pq.ParquetFile(path)
        except self._errors as error:
            raise _damaged(path, error) from error
        layout, self._names = self._file.metadata, set(self._file.schema_arrow.names)
        self._starts = [0]
        for group in range(layout.num_row_groups):
            self._starts.append(self._starts[-1] + layout.row_group(group).num_rows)
        self._group, self._columns = -1, dict[str, Any]()

    def has(self, member: str) -> bool:
        row, _, column = member.partition("/")
        return row.isdecimal() and len(row) < 19 and int(row) < self._starts[-1] and column in self._names

    def read(self, member: str) -> bytes:
        if not self.has(member):
            raise _absent(member)
        row, _, column = member.partition("/")
        group = bisect_right(self._starts, int(row)) - 1
        if group != self._group:
            self._group, self._columns = group, {}
        if column not in self._columns:
            self._check_column(group, column)
            try:
                self._columns[column] = self._file.read_row_group(group, columns=[column]).column(column)
            except self._errors as error:
                raise DataError(f"is damaged in its table ({_first_line(error)}); download the table again") from error
        cell = self._columns[column][int(row) - self._starts[group]].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise DataError("is not in its table: the cell is empty")
        _check_size(len(content))
        return content

    def _check_column(self, group: int, column: str) -> None:
        layout = self._file.metadata.row_group(group)
        parts = [layout.column(i) for i in range(layout.num_columns)]
        size = sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] == column)
        if size > _TABLE_LIMIT:
            raise DataError(f"is among {size:,} bytes that its table must be read by, more than {_TABLE_LIMIT:,}")

    def close(self) -> None:
        self._file.close()


_KINDS: dict[str, Callable[[Path], _Archive]] = {".zip": _Zip, ".tar": _Tar, ".parquet": _Table}
_opened: OrderedDict[Path, tuple[tuple[int, int, int], _Archive]] = OrderedDict()


def read_member(image: PackedImage) -> bytes:
    """What an archive or a table holds of an image, as it is in a file; DataError, one line, for what cannot be read.

    The message goes on after the image's name. Not for several threads at once.
    """
    return _archive(image.archive).read(image.member)


def has_member(image: PackedImage) -> bool:
    """Whether an archive lists an image; it is not read. False where the archive itself cannot be read."""
    try:
        return _archive(image.archive).has(image.member)
    except DataError:
        return False


def named_image(name: str) -> Path | PackedImage:
    """The image that `preferences.image_name` called so: inside an archive where a part of the name is one."""
    path = Path(name)
    for archive in path.parents:
        with suppress(OSError, ValueError):  # a name that no file can have
            if archive.suffix in _KINDS and archive.is_file():
                return PackedImage(archive, path.relative_to(archive).as_posix())
    return path


def members_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, one after the other; none is kept. tarfile.ReadError where one leads back."""
    place = -1
    while member := archive.next():
        archive.members.clear()  # type: ignore[attr-defined]
        if archive.offset <= place:
            raise tarfile.ReadError("a member of negative length")
        place = archive.offset
        yield member


def _archive(path: Path) -> _Archive:
    """An archive that is open, of those used last."""
    try:
        status = path.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        if path in _opened and _opened[path][0] == stamp:
            _opened.move_to_end(path)
            return _opened[path][1]
        if path in _opened:  # it was replaced meanwhile
            _opened.pop(path)[1].close()
        if path.suffix not in _KINDS or not path.is_file():
            raise DataError(f"is in {path.name}, which is no archive that is read in place ({', '.join(_KINDS)})")
        archive = _KINDS[path.suffix](path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"its archive cannot be opened ({getattr(error, 'strerror', error)}); check its name"
        ) from error
    _opened[path] = stamp, archive
    while len(_opened) > _OPEN:
        _opened.popitem(last=False)[1][1].close()
    return archive


@atexit.register
def _close_all() -> None:
    while _opened:
        _opened.popitem()[1][1].close()


def _check_size(size: int) -> None:
    if size > MEMBER_LIMIT:
        raise DataError(f"has {size:,} bytes unpacked, more than {MEMBER_LIMIT:,}, the most that is read")


def _absent(member: str) -> DataError:
    return DataError(f"is not there: the archive has no {member}")


def _damaged(path: Path, error: Exception) -> DataError:
    size = path.stat().st_size
    return DataError(f"its archive is damaged or not whole ({_first_line(error)}, {size:,} bytes); download it again")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
