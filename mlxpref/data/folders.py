"""A user's preferences as two folders, preferred and rejected images, with equal names."""

import json
from pathlib import Path

from mlxpref.data.columns import WINNERS
from mlxpref.data.find_images import find_images
from mlxpref.data.preference_table import NoSplitsError, random_sides
from mlxpref.data.prompt_syntax import plain_prompt
from mlxpref.data.prompts import read_prompt
from mlxpref.data.tables import unusable
from mlxpref.errors import DataError, UnknownSplitError
from mlxpref.preferences import Preference


def read_folders(folder: Path, split: str | None = None) -> list[Preference]:
    """The preferences of a folder that holds `preferred/` and `rejected/`, in the order of names.

    For other names of the two see `columns.WINNERS`. `preferred/cat.png` was preferred to `rejected/cat.jpg`: the stems
    are equal. Their prompt is in `cat.txt`, in either folder, in `prompts/` or in the folder itself, else in one
    `prompt.txt` for all. Subfolders with both are splits. It draws which image is a, as the folders tell the label. One
    DataError for all names without a partner or a prompt; NoSplitsError where a split is asked for and there is none.
    """
    splits = {place.name: pair for place in sorted(folder.iterdir()) if place.is_dir() and (pair := _pair(place))}
    pair = _pair(folder)
    if split in splits:
        folder, pair = folder / str(split), splits[str(split)]
    elif pair is None and splits:
        known = ", ".join(splits)
        raise UnknownSplitError(f"{folder}: no split {json.dumps(split)}; there are {known}; give one with --split")
    elif pair is None:
        names = " or ".join("/ and ".join(names) + "/" for names in WINNERS)
        raise DataError(f"{folder}: holds no two folders {names}")
    better, worse = (_by_stem(folder / name) for name in pair)
    places = [*(folder / name for name in pair), folder / "prompts", folder]
    problems, rows = list[str](), list[Preference]()
    for stem in dict.fromkeys([*better, *worse]):
        if stem not in better or stem not in worse:
            problems.append(f"{stem}: is only in {pair[0] if stem in better else pair[1]}")
            continue
        try:
            prompt = _prompt(stem, places)
            rows.append(Preference(prompt, better[stem], worse[stem], 1.0, 1, prompt))
        except DataError as error:
            problems.append(f"{stem}: {error}")
    if problems:
        raise unusable(folder, problems, len(rows) + len(problems), "pairs")
    preferences = random_sides(rows)
    if split and split not in splits:
        raise NoSplitsError(folder, split, preferences)
    return preferences


def has_folders(folder: Path) -> bool:
    """Whether a folder, or a split's folder in it, holds two such folders."""
    return any(_pair(place) for place in (folder, *folder.iterdir()) if place.is_dir())


def _pair(folder: Path) -> tuple[str, str] | None:
    """The names of a folder's two folders."""
    return next((names for names in WINNERS if all((folder / name).is_dir() for name in names)), None)


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
        return plain_prompt(read_prompt(path))
    except DataError as error:
        raise DataError(f"{path.name} {error}") from error
