"""A judge of real size on a GPU, with random weights: `python -m scripts.bench_gpu [--part decode ...] [--quick]`.

The shapes are those of Qwen2.5-VL-7B, or with `--family qwen3_5` of Qwen3.5-4B, the language model in 4 bit (groups of
64), the rest in bfloat16; nothing is downloaded. Words and pictures are the demo judge's. A result is a JSON line on
stderr as soon as it is there, so that a run which is cut short loses nothing; the last line on stdout has all of them.

On CUDA, MLX 0.32.4 compiles its kernels when they are first used, those of quantized products for 40 s each; it keeps
them in $MLX_PTX_CACHE_DIR. So run it twice on a new machine.

`decode`: tokens a second behind one comparison, and the share of the bandwidth at which the device copies memory, of
the bytes that a step must move at least: the weights, all keys and values once, and the states of recurrent layers
there and back. `pieces`: what a decoding step is made of. `rank`: reading pairs of pictures. `step`: a step of GRPO by
its parts, and `peer` the same by mlx-vlm's own trainer on the same weights.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, repeat
from types import SimpleNamespace
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_unflatten  # noqa: E402

from mlxpref.checkpoints import bounds  # noqa: E402
from mlxpref.cli.output import note  # noqa: E402
from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.engine.completion import Sampling  # noqa: E402
from mlxpref.engine.logprobs import Completions  # noqa: E402
from mlxpref.engine.lora import adapter_weights, attach_lora, linear_layers, linear_shape, lora_targets  # noqa: E402
from mlxpref.engine.rollout import roll_out  # noqa: E402
from mlxpref.engine.vlm import VLM, ComparisonInput  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from scripts import bench_decode  # noqa: E402
from scripts.bench_common import TEXT, PeerTrainer, evaluation_seconds, naive_inputs, pictures, report  # noqa: E402
from scripts.bench_gpu_judges import judge_of  # noqa: E402
from scripts.bench_grpo import Case, Ours  # noqa: E402
from scripts.bench_models import family_option  # noqa: E402

_RANK = 16
_TIMES = 5
"""Repetitions of what takes milliseconds."""
_LONG = 10
"""Seconds of decoding that are repeated once only."""
_BLOCK = 256
"""Columns by which keys and values are stored in mlx-lm and mlx-vlm."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything: rows and sides of pictures that are decoded, the side elsewhere; `copied` is in bytes."""

    rows: Sequence[int] = (1, 8, 32, 128)
    pixels: Sequence[int] = (532, 1064)
    side: int = 512
    tokens: int = 256
    group: int = 8
    images: int = 32
    copied: int = 1 << 32
    repeats: int = 2


