"""The memory plan: what a folder says is what loading it shows, more never takes less, and what is advised fits."""

import json
import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxpref.checkpoints import bounds, memory
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import (
    MemoryPlan,
    ModelSize,
    judging_plan,
    model_size,
    require_fit,
    training_plan,
    with_fitting_batches,
)
from mlxpref.cli import main
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.conversion.convert import convert
from mlxpref.conversion.quantize import Recipe
from mlxpref.demo import JUDGE
from mlxpref.engine.lora import attach_lora, lora_targets
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError
from mlxpref.judge import loading
from mlxpref.text import format_bytes
from mlxpref.training import run
from tests.conftest import FAMILIES, GOLDEN, picture

GB = 10**9
FOLDERS = (*(GOLDEN / family for family in FAMILIES), JUDGE)
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
# Qwen2.5-VL-7B, its language model in 4 bits.
SEVEN = ModelSize.from_config(
    {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "vision_config": {"hidden_size": 1280, "intermediate_size": 3420},
    },
    weights=5_600_000_000,
)  # fmt: skip
MODELS = [SEVEN, *(model_size(Checkpoint(folder)) for folder in FOLDERS)]
PREFERENCES = 50


def loaded_bytes(vlm: VLM) -> int:
    """What the arrays of a loaded model take."""
    arrays: dict[str, mx.array] = dict(tree_flatten(vlm.model.parameters()))
    return sum(int(array.nbytes) for array in arrays.values())


# A folder


@each_folder
def test_sizes_are_those_of_the_loaded_model(folder: Path) -> None:
    size, vlm = model_size(Checkpoint(folder)), load_vlm(folder, 512 * 512)
    assert size.weights == loaded_bytes(vlm)
    assert size.float_bytes == 4  # bfloat16 becomes float32 on a CPU
    assert size.max_pixels == load_vlm(folder, 1 << 30).features.max_pixels
    comparison = vlm.input(picture(0), picture(1), "a hat", "choice", think=True)
    cache, logits = vlm.prefill([comparison])
    stored = cache.arrays
    prefix = size.keys_values(len(comparison)) + size.states(1)
    assert sum(int(part.nbytes) for part in stored if part is not None) == prefix
    assert logits.shape == (1, size.vocabulary)
    side = 3 * math.isqrt(size.pixels_per_token)
    image = vlm.features.get(picture(0, (side, side)))
    assert image.tokens == size.image_tokens(side**2)
    assert image.nbytes == size.features(1, image.tokens)
    attach_lora(vlm.model, lora_targets(vlm.model), 3, 2.0)
    assert size.adapter(3) == loaded_bytes(vlm) - size.weights


def test_quantized_weights_keep_their_size(tmp_path: Path) -> None:
    convert(JUDGE, tmp_path / "small", Recipe(4, 64))
    assert model_size(Checkpoint(tmp_path / "small")).weights == loaded_bytes(load_vlm(tmp_path / "small", 512 * 512))


PIXELS: dict[str, tuple[Any, Any, int | None]] = {
    "max_pixels": ({"max_pixels": 200704}, None, 200704),
    "the longest edge": ({"size": {"longest_edge": 100352, "shortest_edge": 3136}}, None, 100352),
    "null beside it": ({"max_pixels": None, "size": {"longest_edge": 100352}}, None, 100352),
    "the processor's file last": ({"max_pixels": 200704}, {"image_processor": {"max_pixels": 50176}}, 50176),
    "a processor without an image processor": ({"max_pixels": 200704}, {"processor_class": "x"}, 200704),
    "nothing": ({}, None, None),
    "a list": ([1], None, None),
    "a list for a number": ({"max_pixels": []}, None, None),
}


@pytest.mark.parametrize("case", PIXELS)
def test_pixels_are_those_of_the_processor(case: str, tmp_path: Path) -> None:
    first, second, pixels = PIXELS[case]
    copy = shutil.copytree(GOLDEN / "qwen2_vl", tmp_path / "model")
    for name, content in (("preprocessor_config.json", first), ("processor_config.json", second)):
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            (copy / name).write_text(json.dumps(content))
    assert Checkpoint(copy).max_pixels == pixels
    if pixels is not None:
        assert load_vlm(copy, 1 << 30).features.max_pixels == pixels


# More takes more


