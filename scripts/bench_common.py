"""What the benchmarks share: pictures and prompts, fair turns, the peer's trainer, and how results are shown.

A benchmark prints a table and, as its last line on stdout, one JSON object; what it is doing goes to stderr. Every
round has pictures of its own, so that nothing a side keeps in memory makes a later round cheaper than the first.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, TypeVar

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mlxpref.cli.output import note, print_table, print_text  # noqa: E402
from mlxpref.demo.briefs import Brief  # noqa: E402
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render  # noqa: E402
from mlxpref.engine.vlm import VLM  # noqa: E402

__all__ = [
    "TEXT",
    "PeerTrainer",
    "Tokens",
    "environment",
    "evaluation_seconds",
    "idle_optimizer",
    "median",
    "naive_inputs",
    "pictures",
    "report",
    "take_turns",
    "watched",
]

M = TypeVar("M")

TEXT = "a red circle"
"""The prompt that pictures are compared for."""
_CONTEXT = 8192


def pictures(count: int, pixels: int, *seed: int) -> list[Image.Image]:
    """Pictures of the demo's shapes, `pixels` along each side; others for every seed."""
    draw = np.random.default_rng(seed)
    looks = _random_looks(list(COLOURS), count, draw)
    return [render(look, draw).resize((pixels, pixels), Image.Resampling.BICUBIC) for look in looks]


def looks_for(brief: Brief, count: int, rng: np.random.Generator) -> list[PictureSpec]:
    """So many contents of pictures for one brief, in the colours that it asks for and one more; of every quality."""
    asked = sorted({each.wanted for each in brief if not each.is_like})
    palette = [*asked, str(rng.choice([colour for colour in COLOURS if colour not in asked]))]
    return _random_looks(palette, count, rng)


def _random_looks(palette: list[str], count: int, rng: np.random.Generator) -> list[PictureSpec]:
    return [
        PictureSpec(*(*rng.choice(palette, len(SHAPES)).tolist(), str(rng.choice(QUALITIES)))) for _ in range(count)
    ]


