"""Pick-a-Pic: pairs in parquet tables, with JPEGs in the same rows; tables are never in memory as a whole."""

from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.archives import read_columns
from mlxpref.data.catalog import missing_files
from mlxpref.data.rows import RowErrors, RowSampler, all_rows
from mlxpref.log import logger
from mlxpref.preferences import PackedImage, Preference

_LABELS = ("has_label", "label_0", "label_1")
_IMAGES = ("jpg_0", "jpg_1")


def read_pickapic(
    folder: Path, split: str, draw: RowSampler = all_rows, needs_images: bool = True, name: str = "pickapic"
) -> list[Preference]:
    """The preferences of a split, in a folder of the hub's layout; `test` is `test_unique`, the official one.

    a is image 0, `p_people` is label_0 (1, 0, or 0.5 for a tie), the group is the prompt. Outside the training set it
    takes only rows with a label, as the authors do. It skips missing shards; `draw` chooses among the rows of the
    others. It reads first the labels, then the prompts of the chosen rows, and no images.
    """
    split = "test_unique" if split == "test" else split
    shards = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not shards:
        raise missing_files(name, split, f"there is no {split}-*.parquet in {folder / 'data'}")
    _log_absent(name, split, shards)
    labels = [_labelled(shard, split) for shard in shards]
    chosen_rows = np.asarray(draw(sum(len(rows) for rows, _ in labels)), np.int64)
    preferences, start = [], 0
    prompts: dict[str, str] = {}  # each in memory once
    for shard, (rows, p_people) in zip(shards, labels, strict=True):
        places = chosen_rows[(chosen_rows >= start) & (chosen_rows < start + len(rows))] - start
        start += len(rows)
        captions = read_columns(shard, ("caption",))["caption"] if len(places) else []
        for i in places.tolist():
            row = int(rows[i])
            prompt = captions[row].as_py() or ""
            prompt = prompts.setdefault(prompt, prompt)
            a, b = (PackedImage(shard, f"{row}/{column}") for column in _IMAGES)
            preferences.append(Preference(prompt, a, b, float(p_people[i]), 1, prompt))
    return preferences


def _labelled(shard: Path, split: str) -> tuple[Any, Any]:
    """The numbers (N,) of a shard's rows with a label, and their `p_people` (N,)."""
    columns = read_columns(shard, _LABELS, needed=("caption", *_IMAGES))
    has_label = np.asarray(columns["has_label"].to_numpy(), object) == True  # noqa: E712  null is no label
    first, second = (columns[name].to_numpy().astype(np.float64) for name in ("label_0", "label_1"))
    with np.errstate(invalid="ignore"):
        valid = (first >= 0) & (second >= 0) & (np.abs(first + second - 1) < 1e-6)
    errors = RowErrors(shard)
    for row in np.flatnonzero(has_label & ~valid).tolist():
        errors.add(f"row {row}: label_0 is {first[row]:g} and label_1 {second[row]:g}, not 1 together")
    errors.raise_or_log(len(first))
    rows = np.flatnonzero(valid if split == "train" else valid & has_label)
    return rows, first[rows]


def _log_absent(name: str, split: str, shards: list[Path]) -> None:
    """Log the number of shards if their names tell that there should be more."""
    count = shards[0].stem.partition("-of-")[2].partition("-")[0]
    if count.isdecimal() and len(shards) < int(count):
        logger.warning(
            f"{name}, split {split}: {len(shards)} of {int(count)} files are there; "
            f"`mlxpref data {name} --split {split}` downloads the others"
        )
