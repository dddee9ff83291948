"""The bounds on one operation and one evaluation hold, by counting: a Mac ends GPU work that takes long."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.checkpoints import bounds
from mlxpref.engine import decoder
from mlxpref.engine.completion import Sampling
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM
from mlxpref.training import gradients
from tests.conftest import picture, tiny_model
from tests.tolerance import tolerance
from tests.training.test_gradients import GROUP, material, settings


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Callable[..., int]], list[int]]:
    """Counts what a function of a module is given, summed between two evaluations."""

    def count(module: Any, name: str, size: Callable[..., int]) -> list[int]:
        sums, whole, evaluate = [0], getattr(module, name), mx.eval

        def counting(*arguments: Any, **options: Any) -> Any:
            sums[-1] += size(*arguments, **options)
            return whole(*arguments, **options)

        def evaluating(*arrays: Any) -> None:
            evaluate(*arrays)
            if sums[-1]:
                sums.append(0)

        monkeypatch.setattr(module, name, counting)
        monkeypatch.setattr(mx, "eval", evaluating)
        return sums

    return count


def tokens_of(_: Any, block: decoder.Block, *others: Any) -> int:
    return int(block.branch_ids.size)


@pytest.mark.parametrize("way", ["whole", "prefix cache"])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_are_evaluated_piece_by_piece(
    way: str, rows: int, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., list[int]]
) -> None:
    vlm = tiny_model("qwen3_vl")
    inputs = [vlm.input(picture(i, (336, 336)), picture(9, (336, 336)), "a hat", "choice", True) for i in range(rows)]
    prefill = PrefixCache(vlm).prefill if way == "prefix cache" else vlm.prefill
    expected = np.array(prefill(inputs)[1])
    monkeypatch.setattr(bounds, "TARGET_TOKENS", 32)
    monkeypatch.setattr(bounds, "MIN_COLUMNS", 16)
    sums = counted(decoder, "run_layers", tokens_of)
    prefill = PrefixCache(vlm).prefill if way == "prefix cache" else vlm.prefill
    result = np.array(prefill(inputs)[1])
    assert sum(sums) >= len(inputs[0]) > 100
    assert max(sums) <= 2 * max(32, rows * 16)  # one under way, and one behind it
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(result), finite)
    assert np.abs(result[finite] - expected[finite]).max() < tolerance(expected, len(inputs[0]), layers=4)


def test_a_micro_batch_bounds_an_evaluation(trained: VLM, counted: Callable[..., list[int]]) -> None:
    inputs = material(trained)
    for micro_batch in (1, 4):
        sums = counted(gradients, "completion_logprobs", lambda vlm, inputs, part, *others: len(part.lengths))
        gradients.policy_gradient(trained, inputs, settings(micro_batch=micro_batch))
        assert sum(sums) == len(inputs.completions.lengths) + len(inputs.prompts)  # and each is read at once, too
        assert max(sums) <= micro_batch + max(1, micro_batch // GROUP)


def test_few_steps_run_after_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads what was written every few steps, so that no more than these are handed to the device ahead."""
    vlm = tiny_model("qwen2_vl")
    steps: list[int] = []
    extend = vlm.extend
    monkeypatch.setattr(vlm, "extend", lambda *arguments: (steps.append(1), extend(*arguments))[1])
    monkeypatch.setattr(vlm, "eos_ids", frozenset(range(0, 350, 12)))
    comparison = vlm.input(picture(0), picture(1), "a hat", "choice", True)
    sampling = Sampling(samples=3, temperature=1.0, max_tokens=200, close=False)
    (group,) = roll_out(vlm, [comparison], sampling, [(0,)])
    longest = max(len(rollout.tokens) for rollout in group)
    assert longest < 200
    assert longest <= len(steps) < longest + bounds.STEPS_TOGETHER
