"""What the tests of several processes run in each of them: `python -m tests.distributed_worker JOBS.json`."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlxpref  # isort: skip  opens the fast BLAS before anything imports MLX

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxpref.cli import main
from mlxpref.company import here, process_group
from mlxpref.config import TrainSettings, settings_from
from mlxpref.demo.preferences import demo_preferences
from mlxpref.distributed import ProcessGroup
from mlxpref.engine.lora import adapter_weights
from mlxpref.training.policy_update import update_policy
from mlxpref.training.rollouts import sample_step
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.sampler import ComparisonSampler
from mlxpref.training.stopwatch import Stopwatch
from mlxpref.training.trainer import Trainer

DEMO: dict[str, Any] = {"data": "demo", "model": "demo", "limit": 24, "max_tokens": 16, "group": 3, "comparisons": 4}


class Recorder:
    """In the optimizer's place: keeps the gradient."""

    state: dict[str, Any] = {}  # noqa: RUF012

    def update(self, model: Any, gradient: Any) -> None:
        """Take a gradient."""
        self.gradient: dict[str, mx.array] = dict(tree_flatten(gradient))


def gradients(machines: ProcessGroup, changes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The gradient of a step with rollouts that are the same for any number of processes, and what it reports."""
    settings = settings_from(TrainSettings, DEMO | {"max_grad_norm": 1e9} | changes)
    trainer = Trainer(mlxpref.load("demo", max_pixels=settings.max_pixels).vlm, demo_preferences("train", 24), settings)
    mx.random.seed(1)  # else the half of a fresh adapter that is zero would hide most of the gradient
    shift = {name: mx.random.normal(w.shape) * 0.05 for name, w in sorted(adapter_weights(trainer.vlm.model).items())}
    trainer.vlm.model.load_weights(list(shift.items()), strict=False)
    groups, _ = sample_step(trainer.vlm, ComparisonSampler(trainer.preferences, settings), 1, settings, {})
    mine = machines.share(len(groups))
    part = replace(groups, prompts=[prompt if i in mine else None for i, prompt in enumerate(groups.prompts)])
    recorder = Recorder()
    learned = update_policy(trainer.vlm, recorder, part, settings, Stopwatch(), machines)  # type: ignore[arg-type]
    found = {name: np.array(value) for name, value in recorder.gradient.items()}
    said = [learned.loss, learned.grad_norm, learned.kl, learned.clip_fraction, learned.mismatch]
    return found | {"learned": np.array(said), "texts": np.array([r.verdict.text for g in groups.rollouts for r in g])}


def trained(folder: str, settings: dict[str, Any], until: int = 0, resume: bool = False) -> None:
    """A run, or a part of it."""
    if resume:
        run = resume_run(Path(folder), {})
    else:
        run = start_run(settings_from(TrainSettings, DEMO | settings), Path(folder))
    assert run
    for report in run.reports():
        if report.step == until:
            break


def drifted(by: float) -> list[str]:
    """What becomes of an adapter that is another one in each process, by a little or by much."""
    machines = here()
    settings = settings_from(TrainSettings, DEMO | {"think": False})
    trainer = Trainer(mlxpref.load("demo").vlm, demo_preferences("train", 8), settings, {}, machines)
    moved = {name: w + machines.rank * by for name, w in adapter_weights(trainer.vlm.model).items()}
    trainer.vlm.model.load_weights(list(moved.items()), strict=False)
    try:
        trainer._keep_equal(7)
    except mlxpref.MlxprefError as error:
        return machines.gathered(str(error))
    return machines.gathered(str(sum(float(w.sum()) for w in adapter_weights(trainer.vlm.model).values())))


def exchanged() -> Any:
    """Every kind of exchange; what each process got."""
    machines = here()
    own = {"a": mx.array([1.0, 2.0]) * (machines.rank + 1), "b": {"c": mx.ones((2, 3), mx.bfloat16)}}
    total = machines.summed(own)
    arrays = {"x": mx.array([1.5, float("nan")]), "n": mx.array(7, mx.uint64), "h": mx.ones((2, 2), mx.bfloat16)}
    first = machines.agreed_arrays(arrays if machines.leads else {})
    return machines.gathered(
        {
            "sum": [total["a"].tolist(), total["b"]["c"].tolist(), str(total["b"]["c"].dtype)],
            "first": {name: [str(value), str(value.dtype)] for name, value in first.items()},
            "gathered": machines.gathered([machines.rank, 0.1, "\ud800é", None]),
            "totals": machines.totals(0.1, machines.rank),
            "agreed": machines.agreed({"of": machines.rank}),
            "sent": machines.sent_bytes > 0,
        }
    )


def do(job: dict[str, Any]) -> None:
    """One job; process 0 writes what comes of it."""
    machines = here()
    what, out = job.pop("do"), Path(job.pop("out", "/dev/null"))
    if what == "gradients":
        found = gradients(machines, job["changes"])
        if machines.leads:
            np.savez(out, **found)
    elif what == "train":
        trained(**job)
    elif what == "command":
        with (out if machines.leads else Path("/dev/null")).open("w") as file, redirect_stdout(file):
            main.main(job["arguments"], standalone_mode=False)
    else:
        found = exchanged() if what == "exchange" else drifted(**job)
        if machines.leads:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    with process_group():
        for each in json.loads(Path(sys.argv[1]).read_text()):
            do(each)
