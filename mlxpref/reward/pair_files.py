"""Preference pairs as files for other training: bounded memory, the same bytes after a kill, and checksums."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from mlxpref.data.image_stamp import absolute_name, stamp_of
from mlxpref.data.preference_table import random_sides
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import expand, lock, replacing, sha256_of, write_file
from mlxpref.judge.ranking_result import Ranking
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, PackedImage, Preference, image_name
from mlxpref.reward.pair_formats import PARQUET, TIES, FileNames, Format, JpegImages, Row, json_line, row_of, schema_of
from mlxpref.reward.pair_sources import read_source
from mlxpref.reward.pairs import Choose, RankedImages, choose_pairs
from mlxpref.text import counted, first_ten

MANIFEST = "manifest.json"
"""The file of a folder that says what it holds, how it was made, and how far."""
UNREADABLE = "an image cannot be read"
_LOCK = ".lock"
_SHARD_BYTES = 256 << 20
"""A shard ends with the pair that reaches so many bytes of images."""
_GROUP_BYTES = 32 << 20
"""As a row group, which is in memory while it is written or read."""
_NAMED = 10
"""How many unreadable images are named."""


@dataclass
class PairFiles:
    """What `write_pairs` wrote into a folder: the number of pairs, those left out by reason, and the files.

    A file has its `path` from the folder, `sha256`, `bytes` and `pairs`. `unreadable` names the first images that could
    not be read. `done` counts the chosen pairs that were written or left out so far.
    """

    folder: Path
    pairs: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """The JSON of `mlxpref pairs`."""
        names = ("pairs", "left_out", "unreadable", "files")
        return {"output": str(self.folder), **{name: getattr(self, name) for name in names}}


def write_pairs(
    sources: Iterable[str | Path | Ranking] | str | Path | Ranking,
    output: str | Path,
    to: Format,
    *,
    choose: Choose | None = None,
    margin: float | None = None,
    split: str | None = None,
) -> PairFiles:
    """Write preference pairs from rankings, stores and files of preferences into a folder, as `mlxpref pairs`.

    `sources` are files (see `pair_sources.read_source`, also for `split`) or results of `Judge.rank`. `choose` is by
    default "margin" if there is a `margin`, else "best-worst". Which image is a is drawn, the same each time. The same
    call goes on after an interruption, to the same bytes. ConfigError for a folder of other pairs, DataError for
    sources that cannot be read, or without any pair.
    """
    choose = choose or ("best-worst" if margin is None else "margin")
    _check(to, choose, margin)
    is_one = isinstance(sources, str | Path | Ranking) or not isinstance(sources, Iterable)
    several: list[Any] = [sources] if is_one else list(sources)  # type: ignore[arg-type]
    named = [each if isinstance(each, Ranking) else Path(expand(each)) for each in several]  # ConfigError for others
    pairs, left_out = choose_pairs(_items(named, split), choose, margin, to in TIES)
    if not pairs:
        raise DataError(f"no pairs: {_in_words(left_out) or 'the sources are empty'}")
    pairs = random_sides(pairs)
    conditions = {"to": to, "choose": choose, "margin": margin, "split": split, "pairs": _digest(pairs)}
    digests = [{"path": str(each), "sha256": sha256_of(each)} for each in named if isinstance(each, Path)]
    folder = Path(expand(output))
    try:
        with _locked(folder):
            result = _opened(folder, conditions)
            write, is_new = _write_shards if to in PARQUET else _write_lines, not result.complete
            if is_new:
                for leftover in (*folder.glob(".*.pairs.json*"), *folder.glob("data/.*.part")):  # of a killed process
                    leftover.unlink()
                result.left_out = dict(left_out) | result.left_out
                write(result, pairs, to, {"conditions": conditions, "sources": digests})
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); correct that, and give the same again, "
            "which goes on from there"
        ) from error
    if UNREADABLE in result.left_out:
        reasons = first_ten([f"{name} {reason}" for name, reason in result.unreadable.items()], "; ")
        logger.warning(f"{counted(result.left_out[UNREADABLE], 'pair')} left out, as {UNREADABLE}: {reasons}")
    others = {reason: count for reason, count in result.left_out.items() if reason != UNREADABLE}
    done = "written" if is_new else f"in {folder} since an earlier call"
    logger.info(f"{counted(result.pairs, 'pair')} {done}{f'; {_in_words(others)}' if others else ''}")
    return result


def _check(to: Format, choose: Choose, margin: float | None) -> None:
    """ConfigError for what is no choice."""
    for name, value, known in (("to", to, get_args(Format)), ("choose", choose, get_args(Choose))):
        if value not in known:
            raise ConfigError(f"{name} {value!r}: give {', '.join(map(repr, known))}")
    if (choose == "margin") != (margin is not None):
        raise ConfigError("choose 'margin' goes with a margin in nats, and no other choice does")
    if margin is not None and not 0 <= margin < float("inf"):
        raise ConfigError(f"margin {margin!r}: give a number of nats, 0 or more")


def _items(sources: Iterable[Path | Ranking], split: str | None) -> Iterator[RankedImages | Preference]:
    for source in sources:
        if isinstance(source, Ranking):
            yield RankedImages.of_ranking(source)
        else:
            yield from read_source(source, split)


def _in_words(left_out: Counter[str] | dict[str, int]) -> str:
    return "; ".join(f"{counted(count, 'pair')} left out, as {reason}" for reason, count in left_out.items())


def _digest(pairs: Sequence[Preference]) -> str:
    """A digest of all that the files depend on: the pairs, and size and date of each image's file."""
    digest, stamp = hashlib.sha256(), cache(stamp_of)  # a file may be in many pairs

    def named(image: ImageLike) -> list[str]:
        if isinstance(image, Image.Image):
            return [image_name(image)]
        return [absolute_name(image), stamp(image.archive if isinstance(image, PackedImage) else image)]

    for p in pairs:
        digest.update(json.dumps([p.prompt, named(p.a), named(p.b), p.p_people, p.votes, p.group]).encode())
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as file:
        if not lock(file):
            raise ConfigError(f"{folder}: another process writes pairs there; wait for it, or give another --output")
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)


