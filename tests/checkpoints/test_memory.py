"""The memory plan: what the engine goes by, what MLX measures, and what more of anything takes."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.checkpoints import memory
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import ModelSize, Plan, judging_plan, training_plan
from mlxpref.checkpoints.model_shapes import Quantization, shapes_from
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.engine import decoder as trunk
from mlxpref.engine import image_features as features
from mlxpref.engine import kv_cache as prefix
from mlxpref.engine import logprobs as scoring
from mlxpref.engine import prefix_cache as tree
from mlxpref.engine import rollout
from mlxpref.engine.logprobs import Completions
from mlxpref.engine.lora import attach_lora, linear_layers
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.judge import judge
from mlxpref.training.gradients import policy_gradient
from mlxpref.training.loss import LossInputs
from scripts.memory_check import MODELS, RUNS, Run, measure
from scripts.memory_table import JUDGES, LADDERS, main
from tests.conftest import FAMILIES, GOLDEN, picture

GB = 10**9
IMAGES = 100


def real(name: str, bits: int = 4) -> ModelSize:
    shapes = replace(JUDGES[name], quantization=Quantization(bits, 64))
    return ModelSize(shapes, shapes.weight_bytes(2), 2)


CHECKPOINTS = [real("3B"), real("32B", 8)]
for family in FAMILIES:
    tiny = shapes_from(Checkpoint.open(GOLDEN / family).config)
    CHECKPOINTS.append(ModelSize(tiny, tiny.weight_bytes(4), 4))


# The engine


def test_the_plan_goes_by_the_numbers_of_the_engine() -> None:
    assert (memory._TOGETHER, memory._LEAST, memory._MOST) == (trunk._TOGETHER, trunk._LEAST, trunk._MOST)
    assert memory._HEAD_VALUES == scoring._HEAD_VALUES
    assert (memory._BATCH_TOKENS, memory._FEATURES) == (features._BATCH_TOKENS, features._MEMORY)
    assert (memory._TREE, memory._PREFILL_TOKENS) == (tree._MEMORY, judge._PREFILL_TOKENS)
    assert memory._ANSWER_TOKENS == rollout._ANSWER_TOKENS


def test_a_cache_grows_by_what_the_plan_takes() -> None:
    """Storage grows when a run of steps does not fit: by that run, and by room for three more."""
    assert memory._GROWTH == (1 + prefix._AHEAD) * rollout._STEPS
    rows = prefix.BranchedKVCache(1)
    rows.announce(np.full((1, 100), prefix.SHARED, np.int32))
    rows.layers[0].update_and_fetch(*[mx.zeros((1, 1, 100, 4))] * 2)
    sizes = []
    for _ in range(64 // rollout._STEPS):
        rows.announce(np.array([[0, 1, 2]], np.int32), rollout._STEPS)
        for _ in range(rollout._STEPS):
            rows.layers[0].update_and_fetch(*[mx.zeros((1, 1, 3, 4))] * 2)
        assert rows.layers[0].keys is not None
        sizes.append(rows.layers[0].keys.shape[2])
    assert sizes == [100 + 3 * memory._GROWTH] * 4 + [100 + 6 * memory._GROWTH] * 4


@given(st.integers(1, 4000), st.integers(1, 2000), st.integers(1, 64))
def test_prompts_are_copied_as_often_as_planned(prompt: int, completion: int, samples: int) -> None:
    """Rows of a comparison while completions are written, as the engine makes them."""
    model = CHECKPOINTS[0]
    found, _ = memory._Work(model).writing(1, prompt, samples, completion)
    copies = rollout.copies_of(prompt, completion, samples)
    branches = max(len(range(samples)[i::copies]) for i in range(copies))
    grown = -(-completion // memory._GROWTH) * memory._GROWTH
    one = 2 * model.shapes.layers * model.shapes.key_width * 2
    least = copies * (prompt + branches * completion) * one
    assert least <= found <= copies * (prompt + branches * grown) * one * (1 + 0.5 / model.shapes.layers)


# What MLX measures


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.pixels}: {run.name}")
def test_the_plan_is_within_15_percent_of_the_peak(run: Run) -> None:
    ((_, found),) = measure(MODELS[0], (run,))
    assert abs(found.error) < 0.15, f"planned {found.plan.peak / 1e6:.1f} MB, measured {found.peak / 1e6:.1f} MB"


def test_measuring_leaves_nothing_behind() -> None:
    """What is still there of one run would be missing from the peak of the next."""
    left = []
    for _ in measure(MODELS[0], (RUNS[6], RUNS[6])):
        gc.collect()
        left.append(mx.get_active_memory())
    assert left[1] - left[0] < 300_000
    gc.collect()
    assert left[1] - mx.get_active_memory() < 300_000  # the weights take 3 MB


def grouped(vlm: VLM, group: int, tokens: int = 64) -> tuple[list[Any], Completions, LossInputs]:
    """One prompt with `group` completions of full length, all of which are learned from."""
    prompt = vlm.prompt(picture(0, (308, 308)), picture(1, (308, 308)), "a hat", "choice", True)
    rng = np.random.default_rng(0)
    completions = Completions.of(rng.integers(5, 200, (group, tokens)).tolist())
    targets = LossInputs(
        mask=mx.array(completions.mask),
        weights=mx.ones((group, tokens)),
        answer_weights=mx.ones(group),
        advantages=mx.array(rng.standard_normal(group), mx.float32),
        y=mx.ones(group),
        reference=None,
        old=None,
    )
    return [prompt], completions, targets


def measured_update(vlm: VLM, chosen: TrainSettings) -> int:
    prompts, completions, targets = grouped(vlm, chosen.group)
    mx.eval([image.merged for prompt in prompts for image in prompt.images])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    policy_gradient(vlm, prompts, completions, targets, chosen)
    return int(mx.get_peak_memory()) - before


def of_the_update(plan: Plan) -> tuple[int, int, int]:
    return plan.saved, plan.layer, plan.head


def test_the_peak_of_an_update_does_not_grow_with_the_group() -> None:
    """Neither planned nor measured; four times the micro-batch does show."""
    vlm = load_vlm(GOLDEN / "qwen2_5_vl", 308 * 308)
    attach_lora(vlm.model, list(linear_layers(vlm.model)), rank=4, scale=2.0)
    chosen = TrainSettings(comparisons=1, max_tokens=64, max_pixels=308 * 308, micro_batch=4, rank=4)
    eight, more = (measured_update(vlm, replace(chosen, group=group)) for group in (8, 32))
    assert more == pytest.approx(eight, rel=0.05)
    assert measured_update(vlm, replace(chosen, group=32, micro_batch=16)) > 1.5 * eight

    for model in CHECKPOINTS:
        for common in (chosen, replace(chosen, recompute=False), replace(chosen, comparisons=8, max_tokens=256)):
            plans = [training_plan(model, replace(common, group=group), IMAGES) for group in (8, 32)]
            assert of_the_update(plans[0]) == of_the_update(plans[1])
            wider = training_plan(model, replace(common, group=32, micro_batch=16), IMAGES)
            assert wider.phases["update"] > plans[1].phases["update"]


# More takes more


@st.composite
def training(draw: st.DrawFn) -> TrainSettings:
    return TrainSettings(
        comparisons=draw(st.integers(1, 12)),
        group=draw(st.integers(2, 40)),
        max_tokens=draw(st.integers(1, 1200)),
        max_pixels=draw(st.integers(784, 2_000_000)),
        rows=draw(st.integers(1, 100)),
        micro_batch=draw(st.integers(1, 70)),
        rank=draw(st.integers(1, 64)),
        recompute=draw(st.booleans()),
        think=draw(st.booleans()),
        kl=draw(st.sampled_from([0.0, 0.1])),
        held_out=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def judging(draw: st.DrawFn) -> JudgeSettings:
    return JudgeSettings(
        think=draw(st.booleans()),
        samples=draw(st.integers(1, 8)),
        max_tokens=draw(st.integers(1, 1200)),
        max_pixels=draw(st.integers(784, 2_000_000)),
        rows=draw(st.integers(1, 100)),
    )


def raised(chosen: Any, names: tuple[str, ...], more: float) -> Iterator[tuple[str, Any]]:
    """Settings with one of them raised, each in turn."""
    for name in names:
        value = getattr(chosen, name)
        yield name, replace(chosen, **{name: value + max(1, int(value * more))})


MODEL = st.sampled_from(CHECKPOINTS)
MORE = st.sampled_from([0.0, 0.3, 1.0])


@settings(deadline=None, derandomize=True)
@given(MODEL, training(), MORE)
def test_more_of_a_training_run_never_takes_less(model: ModelSize, chosen: TrainSettings, more: float) -> None:
    plan = training_plan(model, chosen, IMAGES)
    for name, other in raised(chosen, ("comparisons", "max_tokens", "rows", "micro_batch", "rank"), more):
        assert training_plan(model, other, IMAGES).peak >= plan.peak, name
    assert training_plan(model, chosen, 2 * IMAGES).peak >= plan.peak
    # Larger images: all but the rollout, where a longer prompt is shared by more completions instead of copied.
    ((_, larger),) = raised(chosen, ("max_pixels",), more)
    wider = training_plan(model, larger, IMAGES)
    assert wider.resident >= plan.resident
    assert all(wider.phases[name] >= plan.phases[name] for name in plan.phases if name != "rollout")
    # A group: those of a batch are fewer where each is larger, so one alone.
    alone = replace(chosen, rows=1, micro_batch=1)
    ((_, larger),) = raised(alone, ("group",), more)
    assert training_plan(model, larger, IMAGES).peak >= training_plan(model, alone, IMAGES).peak


@settings(deadline=None, derandomize=True)
@given(MODEL, judging(), st.integers(2, 60), MORE)
def test_more_of_a_judgement_never_takes_less(
    model: ModelSize, chosen: JudgeSettings, images: int, more: float
) -> None:
    plan = judging_plan(model, chosen, images)
    for name, other in raised(chosen, ("max_tokens", "rows"), more):
        assert judging_plan(model, other, images).peak >= plan.peak, name
    assert judging_plan(model, chosen, images + 1).peak >= plan.peak
    # Larger images and more samples run fewer comparisons together, so one alone.
    alone = replace(chosen, rows=1, samples=1)
    for name, other in raised(alone, ("max_pixels", "samples"), more):
        assert judging_plan(model, other, images).peak >= judging_plan(model, alone, images).peak, name


def test_the_vision_tower_is_planned_for_images_that_fill_a_batch_best() -> None:
    """Three images of 511 tokens run together, two of 529: a budget of 529 must hold for smaller images, too."""
    work = memory._Work(CHECKPOINTS[2])
    for tokens in (1, 121, 511, 529, 1023, 1024, 2000):
        for smaller in range(1, tokens + 1, 37):
            together = -(-features._BATCH_TOKENS // smaller)
            assert work.vision(tokens, 10_000) >= work.vision(smaller, together)


def test_the_parts_of_a_plan() -> None:
    plan = Plan(weights=100, features=20, vision=1, prefill=2, keys_values=3, logits=4, adapter=10, tree=5)
    assert plan.resident == 135
    assert plan.peak == 135 + 7
    assert replace(plan, reference=8).peak == 135 + 8
    assert replace(plan, saved=9, layer=2, head=3).peak == 135 + 12
    assert replace(plan, vision=50).peak == 135 + 50


def test_what_is_not_used_takes_nothing() -> None:
    model, chosen = real("7B"), TrainSettings()
    assert training_plan(model, chosen, IMAGES).reference == 0
    assert training_plan(model, replace(chosen, kl=0.1), IMAGES).reference > 0
    assert training_plan(model, chosen, IMAGES).adapter == 3 * model.shapes.adapter_bytes(16)
    assert training_plan(model, chosen, IMAGES).tree == 0
    read, thought = (judging_plan(model, JudgeSettings(think=think), IMAGES) for think in (False, True))
    assert (read.keys_values, read.logits) == (0, 0)
    assert thought.keys_values > 0
    assert read.phases["update"] == thought.phases["update"] == 0
    # Held-out preferences are judged as `eval` judges.
    assert training_plan(model, chosen, IMAGES).evaluation == 0
    measured = training_plan(model, replace(chosen, held_out=0.1, held_out_limit=20), IMAGES)
    judged = judging_plan(model, replace(chosen, held_out=0.1).judging, 40)
    assert measured.phases["evaluation"] == judged.peak - judged.weights - judged.features
    kept = replace(chosen, recompute=False)
    assert training_plan(model, kept, IMAGES).peak > 3 * training_plan(model, chosen, IMAGES).peak
    # Without thinking nothing is written: a longer limit changes nothing.
    silent = replace(chosen, think=False)
    assert training_plan(model, silent, IMAGES) == training_plan(model, replace(silent, max_tokens=2000), IMAGES)
    # The processor of the checkpoint has the last word on pixels.
    small = model._replace(max_pixels=256 * 256)
    assert training_plan(small, chosen, IMAGES) == training_plan(model, replace(chosen, max_pixels=256 * 256), IMAGES)


# The table


def test_the_table_of_what_fits() -> None:
    result = CliRunner().invoke(main, [], catch_exceptions=False)
    assert result.exit_code == 0
    *table, last = result.stdout.rstrip("\n").split("\n")
    rows = json.loads(last)["table"]
    assert len(rows) == 30
    assert len({(row["mac_gib"], row["judge"], row["bits"]) for row in rows}) == 30
    assert sum("32B" in line for line in table) == 10
    for row in rows:
        fits = row["peak_bytes"] <= row["working_set_bytes"]
        assert row["working_set_bytes"] < row["mac_gib"] << 30
        assert row["weights_bytes"] < row["peak_bytes"]
        # What one setting can be raised to is at least its default where the defaults fit.
        assert not fits or (row["group"] >= 8 and row["max_pixels"] >= 512**2 and row["max_tokens"] >= 256)
        for name in LADDERS:
            assert row[name] is None or row[name] in LADDERS[name]
            chosen = replace(TrainSettings(), micro_batch=1, **({name: row[name]} if row[name] else {}))
            peak = training_plan(real(row["judge"], row["bits"]), chosen, 2000).peak
            assert row[name] is None or peak <= row["working_set_bytes"]
        peak = training_plan(
            real(row["judge"], row["bits"]), replace(TrainSettings(), micro_batch=row["micro_batch"]), 2000
        )
        assert peak.peak == row["peak_bytes"]
        # The micro-batch is the largest that fits.
        if row["micro_batch"] < 16:
            twice = replace(TrainSettings(), micro_batch=2 * row["micro_batch"])
            assert training_plan(real(row["judge"], row["bits"]), twice, 2000).peak > row["working_set_bytes"]
    assert any(row["peak_bytes"] <= row["working_set_bytes"] for row in rows)
    assert any(row["peak_bytes"] > row["working_set_bytes"] for row in rows)
    judges = {(row["judge"], row["bits"]) for row in rows}
    for each in judges:
        macs = [row for row in rows if (row["judge"], row["bits"]) == each]
        assert [row["mac_gib"] for row in macs] == [16, 32, 64, 128, 192]
        for less, more in pairwise(macs):
            assert more["peak_bytes"] <= more["working_set_bytes"] or less["peak_bytes"] > less["working_set_bytes"]
            for name in ("micro_batch", *LADDERS):
                assert (more[name] or 0) >= (less[name] or 0), name
