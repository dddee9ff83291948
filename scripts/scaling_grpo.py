"""A step of GRPO against what it is made of, one at a time from a middle setting: for `scripts.scaling`.

A judge of 13 million parameters with random weights, so that products of matrices matter, with the defaults of a
training. The peer is mlx-vlm's own trainer on the same model, where it can run: one pair of pictures, one sequence at a
time. Peaks are above what is in memory before: weights, adapter and optimizer.
"""

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxpref.checkpoints import bounds  # noqa: E402
from mlxpref.checkpoints.memory import ModelSize, training_plan  # noqa: E402
from mlxpref.cli.output import note  # noqa: E402
from mlxpref.config import TrainSettings  # noqa: E402
from mlxpref.engine.branched_cache import BranchedCache  # noqa: E402
from mlxpref.engine.lora import adapter_weights  # noqa: E402
from mlxpref.engine.vlm import VLM, ComparisonInput  # noqa: E402
from mlxpref.training.gradients import reference_scores  # noqa: E402
from scripts import bench_decode  # noqa: E402
from scripts.bench_common import TEXT, PeerTrainer, Tokens, naive_inputs, watched  # noqa: E402
from scripts.bench_grpo import Case, Ours  # noqa: E402
from scripts.bench_models import attach_equal_adapters, pixels_of_a_token  # noqa: E402
from scripts.memory_check import MODELS, Model, random_judge  # noqa: E402
from scripts.scaling_bounds import Counts, Machine, Operations, Work, counted  # noqa: E402

__all__ = ["LARGE", "PHASES", "SMALL", "Sizes", "grpo_points", "works_of"]

PHASES = ("vision", "prompt", "writing", "update")
"""The parts of a step, in their order; scoring, which a step has with `--kl` only, stands beside it."""
Row = dict[str, Any]
_RANK = 16
_SECONDS = 5.0
"""A point is measured again until it took so long, `Sizes.repeats` times at the most."""
_JUDGE = Model(
    "13 M",
    {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
     "num_key_value_heads": 2, "vocab_size": 8192},
    {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "fullatt_block_indexes": [3]},
)  # fmt: skip
"""Of the tower's four blocks one sees all patches, as few of Qwen2.5-VL's do; the others see windows."""


@dataclass(frozen=True)
class Point:
    """A setting: tokens along the sides of both pictures, and what else a step is made of."""

    side: int
    group: int
    tokens: int
    comparisons: int = 1
    micro_batch: int = 16
    recompute: bool = True


@dataclass(frozen=True)
class Sizes:
    """The middle setting, the values of each axis, the points that the peer runs, and how often a point is measured."""

    model: Model
    middle: Point
    axes: Mapping[str, Sequence[int]]
    peer: Mapping[str, Sequence[int]]
    repeats: int

    def points(self) -> Iterator[tuple[str, Point]]:
        """Every point once, with the axes that it is on."""
        found: dict[Point, list[str]] = {}
        for axis, values in self.axes.items():
            for value in values:
                change: dict[str, Any] = {axis: value}
                found.setdefault(replace(self.middle, **change), []).append(axis)
        for point, axes in found.items():
            yield " ".join(axes), point

    def has_peer(self, point: Point) -> bool:
        """Whether the peer runs at a point."""
        others = [axis for axis in self.axes if getattr(point, axis) != getattr(self.middle, axis)]
        return all(getattr(point, axis) in self.peer.get(axis, ()) for axis in others)


LARGE = Sizes(
    _JUDGE,
    Point(side=10, group=8, tokens=64),
    {"group": (2, 8, 16, 32, 64), "side": (10, 17, 24, 38), "tokens": (32, 64, 128, 256, 512),
     "comparisons": (1, 4, 8), "micro_batch": (1, 16), "recompute": (False, True)},
    {"group": (2, 16), "side": (17, 24), "tokens": (32, 128)},
    3,
)  # fmt: skip
SMALL = Sizes(
    MODELS[0],
    Point(side=3, group=2, tokens=8),
    {"group": (2, 4), "side": (3, 4), "tokens": (8, 16), "comparisons": (1, 2), "micro_batch": (1, 16)},
    {"group": (4,)},
    1,
)


@dataclass(frozen=True)
class Step:
    """What a step took: seconds and operations by phase, tokens computed, and peaks in bytes."""

    seconds: Mapping[str, float]
    operations: Mapping[str, int]
    vision_runs: int
    written_tokens: int
    trained_tokens: int
    rollout_peak: int
    update_peak: int

    @property
    def step_s(self) -> float:
        """The whole step."""
        return sum(self.seconds[name] for name in PHASES)


