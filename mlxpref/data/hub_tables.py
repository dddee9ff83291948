"""Preferences in the parquet tables of any data set on the Hugging Face hub, or of a folder in the same layout."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlxpref.data.catalog import snapshot_of
from mlxpref.data.find_images import ImageFinder
from mlxpref.data.preference_table import read_public_table
from mlxpref.data.tables import SUFFIXES
from mlxpref.errors import ConfigError, DataError, UnknownSplitError
from mlxpref.hub import Destination, HubFile, Question, ask_hub, check_space, download
from mlxpref.log import logger
from mlxpref.preferences import Preference
from mlxpref.text import format_bytes

Agree = Callable[[str], bool]
"""Answers a question, such as whether to download data."""
_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<part>[\w.-]+(/[\w.-]+)*))?(@(?P<revision>[\w.-]+(/[\w.-]+)*))?")
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{8,})?$")
_SPLIT = re.compile("train|test|val|dev|eval", re.I)
"""In the names of splits; one table of another name is no split."""
_OF = re.compile(r"-of-0*(\d+)")


@dataclass(frozen=True)
class HubName:
    """A data set on the hub, perhaps only the tables in a folder of it, at a branch, tag or commit."""

    id: str
    part: str | None = None
    revision: str | None = None


def hub_name(data: str) -> HubName | None:
    """What `owner/name`, `owner/name/folder` or either with `@revision` names; None for another name."""
    match = _NAME.fullmatch(data)
    if match is None or data.startswith(".") or ".." in data or Path(data).suffix.lower() in SUFFIXES:
        return None
    return HubName(match["id"], match["part"], match["revision"])


def read_tables(
    folder: Path, split: str, part: str | None = None, label: str = "", needs_images: bool = True
) -> tuple[list[Preference], str | None]:
    """The preferences in the tables below a folder, and the name of their split, None of tables without splits.

    Without `needs_images` a file that a table names need not be there.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    paths, name = _chosen(label or str(folder), files, split, part)
    warn_of_missing(label or str(folder), split, paths)
    return [each for path in paths for each in _read(folder / path, split, needs_images)], name


def warn_of_missing(label: str, split: str, tables: Sequence[str]) -> None:
    """Warn where the names of a split's tables say that there are more."""
    if len(tables) < (count := count_of_tables(tables[0])):
        logger.warning(f"{label}: {len(tables)} of {count} tables of split {split} are here")


def count_of_tables(name: str) -> int:
    """How many tables a split has by the name of one of them, test-00000-of-00002.parquet; 0 if it does not say."""
    count = _OF.search(name)
    return int(count[1]) if count else 0


def read_hub_tables(
    name: HubName, split: str, limit: int | None, agree: Agree, needs_images: bool = True
) -> tuple[list[Preference], str | None]:
    """As `read_tables`, of a data set on the hub; with a `limit` only the first tables with so many preferences.

    What is not in the hub's cache is downloaded if the user agrees, who sees size and licence before. ConfigError if
    not; DataError for a data set that is missing, gated or without tables.
    """
    label = f"{name.id}@{name.revision}" if name.revision else name.id
    try:
        destination = Destination(ask_hub(name.id, "dataset", name.revision))
    except DataError as error:
        if (folder := snapshot_of(name.id, name.revision)) is None:
            raise
        logger.warning(f"{error}; what is in the hub's cache is used")
        return read_tables(folder, split, name.part, label, needs_images)
    by_path = {file.path: file for file in destination.repository.files}
    paths, chosen = _chosen(label, by_path, split, name.part)
    tables = [by_path[path] for path in paths]
    if destination.bytes_left(tables[:1] if limit else tables) and not agree(
        _question(label, destination, tables, limit)
    ):
        raise ConfigError(f"--data {label}: nothing was downloaded; agree with --yes")
    preferences: list[Preference] = []
    for table in tables:
        check_space(destination, [table])
        preferences += _read(download(destination, table), split, needs_images)
        if limit and len(preferences) >= limit:
            break
    return preferences, chosen


def _read(table: Path, split: str, needs_images: bool) -> list[Preference]:
    return read_public_table(table, split, ImageFinder(table, needed=needs_images))


def _question(label: str, destination: Destination, tables: list[HubFile], limit: int | None) -> Question:
    licence = destination.repository.licence or "not stated"
    size = format_bytes(destination.bytes_left(tables))
    what = f"{len(tables)} table{'s' if len(tables) > 1 else ''}, {size}"
    if limit and len(tables) > 1:
        what += f", of which --limit {limit} needs as many as hold so many preferences, each about "
        what += format_bytes(sum(table.size for table in tables) / len(tables))
    rest = destination.bytes_left(tables[:1] if limit else tables)
    return Question(f"{label} on the hub (licence {licence}; {what})", destination, rest)


def _chosen(label: str, files: Iterable[str], split: str, part: str | None) -> tuple[list[str], str | None]:
    """The tables of a split among files, in order, and its name; DataError where that is not clear."""
    names = list(files)
    tables: dict[str, dict[str, list[str]]] = {}
    for path in sorted(name for name in names if name.endswith(".parquet")):
        folder, of_split = _place(path)
        if part is None or part in (folder, *map(str, PurePosixPath(path).parents)):
            tables.setdefault(folder, {}).setdefault(of_split, []).append(path)
    if not tables:
        kinds = ", ".join(
            f"{n} {kind or 'others'}" for kind, n in Counter(Path(x).suffix for x in names).most_common(4)
        )
        where = f" in {part}" if part else ""
        raise DataError(
            f"{label}: has no parquet tables{where} ({kinds or 'no files'}); the hub may have made some: try "
            f"{label.partition('@')[0]}@refs/convert/parquet, or download it and give a file"
        )
    if len(tables) > 1 and "default" not in tables:
        raise DataError(f"{label}: has several parts, {', '.join(sorted(tables))}: give one, as {label}/{min(tables)}")
    splits = next(iter(tables.values())) if len(tables) == 1 else tables["default"]
    only = next(iter(splits))
    if len(splits) == 1 and not _SPLIT.search(only):
        return splits[only], None
    if split not in splits:
        known = ", ".join(sorted(splits))
        raise UnknownSplitError(f"{label}: no split {split!r}; there are {known}; give one with --split")
    return splits[split], split


def _place(path: str) -> tuple[str, str]:
    """The folder that names a part of a data set, and the split: `photos/train-00000-of-00005.parquet`."""
    *folders, last = PurePosixPath(path).with_suffix("").parts
    name = _SHARD.sub("", last)
    if name in ("", "part", "shard", "chunk", "data") and folders:  # train/0000.parquet
        name = folders.pop()
    folders = [folder for folder in folders if folder != "data"]
    return "/".join(folders), name.removeprefix("partial-")  # the hub's own tables of large data sets
