"""ImageRewardDB: rankings of four to nine images of a prompt, with ties; the hub's files, or the lists on GitHub."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.rows import Row, RowErrors, RowSampler, all_rows, missing, preferences_of, read_json_rows, swapped
from mlxpref.errors import DataError
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, PackedImage, Preference
from mlxpref.text import one_line

__all__ = ["list_rows", "read_imagereward", "table_rows"]

_LISTS = {"train": "train.json", "validation": "valid.json", "test": "test.json"}
"""What the lists are called on GitHub."""
_COLUMNS = ("image_path", "prompt_id", "prompt", "rank")


def read_imagereward(folder: Path, split: str, draw: RowSampler = all_rows) -> list[Preference]:
    """The preferences of a split, `train`, `validation` or `test`, in a folder of the hub's layout or of GitHub's list.

    GitHub's list goes first where both are there: the official numbers are its own. The label is the order of the
    ranks, 0.5 for equal ones. The ratings are not used: one person's difference of two ratings is no share of people.
    The order of the files tells the label (the earlier image wins 59 % of the test's pairs), so for training it is
    drawn which image is a; in validation and test a stays the earlier one, which the official baseline counts, and each
    pair is judged in both orders anyway. Only pairs whose archives are there are taken; `draw` chooses among these.
    """
    listed, table = folder / _LISTS[split], folder / f"metadata-{split}.parquet"
    if listed.is_file():
        rows = list_rows(listed)
    elif table.is_file():
        rows = table_rows(table)
    else:
        raise missing("imagereward", split, f"there is neither {table} nor {listed.name}")
    rows = swapped(rows, "imagereward") if split == "train" else rows
    images = _images(folder, split, dict.fromkeys(name for row in rows for name in (row.a, row.b)))
    there = [row for row in rows if row.a in images and row.b in images]
    if not there:
        place = folder / "images" / split
        count = len(list(place.glob("*.zip")))
        damaged = f"none of its images is in the archives of {place}, {count} in number, which may be damaged"
        raise missing("imagereward", split, damaged if count else f"no archive of its images is in {place}")
    if len(there) < len(rows):
        logger.warning(
            f"imagereward, split {split}: the images of {len(there)} of {len(rows)} pairs are in {folder}; "
            f"`mlxpref data imagereward --split {split}` downloads the others"
        )
    return preferences_of([there[i] for i in draw(len(there))], images)


def list_rows(path: Path) -> list[Row]:
    """All pairs of GitHub's list of rankings (`id`, `prompt`, `generations`, `ranking`), in its order."""
    return _rows(path, (entry for _, entry in read_json_rows(path)))


def table_rows(path: Path) -> list[Row]:
    """All pairs of a metadata table of one row an image, in its order; the images of a prompt_id are one ranking."""
    return _rows(path, _rankings(path))


def _rankings(path: Path) -> Iterator[dict[str, Any]]:
    """The rankings of a table in the form of the list."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if absent := [name for name in _COLUMNS if name not in file.schema_arrow.names]:
                raise DataError(f"{path}: it has no column {', '.join(absent)}; download it again")
            table = file.read(columns=list(_COLUMNS)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: it is damaged ({one_line(error)}); download it again") from error
    rankings: dict[str, dict[str, Any]] = {}
    for row in table:
        # A prompt_id that stands for two prompts would mix their images: the second prompt makes the entry unusable.
        ranking = rankings.setdefault(
            row["prompt_id"], {"id": row["prompt_id"], "prompt": row["prompt"], "generations": [], "ranking": []}
        )
        if ranking["prompt"] != row["prompt"]:
            ranking["prompt"] = None
        ranking["generations"].append(row["image_path"])
        ranking["ranking"].append(row["rank"])
    yield from rankings.values()


def _rows(path: Path, rankings: Iterable[dict[str, Any]]) -> list[Row]:
    faults, rows, seen, number = RowErrors(path), list[Row](), set[str](), 0
    for number, entry in enumerate(rankings, 1):
        problem = _problem(entry, seen)
        if problem:
            faults.add(f"ranking {number}: {problem}")
            continue
        seen.add(entry["id"])
        names, ranks = entry["generations"], entry["ranking"]
        for i, j in combinations(range(len(names)), 2):
            p_people = 1.0 if ranks[i] < ranks[j] else 0.0 if ranks[i] > ranks[j] else 0.5
            rows.append(Row(entry["prompt"], names[i], names[j], p_people, 1, entry["id"]))
    faults.settle(number)
    return rows


def _problem(entry: Any, seen: set[str]) -> str | None:
    """Why a ranking cannot be used."""
    if not isinstance(entry, dict) or any(key not in entry for key in ("id", "prompt", "generations", "ranking")):
        return 'has not "id", "prompt", "generations" and "ranking"'
    name, prompt, names, ranks = (entry[key] for key in ("id", "prompt", "generations", "ranking"))
    if not isinstance(name, str) or name in seen:
        return f"the id {name!r:.60} is no text, or that of another one"
    if not isinstance(prompt, str):
        return f"{name}: no prompt, or two"
    if not all(isinstance(each, str) for each in names) or not all(isinstance(rank, int) for rank in ranks):
        return f"{name}: images that are no text, or ranks that are no numbers"
    if len(names) != len(ranks):
        return f"{name}: {len(names)} images, but {len(ranks)} ranks"
    return f"{name}: names an image twice" if len(set(names)) < len(names) else None


def _images(folder: Path, split: str, names: Iterable[str]) -> dict[str, ImageLike]:
    """The images that are there: files below the folder or its `images`, else members of the split's zips."""
    zips = sorted((folder / "images" / split).glob("*.zip"))
    by_name = {path.stem: path for path in zips}
    archives = ArchiveCache()
    found: dict[str, ImageLike] = {}
    for name in names:
        *_, parent, last = ("", *name.split("/"))
        candidates = [by_name[parent]] if parent in by_name else zips
        if image := _packed(candidates, last, archives):
            found[name] = image
        elif parent in by_name:  # its archive is there, so it is an error that the image is not
            found[name] = PackedImage(by_name[parent], f"{parent}/{last}")
        elif ".." not in name.split("/") and not name.startswith("/"):
            beside = next((place / name for place in (folder, folder / "images") if (place / name).is_file()), None)
            found |= {name: beside} if beside else {}
    return found


def _packed(zips: Sequence[Path], last: str, archives: ArchiveCache) -> PackedImage | None:
    """The member of this name, in the folder of its zip's name or in none."""
    members = (PackedImage(path, member) for path in zips for member in (f"{path.stem}/{last}", last))
    return next(filter(archives.has, members), None)
