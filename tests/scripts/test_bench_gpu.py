"""The benchmark of real sizes runs at small ones; what it counts follows from what it measured."""

import importlib
import json

import pytest
from click.testing import CliRunner

PARTS = ("decode", "pieces", "step")


def test_quick_run() -> None:
    chosen = [f"--part={part}" for part in PARTS]
    main = importlib.import_module("scripts.bench_gpu").main
    run = CliRunner().invoke(main, ["--quick", *chosen], catch_exceptions=False)
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
    from scripts.bench_gpu import REAL
    from scripts.memory_table import SHAPES

    assert ModelSize.from_config(REAL.config(), 0) == ModelSize.from_config(SHAPES["Qwen2.5-VL-7B"], 0)