@dataclass(frozen=True)
class Measured:
    """A point: what was found, and by phase its seconds, operations and work."""

    found: Row
    seconds: Mapping[str, float]
    operations: Mapping[str, int]
    works: Mapping[str, Sequence[Work]]

    def row(self, machine: Machine) -> Row:
        """What was found, with the costs of the phases and of the step by what the machine reached."""
        phases = {
            name: machine.costs(self.seconds[name], self.operations[name], works) for name, works in self.works.items()
        }
        step = {key: round(sum(phases[name][key] for name in PHASES), 4) for key in phases["update"]}
        written_s = round(self.found["written_bytes"] / machine.copied_a_second, 4)
        return {**self.found, "written_bytes_s": written_s, "step": step, "phases": phases}


class Bench:
    """A judge with an adapter, and what the machine reaches with it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.vlm = sizes, random_judge(sizes.model)
        self.weights = _bytes_of(dict(tree_flatten(self.vlm.model.parameters())))
        attach_equal_adapters(self.vlm, self.vlm.model, _RANK)
        self.counts, self.machine = Counts(self.vlm.model), Machine(self.vlm.model)

    def measure(self, point: Point) -> "Measured":
        """One point: the medians of its steps, what was counted, and what was planned."""
        pixels = point.side * pixels_of_a_token(self.vlm.model)
        case = Case(pixels, point.tokens, point.group, point.comparisons)
        ours = Ours(self.vlm, case, recompute=point.recompute, micro_batch=point.micro_batch, max_pixels=pixels**2)
        first, second, *_ = case.pictures(0)
        prompt = len(self.vlm.input(first, second, TEXT, "choice", think=True))
        works = works_of(self.counts, point, pixels, prompt)
        warm_up, steps = _step(ours, 0), list[Step]()
        while len(steps) < self.sizes.repeats and sum(step.step_s for step in steps) < _SECONDS:
            steps.append(_step(ours, 1 + len(steps), count=False))
        self.machine.look(work for each in works.values() for work in each)
        decoding = bench_decode.Case(point.comparisons * point.group, point.comparisons)
        size = ModelSize.from_config(self.sizes.model.config(), self.weights, 4, pixels**2)
        plan = training_plan(size, ours.settings, point.comparisons, text=prompt - 2 * point.side**2)
        found = {
            "prompt": prompt,
            "written_bytes": bench_decode.step_bytes(self.vlm.model, decoding, prompt, point.tokens) * point.tokens,
            "vision_runs": warm_up.vision_runs,
            "written_tokens": warm_up.written_tokens,
            "trained_tokens": warm_up.trained_tokens,
            "update_peak": int(statistics.median(step.update_peak for step in steps)),
            "rollout_peak": int(statistics.median(step.rollout_peak for step in steps)),
            "planned_peak": plan.peak - plan.weights - 3 * _bytes_of(adapter_weights(self.vlm.model)),
            "repeats": len(steps),
        }
        seconds = {name: statistics.median(step.seconds[name] for step in steps) for name in works}
        return Measured(found, seconds, warm_up.operations, works)

    def peer(self, point: Point) -> Row:
        """The same step by mlx-vlm's trainer, once."""
        pixels = point.side * pixels_of_a_token(self.vlm.model)
        case = Case(pixels, point.tokens, point.group)
        processor = SimpleNamespace(image_processor=self.vlm.features.processor)

        def inputs_of(number: int) -> dict[str, mx.array]:
            return naive_inputs(self.vlm, processor, case.pictures(number), think=True)

        trainer = PeerTrainer(self.vlm.model, inputs_of, point.group, point.tokens)
        prepared, before = trainer.prepare(1), _in_memory(self.vlm)
        started = time.perf_counter()
        batch, _ = trainer.write(prepared)
        written = time.perf_counter()
        mx.reset_peak_memory()
        trainer.update(batch)
        ended = time.perf_counter()
        return {
            "step_s": round(ended - started, 4),
            "update_s": round(ended - written, 4),
            "update_peak": int(mx.get_peak_memory()) - before,
        }


