"""A ranking as files: a table for a spreadsheet, and copies of the best images."""

import csv
import re
import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from mlxpref.data.prompts import PromptGroup
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import write_output
from mlxpref.judge.ranking_result import Ranking

_COLUMNS = (
    "prompt", "rank", "image", "strength", "stderr", "low", "high", "p_best", "wins", "pairs", "tied_with", "reason",
    "warnings", "criterion", "group",
)  # fmt: skip
_FORMULA = re.compile(r"[=+\-@\t\r]")
"""A spreadsheet takes a cell that begins so for a formula, and may run it."""


def write_ranking_csv(path: Path, rankings: Sequence[Ranking], alone: Sequence[PromptGroup] = ()) -> None:
    """Write one line an image, best first, prompt by prompt, in UTF-8 with commas; ConfigError where that fails.

    Images `alone` are similar to no other: they come last, without a rank.
    The columns image and prompt make the file a list that `--prompt-from` takes. A prompt or reason that a spreadsheet
    would take for a formula gets an apostrophe in front; a path gets `./`, so that it still leads to the file. Several
    images in `tied_with`, and the warnings in the row of a prompt's best image, have " | " between them. Bytes of a
    file name that are not UTF-8 are written `\\udcff`.
    """
    table = StringIO()
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    for ranking in rankings:
        names = [_path_cell(ranking.name(i)) for i in range(len(ranking.images))]
        for image in ranking:
            numbers = (image.strength, image.stderr, image.low, image.high, image.p_best)
            writer.writerow(
                (
                    text_cell(ranking.prompt),
                    image.rank,
                    names[image.index],
                    *(f"{number:.6g}" for number in numbers),
                    image.wins,
                    image.pairs,
                    " | ".join(names[other] for other in image.tied_with),
                    text_cell(image.reason or ""),
                    text_cell(" | ".join(ranking.warnings) if image is ranking[0] else ""),
                    text_cell(ranking.criterion),
                    _path_cell(ranking.similar_to),
                )
            )
    for each in alone:
        cells = {"prompt": text_cell(each.prompt), "image": _path_cell(str(each.images[0]))}
        writer.writerow(cells.get(column, "") for column in _COLUMNS)
    write_output(path, table.getvalue())


def check_copy_folder(folder: Path) -> None:
    """ConfigError unless a folder for copies is new or empty, so that no file is replaced."""
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise ConfigError(f"{folder}: is not an empty folder; choose a new one for the copies")


def copy_top(rankings: Sequence[Ranking], count: int, folder: Path, captions: bool = False) -> list[Path]:
    """Copy the best `count` images of each prompt as `01_name.png`, `02_name.png` ... and return the copies.

    Each of several prompts has a folder of its own; of several groups of near-duplicates, the number of the group comes
    first in the name. With `captions` there is a text beside each copy, `01_name.txt`, which holds the prompt, and all
    prompts share one folder, their numbers first in the names: what trainers of image models read. DataError for an
    image from memory, and for captions without a prompt; ConfigError for a folder that is not new or empty, or cannot
    be written.
    """
    check_copy_folder(folder)
    copies, texts = dict[Path, Path](), dict[Path, str]()
    digits = max(2, len(str(len(rankings))))
    for number, ranking in enumerate(rankings, 1):
        words = re.sub(r"[\W_]+", "-", ranking.prompt.casefold())[:40].strip("-")
        is_flat = bool(ranking.similar_to) or captions
        place = folder if len(rankings) == 1 or is_flat else folder / f"{number:0{digits}}-{words}"
        group = f"{number:0{digits}}_" if ranking.similar_to or (captions and len(rankings) > 1) else ""
        for rank, image in enumerate(ranking[:count], 1):
            source = image.path
            if source is None:
                raise DataError(f"{image.name} has no file; only files can be copied")
            copy = place / f"{group}{rank:0{max(2, len(str(count)))}}_{source.name}"
            copies[copy] = source
            if captions:  # the numbers tell copies apart, so that no two share a text
                texts[copy.with_suffix(".txt")] = ranking.prompt.strip()
    if not all(texts.values()):
        raise DataError("captions are the prompts of the images, and some have none; copy without captions")
    if same := copies.keys() & texts.keys():
        raise DataError(f"{copies[min(same)]}: its copy has the name of the text beside it; rename it")
    try:
        for copy, source in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as error:
        raise ConfigError(f"{folder}: an image cannot be copied there ({error})") from error
    return list(copies)


def text_cell(text: str) -> str:
    """Text in a cell of a spreadsheet, which must not take it for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def _path_cell(name: str) -> str:
    return f"./{name}" if _FORMULA.match(name) else name
