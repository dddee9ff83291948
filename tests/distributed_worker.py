"""The program of each of several processes in test_distributed.py: `python tests/distributed_worker.py JOBS.json`."""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlxpref  # isort: skip  opens the fast BLAS before anything imports MLX

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlxpref.cli import main
from mlxpref.config import TrainSettings, settings_from
from mlxpref.data import image_cache
from mlxpref.data.images import read_image
from mlxpref.demo.preferences import demo_preferences
from mlxpref.distributed import ProcessGroup, process_group
from mlxpref.engine.lora import adapter_weights
from mlxpref.errors import ImageError
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.trainer import Trainer

DEMO: dict[str, Any] = {"data": "demo", "model": "demo", "limit": 24, "max_tokens": 16, "group": 3, "comparisons": 4}


def shortness(texts: list[str], **other: Any) -> list[float]:
    """A custom reward."""
    return [-len(text) / 100 for text in texts]


class Recorder(optim.SGD):
    """An optimizer that keeps the gradient and changes nothing."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)

    def update(self, model: Any, gradients: Any) -> None:
        """Keep the gradient of the last update."""
        self.gradient: dict[str, mx.array] = dict(tree_flatten(gradients))


def gradients(processes: ProcessGroup, out: str, changes: dict[str, Any]) -> None:
    """Save the gradient of the first step, and what its report says."""
    settings = settings_from(TrainSettings, DEMO | {"max_grad_norm": 1e9} | changes)
    vlm = mlxpref.load("demo", max_pixels=settings.max_pixels).vlm
    trainer = Trainer(vlm, demo_preferences("train", 24), settings, None, processes)
    rng = np.random.default_rng(1)  # half of a fresh adapter is zero, which would hide most of the gradient
    weights = sorted(adapter_weights(vlm.model).items())
    shifted = [(name, mx.array(rng.normal(0, 0.05, weight.shape), weight.dtype)) for name, weight in weights]
    vlm.model.load_weights(shifted, strict=False)
    trainer.optimizer = recorder = Recorder()
    report = next(trainer.steps())
    measured = [report.loss, report.grad_norm, report.kl, report.clip_fraction, report.mismatch]
    if processes.is_main:
        arrays = {name: np.array(value) for name, value in recorder.gradient.items()}
        np.savez(out, measured=np.array(measured), texts=np.array([r.text for r in report.rollouts]), **arrays)


def train(processes: ProcessGroup, folder: str, settings: dict[str, Any], until: int = 0, resume: bool = False) -> None:
    """A run, or a part of it."""
    if resume:
        run = resume_run(Path(folder), {}, processes=processes)
    else:
        run = start_run(settings_from(TrainSettings, DEMO | settings), Path(folder), processes=processes)
    assert run
    for report in run.reports():
        if report.step == until:
            break


def command(processes: ProcessGroup, out: str, arguments: list[str]) -> None:
    """A command, whose output the main process saves."""
    with Path(out if processes.is_main else os.devnull).open("w") as file, redirect_stdout(file):
        main.main(arguments, standalone_mode=False)


def damaged(processes: ProcessGroup, out: str, arguments: list[str], name: str, ranks: list[int]) -> None:
    """A command where some processes cannot read an image whose name ends so."""

    def read(image: Any, *other: Any, **named: Any) -> Any:
        if str(image).endswith(name):
            raise ImageError(str(image), "is damaged here")
        return read_image(image, *other, **named)

    image_cache.read_image = read if processes.rank in ranks else read_image
    try:
        command(processes, out, arguments)
    finally:
        image_cache.read_image = read_image


def drift(processes: ProcessGroup, out: str, by: float) -> None:
    """Save what becomes of adapters that differ between the processes."""
    settings = settings_from(TrainSettings, DEMO | {"think": False, "steps": 1, "save_every": 1, "learning_rate": 1e-9})
    vlm = mlxpref.load("demo").vlm
    trainer = Trainer(vlm, demo_preferences("train", 8), settings, None, processes)
    moved = {name: w + processes.rank * by for name, w in adapter_weights(vlm.model).items()}
    vlm.model.load_weights(list(moved.items()), strict=False)
    try:
        next(trainer.steps())
        result = str(sum(float(w.sum()) for w in adapter_weights(vlm.model).values()))
    except mlxpref.MlxprefError as error:
        result = str(error)
    save(processes, out, processes.all_gather(result))


def exchange(processes: ProcessGroup, out: str) -> None:
    """Save what each process gets from every kind of exchange."""
    own = {"a": mx.array([1.0, 2.0]) * (processes.rank + 1), "b": {"c": mx.ones((2, 3), mx.bfloat16)}}
    total = processes.all_sum(own)
    arrays = {"x": mx.array([1.5, float("nan")]), "n": mx.array(7, mx.uint64), "h": mx.ones((2, 2), mx.bfloat16)}
    main_arrays = processes.broadcast_arrays(arrays if processes.is_main else {})
    results = {
        "sum": [total["a"].tolist(), total["b"]["c"].tolist(), str(total["b"]["c"].dtype)],
        "arrays": {name: [str(value), str(value.dtype)] for name, value in main_arrays.items()},
        "values": processes.all_gather([processes.rank, 0.1, "\ud800é", None]),
        "numbers": processes.all_sum_numbers(0.1, processes.rank),
        "main": processes.broadcast({"of": processes.rank}),
        "sent": processes.sent_bytes > 0,
    }
    save(processes, out, processes.all_gather(results))


def lose(processes: ProcessGroup, out: str) -> None:
    """Save the error of an exchange with a process that has died."""
    if not processes.is_main:
        os._exit(0)
    try:
        processes.all_gather(None)
    except mlxpref.MlxprefError as error:
        save(processes, out, str(error))


def pid(processes: ProcessGroup, folder: str) -> None:
    """Save the number of this process, for who is to kill it."""
    (Path(folder) / f"pid.{processes.rank}").write_text(str(os.getpid()))


def save(processes: ProcessGroup, out: str, result: Any) -> None:
    """Write a result in the main process."""
    if processes.is_main:
        Path(out).write_text(json.dumps(result))


JOBS = {job.__name__: job for job in (gradients, train, command, damaged, drift, exchange, lose, pid)}

if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        JOBS[each.pop("do")](process_group(), **each)
