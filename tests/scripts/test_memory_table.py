"""The memory table and the measurement beside it; the figures of the model lists are those of the plan."""

import gc
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlxpref.checkpoints.memory import ModelSize, training_plan
from mlxpref.checkpoints.recommended import recommended_judges
from mlxpref.config import TrainSettings
from scripts.memory_check import MODELS, RUNS, Run, measure
from scripts.memory_table import JUDGES, LADDERS, main, quantized

GB = 10**9
LIST = Path(__file__).parents[2] / "convert" / "models.toml"


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


def qwen3(hidden: int, inner: int, vision_hidden: int, vision_inner: int, gigabytes: float) -> ModelSize:
    """A Qwen3-VL in 4 bits, as its config states it."""
    text = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    vision = {"patch_size": 16, "num_heads": 16, "deepstack_visual_indexes": [8, 16, 24]}
    config: dict[str, Any] = {
        "model_type": "qwen3_vl",
        "text_config": {**text, "head_dim": 128, "hidden_size": hidden, "intermediate_size": inner},
        "vision_config": {**vision, "hidden_size": vision_hidden, "intermediate_size": vision_inner},
    }
    return ModelSize.from_config(config, int(gigabytes * GB))


RECOMMENDED = {
    "Qwen3-VL-8B": qwen3(4096, 12288, 1152, 4304, 5.8),
    "Qwen3-VL-4B": qwen3(2560, 9728, 1024, 4096, 3.1),
    "Qwen2.5-VL-7B": quantized("7B", 4),
    "Qwen2.5-VL-3B": quantized("3B", 4),
}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_memory_of_recommended_judges(name: str) -> None:
    (judge,) = [judge for judge in recommended_judges() if name in judge.id]
    model = RECOMMENDED[name]
    assert model.weights / GB == pytest.approx(judge.size_gb, abs=0.06)
    peaks = [training_plan(model, replace(TrainSettings(), micro_batch=n), 1000).peak for n in (16, 8, 4, 2, 1)]
    assert min(peaks) / GB == pytest.approx(judge.training_gb, abs=0.1)


@pytest.mark.parametrize("name", ["3B", "7B"])
def test_sizes_in_the_list_of_models(name: str) -> None:
    models = tomllib.loads(LIST.read_text(encoding="utf-8"))["model"]
    (model,) = [model for model in models if model["source"] == f"Qwen/Qwen2.5-VL-{name}-Instruct"]
    assert JUDGES[name].weights / GB == pytest.approx(model["source_gb"], abs=0.06)
    size = quantized(name, 4).weights / GB
    assert size == pytest.approx(model["converted_gb"], abs=0.06)
    largest = JUDGES[name].vocabulary * JUDGES[name].text[0] * 2 / GB
    assert min(size, 5) + largest + 0.3 == pytest.approx(model["conversion_gb"], abs=0.06)
