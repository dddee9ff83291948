"""Which files of a public data set its first preferences need."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from mlxpref.data.catalog import Split
from mlxpref.data.rows import read_columns

__all__ = ["files_for_limit"]

Files = list[str]
"""Paths in the hub's layout."""


def files_for_limit(split: Split, lists: Files, images: Files, folder: Path, limit: int | None) -> Iterator[Files]:
    """The files that a split's first `limit` preferences need, in portions: each lies in `folder` before the next.

    Ties are not counted, as training drops them. Without a limit, and where the images are in one archive, it is all of
    the files at once. Otherwise it is the lists, and of the archives that they name the fewest first ones that hold
    both images of enough pairs; or one table after the other, until there are enough rows. Raises DataError for a list
    or a table that cannot be read.
    """
    if limit is None or split.together:
        yield lists + images
    elif lists:
        yield lists
        yield _first_archives([folder / path for path in lists], images, limit)
    else:
        rows = 0
        for table in images:
            if rows < limit:
                yield [table]
                columns = read_columns(folder / table, ("has_label", "label_0")).to_pylist()
                rows += sum(bool(row["has_label"]) and row["label_0"] != 0.5 for row in columns)


def _first_archives(lists: Sequence[Path], archives: Files, limit: int) -> Files:
    """The first archives, by their numbers, that hold both images of `limit` pairs of unlike ranks."""
    ordered = sorted(archives, key=lambda path: (len(path), path))
    place = {path.removesuffix(".zip"): i for i, path in enumerate(ordered)}
    groups: dict[str, list[tuple[int, int]]] = {}
    for path in lists:
        for row in read_columns(path, ("image_path", "prompt_id", "rank")).to_pylist():
            archive = str(row["image_path"]).rpartition("/")[0]
            if archive in place:
                groups.setdefault(str(row["prompt_id"]), []).append((place[archive], row["rank"]))
    # The number of pairs that are complete with the i-th archive.
    complete_with = Counter(
        max(i, j) for images in groups.values() for (i, rank), (j, other) in combinations(images, 2) if rank != other
    )
    pairs = 0
    for i in range(len(ordered)):
        pairs += complete_with[i]
        if pairs >= limit:
            return ordered[: i + 1]
    return ordered
