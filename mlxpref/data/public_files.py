"""The files of a public data set: are enough of them here, and their download after a question."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub.constants import is_offline_mode

from mlxpref.data.catalog import CATALOG, DataSet, Split, archives_in, files_for_limit, snapshot_of
from mlxpref.data.hub_tables import Agree, count_of_tables
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import write_file
from mlxpref.hub import Destination, HubFile, Question, ask_hub, check_space, download
from mlxpref.log import logger
from mlxpref.text import format_bytes

_WANTED = ".mlxpref-wanted.json"
"""In a data set's folder of the hub cache: the paths that a download was begun for."""


def fetch(name: str, split: str, limit: int | None, agree: Agree, needs_images: bool = True) -> None:
    """Download what a limit needs of a split, and what its protocol reads beside it, unless that is here.

    Without `needs_images` it is the lists of the split, or the tables where these hold the images too. The user is
    asked first. ConfigError if the answer is no; DataError, one line, for what fails; what was downloaded is kept, and
    the next call goes on with it. Offline, and with a part that no `limit` needs more of, nothing happens.
    """
    data_set = CATALOG[name]
    part = data_set.split(split)
    hub_id = next((each for each in (data_set.hub_id, *data_set.aliases) if snapshot_of(each)), data_set.hub_id)
    folder = snapshot_of(hub_id)
    parts = [part, *([data_set.split(part.beside)] if part.beside and needs_images else [])]
    if part.lists and not needs_images:
        parts, limit = [replace(part, images=(), together=False)], None
    missing = [each for each in parts if folder is None or not _is_enough(each, folder, limit)]
    if not missing or is_offline_mode():
        return
    try:
        destination = Destination(ask_hub(hub_id))
    except DataError as error:
        if folder is None:
            raise
        logger.warning(f"{error}; what is in the hub's cache is used")
        return
    question = _question(data_set, missing, destination, limit)
    # A judge, which the answer to a Question brings along, is not needed without images.
    if question.bytes and not agree(question if needs_images else str(question)):
        raise ConfigError(f"{question.what}: nothing was downloaded; agree with --yes")
    for each in missing:
        download_split(each, destination, limit)


@dataclass(frozen=True)
class Downloaded:
    """Files that are here and were checked, and the bytes that had to be downloaded."""

    files: Sequence[HubFile]
    downloaded: int


def download_split(split: Split, destination: Destination, limit: int | None) -> Downloaded:
    """Download the files of a split, or those for a limit, and check those that are here."""
    lists, images = (destination.repository.matching(patterns) for patterns in (split.lists, split.images))
    by_path = {file.path: file for file in lists + images}
    checked: list[HubFile] = []
    downloaded = 0
    for paths in files_for_limit(split, [f.path for f in lists], [f.path for f in images], destination.snapshot, limit):
        files = [by_path[path] for path in paths]
        rest = destination.bytes_left(files)
        check_space(destination, files)
        names = f"{', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}"
        logger.info(f"{names}: {format_bytes(rest)} to download" if rest else f"{names}: here already, to be checked")
        if rest and destination.folder is None:
            destination.root.mkdir(parents=True, exist_ok=True)
            write_file(destination.root / _WANTED, json.dumps(sorted({*_wanted(destination.root), *paths})))
        for file in files:
            download(destination, file)
        checked += files
        downloaded += rest
    return Downloaded(checked, downloaded)


def _is_enough(split: Split, folder: Path, limit: int | None) -> bool:
    """Whether a snapshot has what a limit needs, as far as that is known without the hub; without a limit, a part."""
    patterns = split.lists + split.images
    here = [path.relative_to(folder).as_posix() for pattern in patterns for path in sorted(folder.glob(pattern))]
    wanted = [path for path in _wanted(folder.parent.parent) if any(fnmatchcase(path, each) for each in patterns)]
    if any(path not in here for path in wanted):  # a download was interrupted
        return False
    if not all(any(fnmatchcase(path, pattern) for path in here) for pattern in patterns):
        return False
    if limit is None or split.together:
        return True
    lists = [path for path in here if any(fnmatchcase(path, each) for each in split.lists)]
    tables = [path for path in here if path not in lists]
    if lists:
        archives = archives_in([folder / path for path in lists])
        return all(path in here for paths in files_for_limit(split, lists, archives, folder, limit) for path in paths)
    count = count_of_tables(tables[0])
    absent = "absent"
    try:
        for _ in files_for_limit(split, [], [*tables, absent], folder, limit):
            pass
    except DataError:  # it asks for one more table
        return 0 < count <= len(tables)
    return True


def _question(data_set: DataSet, splits: Sequence[Split], destination: Destination, limit: int | None) -> Question:
    """What is to be downloaded: its size, of the whole, and its licence."""
    repository, whole, needed = destination.repository, list[HubFile](), list[HubFile]()
    for split in splits:
        lists, images = (repository.matching(patterns) for patterns in (split.lists, split.images))
        whole += lists + images
        count = len(images)
        if limit and split.pairs and not split.together:
            count = min(count, math.ceil(limit * len(images) / split.pairs))
        needed += [*lists, *sorted(images, key=lambda file: (len(file.path), file.path))[:count]]
    rest = destination.bytes_left(needed)
    names = " and ".join(split.name for split in splits)
    size = format_bytes(rest)
    if limit and len(needed) < len(whole):
        size = f"about {size} for --limit {limit}, of {format_bytes(sum(file.size for file in whole))}"
    together = ", in one archive that is downloaded whole and unpacked" if splits[0].together else ""
    licence = repository.licence or data_set.licence
    what = f"{data_set.name}, split {names} ({size}{together}; licence {licence}; into {destination.root})"
    return Question(what, destination, rest * (2 if together else 1))  # unpacked it takes as much room again


def _wanted(root: Path) -> list[str]:
    file = root / _WANTED
    try:
        return [str(path) for path in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
    except (OSError, ValueError):
        return []
