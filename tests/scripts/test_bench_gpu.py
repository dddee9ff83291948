"""The benchmark of real sizes runs at small ones; what it counts follows from what it measured."""

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

PARTS = ("decode", "pieces", "step")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_quick_run(family: str) -> None:
    chosen = [f"--part={part}" for part in PARTS]
    main = importlib.import_module("scripts.bench_gpu").main
    run = CliRunner().invoke(main, ["--quick", "--family", family, *chosen], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout.rstrip("\n").rsplit("\n", 1)[1])
    lines = {part: [line for line in result["cases"] if line["part"] == part] for part in ("copy", *PARTS)}
    (copied,) = lines["copy"]
    assert [line["rows"] for line in lines["decode"]] == [1, 4]
    for line in lines["decode"]:
        ideal_ms = 1e3 * line["least_gb"] / copied["gb_per_s"]
        assert line["share"] == pytest.approx(ideal_ms / line["step_ms"], rel=1e-2)
        assert line["tokens_per_s"] == pytest.approx(1e3 * line["rows"] / line["step_ms"], rel=1e-2)
    assert [line["rows"] for line in lines["pieces"]] == [1, 4]
    assert {"vision_s", "prefill_s", "rollout_s", "update_s", "update_peak_gb"} <= set(lines["step"][-1])
    # Every line was said when it was there.
    assert [json.loads(line) for line in run.stderr.splitlines()] == result["cases"]


def test_shapes_are_those_of_the_memory_table() -> None:
    from mlxpref.checkpoints.memory import ModelSize
    from scripts.bench_gpu_judges import REAL
    from scripts.memory_table import SHAPES

    assert ModelSize.from_config(REAL.config(), 0) == ModelSize.from_config(SHAPES["Qwen2.5-VL-7B"], 0)


def test_qwen3_5_has_the_weights_that_are_listed(tmp_path: Path) -> None:
    from mlx.utils import tree_flatten

    from scripts.bench_gpu_judges import QWEN3_5_4B
    from scripts.bench_models import build_hybrid, hybrid_config

    model = build_hybrid(hybrid_config(QWEN3_5_4B), tmp_path / "judge")  # lazy: no weight is computed
    assert sum(weight.size for _, weight in tree_flatten(model.parameters())) == pytest.approx(4.54e9, rel=1e-3)
