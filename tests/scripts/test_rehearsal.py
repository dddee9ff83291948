"""A rehearsal runs through all of its phases; its shapes are those of the lists."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlxpref.checkpoints import bounds
from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.memory import ModelSize
from mlxpref.conversion.quantize import Recipe
from scripts.bench_gpu_judges import QWEN3_5_4B
from scripts.bench_models import hybrid_config
from scripts.conversion_memory import config_of
from scripts.memory_table import SHAPES as LISTED
from scripts.rehearsal import PHASES, Rehearsal, main
from scripts.rehearsal_plans import Sizes
from scripts.rehearsal_shapes import SHAPES, Shape, tokenizer_of
from scripts.several import alone

SMALL = ["--shape", "tiny", "--pixels", "96", "--tokens", "12", "--comparisons", "2", "--group", "3"]
RATE = 1e11
WRITING = ("compare, thinking", "training step, thinking")


def command(*options: str) -> tuple[int, str, str]:
    run = CliRunner().invoke(main, options, catch_exceptions=False)
    return run.exit_code, run.stdout, run.stderr


def phases_of(rehearsal: Rehearsal) -> list[dict[str, Any]]:
    rehearsal.run()
    return rehearsal.lines


def test_all_phases() -> None:
    code, stdout, stderr = alone(command, *SMALL, "--bits", "4", "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert {"device", "cores"} <= set(result["machine"])
    assert result["copy_bytes_per_s"] > 1e8
    check(result["phases"])
    lines = {line["phase"]: line for line in result["phases"]}
    compared, trained = (lines[name] for name in WRITING)
    # Blanks may come before the place of an answer.
    assert 2 * 12 <= compared["tokens"] <= 2 * (12 + bounds.ANSWER_TOKENS)
    assert trained["tokens"] == 2 * 3 * 12
    assert lines["rank 8 pictures, reading"]["comparisons"] == 32


def check(lines: Sequence[Mapping[str, Any]]) -> None:
    assert tuple(line["phase"] for line in lines) == PHASES
    for line in lines:
        assert line["seconds"] > 0
        assert 1 / 3 < line["planned_bytes"] / line["peak_bytes"] < 5, line
        assert ("share" in line) == (line["phase"] in WRITING)
        assert "share" not in line or (line["tokens_per_s"] > 0 and 0 < line["share"] < 1)


def test_table_and_what_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "kept"
    run = CliRunner().invoke(main, [*SMALL, "--output", str(output)], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    assert [line.partition("  ")[0] for line in run.stdout.splitlines()[1:-1]] == list(PHASES)
    assert {folder.name for folder in output.iterdir()} == {"source", "judge", "thinking", "reading", "reward.py"}
    for name, learns in (("thinking", True), ("reading", False)):  # from completions
        log = json.loads((output / name / "log.jsonl").read_text())
        assert log["updated"]
        assert (log["mismatch"] is not None) == learns
        assert log["skipped"] == 0
    again = CliRunner().invoke(main, [*SMALL, "--output", str(output)])
    assert (again.exit_code, "is not empty" in again.stderr) == (2, True)


def test_recurrent_layers(tmp_path: Path) -> None:
    rehearsal = small(tmp_path, Shape("qwen3_5", {"vocab_size": 1024, "hidden_size": 64}, shard=10**5))
    check(alone(phases_of, rehearsal))


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room for a judge, but not for its training."""
    monkeypatch.setattr("scripts.rehearsal.device_working_set", lambda: 4_000_000)
    rehearsal = small(tmp_path)
    rehearsal.run()
    left_out = {line["phase"]: line["left_out"] for line in rehearsal.lines if "left_out" in line}
    assert list(left_out) == list(PHASES[6:])
    assert "this device recommends at most 4.0 MB" in left_out[PHASES[6]]
    assert not any("error" in line for line in rehearsal.lines)


def test_the_phases_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("scripts.rehearsal.start_run", fails)
    rehearsal = small(tmp_path)
    rehearsal.run()
    errors = {line["phase"]: line["error"] for line in rehearsal.lines if "error" in line}
    assert errors == dict.fromkeys(PHASES[6:8], "RuntimeError: no such kernel")
    assert "seconds" in rehearsal.lines[-1]


def small(folder: Path, shape: Shape = SHAPES["tiny"]) -> Rehearsal:
    return Rehearsal(shape, Recipe(None), Sizes(64, 4, 1, 2), folder, RATE)


def config(name: str) -> Mapping[str, Any]:
    shape = SHAPES[name]
    return config_of(shape.family, shape.text, shape.vision)


@pytest.mark.parametrize(("name", "listed"), [("2b", "Qwen3-VL-2B"), ("4b", "Qwen3-VL-4B")])
def test_shapes_are_those_of_the_list(name: str, listed: str) -> None:
    assert ModelSize.from_config(config(name), 0, 2) == ModelSize.from_config(LISTED[listed], 0, 2)


def test_shape_of_qwen3_5() -> None:
    assert ModelSize.from_config(config("qwen3_5-4b"), 0, 2) == ModelSize.from_config(hybrid_config(QWEN3_5_4B), 0, 2)


@pytest.mark.parametrize("name", ["2b", "4b", "qwen3_5-4b"])
def test_rotary_sections_fill_a_head(name: str) -> None:
    family, text = FAMILIES[SHAPES[name].family], config(name)["text_config"]
    assert 2 * sum(text[family.rope]["mrope_section"]) == text["head_dim"] * family.rotary_share


@pytest.mark.parametrize(("rows", "first"), [(151936, 151643), (248320, 248044), (1024, 868)])
def test_special_tokens_have_their_real_ids(rows: int, first: int) -> None:
    words = tokenizer_of(rows)
    assert sorted(words["model"]["vocab"].values()) == list(range(first))
    ids = {token["content"]: token["id"] for token in words["added_tokens"]}
    assert [ids[name] - first for name in ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "</think>")] == [
        0,
        2,
        12,
        25,
    ]
