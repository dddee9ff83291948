"""The curves of cost against work: counts are those of the model that runs; no test asks how fast it is."""

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner
from PIL import Image

from mlxpref.engine.lora import FusedLoRALinear
from scripts.bench_models import decoder_operations, vision_operations
from scripts.memory_check import MODELS, random_judge
from scripts.scaling import main
from scripts.scaling_bounds import Counts, Machine, Work, counted
from scripts.scaling_grpo import PHASES, SMALL, works_of
from scripts.scaling_others import reading_works


def measured(folder: Path, *options: str) -> tuple[dict[str, Any], list[str]]:
    """What a small run writes, and its lines on stdout."""
    files = ["--json", str(folder / "scaling.json"), "--plot", str(folder / "scaling.png")]
    run = CliRunner().invoke(main, [*options, *files], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    return json.loads((folder / "scaling.json").read_text(encoding="utf-8")), run.stdout.splitlines()


def test_a_step_of_grpo(tmp_path: Path) -> None:
    found, lines = measured(tmp_path, "--small", "--only", "grpo")
    points = found["grpo"]["points"]
    assert len(lines) == 2 + len(points)
    assert [(point["group"], point["tokens"]) for point in points if "peer" in point] == [(2, 8), (4, 8)]
    for point in points:
        rows, prompts = point["comparisons"] * point["group"], point["comparisons"] * point["prompt"]
        written, trained = point["written_tokens"], point["trained_tokens"]
        assert point["vision_runs"] == 2 * point["comparisons"]
        assert written == prompts + rows * point["tokens"]
        passes = 3 if point["micro_batch"] < point["group"] else 2  # a prompt whose completions run in parts runs first
        assert trained == passes * prompts + 2 * rows * point["tokens"]
        assert abs(point["planned_peak"] / point["update_peak"] - 1) < 0.25
        step, phases = point["step"], point["phases"]
        assert step["multiply_adds"] == sum(phases[name]["multiply_adds"] for name in PHASES)
        assert all(phase["operations"] > 0 and phase["bound_s"] > 0 for phase in phases.values())
    by_axis = {axis: [p for p in points if axis in p["axes"].split()] for axis in SMALL.axes}
    for axis in ("group", "side", "tokens", "comparisons"):
        first, last = (by_axis[axis][place] for place in (0, -1))
        assert first["step"]["multiply_adds"] < last["step"]["multiply_adds"]
    # Longer rows are not more operations; more tokens are.
    writing = {axis: [point["phases"]["writing"]["operations"] for point in by_axis[axis]] for axis in by_axis}
    assert len(set(writing["side"])) == 1
    assert writing["tokens"][0] < writing["tokens"][-1]
    before = (tmp_path / "scaling.json").read_bytes()
    assert measured(tmp_path, "--table") == (found, lines)
    assert (tmp_path / "scaling.json").read_bytes() == before
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 1000


def test_small_numbers_do_not_replace_real_ones(tmp_path: Path) -> None:
    for options in ([], ["--json", str(tmp_path / "a.json")], ["--plot", str(tmp_path / "a.png")]):
        run = CliRunner().invoke(main, ["--small", *options])
        assert run.exit_code == 2
        assert "give --json and --plot" in run.stderr
    assert not [*tmp_path.iterdir()]


def test_a_ranking(tmp_path: Path) -> None:
    found, lines = measured(tmp_path, "--small", "--only", "rank")
    assert [point["vision_runs"] for point in found["rank"]["points"]] == [4, 8]
    assert [point["comparisons"] for point in found["rank"]["points"]] == [12, 32]
    assert [row["images"] for row in found["rank"]["simulated"]] == [16, 32]
    assert sum(line.startswith("| ") for line in lines) == 6


@pytest.mark.slow
def test_a_conversion(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, "--small", "--only", "convert")
    (row,) = found["convert"]
    assert row["bound_s"] > 0
    assert row["largest_tensor"] < row["bytes"]


def test_counts_agree_with_the_shapes() -> None:
    """A judge of the demo's shape: the same token by token as in blocks, and each kind by hand."""
    model = random_judge(MODELS[0]).model
    counts = Counts(model)
    parts = [counts.tokens(3, 5, 0, 1, 0, 0), counts.tokens(3, 7, 5, 1, 0, 3)]
    whole = counts.tokens(3, 12, 0, 1, 0, 3)
    assert whole.multiply_adds == 3 * decoder_operations(model, 12, heads=1)
    for kind in ("linear", "attention", "head"):
        assert getattr(whole, kind) == sum(getattr(part, kind) for part in parts)
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    assert counts.weights == 3 * layer
    # Of the last layer only keys and values meet more than the last token.
    prompt = counts.prompts(1, 600)
    assert prompt.linear == 600 * 2 * layer + 600 * 2 * 128 * 64 + (layer - 2 * 128 * 64)
    # Two pieces: of 512 tokens that see each other, and of 88 that see all.
    assert prompt.exponentials == 3 * (4 * (512 * 512 + 88 * 600) + 600 * 256) + counts.vocabulary
    assert counts.vision(2, 84).linear == 2 * vision_operations(model, 84)


def test_passes_agree_with_the_graph() -> None:
    """The products that MLX makes of a frozen layer with an adapter, and of attention, forward and backward."""
    layer = FusedLoRALinear(nn.Linear(8, 8, bias=False), 2, 1.0, mx.random.key(0))
    layer.linear.freeze()
    states = mx.random.normal((4, 8))

    def objective(weights: Any, states: mx.array) -> mx.array:
        layer.update(weights)
        return (layer(states) ** 2).sum()

    weights = layer.trainable_parameters()
    value, (by_weights, by_states) = mx.value_and_grad(objective, argnums=(0, 1))(weights, states)
    once = Work(1, 1, linear=1, adapter=2, head=0, attention=2, exponentials=1)
    both = once.passes(1, 1)
    assert products(value, by_states, *by_weights.values()) == both.linear + both.adapter

    queries, keys = mx.random.normal((1, 2, 4, 8)), mx.random.normal((1, 2, 6, 8))

    def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return (mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0) ** 2).sum()

    value, gradients = mx.value_and_grad(attention, argnums=(0, 1, 2))(queries, keys, keys + 1)
    if mx.default_device().type == mx.DeviceType.cpu:  # elsewhere it is one operation
        assert products(value, *gradients) == both.attention


