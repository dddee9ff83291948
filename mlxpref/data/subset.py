"""Which files of a public data set have to be there for its first so many preferences."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from mlxpref.data.catalog import Split
from mlxpref.errors import DataError

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
        return
    if lists:
        yield lists
        yield _first_archives([folder / path for path in lists], images, limit)
        return
    found = 0
    for table in images:
        yield [table]
        found += _labelled_rows(folder / table)
        if found >= limit:
            return


def _first_archives(lists: Sequence[Path], archives: Files, limit: int) -> Files:
    """The first archives, by their numbers, that hold both images of so many pairs of unlike ranks."""
    ordered = sorted(archives, key=lambda path: (len(path), path))
    place = {path.removesuffix(".zip"): i for i, path in enumerate(ordered)}
    groups: dict[str, list[tuple[int, int]]] = {}
    for path in lists:
        columns = _columns(path, ["image_path", "prompt_id", "rank"])
        for image, group, rank in zip(*columns, strict=True):
            archive = str(image).rpartition("/")[0]
            if archive in place:
                groups.setdefault(str(group), []).append((place[archive], rank))
    complete_with = Counter(
        max(i, j) for images in groups.values() for (i, rank), (j, other) in combinations(images, 2) if rank != other
    )
    found = 0
    for i in range(len(ordered)):
        found += complete_with[i]
        if found >= limit:
            return ordered[: i + 1]
    return ordered


def _labelled_rows(table: Path) -> int:
    """How many rows of a table have a label that is no tie."""
    has_label, labels = _columns(table, ["has_label", "label_0"])
    return sum(bool(has) and label != 0.5 for has, label in zip(has_label, labels, strict=True))


def _columns(path: Path, names: list[str]) -> list[list[object]]:
    """Some columns of a parquet file; DataError where it has them not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=names)
        return [table.column(name).to_pylist() for name in names]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"{path}: {' and '.join(names)} cannot be read from it; leave out --limit") from error