@st.composite
def trainings(draw: st.DrawFn) -> TrainSettings:
    return TrainSettings(
        comparisons=draw(st.integers(1, 12)),
        group=draw(st.integers(2, 40)),
        max_tokens=draw(st.integers(1, 1200)),
        max_pixels=draw(st.integers(784, 2_000_000)),
        rows=draw(st.integers(1, 100)),
        micro_batch=draw(st.integers(1, 70)),
        rank=draw(st.integers(1, 64)),
        recompute=draw(st.booleans()),
        held_out=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def judgings(draw: st.DrawFn) -> JudgeSettings:
    return JudgeSettings(
        think=draw(st.booleans()),
        samples=draw(st.integers(1, 8)),
        max_tokens=draw(st.integers(1, 1200)),
        max_pixels=draw(st.integers(784, 2_000_000)),
        rows=draw(st.integers(1, 100)),
    )


def raised(chosen: Any, name: str, more: float) -> Any:
    value = getattr(chosen, name)
    return replace(chosen, **{name: value + max(1, int(value * more))})


MORE = st.sampled_from([0.0, 0.3, 1.0])


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(MODELS), trainings(), st.booleans(), MORE)
def test_more_training_takes_no_less(model: ModelSize, chosen: TrainSettings, writes: bool, more: float) -> None:
    plan = training_plan(model, chosen, PREFERENCES, writes)
    for name in ("comparisons", "max_tokens", "rows", "micro_batch", "rank"):
        assert training_plan(model, raised(chosen, name, more), PREFERENCES, writes).peak >= plan.peak, name
    assert training_plan(model, chosen, 2 * PREFERENCES, writes).peak >= plan.peak
    # Groups that run together are fewer where each is larger, so a group alone.
    alone = replace(chosen, rows=1, micro_batch=1)
    larger = training_plan(model, raised(alone, "group", more), PREFERENCES, writes)
    assert larger.peak >= training_plan(model, alone, PREFERENCES, writes).peak
    # The phase of an update does not grow with the group.
    assert larger.phases["update"] == training_plan(model, alone, PREFERENCES, writes).phases["update"]


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(MODELS), judgings(), st.integers(2, 60), MORE)
def test_more_judging_takes_no_less(model: ModelSize, chosen: JudgeSettings, images: int, more: float) -> None:
    plan = judging_plan(model, chosen, images)
    for name in ("max_tokens", "rows"):
        assert judging_plan(model, raised(chosen, name, more), images).peak >= plan.peak, name
    assert judging_plan(model, chosen, images + 1).peak >= plan.peak
    # Larger images and more samples run fewer comparisons together, so one comparison alone. The vision tower runs two
    # small images together, a large one alone.
    alone = replace(chosen, rows=1, samples=1)
    plan = judging_plan(model, alone, images)
    for name in ("max_pixels", "samples"):
        larger = judging_plan(model, raised(alone, name, more), images)
        assert larger.resident >= plan.resident, name
        assert all(larger.phases[phase] >= plan.phases[phase] for phase in ("prefill", "rollout")), name


def test_unused_parts_take_nothing() -> None:
    settings = TrainSettings()
    silent = training_plan(SEVEN, replace(settings, think=False), PREFERENCES, writes=False)
    assert silent == training_plan(SEVEN, replace(settings, think=False, max_tokens=2000), PREFERENCES, writes=False)
    assert silent.phases["rollout"] == 0
    assert judging_plan(SEVEN, JudgeSettings(think=False), 9).phases["rollout"] == 0
    assert "evaluation" not in silent.phases
    plan = training_plan(SEVEN, replace(settings, recompute=False), PREFERENCES)
    assert plan.peak > 3 * training_plan(SEVEN, settings, PREFERENCES).peak
    assert training_plan(SEVEN, replace(settings, steps=1), 1000) == training_plan(
        SEVEN, settings, settings.comparisons
    )
    small = replace(SEVEN, max_pixels=256 * 256)
    assert training_plan(small, settings, 9) == training_plan(SEVEN, replace(settings, max_pixels=256 * 256), 9)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 32, 64, 65, 100, 1000, 8192, 20000])
def test_pieces_are_neither_short_nor_long(rows: int) -> None:
    columns = bounds.piece_columns(rows)
    assert rows * columns <= max(bounds.MAX_TOKENS, rows)
    assert rows * columns >= bounds.TARGET_TOKENS / 2
    assert columns >= bounds.MIN_COLUMNS or rows > 64


# Advice


def training(settings: TrainSettings) -> MemoryPlan:
    return training_plan(SEVEN, settings, 1000)


def judging(settings: JudgeSettings) -> MemoryPlan:
    return judging_plan(SEVEN, settings, 32)


def options(line: str) -> list[list[str]]:
    """The options that a refusal advises, as the command line takes them."""
    return [part.split() for part in line.split(": try ")[1].split(" or ")]


