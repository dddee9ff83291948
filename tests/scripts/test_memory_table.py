"""The memory table and the measurement beside it; the figures of the model lists are those of the plan."""

import gc
import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlxpref.checkpoints.memory import training_plan
from mlxpref.checkpoints.recommended import RecommendedJudge, recommended_judges
from mlxpref.config import TrainSettings
from mlxpref.conversion.quantize import Recipe, cast, plan_layers, quantize
from scripts.memory_check import MODELS, RUNS, Run, measure
from scripts.memory_table import LADDERS, LIST, SHAPES, figures, in_bits, main, quantized, shape_of

MEMORY = ("judging_gb", "judging_cpu_gb", "training_gb", "training_cpu_gb")
FIGURES = (*MEMORY, "source_gb", "converted_gb", "conversion_gb")


@pytest.mark.parametrize("run", [RUNS[number] for number in (0, 1, 5, 6)], ids=lambda run: f"{run.pixels}: {run.name}")
def test_the_plan_is_near_the_peak(run: Run) -> None:
    left = mx.get_active_memory()
    ((_, result),) = measure(MODELS[0], (run,))
    assert abs(result.error) < 0.25, f"planned {result.plan.peak / 1e6:.1f} MB, measured {result.peak / 1e6:.1f} MB"
    gc.collect()
    assert mx.get_active_memory() - left < 300_000  # the weights take 3 MB


def test_table_agrees_with_the_plan() -> None:
    result = CliRunner().invoke(main, [], catch_exceptions=False)
    rows = json.loads(result.stdout.rstrip("\n").split("\n")[-1])["table"]
    assert len({(row["mac_gib"], row["judge"], row["bits"]) for row in rows}) == len(rows) == 30
    for row in rows:
        model, fits = quantized(row["judge"], row["bits"]), row["peak_bytes"] <= row["working_set_bytes"]
        settings = replace(TrainSettings(), micro_batch=row["micro_batch"])
        assert training_plan(model, settings, 1000).peak == row["peak_bytes"]
        for name in LADDERS:
            assert (row[name] is not None) == fits
            if fits:
                settings = replace(TrainSettings(), micro_batch=1, **{name: row[name]})
                assert training_plan(model, settings, 1000).peak <= row["working_set_bytes"]


@pytest.mark.parametrize("judge", recommended_judges(), ids=lambda judge: judge.id)
def test_figures_of_recommended_judges(judge: RecommendedJudge) -> None:
    """Those in the file are what the plan says now."""
    shape = shape_of(judge)
    planned = figures(shape, judge.profile) if shape else dict.fromkeys(FIGURES, 0.0)
    assert {name: getattr(judge, name) for name in MEMORY} == {name: planned[name] for name in MEMORY}
    if judge.is_converted:
        assert (judge.download_gb, judge.converted_gb) == (planned["source_gb"], planned["converted_gb"])
    else:
        assert (judge.download_gb, judge.converted_gb) == (planned["converted_gb"], 0)


@pytest.mark.parametrize("model", LIST["model"], ids=lambda model: model["source"])
def test_sizes_in_the_list_of_models(model: dict[str, Any]) -> None:
    planned = figures(model["shape"]) if "shape" in model else dict.fromkeys(FIGURES, 0.0)
    names = ("source_gb", "converted_gb", "conversion_gb")
    assert {name: model[name] for name in names} == {name: planned[name] for name in names}


@pytest.mark.parametrize("name", [name for name in SHAPES if "32B" not in name])
def test_weights_are_those_of_the_model_and_of_its_conversion(name: str) -> None:
    """Of mlx-vlm's model of that shape, whose weights are lazy, so that they take no memory."""
    shape = SHAPES[name]
    config = {**shape, **shape.get("text_config", {}), "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    config["max_position_embeddings"] = 32768
    package, settings = import_module(f"mlx_vlm.models.{shape['model_type']}"), SimpleNamespace(**config)
    settings.text_config = package.TextConfig.from_dict(config)
    settings.vision_config = package.VisionConfig.from_dict(shape["vision_config"])
    settings.image_token_index, settings.video_token_index, settings.skip_vision = 0, 0, False
    model = package.Model(settings)
    cast(model, mx.bfloat16, dict.fromkeys(dict(tree_flatten(model.parameters())), mx.bfloat16))
    assert bytes_of(model) == in_bits(name, None).weights == SHAPES[name]["bytes"]
    plan, left = plan_layers(model, Recipe())
    quantize(model, plan)
    assert left == []
    assert bytes_of(model) == in_bits(name, 4).weights


def bytes_of(model: nn.Module) -> int:
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return sum(int(weight.nbytes) for _, weight in weights)


def test_judges_as_they_are_printed() -> None:
    result = CliRunner().invoke(main, ["--judges"], catch_exceptions=False)
    rows = json.loads(result.stdout.rstrip("\n").split("\n")[-1])["judges"]
    assert [row["judge"] for row in rows] == [judge.id for judge in recommended_judges() if judge.judging_gb]
    profiles = {judge.id: judge.profile for judge in recommended_judges()}
    for row in rows:
        assert row == {"judge": row["judge"], "shape": row["shape"], **figures(row["shape"], profiles[row["judge"]])}