def works_of(counts: Counts, point: Point, pixels: int, prompt: int) -> dict[str, list[Work]]:
    """The work of each phase of a step, and of scoring."""
    rows, tokens = point.comparisons * point.group, point.tokens
    together = min(point.comparisons, max(1, TrainSettings().rows // point.group))
    branches = -(-point.group // bounds.row_copies(prompt, tokens, point.group))
    seen = prompt + branches * (tokens + 1) / 2
    writing = counts.tokens(rows, tokens, prompt, together * point.group, seen, heads=rows * tokens)
    in_parts, again = point.group > point.micro_batch, int(point.recompute)
    batch = min(rows, point.micro_batch if in_parts else point.micro_batch // point.group * point.group)
    columns = min(tokens, bounds.piece_columns(batch))
    scored = counts.tokens(rows, tokens, prompt, batch * columns, prompt + (tokens + columns) / 2, rows * tokens)
    trained = replace(scored, head=scored.head * 3 / (2 + again))  # the head is always computed again backwards
    prompts = [replace(counts.prompts(1, prompt), head=0)] * point.comparisons
    return {
        "vision": [counts.vision(2 * point.comparisons, pixels)],
        "prompt": [counts.prompts(together, prompt)] * (point.comparisons // together),
        "writing": [writing],
        "update": [*(each.passes(1 + again + in_parts, 1) for each in prompts), trained.passes(1 + again, 1)],
        "scoring": [*prompts, scored],
    }


def _step(ours: Ours, number: int, count: bool = True) -> Step:
    """One step in a round; its pictures and what they become are in memory only while it runs.

    To `count` operations takes time.
    """
    pictures, runs, before = ours.prepare(number), ours.encoded, _in_memory(ours.vlm)
    clock = _Clock()
    norm = ours.model.language_model.model.layers[0].input_layernorm
    written, trained = Tokens(), Tokens()

    def prefill(prompts: Sequence[ComparisonInput]) -> tuple[BranchedCache, mx.array]:
        clock.end("writing")
        cache, logits = ours.vlm.prefill(prompts)
        mx.eval(logits, cache.arrays)
        clock.end("prompt")
        return cache, logits

    with counted() if count else nullcontext(clock.operations) as clock.operations:
        clock.end("setting up")
        ours.vlm.features.get_all(pictures)
        clock.end("vision")
        with watched(norm, written.see):
            completions, lengths = ours.write(pictures, prefill)
        clock.end("writing")
        rollout_peak = int(mx.get_peak_memory())
        mx.reset_peak_memory()
        with watched(norm, trained.see):
            ours.update(completions)
        clock.end("update")
        update_peak = int(mx.get_peak_memory())
        reference_scores(ours.vlm, ours.inputs(*completions), ours.settings)
        clock.end("scoring")
    if set(lengths) != {ours.case.tokens}:
        raise RuntimeError(f"completions of {sorted(set(lengths))} tokens instead of {ours.case.tokens}")
    return Step(
        clock.seconds,
        clock.counts,
        ours.encoded - runs,
        written.all,
        trained.all,
        rollout_peak - before,
        update_peak - before,
    )


class _Clock:
    """Seconds and operations by phase: those since the last end of one."""

    def __init__(self) -> None:
        self.operations = Operations()
        self.seconds, self.counts = defaultdict[str, float](float), defaultdict[str, int](int)
        self._then, self._before = time.perf_counter(), 0

    def end(self, phase: str) -> None:
        """A phase, or a part of it, ends."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._then
        self.counts[phase] += self.operations.count - self._before
        self._then, self._before = time.perf_counter(), self.operations.count


def _in_memory(vlm: VLM) -> int:
    """Bytes in memory without features of pictures; the peak begins anew."""
    vlm.features.limit(bounds.FEATURE_BYTES)
    gc.collect()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())


def _bytes_of(arrays: Mapping[str, mx.array]) -> int:
    return sum(int(array.nbytes) for array in arrays.values())


def grpo_points(sizes: Sizes) -> dict[str, Any]:
    """All points, and what the machine reached."""
    bench, found = Bench(sizes), list[tuple[Row, Measured]]()
    for axes, point in sizes.points():
        measured = bench.measure(point)
        row = {"axes": axes} | vars(point)
        if sizes.has_peer(point):
            row["peer"] = bench.peer(point)
        found.append((row, measured))
        step = measured.row(bench.machine)["step"]
        note(f"GRPO: {point}: {step['seconds']:.2f} s, bound {step['bound_s']:.2f} s")
    return {
        "judge": sizes.model.name,
        "points": [row | measured.row(bench.machine) for row, measured in found],
        "machine": bench.machine.to_json(),
    }
