"""Finds the prompt of each image: in a text file next to it, its own metadata, or a list of all."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxpref.data.columns import IMAGES, PROMPTS
from mlxpref.data.find_images import (
    Skipped,
    check_images,
    file_identity,
    find_duplicates,
    find_images,
    fold_name,
    locate,
    reasons_of,
)
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.prompt_metadata import prompt_in_image, prompt_in_infotext
from mlxpref.data.prompt_syntax import plain_prompt
from mlxpref.data.tables import SUFFIXES, NumberedRow, read_table, unusable, use_rows
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import read_file
from mlxpref.text import UNDECODED, shorten

PROMPT_LIMIT = 10_000
"""The most characters of a prompt; longer text is a document or a graph."""
FILE_LIMIT = 64 * 2**20
"""The most bytes of a text file or a list."""
EXAMPLE = '{"image": "1.png", "prompt": "a red cube"}'
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""A folder's list of its images, with columns `file_name` and `text`: the layout for training diffusion models."""


@dataclass(frozen=True)
class PromptGroup:
    """Images of one prompt, at least two; `similar_to` is the name of the first one where all are near-duplicates."""

    prompt: str
    images: tuple[Path, ...]
    similar_to: str = ""


def group_title(prompt: str, criterion: str = "", similar_to: str = "") -> str:
    """What images are ranked for, as far as it is known: the prompt, the user's own criterion, and the group."""
    parts = (prompt and f"“{prompt}”", criterion and f"by “{criterion}”", similar_to and f"similar to {similar_to}")
    return ", ".join(part for part in parts if part)


def find_groups(
    places: Sequence[Path], recursive: bool, prompt: str | None, source: str | None, images: ImageCache
) -> tuple[list[PromptGroup], list[Skipped], list[str]]:
    """The images of each prompt in files and folders, those that are left out, and notes.

    All have `prompt`, unless `source` (see `prompts_of`) gives each its own. `images` decodes each image once.
    """
    readable, skipped = check_images(find_images(places, recursive), images)
    groups, notes = [PromptGroup(prompt or "", tuple(readable))], list[str]()
    if source is not None:
        prompts, without, notes = prompts_of(readable, source)
        groups, alone = group_by_prompt(prompts)
        skipped = [*skipped, *without, *alone]
    same = (", ".join(str(path) for path in group) for group in find_duplicates(readable))
    return groups, list(skipped), [*notes, *(f"the same file: {names}; each is ranked" for names in same)]


def prompts_of(images: Sequence[Path], source: str) -> tuple[dict[Path, str], list[Skipped], list[str]]:
    """The prompt of each image, in the order of `images`, the images without one, each with the reason, and notes.

    `source` is `sidecar` (`cat.png.txt` or `cat.txt` next to `cat.png`; of AUTOMATIC1111's text files the positive
    prompt; else a row of the folder's METADATA), `png` (the metadata of PNG, JPEG, WebP and AVIF, see
    `prompt_in_image`) or a table (see `read_table`) with a column of `columns.IMAGES`, relative to its folder, and one
    of `columns.PROMPTS`; a JSON object of images and their prompts is one, too. Prompts are plain text, without blanks
    around them and with "\\n" between lines. Raises DataError if a table cannot be read, for all its bad rows together,
    and if no image has a prompt.
    """
    find_prompt: Callable[[Path], str | None]
    if source == "sidecar":
        find_prompt = _in_sidecars(images)
        none = f"has no text file of its name beside it, and no row in a {METADATA[0]} there"
    elif source == "png":
        find_prompt, none = prompt_in_image, "has no prompt in its metadata"
    elif Path(source).suffix.lower() in SUFFIXES:
        find_prompt, none = _in_list(Path(source), images), f"has no row in {source}"
    else:
        raise ConfigError(f"{source}: prompts come from `sidecar`, `png`, or a file ({', '.join(SUFFIXES)}); name one")
    prompts: dict[Path, str] = {}
    skipped: list[Skipped] = []
    changed: list[tuple[str, str]] = []
    for image in images:
        try:
            prompt = find_prompt(image)
            if prompt is None:
                raise DataError(none)
            prompts[image] = _checked(plain_prompt(prompt := _checked(prompt)))
            if prompts[image] != prompt:
                changed.append((prompt, prompts[image]))
        except DataError as error:
            skipped.append(Skipped(image, str(error)))
    if not prompts:
        ways = f"--prompt-from sidecar, png or a file ({', '.join(SUFFIXES)}), or one --prompt for all"
        raise DataError(f"none of {len(images)} images has a prompt: {reasons_of(skipped)}; other ways are {ways}")
    notes = [
        f"{len(changed)} of {len(prompts)} prompts are used without LoRAs, weights and the like: "
        f"“{shorten(before, 60)}” as “{shorten(after, 60)}”"
        for before, after in changed[:1]
    ]
    return prompts, skipped, notes


def group_by_prompt(prompts: Mapping[Path, str]) -> tuple[list[PromptGroup], list[Skipped]]:
    """The groups of images with equal prompts, in order of first appearance, and single images.

    A single image cannot be ranked. DataError if there is no group.
    """
    images: dict[str, list[Path]] = {}
    for path, prompt in prompts.items():
        images.setdefault(prompt, []).append(path)
    groups = [PromptGroup(prompt, tuple(paths)) for prompt, paths in images.items() if len(paths) > 1]
    alone = [
        Skipped(
            paths[0], f"is the only image of its prompt, “{shorten(prompt, 60)}”: there is nothing to rank it against"
        )
        for prompt, paths in images.items()
        if len(paths) == 1
    ]
    if not groups:
        raise DataError(
            f"no two of {len(prompts)} images have the same prompt, so none can be ranked: {reasons_of(alone)}"
        )
    return groups, alone