def naive_inputs(vlm: VLM, processor: Any, shown: Sequence[Image.Image], think: bool) -> dict[str, mx.array]:
    """A comparison as mlx-vlm's own model takes it: the ids of our prompt (1, L), all patches, and the grids."""
    encoded = [processor.image_processor([image]) for image in shown]
    grids = np.concatenate([np.asarray(one["image_grid_thw"]) for one in encoded])
    merge = int(processor.image_processor.merge_size) ** 2
    tokens = vlm.tokenizer.comparison(TEXT, "choice", think)
    first, second = ([vlm.image_token_id] * int(count) for count in grids.prod(axis=1) // merge)
    ids = [*tokens.texts[0], *first, *tokens.texts[1], *second, *tokens.texts[2]]
    patches = mx.array(np.concatenate([np.asarray(one["pixel_values"], np.float32) for one in encoded]))
    inputs = {"input_ids": mx.array([ids]), "pixel_values": patches, "image_grid_thw": mx.array(grids)}
    mx.eval(inputs)
    return inputs


def take_turns(
    sides: Mapping[str, Callable[[int], M]], rounds: Mapping[str, int], what: str
) -> tuple[dict[str, M], dict[str, list[M]]]:
    """Let the sides run in turn: what they measured in round 0, the warm-up, and in their `rounds` rounds after it."""
    warm_up: dict[str, M] = {}
    kept: dict[str, list[M]] = {name: [] for name in sides}
    for number in range(max(rounds.values()) + 1):
        note(f"{what}: " + (f"round {number} of {max(rounds.values())}" if number else "warm-up"))
        for name, run in sides.items():
            if number > rounds[name]:
                continue
            measured = run(number)
            if number:
                kept[name].append(measured)
            else:
                warm_up[name] = measured
    return warm_up, kept


def evaluation_seconds(compute: Callable[[], Any], repeats: int) -> list[float]:
    """The seconds that arrays take to evaluate, so many times after a warm-up."""
    mx.eval(compute())
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        mx.eval(compute())
        taken.append(time.perf_counter() - started)
    return taken


def median(values: Sequence[Any], name: str) -> float:
    """The median of one attribute over repetitions."""
    return float(statistics.median(getattr(value, name) for value in values))


@contextmanager
def watched(module: nn.Module, see: Callable[..., None]) -> Iterator[None]:
    """Let `see` know the arguments of every call of a module."""
    kind: Any = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        see(*args, **kwargs)
        return kind.__call__(self, *args, **kwargs)

    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__call__": call}))
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", kind)


class Tokens:
    """Counts the tokens that run through a layer: all of them, and those in blocks.

    A decoding step is no block: mlx-vlm's has one column, ours comes as (rows, D).
    """

    def __init__(self) -> None:
        self.all = self.in_blocks = 0

    def see(self, states: mx.array) -> None:
        """One call of a norm of the layer."""
        count = states.size // states.shape[-1]
        self.all += count
        self.in_blocks += count if states.ndim == 3 and states.shape[1] > 1 else 0


def idle_optimizer(model: nn.Module) -> optim.Optimizer:
    """AdamW that does all of its work and changes nothing, so that every round has the same weights."""
    optimizer = optim.AdamW(learning_rate=0.0, weight_decay=0.0)
    optimizer.init(model.trainable_parameters())
    return optimizer


class PeerTrainer:
    """mlx-vlm's own GRPO trainer: what its training loop does with a batch of one row, with its own defaults.

    `inputs_of` makes the comparison of a round. The trainer encodes the pictures for every completion that it writes
    and for every one that it trains; `encoded` counts them.
    """

    def __init__(self, model: Any, inputs_of: Callable[[int], dict[str, mx.array]], group: int, tokens: int) -> None:
        from mlx_vlm.trainer.common.utils import apply_gradient_step
        from mlx_vlm.trainer.vlm.grpo.config import GRPOTrainingArgs
        from mlx_vlm.trainer.vlm.grpo.trainer import make_task

        self.model, self.inputs_of, self.encoded = model, inputs_of, 0
        arguments = GRPOTrainingArgs(
            group_size=group,
            max_completion_length=tokens,
            max_seq_length=_CONTEXT,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        )
        endless = SimpleNamespace(eos_token_ids=[], decode=lambda tokens: "", encode=lambda text, **_: [])
        self._task = make_task(model, arguments, endless, reward_funcs=[_reward_by_place])
        self._value_and_grad = self._task.value_and_grad_factory(model, arguments.compile)
        self._apply, self._optimizer = apply_gradient_step, idle_optimizer(model)

    def prepare(self, number: int) -> dict[str, mx.array]:
        """Ids and patches of a round, as its dataset keeps them."""
        mx.random.seed(number)
        inputs = self.inputs_of(number)
        ids = inputs["input_ids"][0]
        return {**inputs, "input_ids": ids, "attention_mask": mx.ones_like(ids)}

    def write(self, prepared: dict[str, mx.array]) -> tuple[dict[str, Any], list[int]]:
        """The completions of a comparison, as the batch that its update takes, and their lengths."""
        row = {"inputs": prepared, "prompt": TEXT, "answer": None}
        with watched(self.model.vision_tower, self._count):
            batch: dict[str, Any] = next(iter(self._task.batches([row], train=True, seed=0)))
        return batch, [sample["batch"]["input_ids"].shape[1] - sample["start"] - 1 for sample in batch["samples"]]

    def update(self, batch: dict[str, Any]) -> None:
        """One step of the optimizer, evaluated as the training loop does."""
        with watched(self.model.vision_tower, self._count):
            loss, _, _ = self._apply(
                self.model, self._optimizer, self._value_and_grad, batch, update=True, accumulation_steps=1
            )
            mx.eval(self.model.state, self._optimizer.state, mx.random.state, loss)

    def gradient(self, prepared: dict[str, mx.array], completions: mx.array, advantages: mx.array) -> Any:
        """The gradient of its objective for completions (G, T) that someone else wrote."""
        ids, samples = prepared["input_ids"], []
        for tokens, advantage in zip(completions, advantages, strict=True):
            whole = mx.concatenate([ids, tokens.astype(ids.dtype)])[None]
            batch = {**prepared, "input_ids": whole, "attention_mask": mx.ones_like(whole)}
            samples.append({"batch": batch, "start": ids.size - 1, "advantage": advantage[None]})
        return self._value_and_grad(self.model, {"samples": samples, "reward_metrics": {}})[1]

    def _count(self, patches: mx.array, grid: mx.array, **_: Any) -> None:
        self.encoded += len(grid)


def _reward_by_place(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(place) for place in range(len(completions))]


def report(
    name: str,
    settings: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    table: tuple[Sequence[str], Sequence[Sequence[object]]],
    remarks: Sequence[str] = (),
) -> None:
    """Print the table and its remarks, then everything as one JSON object on the last line."""
    print_table(*table)
    for remark in remarks:
        print_text(remark)
    print_text(json.dumps({"benchmark": name, **environment(), "settings": dict(settings), "cases": cases}))


def environment() -> dict[str, Any]:
    """What a measurement was made on, and with: `machine` and `versions`."""
    device: Any = mx.device_info()
    return {
        "machine": {
            "device": device.get("device_name"),
            "kind": str(mx.default_device()),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {package: version(package) for package in ("mlx", "mlx-vlm", "mlxpref")}
        | {"python": platform.python_version()},
    }
