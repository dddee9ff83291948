"""The benchmarks run, and their counts are right; no test asks how fast they are."""

import importlib
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from tests.tolerance import PROBABILITY

FAMILIES = ("qwen2_5_vl", "qwen3_5")
STEP = {"rollout_s", "update_s", "vision_runs", "prefill_tokens", "trained_tokens", "peak_bytes"}


def result_of(name: str, *options: str) -> dict[str, Any]:
    """The last line of a quick run."""
    main = importlib.import_module(f"scripts.bench_{name}").main
    run = CliRunner().invoke(main, ["--quick", *options], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    assert "round 1 of 1" in run.stderr
    table, last = run.stdout.rstrip("\n").rsplit("\n", 1)
    assert table
    result: dict[str, Any] = json.loads(last)
    assert result["benchmark"] == name
    assert {"device", "cores"} <= set(result["machine"])
    assert {"mlx", "mlx-vlm", "mlxpref"} <= set(result["versions"])
    assert result["settings"]
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo(family: str) -> None:
    (case,) = result_of("grpo", "--family", family)["cases"]
    assert set(case) == {
        "prompt_tokens", "completion_tokens", "step_ratio", "rollout_ratio", "update_ratio", "peak_ratio",
        "gradient_error", "ours", "peer",
    }  # fmt: skip
    ours, peer, group = case["ours"], case["peer"], 2
    assert set(ours) == set(peer) == STEP
    assert case["gradient_error"] < 1e-4
    # Each picture once; the peer encodes both for every completion that it writes or trains, but for Qwen3.5.
    assert (ours["vision_runs"], peer["vision_runs"]) == (2, 2 if family == "qwen3_5" else 2 * 2 * group)
    prompt, completion = case["prompt_tokens"], case["completion_tokens"]
    assert ours["prefill_tokens"] == prompt
    # The peer's last token of the prompt runs alone.
    assert peer["prefill_tokens"] == group * (prompt - 1)
    assert prompt + group * (completion - 1) <= ours["trained_tokens"] <= prompt + group * completion
    assert peer["trained_tokens"] == group * (prompt + completion - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_rank(family: str) -> None:
    cases = result_of("rank", "--family", family)["cases"]
    assert [case["think"] for case in cases] == [False, True]
    for case in cases:
        assert set(case) == {
            "pixels", "think", "ratio", "bound", "max_difference", "vision_runs", "ours_s", "naive_s",
        }  # fmt: skip
        assert case["max_difference"] < PROBABILITY
        assert case["vision_runs"] == 4
        assert 1 < case["bound"] < 12


@pytest.mark.parametrize("family", FAMILIES)
def test_decode(family: str) -> None:
    cases = result_of("decode", "--family", family)["cases"]
    assert [(case["rows"], case["comparisons"]) for case in cases] == [(1, 1), (2, 1), (2, 2)]
    for case in cases:
        assert {"tokens_per_s", "share", "peer_tokens_per_s"} <= set(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_counting_agrees_with_a_prompt_in_pieces(tmp_path: Path, family: str) -> None:
    """What a model does for a prompt does not depend on where the prompt is cut."""
    from scripts.bench_models import decoder_operations, load_both

    _, model, _ = load_both(tmp_path, family)
    parts = decoder_operations(model, 5) + decoder_operations(model, 7, before=5, heads=1)
    assert parts == decoder_operations(model, 12, heads=1)


def vocabulary(model: Any) -> int:
    """How many tokens the head of a judge of the demo's shape tells apart."""
    count: int = model.language_model.model.embed_tokens.weight.shape[0]
    return count


def test_counting_agrees_with_the_shapes(tmp_path: Path) -> None:
    from scripts.bench_models import decoder_operations, load_both, vision_operations

    _, model, _ = load_both(tmp_path)
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    assert decoder_operations(model, 1, heads=1) == 3 * (layer + 2 * 128) + vocabulary(model) * 128
    block, attention = 4 * 64 * 64 + 3 * 64 * 128, 2 * 36 * 36 * 64
    merged = 9 * (256 * 256 + 256 * 128)
    assert vision_operations(model, 84) == 36 * 1176 * 64 + 2 * (36 * block + attention) + merged


def test_counting_agrees_with_the_shapes_of_recurrent_layers(tmp_path: Path) -> None:
    from scripts.bench_models import decoder_operations, load_both, vision_operations

    _, model, _ = load_both(tmp_path, "qwen3_5")
    mlp, state = 3 * 128 * 256, 4 * 32 * 32
    attending = 128 * (2 * 128 + 2 * 64) + 128 * 128 + 2 * 128  # with a gate, and one key to meet
    recurrent = 128 * (2 * 64 + 128 + 128 + 2 * 4) + 128 * 128 + 4 * (2 * 64 + 128) + 3 * state
    layers = 2 * (attending + mlp) + 6 * (recurrent + mlp)
    assert decoder_operations(model, 1, heads=1) == layers + vocabulary(model) * 128
    block, attention = 4 * 64 * 64 + 2 * 64 * 128, 2 * 36 * 36 * 64
    merged = 9 * (256 * 256 + 256 * 128)
    assert vision_operations(model, 96) == 36 * 1536 * 64 + 3 * (36 * block + attention) + merged


def test_both_sides_have_equal_weights(tmp_path: Path) -> None:
    from scripts.bench_models import attach_equal_adapters, give_random_weights, load_both, named

    vlm, model, _ = load_both(tmp_path, "qwen3_5")
    for change in (None, give_random_weights, lambda *both: attach_equal_adapters(*both, rank=2)):
        if change:
            change(vlm, model)
        ours, theirs = dict(named(vlm.model.parameters())), dict(named(model.parameters()))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_bound_by_enumeration(tmp_path: Path) -> None:
    """The closed form against a count of every run of a prefix tree."""
    from scripts.bench_common import TEXT
    from scripts.bench_models import decoder_operations, load_both, vision_operations
    from scripts.bench_rank import Case, bound_of

    vlm, model, _ = load_both(tmp_path)
    case = Case(pixels=84, think=False, images=3, sample=1, max_tokens=1)
    words = vlm.tokenizer.comparison(TEXT, "choice", False)
    start, between, after = map(len, words.texts)
    cuts = [start, 9 + between, 9 + after]
    naive = least = 0
    encoded, run = set(), set()
    for pair in permutations(range(3), 2):
        naive += 2 * vision_operations(model, 84) + decoder_operations(model, sum(cuts), heads=1)
        least += vision_operations(model, 84) * len(set(pair) - encoded)
        encoded |= set(pair)
        for depth, node in enumerate([(), pair[:1], pair]):
            if node not in run:
                least += decoder_operations(model, cuts[depth], before=sum(cuts[:depth]), heads=int(depth == 2))
            run.add(node)
    assert bound_of(vlm, model, case, 0) == pytest.approx(naive / least)


def test_watching_leaves_a_module_unchanged() -> None:
    import mlx.nn as nn

    from scripts.bench_common import Tokens, watched

    norm, tokens = nn.RMSNorm(4), Tokens()
    with watched(norm, tokens.see):
        norm(mx.ones((2, 3, 4)))
        norm(mx.ones((5, 1, 4)))
    norm(mx.ones((1, 1, 4)))
    assert (tokens.all, tokens.in_blocks) == (11, 6)
    assert type(norm) is nn.RMSNorm


@pytest.mark.slow
def test_machines() -> None:
    one, apart, two, *paper = result_of("machines")["cases"]
    assert [case["sent_bytes"] for case in (one, apart)] == [0, 0]
    assert one["tokens"] == apart["tokens"] == two["tokens"] > 0
    assert two["sent_bytes"] > 300_000
    assert 0 < two["wait_seconds"] < two["seconds"]
    assert one["share_of_ideal"] == 1
    assert len(paper) == 9
    # Two Macs send the gradient once: 40 million numbers at 7B.
    assert paper[0]["sent_bytes"] == pytest.approx(161.5e6, rel=0.01)
    assert all(0.9 < share < 1 for row in paper for share in row["shares"])