def products(*arrays: mx.array) -> int:
    """The products of matrices in the graph of arrays."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return sum(graph.getvalue().count(f'label ="{kind}"') for kind in ("Matmul", "AddMM"))


def test_operations_are_counted_where_they_are_evaluated() -> None:
    evaluate = mx.eval
    number = mx.array(1.0)
    mx.eval(number)
    with counted() as operations:
        mx.eval({"a": [mx.exp(number)], "b": None})
        assert operations.count == 1
        mx.async_eval(mx.exp(mx.exp(number)), (mx.exp(number),))
        assert operations.count == 4
    assert mx.eval is evaluate


def test_a_ranking_reads_what_is_shared_once() -> None:
    """The work of a ranking of all pairs is the least of `bench_rank`."""
    from scripts.bench_rank import Case, bound_of

    vlm = random_judge(MODELS[0])
    case = Case(pixels=84, think=False, images=5, sample=1, max_tokens=1)
    counts, tokens = Counts(vlm.model), vlm.tokenizer
    works = [counts.vision(5, 84), *reading_works(counts, tokens, 3, 5, len(case.ordered_pairs))]
    start, between, after = map(len, tokens.comparison("a red circle", "choice", False).texts)
    length = start + 2 * 9 + between + after
    naive = 20 * (2 * vision_operations(vlm.model, 84) + decoder_operations(vlm.model, length, heads=1))
    assert naive / sum(work.multiply_adds for work in works) == pytest.approx(bound_of(vlm, vlm.model, case, 0))


def test_the_bound_grows_with_the_work() -> None:
    """Each kind of product has a rate of its own; looking again finds no worse ones."""
    model = random_judge(MODELS[0]).model
    machine, work = Machine(model), works_of(Counts(model), SMALL.middle, 84, 116)["writing"][0]
    machine.look([work])
    rates = dict(machine.rates)
    assert {kind for kind, *_ in rates} == {"linear", "head", "attention"}  # there is no adapter
    machine.look([work])
    assert all(machine.rates[shape] >= rate for shape, rate in rates.items())
    once, twice = (machine.costs(1.0, 10, [work] * count) for count in (1, 2))
    assert twice["multiply_adds"] == 2 * once["multiply_adds"]
    assert twice["bound_s"] == pytest.approx(2 * once["bound_s"], abs=2e-4)  # both are rounded
