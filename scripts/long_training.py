"""What grows in ten thousand steps of training: `python -m scripts.long_training`.

The tests' tiny judge learns from tiny pictures, without thinking, in a run's folder, as `mlxpref train` does it. A line
of JSON, every --every steps, has the resident memory, what MLX holds, the seconds of a step since the line before, the
images that ran through the vision tower, and the bytes of the records. The last line is about the report page.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mlxpref.config import TrainSettings, settings_from  # noqa: E402
from mlxpref.report.run_page import RUN_PAGE, write_run_page  # noqa: E402
from mlxpref.training.run import start_run  # noqa: E402
from mlxpref.training.run_folder import LOG, ROLLOUTS, Run  # noqa: E402
from scripts.conversion_memory import GOLDEN, memory  # noqa: E402

_SIDE = 56


@click.command()
@click.option("--steps", default=10_000, show_default=True, help="Steps to train.")
@click.option("--every", default=500, show_default=True, help="Steps between two lines.")
@click.option("--log-every", default=1, show_default=True, help="That of `mlxpref train`.")
@click.option("--preferences", default=5_000, show_default=True, help="Preferences, of a tenth as many pictures.")
def main(steps: int, every: int, log_every: int, preferences: int) -> None:
    """Train, and print a line every few steps."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        values = {
            "data": str(_write_data(folder, preferences)), "model": str(GOLDEN / "qwen2_5_vl"), "think": False,
            "steps": steps, "comparisons": 2, "group": 2, "rank": 2, "held_out": 0.01, "held_out_limit": 10,
            "evaluate_every": every, "save_every": 100, "log_every": log_every,
        }  # fmt: skip
        run = start_run(settings_from(TrainSettings, values), folder / "run")
        started, runs = time.perf_counter(), 0
        for report in run.reports():
            runs += report.vision_runs
            if report.step % every == 0:
                seconds = (time.perf_counter() - started) / every
                print(json.dumps(_line(run, report.step, seconds, runs)), flush=True)
                started, runs = time.perf_counter(), 0
        used = time.process_time()
        write_run_page(run.folder)
        seconds = round(time.process_time() - used, 2)
        print(json.dumps({"page_bytes": (run.folder / RUN_PAGE).stat().st_size, "page_cpu_seconds": seconds}))


def _write_data(folder: Path, preferences: int) -> Path:
    rng, count = np.random.default_rng(0), max(4, preferences // 10)
    (folder / "pictures").mkdir()
    for i in range(count):
        pixels = rng.integers(256, size=(_SIDE, _SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    path = folder / "preferences.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(preferences):
            a, b = (int(number) for number in rng.choice(count, 2, replace=False))
            row = {"prompt": f"picture {i % count}", "a": f"pictures/{a}.png", "b": f"pictures/{b}.png", "p_a": a % 2}
            file.write(json.dumps(row) + "\n")
    return path


def _line(run: Run, step: int, seconds: float, vision_runs: int) -> dict[str, Any]:
    sizes = {name: (run.folder / name).stat().st_size for name in (LOG, ROLLOUTS)}
    return {
        "step": step,
        "resident_megabytes": round(memory("VmRSS") / 1e6, 1),
        "mlx_megabytes": round(mx.get_active_memory() / 1e6, 2),
        "seconds_a_step": round(seconds, 4),
        "vision_runs": vision_runs,
        "bytes": sizes,
    }


if __name__ == "__main__":
    main()