@dataclass
class Bench:
    """A judge of random weights, what is measured of it, and the rate of a copy in bytes a second."""

    vlm: VLM
    sizes: Sizes
    rate: float = 0.0
    found: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        source = mx.random.uniform(shape=(self.sizes.copied // 4,))
        self.rate = 2 * self.sizes.copied / _typical_seconds(lambda: source + 1)
        self.keep("copy", {"gb_per_s": self.rate / 1e9})

    def keep(self, part: str, line: dict[str, Any]) -> None:
        """Keep a result, and say it at once."""
        short = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in line.items()}
        self.found.append({"part": part} | short)
        note(json.dumps(self.found[-1]))

    def prompt(self, pixels: int) -> ComparisonInput:
        """A comparison of two square pictures, to be thought about."""
        first, second = pictures(2, pixels, 0)
        return self.vlm.input(first, second, TEXT, "choice", think=True)


@contextmanager
def measured(line: dict[str, Any], part: str) -> Iterator[None]:
    """Add the seconds and the peak of what is done meanwhile, which must evaluate its results, to a result."""
    mx.reset_peak_memory()
    started = time.perf_counter()
    yield
    line |= {f"{part}_s": time.perf_counter() - started, f"{part}_peak_gb": mx.get_peak_memory() / 1e9}


def _typical_seconds(compute: Callable[[], Any]) -> float:
    """The median time of an evaluation, the first one left out."""
    return statistics.median(evaluation_seconds(compute, _TIMES))


def decode(bench: Bench) -> None:
    """Tokens a second by rows and the comparison's length; kernels are compiled in the warm-up."""
    for pixels in bench.sizes.pixels:
        prompt = bench.prompt(pixels)
        for rows in bench.sizes.rows:
            bench.keep("decode", _decoding(bench, prompt, rows))


def _decoding(bench: Bench, prompt: ComparisonInput, rows: int) -> dict[str, Any]:
    vlm, tokens, case = bench.vlm, bench.sizes.tokens, bench_decode.Case(rows, 1)
    mx.reset_peak_memory()
    warm_up = bench_decode.write(vlm, [prompt], case, tokens, 0)
    repeats = bench.sizes.repeats if warm_up < _LONG else 1
    seconds = statistics.median(bench_decode.write(vlm, [prompt], case, tokens, 1 + n) for n in range(repeats))
    least = bench_decode.step_bytes(vlm.model, case, len(prompt), tokens)
    return {
        "prompt": len(prompt),
        "rows": rows,
        "copies": bounds.row_copies(len(prompt), tokens, rows),
        "tokens_per_s": rows * tokens / seconds,
        "step_ms": 1e3 * seconds / tokens,
        "warm_up_step_ms": 1e3 * warm_up / tokens,
        "least_gb": least / 1e9,
        "share": least * tokens / seconds / bench.rate,
        "peak_gb": mx.get_peak_memory() / 1e9,
    }


def pieces(bench: Bench) -> None:
    """Milliseconds of a decoding step's parts by themselves, all layers of a kind together.

    `linear`: the layers' matrices, and their share of the copy rate. `head`, and with it the choice of a token.
    `attention`: in the layout of a rollout in its middle, where columns grow from step to step; `same`: where their
    number stays; `own_rows`: a row for each completion, without a mask. `build`: the host describes a step.
    """
    for pixels in bench.sizes.pixels:
        prompt = bench.prompt(pixels)
        for rows in bench.sizes.rows:
            line = {"prompt": len(prompt), "rows": rows}
            bench.keep("pieces", line | _matrices(bench, rows) | _attention(bench, prompt, rows))


def _matrices(bench: Bench, rows: int) -> dict[str, float]:
    vlm, layers = bench.vlm, list(linear_layers(bench.vlm.model).values())
    inputs = {width: _random(rows, width) for width in {linear_shape(layer)[1] for layer in layers}}
    states, uniforms = _random(rows, vlm.language_model.args.hidden_size), mx.random.uniform(shape=(rows, 1))
    weights = sum(part.nbytes for layer in layers for part in layer.parameters().values())

    def choose() -> mx.array:
        cumulative = mx.cumsum(mx.softmax(vlm.head(states), axis=-1), axis=-1)
        return (cumulative < uniforms * cumulative[:, -1:]).sum(axis=-1)

    linear = _typical_seconds(lambda: [layer(inputs[linear_shape(layer)[1]]) for layer in layers])
    return {
        "linear_ms": 1e3 * linear,
        "linear_share": weights / linear / bench.rate,
        "head_ms": 1e3 * _typical_seconds(lambda: vlm.head(states)),
        "head_and_choice_ms": 1e3 * _typical_seconds(choose),
    }


def _attending(vlm: VLM) -> list[Any]:
    """The attention of each layer that has one."""
    return [layer.self_attn for layer in vlm.decoder.layers if "self_attn" in layer]


def _attention(bench: Bench, prompt: ComparisonInput, rows: int) -> dict[str, float]:
    vlm, tokens = bench.vlm, bench.sizes.tokens
    copies = bounds.row_copies(len(prompt), tokens, rows)
    branches = -(-rows // copies)
    middle = len(prompt) + branches * tokens // 2
    own = -(-(len(prompt) + tokens // 2) // _BLOCK) * _BLOCK
    cache, _ = vlm.prefill([prompt])
    cache.begin_branches(np.arange(rows, dtype=np.int32)[None])

    def build() -> float:
        cache.reserve(np.arange(rows, dtype=np.int32)[None])
        started = time.perf_counter()
        logits = vlm.head(vlm.extend(cache, mx.zeros((1, rows), mx.int32), mx.full((1, rows), len(prompt))))
        seconds = time.perf_counter() - started
        mx.eval(logits)
        return seconds

    return {
        "attention_ms": _attention_ms(vlm, copies, branches, count(middle)),
        "attention_same_ms": _attention_ms(vlm, copies, branches, repeat(middle)),
        "attention_own_rows_ms": _attention_ms(vlm, rows, 1, repeat(own)),
        "build_ms": 1e3 * statistics.median(build() for _ in range(_TIMES)),
    }


def _attention_ms(vlm: VLM, rows: int, branches: int, columns: Iterator[int]) -> float:
    """Attention of all layers over so many columns, each time the next; one in ten is hidden where branches share."""
    arguments, attending = vlm.language_model.args, _attending(vlm)
    heads, shared = arguments.num_attention_heads, arguments.num_key_value_heads
    width, first = attending[0].head_dim, next(columns)
    storage = -(-(first + _TIMES + 2) // _BLOCK) * _BLOCK if isinstance(columns, count) else first
    queries = _random(rows, heads, branches, width)
    stored = [_random(rows, shared, storage, width) for _ in range(4)]
    mask = mx.random.uniform(shape=(rows, 1, branches, storage)) < 0.9

    def attend() -> list[mx.array]:
        end = next(columns)
        part = [each[:, :, :end] for each in stored]
        seen = mask[..., :end] if branches > 1 else None
        return [
            mx.fast.scaled_dot_product_attention(
                queries, part[layer % 4], part[(layer + 1) % 4], scale=width**-0.5, mask=seen
            )
            for layer in range(len(attending))
        ]

    return 1e3 * _typical_seconds(attend)


def _random(*shape: int) -> mx.array:
    array = mx.random.normal(shape).astype(mx.bfloat16)
    mx.eval(array)
    return array


def rank(bench: Bench) -> None:
    """Reading: rankings of pictures by default, and, last, all pairs of some in both orders."""
    side, images = bench.sizes.side, bench.sizes.images
    judge = Judge(bench.vlm, JudgeSettings(think=False, max_pixels=side**2), "random")
    for number in range(bench.sizes.repeats + 2):
        every = number > bench.sizes.repeats
        line: dict[str, Any] = {"round": number, "images": images, "all_pairs": every}
        shown = pictures(images, side, 1, number)
        with measured(line, "encode"):
            bench.vlm.features.get_all(shown)
        with measured(line, "judge"):
            if every:
                judge.score(shown, TEXT)
                line["comparisons"] = images * (images - 1)
            else:
                line["comparisons"] = judge.rank(shown, TEXT).comparisons
        line["comparisons_per_s"] = line["comparisons"] / (line["encode_s"] + line["judge_s"])
        bench.keep("rank", line)


def learner(bench: Bench) -> Case:
    """Put an adapter that adds something on the judge; what it learns from."""
    model = bench.vlm.model
    if not adapter_weights(model):
        attach_lora(model, lora_targets(model), _RANK, scale=2.0)
        weights = [(name, weight) for name, weight in adapter_weights(model).items() if name.endswith("lora_b")]
        model.update(tree_unflatten([(name, 0.02 * mx.random.normal(weight.shape)) for name, weight in weights]))
        mx.eval(model.parameters())
    return Case(bench.sizes.side, bench.sizes.tokens, bench.sizes.group)


def step(bench: Bench) -> None:
    """A step of GRPO, by its parts, with the defaults of a training."""
    case, vlm = learner(bench), bench.vlm
    ours = Ours(vlm, case, recompute=True)
    sampling = Sampling(case.group, 1.0, case.tokens, until="end", close=False)
    for number in range(bench.sizes.repeats + 1):
        line: dict[str, Any] = {"round": number, "completion": case.tokens, "group": case.group}
        first, second = case.pictures(number)
        with measured(line, "vision"):
            vlm.features.get_all([first, second])
        prompt = vlm.input(first, second, TEXT, "choice", think=True)
        with measured(line, "prefill"):
            cache, logits = vlm.prefill([prompt])
            mx.eval(logits, cache.arrays)
        with measured(line, "rollout"):
            (group,) = roll_out(vlm, [prompt], sampling, [(0,)], prefill=lambda _, c=cache, x=logits: (c, x))  # type: ignore[misc]
        completions = Completions.of([rollout.tokens for rollout in group])
        with measured(line, "update"):
            ours.update(([prompt], completions))
        bench.keep("step", {"prompt": len(prompt)} | line)


def peer(bench: Bench) -> None:
    """The same step by mlx-vlm's own trainer, after a short one in which kernels are compiled."""
    case, vlm = learner(bench), bench.vlm
    processor = SimpleNamespace(image_processor=vlm.features.processor)

    def inputs_of(number: int) -> dict[str, mx.array]:
        return naive_inputs(vlm, processor, case.pictures(100 + number), think=True)

    for number, (group, tokens) in enumerate([(2, 4), (case.group, case.tokens)]):
        trainer = PeerTrainer(vlm.model, inputs_of, group, tokens)
        line: dict[str, Any] = {"round": number, "completion": tokens, "group": group}
        prepared = trainer.prepare(number)
        with measured(line, "rollout"):
            batch, _ = trainer.write(prepared)
        with measured(line, "update"):
            trainer.update(batch)
        bench.keep("peer", {"prompt": prepared["input_ids"].size} | line)


PARTS: dict[str, Callable[[Bench], None]] = {
    "decode": decode, "rank": rank, "step": step, "pieces": pieces, "peer": peer,
}  # fmt: skip


@click.command()
@family_option
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="What to measure; else all.")
@click.option("--rows", multiple=True, type=int, default=Sizes.rows, show_default=True, help="Rows written together.")
@click.option("--tokens", default=Sizes.tokens, show_default=True, help="Tokens of a completion.")
@click.option("--repeats", default=Sizes.repeats, show_default=True, help="Repetitions, after a warm-up.")
@click.option("--quick", is_flag=True, help="A small model and small cases, once: a test that everything works.")
def main(family: str, parts: Sequence[str], rows: Sequence[int], tokens: int, repeats: int, quick: bool) -> None:
    """Time decoding, ranking and training at real size."""
    sizes = Sizes(rows, tokens=tokens, repeats=repeats)
    if quick:
        sizes = Sizes((1, 4), (84,), 84, 8, 2, 4, 1 << 20, 1)
    name, judge = judge_of(family, quick)
    bench = Bench(judge, sizes)
    for part in parts or PARTS:
        PARTS[part](bench)
    settings = {"model": name, "repeats": sizes.repeats, "dtype": "bfloat16"}
    decoded = [line for line in bench.found if line["part"] == "decode"]
    columns = (">prompt", ">rows", ">tokens/s", ">step ms", ">share %")
    table = [
        [line["prompt"], line["rows"], line["tokens_per_s"], line["step_ms"], f"{100 * line['share']:.1f}"]
        for line in decoded
    ]
    report("gpu", settings, bench.found, (columns, table), [f"share: of {bench.rate / 1e9:.0f} GB/s of a copy"])


if __name__ == "__main__":
    main()
