"""Reads what pairs are made of: the JSON of `mlxpref rank`, a store of comparisons, or any file of preferences."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.find_images import ImageFinder
from mlxpref.data.image_stamp import find_stamped
from mlxpref.data.label_file import TRAIN
from mlxpref.data.preference_table import NoSplitsError, read_preferences
from mlxpref.data.tables import SUFFIXES, read_json_rows
from mlxpref.errors import DataError
from mlxpref.files import read_file
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.store import REMEDY, Names, Store, image_of
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, PackedImage, Preference
from mlxpref.ranking.outcomes import components
from mlxpref.ranking.strength_ranking import names_only_near_ties, rank_images
from mlxpref.reward.pairs import RankedImages
from mlxpref.text import counted
from mlxpref.verdict import Verdict

_SQLITE = b"SQLite format 3\0"
_TABLE = b"prompt,rank,image,strength,"
_RANKING = {"prompt", "images", "pairs", "position_bias"}
"""Keys of the JSON of a ranking, by which it is known."""
_AGAIN = re.compile(r" \(image \d+\)$")
"""Behind the name of a file that was given twice."""
_INSTRUMENTS = 10
"""The most ways of asking one judge that a fit takes."""


def read_source(path: Path, split: str | None = None) -> Iterable[RankedImages | Preference]:
    """The rankings of a file of `mlxpref rank --json` or of a store, or the preferences of a file that `--data` reads.

    Of preferences with splits those of `split`, by default train. Images need not be there. DataError for a file that
    is none of these.
    """
    try:
        head = read_file(path, 4096)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if head.startswith(_SQLITE):
        return _of_store(path)
    if (values := _rankings_in(path, head)) is not None:
        return (_ranked(path, value) for value in values)
    if head.startswith(_TABLE):
        raise DataError(f"{path}: is the table of `rank --csv`, which has ranks and no ties; give the JSON of --json")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: is no JSON of `mlxpref rank --json`, no store, and no file of preferences ({', '.join(SUFFIXES)})"
        )
    try:
        return read_preferences(path, split or TRAIN, ImageFinder(path, needed=False))
    except NoSplitsError as error:
        if split is not None:
            raise
        return error.preferences


def _rankings_in(path: Path, head: bytes) -> Iterable[Any] | None:
    """The rankings in a file of JSON: one, a list of them, or the value of "rankings"; None for another file."""
    values: Iterator[Any] = iter(())
    with suppress(DataError, ValueError, RecursionError):
        match head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
            case b"[":
                values = read_json_rows(path)  # one at a time
            case b"{":
                value = json.loads(read_file(path))
                values = iter(value.get("rankings", [value]))
        first = next(values, None)
        if isinstance(first, dict) and first.keys() >= _RANKING:
            return chain([first], values)
    return None


def _ranked(path: Path, value: Mapping[str, Any]) -> RankedImages:
    """A ranking from its JSON, without images that are gone or have changed since."""
    try:
        found = [(entry, _image(entry, path.parent)) for entry in value["images"]]
        there = [(entry, image) for entry, image in found if image is not None]
        names = [str(entry["path"]) for entry, _ in there]
        strengths = [float(entry["strength"]) for entry, _ in there]
        tied = [entry["tied_with"] for entry, _ in there]
        images = [image for _, image in there]
        errors = [float(entry["stderr"]) for entry, _ in there] if names_only_near_ties(len(found)) else []
        ranking = RankedImages.of(value["prompt"], names, images, strengths, tied, value["group"] or "", errors)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is no JSON of this version's `mlxpref rank`; rank again with --json") from error
    _say_gone(path, [str(entry["path"]) for entry, image in found if image is None])
    return ranking


def _image(entry: Mapping[str, Any], folder: Path) -> Path | PackedImage | None:
    """The image of a ranking's entry: its file, or one of its name and size beside the JSON, if both were moved."""
    file, stamp = str(entry["file"]), str(entry["stamp"])
    beside = str(folder / _AGAIN.sub("", str(entry["path"])))
    return find_stamped(file, stamp) or find_stamped(beside, stamp, is_moved=True)


def _say_gone(path: Path, names: Sequence[str]) -> None:
    if names:
        left = f"{counted(len(names), 'image')} left out: gone, or changed since they were judged, such as {names[0]}"
        logger.warning(f"{path}: {left}")


