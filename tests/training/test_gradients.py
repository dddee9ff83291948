"""The gradient of a step: what is computed together changes nothing, and less together takes less memory."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import Completions
from mlxpref.engine.lora import adapter_weights
from mlxpref.engine.vlm import VLM
from mlxpref.training.gradients import GradientResult, policy_gradient, policy_logprobs
from mlxpref.training.loss import LossInputs
from mlxpref.training.rewards import RewardMix
from tests.conftest import picture
from tests.tolerance import tolerance

GROUP = 4


def material(vlm: VLM, longest: int = 9) -> LossInputs:
    """Three groups of four completions of different lengths, one of them empty, with weights of all kinds."""
    sizes = [(84, 84), (140, 84), (56, 112)]
    prompts = [vlm.input(picture(i, size), picture(i + 9), f"{i} hats", "choice", True) for i, size in enumerate(sizes)]
    rng = np.random.default_rng(0)
    lengths = [longest, 2, 5, 1, 0, 6, 3, 4, 7, 2, longest, 8]
    completions = Completions.of([rng.integers(5, 200, length).tolist() for length in lengths])
    shape = completions.tokens.shape

    def drawn(*shape: int) -> mx.array:
        return mx.array(rng.random(shape).astype(np.float32))

    return LossInputs(
        prompts=prompts,
        completions=completions,
        mix=RewardMix.parse("soft"),
        mask=mx.array(completions.mask),
        weights=drawn(*shape) * mx.array(completions.mask),
        answer_weights=drawn(len(lengths)),
        advantages=drawn(len(lengths)) - 0.5,
        y=drawn(len(lengths)),
        reference=-5 * drawn(*shape),
        old=-5 * drawn(*shape),
    )


def settings(**changes: Any) -> TrainSettings:
    return replace(TrainSettings(reward="soft", kl=0.1, level="token"), **changes)


def assert_same(result: GradientResult, expected: GradientResult) -> None:
    assert float(np.array(result.loss)) == pytest.approx(float(np.array(expected.loss)), rel=1e-4)
    assert result.clipped.item() == expected.clipped.item()
    assert mx.abs(result.logprobs - expected.logprobs).max().item() < 1e-4  # type: ignore[operator]
    ours, theirs = dict(tree_flatten(result.gradient)), dict(tree_flatten(expected.gradient))
    assert set(ours) == set(theirs)
    allowed = max(tolerance(weight, 512, layers=4) for weight in theirs.values())
    for name, weight in theirs.items():
        assert np.abs(np.array(ours[name] - weight)).max() < allowed, name


@pytest.mark.parametrize(
    ("micro_batch", "recompute", "level"),
    [(1, True, "token"), (3, False, "sequence"), (3, True, "token"), (4, True, "sequence"), (8, False, "token")],
)
def test_micro_batches_change_nothing(trained: VLM, micro_batch: int, recompute: bool, level: str) -> None:
    inputs = material(trained)
    expected = policy_gradient(trained, inputs, settings(micro_batch=99, level=level))
    assert len(dict(tree_flatten(expected.gradient))) == len(adapter_weights(trained.model))
    options = settings(micro_batch=micro_batch, recompute=recompute, level=level)
    assert_same(policy_gradient(trained, inputs, options), expected)


def test_weights_are_unchanged(trained: VLM) -> None:
    inputs = material(trained)
    before = {name: np.array(weight) for name, weight in adapter_weights(trained.model).items()}
    policy_gradient(trained, inputs, settings(micro_batch=1))
    after = adapter_weights(trained.model)
    assert all(np.array_equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("micro_batch", [1, 99])
def test_logprobs_are_those_of_the_gradient(trained: VLM, micro_batch: int) -> None:
    inputs = material(trained)
    expected = policy_gradient(trained, inputs, settings(micro_batch=99)).logprobs
    result = policy_logprobs(trained, inputs, settings(micro_batch=micro_batch))
    assert mx.abs(result - expected).max().item() < 1e-4  # type: ignore[operator]


def test_smaller_micro_batches_take_less_memory(trained: VLM) -> None:
    inputs = material(trained, longest=60)
    peaks = []
    for micro_batch in (2, 12):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        policy_gradient(trained, inputs, settings(micro_batch=micro_batch, recompute=False))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 0.6 * peaks[1]
