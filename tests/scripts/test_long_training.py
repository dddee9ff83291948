"""The measurement of long runs and of large lists runs; no test asks how fast anything is."""

import json

from click.testing import CliRunner

from scripts.bench_data import main as bench_data
from scripts.long_training import main as long_training


def test_a_few_steps() -> None:
    run = CliRunner().invoke(
        long_training,
        ["--steps", "4", "--every", "2", "--log-every", "4", "--preferences", "40"],
        catch_exceptions=False,
    )
    assert run.exit_code == 0, run.stderr
    *lines, page = map(json.loads, run.stdout.splitlines())
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["resident_megabytes"] > 0 and line["mlx_megabytes"] > 0 for line in lines)
    assert lines[0]["bytes"]["log.jsonl"] < lines[1]["bytes"]["log.jsonl"]
    assert page["page_bytes"] > 0


def test_small_lists() -> None:
    run = CliRunner().invoke(bench_data, ["--pairs", "60", "--limit", "50"], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    results = list(map(json.loads, run.stdout.splitlines()))
    assert [(result["list"], result["pairs"], result["preferences"]) for result in results] == [
        ("hpdv2", 60, 50), ("pickapic", 60, 50), ("jsonl", 60, 50)
    ]  # fmt: skip
