"""How fast large lists of preferences open, in how much memory, and what `train` does with them before its first step.

    python -m scripts.bench_data
    python -m scripts.bench_data --list hpdv2 --limit 2000

Three lists are made up: HPDv2's train.json in the size of the public one, parquet tables of a million rows with images
in their cells, as Pick-a-Pic's, and a million lines of JSON that name files. All images are one tiny JPEG. A process of
its own opens each, so that the peak is that of one list. The seconds of a bare `json.load` of HPDv2's list say how fast
the machine is.
"""

import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from scripts.several import alone

PAIRS = {"hpdv2": 645_090, "pickapic": 1_000_000, "jsonl": 1_000_000}
"""By the name of a list."""
_IMAGES, _PROMPTS = 2 / 3, 1 / 6
"""Images and prompts for each pair, about as in HPDv2."""
_TABLES, _ROWS = 20, 1000
"""Parquet tables, and rows of a group in one."""
_WORDS = ("quiet", "red", "city", "portrait", "of", "the", "small", "robot", "under", "morning", "light", "painting")


@click.command()
@click.option("--list", "names", type=click.Choice([*PAIRS]), multiple=True, help="Only this list.")
@click.option("--pairs", type=int, help="Pairs of each list; images and prompts in proportion.")
@click.option("--limit", type=int, help="Draw only this many of them.")
def main(names: tuple[str, ...], pairs: int | None, limit: int | None) -> None:
    """Write the lists, open each, and print seconds and peaks of resident memory as lines of JSON."""
    for name in names or PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            written = alone(_WRITERS[name], Path(folder), pairs or PAIRS[name])
            print(json.dumps({"list": name} | written | alone(_measured, name, Path(folder), limit)))


def _rows(pairs: int) -> Iterator[tuple[str, int, int]]:
    """The prompt of each pair, the number of its first image, and who is preferred, 0 or 1."""
    rng = np.random.default_rng(0)
    prompts = max(1, round(_PROMPTS * pairs))
    texts = [" ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=13)) + f" {n}" for n in range(prompts)]
    firsts = rng.integers(_images(pairs) - 1, size=pairs).tolist()
    return ((texts[i * prompts // pairs], first, i % 2) for i, first in enumerate(firsts))


def _images(pairs: int) -> int:
    return max(2, round(_IMAGES * pairs))


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG")
    return file.getvalue()


def _write_images(folder: Path, pairs: int) -> None:
    folder.mkdir()
    for i in range(_images(pairs)):
        (folder / f"{i:08d}.jpg").write_bytes(_jpeg())


def _write_hpdv2(folder: Path, pairs: int) -> dict[str, Any]:
    path = folder / "train.json"
    with path.open("w", encoding="utf-8") as file:
        for i, (prompt, first, label) in enumerate(_rows(pairs)):
            images = [f"{first:08d}.jpg", f"{first + 1:08d}.jpg"]
            row = {"prompt": prompt, "file_path": images, "human_preference": [label, 1 - label]}
            file.write((", " if i else "[") + json.dumps(row))
        file.write("]")
    _write_images(folder / "train", pairs)
    used = time.process_time()
    with path.open(encoding="utf-8") as file:
        json.load(file)
    bare = round(time.process_time() - used, 2)
    return {"pairs": pairs, "megabytes": round(path.stat().st_size / 1e6), "json_load_cpu_seconds": bare}


def _write_jsonl(folder: Path, pairs: int) -> dict[str, Any]:
    path = folder / "mine.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for prompt, first, label in _rows(pairs):
            names = [f"images/{first + i:08d}.jpg" for i in (0, 1)]
            file.write(json.dumps({"prompt": prompt, "a": names[0], "b": names[1], "p_a": label}) + "\n")
    _write_images(folder / "images", pairs)
    return {"pairs": pairs, "megabytes": round(path.stat().st_size / 1e6)}


def _write_pickapic(folder: Path, pairs: int) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    rows, picture = _rows(pairs), _jpeg()
    for table in range(_TABLES):
        columns: dict[str, list[Any]] = {name: [] for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")}
        count = pairs * (table + 1) // _TABLES - pairs * table // _TABLES
        for _, (prompt, first, label) in zip(range(count), rows, strict=False):
            values = (prompt, picture, picture + bytes([first % 256]), float(label), float(1 - label))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        columns |= {"has_label": [True] * count, "ranking_id": [*range(count)], "image_0_uid": columns["caption"]}
        path = folder / "data" / f"train-{table:05d}-of-{_TABLES:05d}-0123456789abcdef.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=_ROWS)
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    return {"pairs": pairs, "megabytes": round(size / 1e6)}


_WRITERS = {"hpdv2": _write_hpdv2, "pickapic": _write_pickapic, "jsonl": _write_jsonl}


def _measured(name: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Seconds of opening and of each step after it, and the peaks."""
    from mlxpref.config import TrainSettings
    from mlxpref.data.image_cache import ImageCache
    from mlxpref.data.learned import digests_of
    from mlxpref.data.load import check_preferences, load_preferences
    from mlxpref.preferences import data_fingerprint
    from mlxpref.training.sampler import ComparisonSampler, held_out_split

    data = {"jsonl": str(folder / "mine.jsonl")}.get(name, name)
    place = None if name == "jsonl" else folder
    started, used = time.perf_counter(), time.process_time()
    preferences = load_preferences(data, "train", limit, 0, place)
    result: dict[str, Any] = {
        "preferences": len(preferences),
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "peak_megabytes": _peak(),
    }
    sampler = ComparisonSampler(preferences, TrainSettings())
    steps: dict[str, Callable[[], Any]] = {
        "check_preferences": partial(check_preferences, data, preferences, ImageCache(512 * 512)),
        "held_out_split": partial(held_out_split, preferences, 0.1, 0),
        "digests_of": partial(digests_of, preferences),
        "data_fingerprint": partial(data_fingerprint, preferences),
        "step": lambda: (sampler.for_step(2), next(sampler.unused(2))),
    }
    for step, work in steps.items():
        used = time.process_time()
        work()
        result[f"{step}_cpu_seconds"] = round(time.process_time() - used, 2)
    return result | {"peak_megabytes_at_last": _peak()}


def _peak() -> int:
    """The largest resident memory so far in megabytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)


if __name__ == "__main__":
    main()
