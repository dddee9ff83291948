"""A user's preferences as two folders, preferred and rejected images, with equal names."""

from pathlib import Path

from mlxpref.data.find_images import find_images
from mlxpref.data.prompts import read_prompt
from mlxpref.data.rows import Row, preferences_of, random_swaps
from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike, Preference
from mlxpref.text import first_ten

NAMES = (("preferred", "rejected"), ("chosen", "rejected"), ("winner", "loser"), ("win", "lose"), ("better", "worse"))
"""The names of the two folders."""


def read_folders(folder: Path, split: str | None = None) -> list[Preference]:
    """The preferences of a folder that holds `preferred/` and `rejected/` (or other NAMES), in the order of names.

    `preferred/cat.png` was preferred to `rejected/cat.jpg`: the stems are equal. Their prompt is in `cat.txt`, in
    either folder, in `prompts/` or in the folder itself, else in one `prompt.txt` for all. If there is a subfolder with
    the split's name, it reads that one. It draws which image is a, as the folders tell the label. One DataError for all
    names without a partner or a prompt.
    """
    if split and (folder / split).is_dir():
        folder = folder / split
    pair = next((names for names in NAMES if all((folder / name).is_dir() for name in names)), None)
    if pair is None:
        raise DataError(f"{folder}: holds no two folders {' or '.join('/ and '.join(names) + '/' for names in NAMES)}")
    better, worse = (_by_stem(folder / name) for name in pair)
    places = [*(folder / name for name in pair), folder / "prompts", folder]
    problems, rows, images = list[str](), list[Row](), dict[str, ImageLike]()
    for stem in dict.fromkeys([*better, *worse]):
        if stem not in better or stem not in worse:
            problems.append(f"{stem}: is only in {pair[0] if stem in better else pair[1]}")
            continue
        try:
            prompt = _prompt(stem, places)
        except DataError as error:
            problems.append(f"{stem}: {error}")
            continue
        first, second = better[stem], worse[stem]
        images |= {str(first): first, str(second): second}
        rows.append(Row(prompt, str(first), str(second), 1.0, 1, prompt))
    if problems:
        count = f"{len(problems)} of {len(rows) + len(problems)} pairs cannot be used"
        raise DataError(f"{folder}: {count}; correct or remove them:\n  {first_ten(problems)}")
    return preferences_of(random_swaps(rows, "folders"), images)


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix."""
    images: dict[str, Path] = {}
    for path in find_images([folder]):
        if path.stem in images:
            raise DataError(f"{folder}: {images[path.stem].name} and {path.name} have the same name; rename one")
        images[path.stem] = path
    return images


def _prompt(stem: str, places: list[Path]) -> str:
    """The prompt of a pair, from its own text file, else from the one for all."""
    files = [*(place / f"{stem}.txt" for place in places), places[-1] / "prompt.txt"]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise DataError(f"has no prompt: neither {stem}.txt nor prompt.txt is there")
    try:
        return read_prompt(path)
    except DataError as error:
        raise DataError(f"{path.name} {error}") from error
