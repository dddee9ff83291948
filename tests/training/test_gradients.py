"""The gradient of a step: what is computed together changes nothing, and less together takes less memory."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.config import TrainSettings
from mlxpref.engine.experts import has_experts
from mlxpref.engine.logprobs import Completions
from mlxpref.engine.lora import adapter_weights
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.training.gradients import GradientResult, policy_gradient, reference_scores, with_reference
from mlxpref.training.loss import LossInputs
from mlxpref.training.rewards import RewardMix
from tests.conftest import picture
from tests.tolerance import tolerance

GROUP = 4


def vlm_input(vlm: VLM, number: int, size: tuple[int, int], think: bool) -> ComparisonInput:
    return vlm.input(picture(number, size), picture(number + 9), f"{number} hats", "choice", think)


def material(vlm: VLM, longest: int = 9, with_experts: bool = False) -> LossInputs:
    """Three groups of four completions of different lengths, one of them empty, with weights of all kinds.

    `with_experts` gives the tokens of a mixture experts that it would not choose.
    """
    sizes = [(84, 84), (140, 84), (56, 112)]
    prompts = [vlm_input(vlm, i, size, think=True) for i, size in enumerate(sizes)]
    rng = np.random.default_rng(0)
    lengths = [longest, 2, 5, 1, 0, 6, 3, 4, 7, 2, longest, 8]
    rows = [rng.integers(5, 200, length).tolist() for length in lengths]
    layers = sum(map(has_experts, vlm.decoder.layers)) if with_experts else 0
    choices = [rng.permuted([[range(8)] * layers] * length, axis=-1) for length in lengths if layers and length]
    given = iter(np.array(choice[..., :2], np.int32) for choice in choices)
    experts = [next(given, None) if length else None for length in lengths]
    completions = Completions.of(rows, (), experts)
    shape = completions.tokens.shape

    def drawn(*shape: int) -> mx.array:
        return mx.array(rng.random(shape).astype(np.float32))

    width = int(vlm.decoder.embed_tokens.weight.shape[1])
    no_thinking = Completions.of([vlm.tokenizer.at_once_ids] * len(prompts))
    nothing = mx.zeros(no_thinking.tokens.shape)
    read = LossInputs(
        prompts=prompts,
        completions=no_thinking,
        mix=RewardMix.parse("brier"),
        mask=nothing > 0,
        weights=nothing,
        answer_weights=drawn(len(prompts)),
        advantages=mx.zeros(len(prompts)),
        y=drawn(len(prompts)),
        form=drawn(len(prompts)),
        reference_states=drawn(len(prompts), width),
        is_read=True,
    )
    return LossInputs(
        prompts=prompts,
        completions=completions,
        mix=RewardMix.parse("soft"),
        mask=mx.array(completions.mask),
        weights=drawn(*shape) * mx.array(completions.mask),
        answer_weights=drawn(len(lengths)),
        advantages=drawn(len(lengths)) - 0.5,
        y=drawn(len(lengths)),
        form=drawn(len(lengths)),
        reference=-5 * drawn(*shape),
        reference_states=drawn(len(lengths), width),
        other_order=drawn(len(lengths), 3),
        read=read,
        old=-5 * drawn(*shape),
    )


def settings(**changes: Any) -> TrainSettings:
    return replace(TrainSettings(reward="soft", kl=0.1, agreement=0.5, level="token"), **changes)


def assert_same(result: GradientResult, expected: GradientResult) -> None:
    assert float(np.array(result.loss)) == pytest.approx(float(np.array(expected.loss)), rel=1e-4)
    assert np.array(result.measurements) == pytest.approx(np.array(expected.measurements), rel=1e-4)
    assert all(np.array(expected.measurements[:3]) > 0)
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
    inputs = material(trained, with_experts=True)
    expected = policy_gradient(trained, inputs, settings(micro_batch=99, level=level))
    assert len(dict(tree_flatten(expected.gradient))) == len(adapter_weights(trained.model))
    assert (expected.measurements[3].item() > 0) == (inputs.completions.experts is not None)
    options = settings(micro_batch=micro_batch, recompute=recompute, level=level)
    assert_same(policy_gradient(trained, inputs, options), expected)


def test_weights_are_unchanged(trained: VLM) -> None:
    inputs = material(trained)
    before = {name: np.array(weight) for name, weight in adapter_weights(trained.model).items()}
    policy_gradient(trained, inputs, settings(micro_batch=1))
    after = adapter_weights(trained.model)
    assert all(np.array_equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("micro_batch", [1, 99])
def test_the_reference_is_what_the_gradient_sees(trained: VLM, micro_batch: int) -> None:
    """From itself the policy diverges nowhere: neither at a token nor at an answer, read at once or not."""
    inputs = material(trained)
    expected = policy_gradient(trained, inputs, settings(micro_batch=99)).logprobs
    result = with_reference(inputs, *reference_scores(trained, inputs, settings(micro_batch=micro_batch)))
    assert result.reference is not None
    assert mx.abs(result.reference - expected).max().item() < 1e-4  # type: ignore[operator]
    divergence = policy_gradient(trained, result, settings(micro_batch=99)).measurements[1]
    assert abs(divergence.item()) < 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_answer_read_at_once_is_trained_as_without_thinking(trained: VLM, kl: float) -> None:
    """Behind the thinking comparison's keys and values: the loss and gradient of a step with --no-think."""
    inputs = material(trained)
    assert inputs.read
    nothing = mx.zeros(inputs.answer_weights.shape)
    silent = replace(inputs, answer_weights=nothing, weights=nothing[:, None] * inputs.weights)
    result = policy_gradient(trained, silent, settings(kl=kl))
    pictures = [(84, 84), (140, 84), (56, 112)]
    prompts = [vlm_input(trained, i, size, think=False) for i, size in enumerate(pictures)]
    empty = replace(inputs.read, prompts=prompts, completions=Completions.of([[]] * 3), mask=mx.zeros((3, 0)) > 0)
    alone = policy_gradient(trained, replace(empty, weights=mx.zeros((3, 0)), is_read=False), settings(kl=kl))
    assert float(np.array(result.loss)) == pytest.approx(float(np.array(alone.loss)), rel=1e-4)
    ours, theirs = dict(tree_flatten(result.gradient)), dict(tree_flatten(alone.gradient))
    allowed = max(tolerance(weight, 512, layers=4) for weight in theirs.values())
    assert max(float(mx.abs(weight).max()) for weight in theirs.values()) > 100 * allowed
    for name, weight in theirs.items():
        assert float(mx.abs(ours[name] - weight).max()) < allowed, name


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