def advised(settings: Any, flags: list[str]) -> Any:
    """Settings with these options."""
    pairs = re.findall(r"--([a-z-]+)(?: (\d+))?", " ".join(flags))
    return replace(settings, **{name.replace("-", "_"): int(value) if value else True for name, value in pairs})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    ("plan_of", "chosen"),
    [
        (training, TrainSettings(group=32, max_tokens=1024, max_pixels=1344 * 1344, micro_batch=32)),
        (training, TrainSettings(recompute=False)),
        (judging, JudgeSettings(max_tokens=1024, max_pixels=1024 * 1024)),
    ],
)
def test_advice_fits_and_needs_each_option(
    plan_of: Any, chosen: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = {"recompute": True, "micro_batch": 1, "rows": 1, "max_pixels": 128 * 128, "max_tokens": 32, "group": 2}
    smallest = replace(chosen, **{field.name: least[field.name] for field in fields(chosen) if field.name in least})
    low, high = plan_of(smallest).peak, plan_of(chosen).peak
    working_set = int(low + share * (high - low))
    monkeypatch.setattr(memory, "device_working_set", lambda: working_set)
    with pytest.raises(ConfigError) as caught:
        require_fit(plan_of, chosen, "this")
    assert f"this needs about {format_bytes(high)}, this device recommends at most" in str(caught.value)
    for flags in options(str(caught.value)):
        assert plan_of(advised(chosen, flags)).peak <= working_set
        for left_out in re.findall(r"--[a-z-]+(?: \d+)?", " ".join(flags)):
            fewer = " ".join(flags).replace(left_out, "").split()
            assert plan_of(advised(chosen, fewer)).peak > working_set


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_working_set", lambda: 5 * GB)
    with pytest.raises(ConfigError, match=r"no settings make it fit: its weights take 5\.6 GB; take a smaller model"):
        require_fit(training, TrainSettings(), "training")


# The commands


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    return paths


def test_training_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(steps=1, comparisons=4, max_tokens=64)
    plan = training_plan(model_size(Checkpoint(JUDGE)), settings, 8)
    monkeypatch.setattr(memory, "device_working_set", lambda: (plan.weights + plan.peak) // 2)
    command = ("train", "--data", "demo", "--model", "demo", "--limit", "8", "--steps", "1", "--comparisons", "4")
    command = (*command, "--max-tokens", "64", "--rows", "64", "--micro-batch", "16")
    with monkeypatch.context() as patched:
        patched.setattr(run, "load_vlm", None)  # nothing may be loaded
        result = invoke(*command, "--output", tmp_path / "folder" / "run")
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    begun = invoke(*command, *options(result.stderr)[0], "--output", tmp_path / "run")
    assert begun.exit_code == 0, begun.output
    assert "of memory at the peak" in begun.stderr


@pytest.mark.parametrize("command", ["compare", "rank"])
def test_judging_that_does_not_fit(command: str, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = judging_plan(model_size(Checkpoint(JUDGE)), JudgeSettings(), 2)
    monkeypatch.setattr(memory, "device_working_set", lambda: plan.weights + 9 * (plan.peak - plan.weights) // 10)
    arguments = (command, *pictures, "--prompt", "a hat", "--model", "demo", "--rows", "32")
    with monkeypatch.context() as patched:
        patched.setattr(loading, "load_vlm", None)
        result = invoke(*arguments)
    assert result.exit_code == 1
    assert f"judging needs about {format_bytes(plan.peak)}, this device" in result.stderr
    for flags in options(result.stderr):
        assert invoke(*arguments, *flags, "--json").exit_code == 0


def test_batches_are_as_large_as_fit(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says how many."""
    size = model_size(Checkpoint(JUDGE))
    peaks = {rows: judging_plan(size, JudgeSettings(rows=rows), 9).peak for rows in (32, 16, 8, 1)}
    for working_set, rows in ((peaks[32], 32), (peaks[32] - 1, 16), (peaks[8], 8), (peaks[1], 1), (peaks[1] - 1, 32)):
        monkeypatch.setattr(memory, "device_working_set", lambda: working_set)  # noqa: B023
        chosen = with_fitting_batches(lambda s: judging_plan(size, s, 9), JudgeSettings(), ())
        assert chosen == JudgeSettings(rows=rows)
    monkeypatch.setattr(memory, "device_working_set", lambda: peaks[8])
    assert loading.load_judge("demo", images=9).settings.rows == 8
    with pytest.raises(ConfigError, match="judging needs about"):
        loading.load_judge("demo", settings={"rows": 32}, images=9)
    training = replace(TrainSettings(), comparisons=4, max_tokens=64)
    peak = training_plan(size, replace(training, rows=16, micro_batch=4), 8).peak
    monkeypatch.setattr(memory, "device_working_set", lambda: peak)
    both = with_fitting_batches(lambda s: training_plan(size, s, 8), training, ())
    assert (both.rows, both.micro_batch) == (16, 4)
    assert with_fitting_batches(lambda s: training_plan(size, s, 8), training, ("rows", "micro_batch")) == training