def read_prompt(path: Path) -> str:
    """The prompt in a text file, also in one of AUTOMATIC1111's; DataError, which continues the file's name."""
    text = _read_text(path)
    prompt = prompt_in_infotext(text)
    return _checked(text if prompt is None else prompt)


def _checked(prompt: str) -> str:
    """A prompt without blanks around it, with line feeds between lines; DataError if it cannot be used."""
    prompt = re.sub(r"\r\n?", "\n", prompt).strip().strip("\ufeff\0").strip()
    if not prompt:
        raise DataError("has an empty prompt")
    if len(prompt) > PROMPT_LIMIT:
        raise DataError(f"has a prompt of {len(prompt):,} characters, more than {PROMPT_LIMIT:,}; shorten it")
    if UNDECODED.search(prompt):  # half of a surrogate pair, which JSON allows
        raise DataError("has a prompt that is not valid Unicode; write it again")
    return prompt


def _in_sidecars(images: Sequence[Path]) -> Callable[[Path], str | None]:
    """The prompt in the text file next to an image (`cat.png.txt` goes before `cat.txt`), else in its folder's list."""

    @cache
    def list_of(folder: Path) -> Callable[[Path], str | None]:
        path = next((folder / name for name in METADATA if (folder / name).is_file()), None)
        if path is None:
            return lambda image: None
        try:
            return _in_list(path, images)
        except DataError as error:  # it may be a file of another kind, and text files may be there
            reason = str(error).partition("\n")[0]

        def unreadable(image: Path) -> str | None:
            raise DataError(f"has no text file of its name beside it, and {reason}")

        return unreadable

    def prompt_of(image: Path) -> str | None:
        for name in (f"{image.name}.txt", f"{image.stem}.txt", f"{image.stem}.caption"):
            path = locate(name, image.parent)
            if path is not None and path.is_file():
                try:
                    return read_prompt(path)
                except DataError as error:
                    raise DataError(f"has a prompt file, {path.name}, that {error}") from error
        return list_of(image.parent)(image)

    return prompt_of


def _in_list(path: Path, images: Sequence[Path]) -> Callable[[Path], str | None]:
    """A list of prompts as a function of the image: by its path, or by its name if that is unique.

    Names are for lists from elsewhere, with folders that do not exist here.
    """
    by_path: dict[tuple[str, int], str] = {}
    by_name: dict[str, set[str]] = {}
    rows = _list_rows(path)
    columns = {column for _, row in rows if isinstance(row, dict) for column in row}
    if columns and not (columns & {*IMAGES} and columns & {*PROMPTS}):
        raise DataError(
            f"{path}: no column of images ({', '.join(IMAGES[:3])} ...) or none of prompts ({', '.join(PROMPTS[:4])} "
            f"...); write {EXAMPLE} on each line, or a table with these columns"
        )

    def use(number: int, row: dict[str, Any]) -> None:
        name, prompt = _image_and_prompt(row)
        image = locate(name, path.parent)
        if image is None:
            by_name.setdefault(fold_name(re.split(r"[/\\]", name)[-1]), set()).add(prompt)
        elif by_path.setdefault(file_identity(image), prompt) != prompt:
            raise DataError(f'"{name}" has another prompt in an earlier row')

    errors, count = use_rows(path, rows, use)
    if errors:
        raise unusable(path, errors, count)
    if not rows:
        raise DataError(f"{path}: no prompts in this file; write {EXAMPLE} on each line")
    namesakes = Counter(fold_name(image.name) for image in images)

    def prompt_of(image: Path) -> str | None:
        if (prompt := by_path.get(file_identity(image))) is not None:
            return prompt
        name = fold_name(image.name)
        prompts_of_name = by_name.get(name, set())
        if prompts_of_name and (len(prompts_of_name) > 1 or namesakes[name] > 1):
            raise DataError(f"has the same name as another image in {path}; give its path there")
        return next(iter(prompts_of_name), None)

    return prompt_of


def _list_rows(path: Path) -> list[NumberedRow]:
    """The numbered rows of a list; a JSON object of images and their prompts, or {caption}, has a row for each."""
    rows = list(read_table(path, lambda name: name in (*IMAGES, *PROMPTS)))
    row = rows[0][1] if path.suffix.lower() == ".json" and len(rows) == 1 else None
    if not isinstance(row, dict) or set(row) & {*IMAGES, *PROMPTS}:
        return rows
    entries = {image: cell if isinstance(cell, dict) else {"prompt": cell} for image, cell in row.items()}
    return [(n, {**entry, "image": image}) for n, (image, entry) in enumerate(entries.items(), 1)]


def _image_and_prompt(row: dict[str, Any]) -> tuple[str, str]:
    """The name and the prompt in a row; the prompt may be empty, which the image's error reports."""
    image, prompt = (next((row[name] for name in names if name in row), None) for names in (IMAGES, PROMPTS))
    if not isinstance(image, str) or not isinstance(prompt, str):
        names = [names[0] for names, cell in ((IMAGES, image), (PROMPTS, prompt)) if not isinstance(cell, str)]
        raise DataError(f"{' and '.join(names)} missing or not text")
    if not image.strip():
        raise DataError('"image" is empty')
    return image.strip(), _checked(prompt) if prompt.strip() else ""


def _read_text(path: Path) -> str:
    """The text of a file; DataError, which continues the file's name, if it cannot be read."""
    content = read_file(path, FILE_LIMIT + 1)
    if len(content) > FILE_LIMIT:
        raise DataError(f"has more than {FILE_LIMIT:,} bytes, the most that is read; split it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8; save it as UTF-8") from error