def _opened(folder: Path, conditions: dict[str, Any]) -> PairFiles:
    """How far a folder is; ConfigError for one with other files, or with pairs of other conditions."""
    result, path = PairFiles(folder), folder / MANIFEST
    if path.exists():
        try:
            manifest = json.loads(path.read_bytes())
            changed = [name for name, value in conditions.items() if manifest["conditions"][name] != value]
            result = PairFiles(folder, **manifest["state"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is none of `mlxpref pairs`; give another --output") from error
        if changed:
            what = ", ".join("sources or images" if name == "pairs" else f"--{name}" for name in changed)
            raise ConfigError(f"{folder}: holds pairs of other {what}; give another --output, or remove the folder")
        for number, file in enumerate(result.files):
            name = file["path"] or _shard(number, len(result.files))  # it may have been renamed just before a kill
            written = [each for each in (folder / name, _part(folder, number)) if each.exists()]
            if not written or sha256_of(written[0]) != file["sha256"]:
                raise ConfigError(f"{folder / name}: is gone or has changed; remove the folder, and write anew")
    elif any(not each.name.startswith(".") for each in folder.iterdir()):
        raise ConfigError(f"{folder}: is not an empty folder; give a new one as --output")
    return result


def _save(result: PairFiles, origin: dict[str, Any]) -> None:
    state = asdict(result)
    del state["folder"]
    text = json.dumps(origin | {"state": state}, ensure_ascii=False, indent=1)
    write_file(result.folder / MANIFEST, text.encode(errors="backslashreplace"))


def _rows(result: PairFiles, pairs: Sequence[Preference], to: Format, images: JpegImages | FileNames) -> Iterator[Row]:
    """The rows from where a folder ends; counts them and those with an image that cannot be read."""
    for pair in track(pairs[result.done :], len(pairs) - result.done, "writing pairs"):
        result.done += 1
        try:
            row = row_of(to, pair, images.of)
        except DataError as error:
            result.left_out[UNREADABLE] = result.left_out.get(UNREADABLE, 0) + 1
            name = getattr(error, "name", "an image")
            if len(result.unreadable) < _NAMED:
                result.unreadable[name] = getattr(error, "reason", str(error))
            continue
        result.pairs += 1
        yield row


def _write_shards(result: PairFiles, pairs: Sequence[Preference], to: Format, origin: dict[str, Any]) -> None:
    """Write parquet tables; after each the folder knows how far it is."""
    _save(result, origin)
    (result.folder / "data").mkdir(exist_ok=True)
    rows = _rows(result, pairs, to, JpegImages())
    for first in rows:
        before, part = result.pairs - 1, _part(result.folder, len(result.files))
        with replacing(part) as temporary:
            _write_shard(temporary, chain([first], rows), to)
        size, digest = part.stat().st_size, sha256_of(part)
        result.files.append({"path": "", "sha256": digest, "bytes": size, "pairs": result.pairs - before})
        _save(result, origin)
    _check_any(result)
    for number, file in enumerate(result.files):
        file["path"] = _shard(number, len(result.files))
        with suppress(FileNotFoundError):  # it has its name since an earlier call
            _part(result.folder, number).rename(result.folder / file["path"])
    result.complete = True
    _save(result, origin)


def _part(folder: Path, number: int) -> Path:
    """The name of a table until it is known how many there are; no reader takes it for one."""
    return folder / "data" / f"train-{number:05d}.parquet.part"


def _shard(number: int, count: int) -> str:
    """The name of a table from the folder, by which readers find the split train and its parts."""
    return f"data/train-{number:05d}-of-{count:05d}.parquet"


def _write_shard(path: Path, rows: Iterable[Row], to: Format) -> None:
    """Write rows until the table is large enough; memory holds one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, written, group, size = schema_of(to), 0, list[Row](), 0
    # A JPEG is not made smaller, and no two are alike.
    with pq.ParquetWriter(path, schema, compression="NONE", use_dictionary=False) as writer:
        for row in rows:
            group.append(row)
            images = (
                [row["jpg_0"], row["jpg_1"]] if to == "diffusion-dpo" else [each["bytes"] for each in row["images"]]
            )
            size += sum(map(len, images))
            if size >= _GROUP_BYTES or written + size >= _SHARD_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                written, group, size = written + size, [], 0
            if written >= _SHARD_BYTES:
                break
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _write_lines(result: PairFiles, pairs: Sequence[Preference], to: Format, origin: dict[str, Any]) -> None:
    """Write one file of rows: of JSON lines, or an array of JSON with one row a line, as HPSv3 reads it."""
    _save(result, origin)
    path = result.folder / ("pairs.jsonl" if to == "jsonl" else "pairs.json")
    names = FileNames(path)
    begin, between, end = (b"", b"\n", b"\n") if to == "jsonl" else (b"[\n", b",\n", b"\n]\n")
    with replacing(path) as temporary, temporary.open("wb") as file:
        for row in _rows(result, pairs, to, names):
            for key in ("path1", "path2") if to == "hpsv3" else ():  # its script looks from where it is started
                row[key] = os.path.normpath(names.folder / row[key])
            file.write((between if result.pairs > 1 else begin) + json_line(row))
        file.write(end)
        _check_any(result)
    size, digest = path.stat().st_size, sha256_of(path)
    result.files = [{"path": path.name, "sha256": digest, "bytes": size, "pairs": result.pairs}]
    result.complete = True
    _save(result, origin)


def _check_any(result: PairFiles) -> None:
    """DataError, with the folder as it was, if no pair could be written."""
    if not result.pairs:
        (result.folder / MANIFEST).unlink()
        with suppress(OSError):
            (result.folder / "data").rmdir()
        names = [f"{name} {reason}" for name, reason in result.unreadable.items()]
        raise DataError(f"no pairs: {first_ten(names, '; ')}")
