"""Mixtures of experts: what mlx-vlm computes, and in the update the experts that the rollout met."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.experts import NO_CHOICE, run_experts
from mlxpref.engine.logprobs import Completions, completion_logprobs, prefill
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput
from tests.conftest import picture

pytestmark = pytest.mark.parametrize("family", ["qwen3_vl_moe"], indirect=True)
SAMPLING = Sampling(3, 1.0, 9, until="end", close=False, keep_experts=True)


def written(vlm: VLM) -> tuple[list[ComparisonInput], list[Rollout]]:
    """Two comparisons and three completions of each."""
    inputs = [vlm.input(picture(i), picture(i + 5), f"{i} hats", "choice", True) for i in range(2)]
    groups = roll_out(vlm, inputs, SAMPLING, [(0,), (1,)])
    return inputs, [rollout for group in groups for rollout in group]


def completions_of(rollouts: list[Rollout]) -> Completions:
    return Completions.of([each.tokens for each in rollouts], (), [each.experts for each in rollouts])


def test_a_mixture_equals_mlx_vlms(tiny_vlm: VLM) -> None:
    states = mx.random.normal((90, 64), key=mx.random.key(0))  # enough that it sorts them by expert
    for layer in tiny_vlm.decoder.layers:
        ours, experts, others = run_experts(layer.mlp, states)
        assert experts.shape == (90, 2)
        assert others is None
        assert mx.abs(ours - layer.mlp(states)).max().item() < 1e-5


def test_experts_are_kept_with_their_tokens(tiny_vlm: VLM) -> None:
    _, rollouts = written(tiny_vlm)
    assert {len(rollout.tokens) for rollout in rollouts} == {9}
    for rollout in rollouts:
        assert rollout.experts is not None
        assert rollout.experts.shape == (9, 2, 2)  # tokens, layers, experts a token
        assert rollout.experts.min() >= 0
        assert rollout.experts.max() < 8
    without = replace(SAMPLING, keep_experts=False)
    inputs, _ = written(tiny_vlm)
    assert roll_out(tiny_vlm, inputs, without, [(0,), (1,)])[0][0].experts is None


@pytest.mark.parametrize("recompute", [True, False])
def test_the_update_meets_the_experts_of_the_rollout(trained: VLM, recompute: bool) -> None:
    inputs, rollouts = written(trained)
    completions = completions_of(rollouts)
    found = completion_logprobs(trained, prefill(trained, inputs), completions, recompute=recompute)
    sampled = np.array([rollout.logprobs for rollout in rollouts])
    assert found.other_experts is not None
    assert found.other_experts.item() == 0
    assert np.abs(np.array(found.logprobs) - sampled).max() < 1e-5
    assert completion_logprobs(trained, prefill(trained, inputs), Completions.of([[5]] * 6)).other_experts is None


@pytest.mark.parametrize("recompute", [True, False])
def test_given_experts_are_obeyed_and_counted(trained: VLM, recompute: bool) -> None:
    inputs, rollouts = written(trained)
    completions = completions_of(rollouts)
    assert completions.experts is not None
    changed = completions.experts.copy()  # (E, R, T, K)
    changed[1, 0, 2] = [i for i in range(8) if i not in changed[1, 0, 2]][:2]
    changed[0, 4, 0] = NO_CHOICE

    def logprobs(_: nn.Module, experts: np.ndarray | None) -> tuple[mx.array, mx.array]:
        found = completion_logprobs(
            trained, prefill(trained, inputs), replace(completions, experts=experts), recompute=recompute
        )
        return found.logprobs.sum(), found.logprobs if found.other_experts is None else found.other_experts

    gradient = nn.value_and_grad(trained.model, logprobs)
    (total, others), changed_gradient = gradient(trained.model, changed)
    (free_total, _), free_gradient = gradient(trained.model, None)
    (same_total, none), same_gradient = gradient(trained.model, completions.experts)
    assert others.item() == 2
    assert none.item() == 0
    assert abs(total.item() - free_total.item()) > 1e-2
    assert abs(same_total.item() - free_total.item()) < 1e-4
    pairs = zip(
        *(dict(tree_flatten(each)).values() for each in (same_gradient, free_gradient, changed_gradient)), strict=True
    )
    for same, free, other in pairs:
        assert mx.abs(same - free).max().item() < 1e-4 * mx.abs(free).max().item()
        assert mx.abs(other - free).max().item() > 1e-4 * mx.abs(free).max().item()
