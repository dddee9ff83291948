"""HPDv3: pairs with the votes of several people, the preferred image always first, and one archive cut into parts."""

from collections.abc import Iterator
from pathlib import Path
from sys import intern
from typing import Any

from mlxpref.data.catalog import missing_files
from mlxpref.data.rows import Row, RowSampler, all_rows, parse_rows, random_swaps, read_json_rows, with_images
from mlxpref.errors import DataError
from mlxpref.preferences import Preference


def read_hpdv3(folder: Path, split: str, draw: RowSampler = all_rows, needs_images: bool = True) -> list[Preference]:
    """The preferences of a split, `train` or `test`, in a folder of the hub's layout.

    path1 is always the preferred image, so a is drawn at random. Its share of the votes is max(choice_dist) over their
    sum, or 1 without votes, as in the test. The confidence is ignored: it is no share of people. `draw` chooses among
    the pairs.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise missing_files("hpdv3", split, f"there is no {path}")
    rows = pair_rows(path)
    rows = [rows[i] for i in draw(len(rows))]
    return with_images("hpdv3", split, rows, folder, folder / "images.tar.gz", needs_images)


def pair_rows(path: Path) -> list[Row]:
    """The pairs of a list, with names of images and random sides."""
    return random_swaps(parse_rows(path, read_json_rows(path), _pair), "hpdv3")


def _pair(entry: Any) -> Iterator[Row]:
    texts = [entry[key] for key in ("prompt", "path1", "path2")]
    if not all(isinstance(text, str) and text for text in texts) or texts[1] == texts[2]:
        raise DataError("prompt, path1 and path2 must be text, the paths two")
    prompt, first, second = map(intern, texts)  # in memory once for many pairs
    share, votes = _votes(entry.get("choice_dist"))
    yield Row(prompt, first, second, share, votes, prompt, "a" if share == 0.5 else None)


def _votes(distribution: Any) -> tuple[float, int]:
    """The preferred image's share of the votes, and their number."""
    if not distribution:  # null, or none
        return 1.0, 1
    first, second = distribution
    if min(first, second) < 0 or first + second <= 0:
        raise DataError(f'"choice_dist" is {distribution}, no two numbers of votes')
    total = first + second
    return max(first, second) / total, max(1, round(total))
