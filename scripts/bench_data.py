"""How fast a large list of preferences opens, and in how much memory: HPDv2's train.json, made up in its size.

    python scripts/bench_data.py

The list has about as many pairs, images, prompts and bytes as the public one; the images are empty files. A process of
its own opens it, so that the peak is that of opening alone.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

PAIRS, IMAGES, PROMPTS = 645_090, 430_000, 107_000
_WORDS = (
    "a",
    "quiet",
    "red",
    "city",
    "portrait",
    "of",
    "the",
    "small",
    "robot",
    "under",
    "morning",
    "light",
    "painting",
)


@click.command()
@click.option("--pairs", default=PAIRS, show_default=True, help="Pairs of the list; images and prompts in proportion.")
@click.option("--limit", type=int, help="Draw only this many of them.")
@click.option("--opened", type=click.Path(path_type=Path), hidden=True)
def main(pairs: int, limit: int | None, opened: Path | None) -> None:
    """Write the list, open it, and print seconds and the peak of resident memory as JSON."""
    if opened:
        print(json.dumps(_measured(opened, limit)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, pairs)
        arguments = [] if limit is None else ["--limit", str(limit)]
        command = [sys.executable, str(Path(__file__)), "--opened", name, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = {"pairs": pairs, "megabytes": round((folder / "train.json").stat().st_size / 1e6)}
        print(json.dumps(result | json.loads(done.stdout)))


def _write(folder: Path, pairs: int) -> None:
    rng = np.random.default_rng(0)
    images, prompts = max(2, pairs * IMAGES // PAIRS), max(1, pairs * PROMPTS // PAIRS)
    texts = [" ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=13)) + f" {n}" for n in range(prompts)]
    firsts = rng.integers(images - 1, size=pairs)
    with (folder / "train.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for i, first in enumerate(firsts.tolist()):
            row = {
                "prompt": texts[i * prompts // pairs],
                "file_path": [f"{first:08d}.jpg", f"{first + 1:08d}.jpg"],
                "human_preference": [i % 2, 1 - i % 2],
            }
            file.write((", " if i else "") + json.dumps(row))
        file.write("]")
    (folder / "train").mkdir()
    for i in range(images):
        os.close(os.open(folder / "train" / f"{i:08d}.jpg", os.O_CREAT | os.O_WRONLY))


def _measured(folder: Path, limit: int | None) -> dict[str, float]:
    from mlxpref.data.load import load_preferences

    started, used = time.perf_counter(), time.process_time()
    preferences = load_preferences("hpdv2", "train", limit, 0, folder)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "preferences": len(preferences),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used, 2),
        "peak_megabytes": round(peak / 1e6),
    }


if __name__ == "__main__":
    main()