def _of_store(path: Path) -> Iterator[RankedImages]:
    """The rankings of the judge with the most comparisons in a store, prompt by prompt."""
    try:
        with Store(path) as store:
            if not (asked := store.judges()):
                raise DataError(
                    f"{path}: names no images: an earlier version made it, or a judge of single images. Run the same "
                    "`mlxpref rank` with this --store again, which judges nothing anew, or give the JSON of its --json"
                )
            ways = _ways_of_one_judge(path, asked)
            gone = Counter[str]()
            for prompt, rows in groupby(store.named(ways), key=lambda row: row[0][1]):
                yield from _fitted(prompt, rows, ways, gone)
            _say_gone(path, list(gone))
    except DataError as error:
        raise DataError(str(error).removesuffix(f"; {REMEDY}")) from error


def _ways_of_one_judge(path: Path, asked: Mapping[str, int]) -> list[str]:
    """How the judge with the most comparisons was asked, thinking last, as the scale is that of the last way.

    Each judge and profile is one, as are other criteria; numbers of samples, of tokens and of pixels are ways.
    """
    judges: dict[tuple[str, str], list[str]] = {}
    for text in asked:
        value = json.loads(text)
        if value["form"] == "choice":
            judges.setdefault((value["judge"], value["profile"]), []).append(text)
    sizes = {judge: sum(asked[way] for way in ways) for judge, ways in judges.items()}
    if not sizes:
        raise DataError(f"{path}: holds only scores of images; rank again with this --store")
    names = {judge: json.loads(ways[0])["name"] for judge, ways in judges.items()}
    judge = max(sizes, key=lambda each: (sizes[each], each))
    ways = sorted(judges.pop(judge), key=lambda way: (json.loads(way)["think"], asked[way], way))[-_INSTRUMENTS:]
    thinking = sum(asked[way] for way in ways if json.loads(way)["think"])
    others = ", ".join(f"{names[each]} ({sizes[each]})" for each in judges)
    unused = f"; not used: {others}: to choose one of these, rank with it and a --store of its own" if judges else ""
    logger.info(
        f"{path}: {counted(sizes[judge], 'comparison')} by {names[judge]}, {thinking} of them with thinking{unused}"
    )
    return ways


def _fitted(
    prompt: str, rows: Iterable[tuple[Names, tuple[Verdict, ...]]], ways: Sequence[str], gone: Counter[str]
) -> Iterator[RankedImages]:
    """The rankings of a prompt's images: those that comparisons do not connect are ranked each by themselves.

    An image that is gone helps to rank the others.
    """
    numbers: dict[str, int] = {}
    orders: dict[tuple[int, int, int], list[tuple[Verdict, ...]]] = {}
    for (way, _, *names), verdicts in rows:
        first, second = (numbers.setdefault(name, len(numbers)) for name in names)
        if first != second:
            both = orders.setdefault((min(first, second), max(first, second), ways.index(way)), [(), ()])
            both[first > second] = verdicts
    images = [image_of(name) for name in numbers]
    gone.update(name.partition(" ")[2] for name, image in zip(numbers, images, strict=True) if image is None)
    pairs = {key: PairVerdict(a_first, b_first) for key, (a_first, b_first) in orders.items()}
    readable = {key: verdict for key, verdict in pairs.items() if verdict.is_readable}
    ends = np.array([(a, b) for a, b, _ in readable], np.int64).reshape(-1, 2).T  # (2, K)
    parts = components(len(numbers), *ends)  # (N,)
    verdicts_of: dict[int, dict[tuple[int, int, int], PairVerdict]] = {}
    for key, verdict in readable.items():
        verdicts_of.setdefault(int(parts[key[0]]), {})[key] = verdict
    for own in verdicts_of.values():
        yield _ranked_part(prompt, images, own)


def _ranked_part(
    prompt: str, images: Sequence[ImageLike | None], verdicts: Mapping[tuple[int, int, int], PairVerdict]
) -> RankedImages:
    """The ranking of images by verdicts, each by both numbers and the way of asking; without images that are gone."""
    numbers = sorted({number for a, b, _ in verdicts for number in (a, b)})
    instruments = sorted({way for _, _, way in verdicts})
    places = {number: place for place, number in enumerate(numbers)}
    outcomes = [
        verdict.outcome(places[a], places[b], instruments.index(way)) for (a, b, way), verdict in verdicts.items()
    ]
    ranked = [
        (str(each.index), image, each.strength, each.stderr, map(str, each.tied_with))
        for each in rank_images(len(numbers), outcomes).images
        if (image := images[numbers[each.index]]) is not None
    ]
    names, there, strengths, errors, tied = zip(*ranked, strict=True) if ranked else ((), (), (), (), ())
    errors = errors if names_only_near_ties(len(numbers)) else ()
    return RankedImages.of(prompt, names, there, strengths, tied, errors=errors)
