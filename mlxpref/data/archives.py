"""Images inside zip archives and parquet tables, read in place.

Archives are not trusted: the size of an image is bounded, even if the archive declares less. DataError, with the
reason, for an unreadable image. A tar.gz has no random access; see `mlxpref.data.tar_gz`.
"""

import re
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

from mlxpref.errors import DataError
from mlxpref.log import logger
from mlxpref.lru import LRU
from mlxpref.preferences import PackedImage
from mlxpref.text import one_line

_ROW = re.compile("0|[1-9][0-9]{0,17}")
MEMBER_BYTES = 200_000_000
"""The most bytes of an unpacked member: many times the largest image, far below memory."""
OPEN_ARCHIVES = 40
"""The number of open archives: more than ImageRewardDB's 32, far below a Mac's limit of 256 files."""


class ArchiveCache:
    """Keeps the last used archives open. Safe for threads, which wait for each other."""

    def __init__(self) -> None:
        self._archives: LRU[Path, tuple[tuple[int, ...], _Zip | _Table]] = LRU(OPEN_ARCHIVES)
        self._lock = Lock()

    def read(self, image: PackedImage) -> bytes:
        """The bytes of an image; DataError, one line that continues the image's name, if it cannot be read."""
        with self._lock:
            return self._opened(image.archive).read(image.member)

    def absent(self, images: Iterable[PackedImage]) -> Iterator[PackedImage]:
        """The images that their archives do not list, or whose archives are unreadable; it reads no image.

        It looks once for the archive of images that follow each other.
        """
        with self._lock:
            for archive, members in groupby(images, lambda image: image.archive):
                try:
                    has = self._opened(archive).has
                except DataError:
                    yield from members
                    continue
                yield from (image for image in members if not has(image.member))

    def members(self, path: Path) -> list[str]:
        """The members of a zip; none of an unreadable one, which a warning names."""
        with self._lock:
            try:
                return self._opened(path).members
            except DataError as error:
                logger.warning(f"{path}: {error}")
                return []

    def _opened(self, path: Path) -> "_Zip | _Table":
        try:
            status = path.stat()
            stamp = status.st_ino, status.st_size, status.st_mtime_ns
            entry = self._archives.get(path)
            if entry is not None and entry[0] == stamp:  # else the file was replaced
                return entry[1]
            if path.suffix not in _KINDS or not path.is_file():
                raise DataError(f"is in {path.name}, which is no archive that is read in place ({', '.join(_KINDS)})")
            archive = _KINDS[path.suffix](path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise DataError(f"its archive cannot be opened ({reason}); check its name") from error
        self._archives.put(path, (stamp, archive))
        return archive


class _Zip:
    """Members are paths. `has` goes by the list of members; `read` raises DataErrors without the archive's name."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _damaged(path, error) from error
        self.members = self._file.namelist()

    def has(self, member: str) -> bool:
        return member in self._file.NameToInfo

    def read(self, member: str) -> bytes:
        if not self.has(member):
            raise _absent(member)
        information = self._file.getinfo(member)
        if information.flag_bits & 1:
            raise DataError("is encrypted in its archive; unpack it with its password")
        # Other methods unpack whole blocks, so a bomb would be found too late.
        if information.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"is packed by method {information.compress_type}, which is not read; pack it as usual")
        _check_size(information.file_size)
        try:
            with self._file.open(information) as file:
                return file.read(MEMBER_BYTES)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"is damaged in its archive ({error}); download the archive again") from error


class _Table:
    """Members are "row/column", or "row/column/place" in a list. Memory holds the columns of one row group."""

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
        self._group, self._columns, self.members = -1, dict[str, Any](), list[str]()

    def has(self, member: str) -> bool:
        row, column, place = self._parts(member)
        known = column in self._names and (not place or place.isdecimal())
        return known and row.isdecimal() and len(row) < 19 and int(row) < self._starts[-1]

    def _parts(self, member: str) -> tuple[str, str, str]:
        """Row, column, and the place in a list, if any; a column's own name may hold slashes."""
        row, _, column = member.partition("/")
        before, _, place = column.rpartition("/")
        return (row, before, place) if column not in self._names and before else (row, column, "")

    def read(self, member: str) -> bytes:
        if not self.has(member):
            raise _absent(member)
        row, column, place = self._parts(member)
        group = bisect_right(self._starts, int(row)) - 1
        if group != self._group:
            self._group, self._columns = group, {}
        if column not in self._columns:
            try:
                self._columns[column] = self._file.read_row_group(group, columns=[column]).column(column)
            except self._errors as error:
                raise DataError(f"is damaged in its table ({one_line(error)}); download the table again") from error
        cell = self._columns[column][int(row) - self._starts[group]].as_py()
        if place and cell:
            cell = cell[int(place)] if int(place) < len(cell) else None
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise DataError("is not in its table: the cell is empty")
        _check_size(len(content))
        return content


_KINDS: dict[str, type[_Zip] | type[_Table]] = {".zip": _Zip, ".parquet": _Table}


def named_image(name: str) -> Path | PackedImage:
    """The image with this `preferences.image_name`: inside an archive if a part of the name is one."""
    path = Path(name)
    for archive in path.parents:
        with suppress(OSError, ValueError):  # an impossible file name
            if archive.suffix in _KINDS and archive.is_file():
                return _packed(archive, path.relative_to(archive).as_posix())
    return path


def _packed(archive: Path, member: str) -> PackedImage:
    row, _, column = member.partition("/")
    is_cell = archive.suffix == ".parquet" and column and _ROW.fullmatch(row)
    return PackedImage(archive, column, int(row)) if is_cell else PackedImage(archive, member)


def read_columns(path: Path, names: Sequence[str]) -> Any:
    """Columns of a parquet file as a table; DataError if it is damaged or lacks one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if absent := [name for name in names if name not in file.schema_arrow.names]:
                raise DataError(f"{path}: it has no column {', '.join(absent)}; download the data set's own files")
            return file.read(columns=list(names))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: it is damaged ({one_line(error)}); download it again") from error


def count_rows(path: Path) -> int:
    """The number of rows of a parquet file; DataError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: it is damaged ({one_line(error)}); download it again") from error


def _check_size(size: int) -> None:
    if size > MEMBER_BYTES:
        raise DataError(f"has {size:,} bytes unpacked, more than {MEMBER_BYTES:,}, the most that is read")


def _absent(member: str) -> DataError:
    return DataError(f"is not there: the archive has no {member}")


def _damaged(path: Path, error: Exception) -> DataError:
    size = path.stat().st_size
    return DataError(f"its archive is damaged or not whole ({one_line(error)}, {size:,} bytes); download it again")
