"""A ranking as files: a table for a spreadsheet, and copies of the best images."""

import csv
import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path

from mlxpref.data.duplicates import same_content
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import write_file
from mlxpref.judge.ranking_result import Ranking

__all__ = ["check_place", "copy_top", "write_ranking_csv"]

_COLUMNS = (
    "prompt", "rank", "image", "strength", "stderr", "low", "high", "p_best", "wins", "pairs", "tied_with", "reason",
)  # fmt: skip
_FORMULA = re.compile(r"[=+\-@\t\r]")
"""What a cell begins with that a spreadsheet takes for a formula, and may run."""
_SHOWN = 10
_NAME_BYTES = 255
"""The most bytes of a file name on the usual file systems."""


def write_ranking_csv(path: Path, rankings: Sequence[Ranking]) -> None:
    """Write one line an image, best first, prompt by prompt, in UTF-8 with commas.

    The columns image and prompt make the file a list that `--prompt-from` takes. A prompt or reason that a spreadsheet
    would take for a formula gets an apostrophe in front; a path gets `./`, so that it still leads to the file. Several
    images in `tied_with` stand with " | " between them. Bytes of a file name that are not UTF-8 are written `\\udcff`.
    """
    table = StringIO()
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    for ranking in rankings:
        names = [_path_cell(ranking.name(i)) for i in range(len(ranking.images))]
        for image in ranking.ranking.images:
            numbers = (image.strength, image.stderr, image.low, image.high, image.p_best)
            writer.writerow(
                (
                    _text_cell(ranking.prompt),
                    image.rank,
                    names[image.index],
                    *(f"{number:.6g}" for number in numbers),
                    image.wins,
                    image.pairs,
                    " | ".join(names[other] for other in image.tied_with),
                    _text_cell(ranking.reason_text(image) or ""),
                )
            )
    try:
        write_file(path, table.getvalue().encode(errors="backslashreplace").decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def copy_top(rankings: Sequence[Ranking], count: int, folder: Path) -> list[Path]:
    """Copy the best `count` images of each prompt into a folder as `01_name.png`, `02_name.png` ...; never move one.

    With several prompts, each has a subfolder named after it. Fewer images than `count` are all copied. What is there
    already in the same bytes is left as it is, so the same call may be repeated; anything else of that name, or that
    has a place in an earlier order, is never overwritten: a DataError names all of them before anything is copied.
    ConfigError for a folder that holds the images themselves (copies would be ranked the next time; a folder within it
    is well, unless folders are searched with `--recursive`), and for one that cannot be written. Returns the copies.
    """
    if count < 1:
        raise ConfigError(f"the best {count} images cannot be copied; ask for at least 1")
    copies: dict[Path, Path] = {}
    for ranking in rankings:
        place = folder / _folder_name(ranking.prompt) if len(rankings) > 1 else folder
        best = [ranking.images[image.index] for image in ranking.ranking.images[:count]]
        digits = max(2, len(str(len(best))))
        for number, image in enumerate(best, 1):
            if not isinstance(image, Path):
                raise DataError(f"image {number} came from memory; only files can be copied")
            check_place(folder, [image])
            check_place(place, [image])
            copies[place / _file_name(f"{number:0{digits}}_", image.name)] = image
    if clashes := _clashes(copies):
        more = f" and {len(clashes) - _SHOWN} more" if len(clashes) > _SHOWN else ""
        raise DataError(
            f"{folder}: nothing was copied, other files are in the place of {len(clashes)} of {len(copies)} copies "
            f"({', '.join(clashes[:_SHOWN])}{more}); choose an empty folder"
        )
    _check_space(folder, [image for copy, image in copies.items() if not copy.exists()])
    for copy, image in copies.items():
        _copy(image, copy)
    return list(copies)


def check_place(folder: Path, images: Iterable[Path]) -> None:
    """Refuse a folder for copies that holds an image itself: the copies would be ranked the next time."""
    if os.path.realpath(folder) in {os.path.realpath(image.parent) for image in images}:
        raise ConfigError(f"{folder}: holds images that are ranked; choose another folder for the copies")


def _clashes(copies: dict[Path, Path]) -> list[str]:
    """The files that are not what a copy would be, but have its name or its number."""
    numbered: dict[tuple[Path, int], list[Path]] = {}
    for place in dict.fromkeys(copy.parent for copy in copies):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if match := re.match(r"(\d+)_", entry.name):
                numbered.setdefault((place, int(match[1])), []).append(entry)
    clashes: list[str] = []
    for copy, image in copies.items():
        if os.path.lexists(copy) and not same_content(copy, image):
            clashes.append(str(copy))
        number = int(copy.name.partition("_")[0])
        others = [e for e in numbered.get((copy.parent, number), ()) if _composed(e.name) != _composed(copy.name)]
        clashes += map(str, others)
    return clashes


def _check_space(folder: Path, images: Sequence[Path]) -> None:
    """ConfigError if the copies do not fit on the disk of the folder, which need not be there yet."""
    try:
        needed = sum(image.stat().st_size for image in images)
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be copied ({error.strerror}); nothing was copied") from error
    if needed > free:
        raise ConfigError(
            f"{folder}: the copies need {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; choose another disk"
        )


def _copy(image: Path, copy: Path) -> None:
    """Copy a file beside its new name and rename it, unless that name is taken."""
    temporary = copy.with_name(f".mlxpref.{os.getpid()}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(copy):  # in the same bytes, see `_clashes`
            return
        try:
            shutil.copyfile(image, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.rename(copy)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{image} cannot be copied to {copy} ({error.strerror}); correct that, run it again"
        ) from error
    with suppress(OSError):  # after renaming: a Mac's locked file stays locked, and could then not be renamed
        shutil.copystat(image, copy)


def _folder_name(prompt: str) -> str:
    """A folder for a prompt: its first words, and what tells it from another one that begins alike."""
    words = re.sub(r"[\W_]+", "-", _composed(prompt).casefold())[:40].strip("-")
    number = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{words}-{number}" if words else number


def _file_name(place: str, name: str) -> str:
    """A name after its place; of one that gets too long, the end of the stem is cut off."""
    stem, suffix = Path(name).stem, Path(name).suffix
    room = _NAME_BYTES - len(os.fsencode(place + suffix))
    if len(os.fsencode(stem)) > room:
        stem = os.fsencode(stem)[:room].decode(errors="ignore")
    return place + stem + suffix


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _text_cell(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


def _path_cell(name: str) -> str:
    return f"./{name}" if _FORMULA.match(name) else name
