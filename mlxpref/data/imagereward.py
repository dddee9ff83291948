"""ImageRewardDB: rankings of four to nine images of a prompt, with ties; the hub's files, or the lists on GitHub."""

from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from mlxpref.data.archives import ArchiveCache, read_columns
from mlxpref.data.catalog import missing_files
from mlxpref.data.rows import (
    Row,
    RowSampler,
    all_rows,
    parse_rows,
    preferences_of,
    random_swaps,
    read_json_rows,
)
from mlxpref.errors import DataError
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, PackedImage, Preference

_LISTS = {"train": "train.json", "validation": "valid.json", "test": "test.json"}
"""The names of the lists on GitHub."""


def read_imagereward(
    folder: Path, split: str, draw: RowSampler = all_rows, needs_images: bool = True
) -> list[Preference]:
    """The preferences of a split, `train`, `validation` or `test`, in a folder of the hub's layout or of GitHub's list.

    It prefers GitHub's list to the hub's table, as the official numbers come from it. The label is the order of the
    ranks, 0.5 for equal ones. It ignores the ratings: one person's difference of two ratings is no share of people. The
    order of the files tells the label (the earlier image wins 59 % of the test's pairs), so for training a is drawn at
    random; in validation and test a is the earlier one, as in the official baseline, and judging uses both orders
    anyway. It takes only pairs with an archive here; `draw` chooses among these.
    """
    list_file, table = folder / _LISTS[split], folder / f"metadata-{split}.parquet"
    if not list_file.is_file() and not table.is_file():
        raise missing_files("imagereward", split, f"there is neither {table} nor {list_file.name}")
    rows = list_rows(list_file) if list_file.is_file() else table_rows(table)
    rows = random_swaps(rows, "imagereward") if split == "train" else rows
    names = dict.fromkeys(name for row in rows for name in (row.a, row.b))
    images = _images(folder, split, names)
    if not needs_images:
        images = {name: folder / name for name in names} | images
    usable = [row for row in rows if row.a in images and row.b in images]
    if not usable:
        place = folder / "images" / split
        count = len(list(place.glob("*.zip")))
        problem = f"none of its images is in the archives of {place}, {count} in number, which may be damaged"
        raise missing_files("imagereward", split, problem if count else f"no archive of its images is in {place}")
    if len(usable) < len(rows):
        logger.warning(
            f"imagereward, split {split}: the images of {len(usable)} of {len(rows)} pairs are in {folder}; "
            f"`mlxpref data imagereward --split {split}` downloads the others"
        )
    return preferences_of([usable[i] for i in draw(len(usable))], images)


def list_rows(path: Path) -> list[Row]:
    """All pairs of GitHub's list of rankings (`id`, `prompt`, `generations`, `ranking`), in its order."""
    return _rows(path, read_json_rows(path))


def table_rows(path: Path) -> list[Row]:
    """All pairs of a metadata table of one row an image, in its order; the images of a prompt_id are one ranking."""
    rankings: dict[str, dict[str, Any]] = {}
    for row in read_columns(path, ("image_path", "prompt_id", "prompt", "rank")).to_pylist():
        # A prompt_id with two prompts would mix their images: the second prompt makes the entry unusable.
        name = row["prompt_id"]
        ranking = rankings.setdefault(name, {"id": name, "prompt": row["prompt"], "generations": [], "ranking": []})
        if ranking["prompt"] != row["prompt"]:
            ranking["prompt"] = None
        ranking["generations"].append(row["image_path"])
        ranking["ranking"].append(row["rank"])
    return _rows(path, rankings.values())


def _rows(path: Path, rankings: Iterable[Any]) -> list[Row]:
    names = set[str]()

    def pairs(entry: Any) -> Iterator[Row]:
        name, prompt, images, ranks = (entry[key] for key in ("id", "prompt", "generations", "ranking"))
        if not isinstance(name, str) or name in names:
            raise DataError(f"the id {name!r:.60} is no text, or that of another one")
        if not isinstance(prompt, str):
            raise DataError(f"{name}: no prompt, or two")
        if not all(isinstance(each, str) for each in images) or not all(isinstance(rank, int) for rank in ranks):
            raise DataError(f"{name}: images that are no text, or ranks that are no numbers")
        if len(images) != len(ranks) or len(set(images)) < len(images):
            raise DataError(f"{name}: {len(images)} images, perhaps one twice, and {len(ranks)} ranks")
        names.add(name)
        for i, j in combinations(range(len(images)), 2):
            p_people = 1.0 if ranks[i] < ranks[j] else 0.0 if ranks[i] > ranks[j] else 0.5
            yield Row(prompt, images[i], images[j], p_people, 1, name)

    return parse_rows(path, rankings, pairs)


def _images(folder: Path, split: str, names: Iterable[str]) -> dict[str, ImageLike]:
    """The images here: files below the folder or its `images`, else members of the split's zips."""
    by_name = {path.stem: path for path in sorted((folder / "images" / split).glob("*.zip"))}
    archives = ArchiveCache()
    images: dict[str, ImageLike] = {}
    for name in names:
        *_, parent, last = ("", *name.split("/"))
        # A member is in a folder with its zip's name, or in none.
        zips = [by_name[parent]] if parent in by_name else by_name.values()
        members = (PackedImage(path, member) for path in zips for member in (f"{path.stem}/{last}", last))
        if member := next(filter(archives.has, members), None):
            images[name] = member
        elif parent in by_name:  # its archive is here, so a missing image is an error
            images[name] = PackedImage(by_name[parent], f"{parent}/{last}")
        elif ".." not in name.split("/") and not name.startswith("/"):
            beside = next((place / name for place in (folder, folder / "images") if (place / name).is_file()), None)
            images |= {name: beside} if beside else {}
    return images
