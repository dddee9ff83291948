"""Data sets of preferences by name, one reader a file."""

from pathlib import Path

import numpy as np

from mlxpref.datasets.jsonl import EXAMPLE, read_jsonl
from mlxpref.demo.preferences import SPLITS, demo_preferences
from mlxpref.errors import ConfigError
from mlxpref.images import locate
from mlxpref.preferences import Preference

__all__ = ["load_preferences"]

DEMO_COUNTS = {"train": 2000, "test": 400, "heldout": 400}
"""How many preferences of the demo are rendered when no limit is given."""
_NOT_YET = ("imagereward", "hpdv2", "pickapic", "hpdv3")


def load_preferences(data: str, split: str, limit: int | None = None, seed: int = 0) -> list[Preference]:
    """The preferences that `--data` names: `demo`, or a .jsonl file of one's own (see `jsonl.read_jsonl`).

    `demo` has the splits train, test and heldout; `seed` decides what is rendered. A file has the splits that
    its rows name under "split"; if no row does, `split` is ignored. Of a file, `limit` draws that many rows
    at random by `seed`, kept in the file's order, as its first rows are often all of one prompt; a smaller
    limit draws some of those of a larger one. Raises ConfigError for an unknown name or split of the demo,
    DataError for what is wrong in a file.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: it must be at least 1")
    if data == "demo":
        if split not in SPLITS:
            raise ConfigError(f"split {split!r}: the demo has {', '.join(SPLITS)}")
        return demo_preferences(split, DEMO_COUNTS[split] if limit is None else limit, seed)
    preferences = read_jsonl(_file(data), split)
    drawn = np.random.default_rng(seed).permutation(len(preferences))[:limit]
    return [preferences[i] for i in sorted(drawn)]


def _file(data: str) -> Path:
    """The file that `data` names; ConfigError if there is none."""
    if data in _NOT_YET:
        raise ConfigError(f"--data {data}: this data set cannot be read yet; a .jsonl file can, with rows {EXAMPLE}")
    path = locate(data)
    if path is not None and path.suffix.lower() == ".jsonl":
        return path
    known = f"demo, or a .jsonl file with rows {EXAMPLE}"
    if path is not None:
        raise ConfigError(f"--data {data}: not a .jsonl file; known are {known}")
    if Path(data).suffix or len(Path(data).parts) > 1:
        raise ConfigError(f"--data {data}: no such file; known are {known}")
    raise ConfigError(f"unknown --data {data}: known are {known}")
