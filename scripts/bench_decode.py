"""Decoding, ours beside mlx-vlm's `generate_step` at one row: `python -m scripts.bench_decode [--family qwen3_5]`.

Tokens a second, and the share of what the machine can do: on a CPU, of the rate of one large product of matrices,
measured in the same run; on a GPU, of the bandwidth at which it copies memory. Rows are samples of one comparison, or
that many different comparisons of one length. Random weights, so that all rows are written to the end. Pictures and
prompts are not in what is timed.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, permutations
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
from mlx_vlm.generate import generate_step  # noqa: E402

from mlxpref.engine.branched_cache import BranchedCache  # noqa: E402
from mlxpref.engine.completion import Sampling  # noqa: E402
from mlxpref.engine.lora import linear_layers  # noqa: E402
from mlxpref.engine.rollout import roll_out  # noqa: E402
from mlxpref.engine.vlm import VLM, ComparisonInput  # noqa: E402
from scripts.bench_common import TEXT, evaluation_seconds, naive_inputs, pictures, report, take_turns  # noqa: E402
from scripts.bench_models import (  # noqa: E402
    decoder_operations,
    family_option,
    give_random_weights,
    load_both,
    pixels_of_a_token,
)

_TOKENS = 12
"""Tokens along the sides of the pictures."""
_IMAGES = 7
"""Pictures, of whose ordered pairs the comparisons are."""
_SIDE = 2048
"""Rows and columns of the matrices whose product is the measure of a CPU."""
_COPIED = 1 << 28
"""Bytes whose copy is the measure of a GPU."""
_PEER = "mlx-vlm, 1 row"


@dataclass(frozen=True)
class Case:
    """Rows that are written together, and of how many comparisons they are samples."""

    rows: int
    comparisons: int

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.comparisons}"


def write(vlm: VLM, prompts: Sequence[ComparisonInput], case: Case, tokens: int, number: int) -> float:
    """The seconds that `tokens` tokens a row take behind their prompts, in a round."""
    started = 0.0

    def prefill(prompts: Sequence[ComparisonInput]) -> tuple[BranchedCache, mx.array]:
        nonlocal started
        cache, logits = vlm.prefill(prompts)
        mx.eval(logits, cache.arrays)
        started = time.perf_counter()
        return cache, logits

    sampling = Sampling(case.rows // case.comparisons, 1.0, tokens, number, until="end", close=False)
    keys = [(place,) for place in range(case.comparisons)]
    groups = roll_out(vlm, prompts[: case.comparisons], sampling, keys, prefill=prefill)
    seconds = time.perf_counter() - started
    if {len(rollout.tokens) for group in groups for rollout in group} != {tokens}:
        raise RuntimeError(f"not all completions have {tokens} tokens")
    return seconds


def write_alone(model: Any, inputs: Mapping[str, mx.array], tokens: int) -> float:
    """The seconds that mlx-vlm takes for `tokens` tokens behind the first one."""
    mx.random.seed(0)
    steps = generate_step(
        inputs["input_ids"],
        model,
        inputs["pixel_values"],
        None,
        image_grid_thw=inputs["image_grid_thw"],
        max_tokens=tokens + 1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    next(steps)
    started = time.perf_counter()
    if len(list(islice(steps, tokens))) != tokens:
        raise RuntimeError("mlx-vlm wrote too few tokens")
    return time.perf_counter() - started


def operations_rate(repeats: int = 5) -> float:
    """Operations a second of one large product of matrices in float32."""
    left, right = (mx.random.normal((_SIDE, _SIDE), key=mx.random.key(i)) for i in range(2))
    return 2 * _SIDE**3 / statistics.median(evaluation_seconds(lambda: left @ right, repeats))


def bandwidth(repeats: int = 5) -> float:
    """Bytes a second that a copy reads and writes."""
    source = mx.zeros(_COPIED // 4)
    return 2 * _COPIED / statistics.median(evaluation_seconds(lambda: source + 1, repeats))


def step_operations(model: Any, case: Case, prompt: int, tokens: int) -> float:
    """Operations of writing one token in every row, on average: two for a multiply-add."""
    return 2 * case.rows * decoder_operations(model, tokens, before=prompt, heads=tokens) / tokens


def step_bytes(model: Any, case: Case, prompt: int, tokens: int) -> float:
    """Bytes that writing one token in every row must read or write.

    Weights once, each prompt's keys and values once; the states of recurrent layers in every row, there and back.
    """
    language = model.language_model
    arguments, embedding = language.args, language.model.embed_tokens
    head = embedding if arguments.tie_word_embeddings else language.lm_head
    weights = sum(
        part.nbytes for layer in [*linear_layers(model).values(), head] for part in layer.parameters().values()
    )
    itemsize, column, state = embedding(mx.array([0])).itemsize, 0, 0
    for layer in language.model.layers:
        if "self_attn" in layer:
            column += 2 * arguments.num_key_value_heads * layer.self_attn.head_dim * itemsize
        else:
            mixer = layer.linear_attn
            state += 4 * mixer.num_v_heads * mixer.head_v_dim * mixer.head_k_dim  # in float32
    return float(weights + column * (case.comparisons * prompt + case.rows * tokens / 2) + 2 * state * case.rows)


@click.command()
@family_option
@click.option("--rows", multiple=True, default=(1, 8, 32), show_default=True, help="Rows written together.")
@click.option("--pixels", type=int, help=f"Sides of the pictures; else those of {_TOKENS} tokens.")
@click.option("--tokens", default=64, show_default=True, help="Tokens that are written in every row.")
@click.option("--repeats", default=5, show_default=True, help="Repetitions, of which the medians are taken.")
@click.option("--quick", is_flag=True, help="Two small cases, once: a test that everything works.")
def main(family: str, rows: Sequence[int], pixels: int | None, tokens: int, repeats: int, quick: bool) -> None:
    """Time decoding, ours and mlx-vlm's, in turn."""
    if quick:
        rows, tokens, repeats = (1, 2), 8, 1
    cases = list(dict.fromkeys(Case(count, each) for count in rows for each in (1, count)))
    with tempfile.TemporaryDirectory() as folder:
        vlm, model, processor = load_both(Path(folder), family)
        pixels = pixels or (3 if quick else _TOKENS) * pixels_of_a_token(model)
        give_random_weights(vlm, model)
        shown = list(permutations(pictures(_IMAGES, pixels, 0), 2))[: max(rows)]
        if len(shown) < max(rows):
            raise click.UsageError(f"at most {_IMAGES * (_IMAGES - 1)} rows")
        prompts = [vlm.input(first, second, TEXT, "choice", think=True) for first, second in shown]
        inputs = naive_inputs(vlm, processor, shown[0], think=True)
        runs: dict[str, Callable[[int], float]] = {_PEER: lambda _: write_alone(model, inputs, tokens)}
        for case in cases:
            runs[str(case)] = partial(write, vlm, prompts, case, tokens)
        _, kept = take_turns(runs, dict.fromkeys(runs, repeats), f"{tokens} tokens")
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    limit, needed = (operations_rate(), step_operations) if on_cpu else (bandwidth(), step_bytes)
    seconds = {name: statistics.median(values) for name, values in kept.items()}
    length = len(prompts[0])
    found = [
        {
            "rows": case.rows,
            "comparisons": case.comparisons,
            "tokens_per_s": round(case.rows * tokens / seconds[str(case)], 1),
            "share": round(needed(model, case, length, tokens) * tokens / seconds[str(case)] / limit, 4),
            "peer_tokens_per_s": round(tokens / seconds[_PEER], 1),
        }
        for case in cases
    ]
    unit = "GFLOP/s of a product of matrices" if on_cpu else "GB/s of a copy"
    columns = (">rows", ">comparisons", ">tokens/s", ">a row", ">share %", ">x mlx-vlm at 1 row")
    table = [
        [one["rows"], one["comparisons"], one["tokens_per_s"], f"{one['tokens_per_s'] / one['rows']:.1f}",
         f"{100 * one['share']:.1f}", f"{one['tokens_per_s'] / one['peer_tokens_per_s']:.2f}"]
        for one in found
    ]  # fmt: skip
    remarks = [
        f"prompts of {length} tokens, {tokens} written; mlx-vlm at 1 row: {tokens / seconds[_PEER]:.1f} tokens/s",
        f"share: of {limit / 1e9:.1f} {unit}",
    ]
    settings = {"family": family, "prompt_tokens": length, "tokens": tokens, "repeats": repeats, "limit": limit,
                "limit_of": unit, "dtype": "float32"}  # fmt: skip
    report("decode", settings, found, (columns, table), remarks)


if __name__ == "__main__":
    main()
