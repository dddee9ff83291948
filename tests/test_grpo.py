"""Advantages and losses: equal to TRL's, and unbiased where they claim to be."""

import json
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.grpo import (
    group_advantages,
    kl_to_reference,
    leave_one_out_advantages,
    policy_objective,
    token_weights,
)
from mlxpref.objective import Targets, loss_of, targets_of
from mlxpref.rewards import EXACT_REWARDS
from mlxpref.scoring import Scores
from tests.conftest import GOLDEN

with np.load(GOLDEN / "grpo.npz", allow_pickle=False) as _file:
    TRL: dict[str, Any] = dict(_file)
CASES = json.loads(str(TRL["meta"]))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i]['loss_type']}-{CASES[i]['level']}-{i}")
def test_losses_and_gradients_equal_trls(number: int) -> None:
    case = CASES[number]
    mask = TRL["mask"]
    old, reference, advantages = (mx.array(TRL[name], dtype=mx.float64) for name in ("old", "ref", "adv"))
    weights = mx.array(token_weights(mask, case["loss_type"], case["max_len"]), dtype=mx.float64)

    def loss(logprobs: mx.array) -> mx.array:
        before = mx.stop_gradient(logprobs) if case["on_policy"] else old
        high = case["eps_high"] or case["eps"]
        surrogate, _ = policy_objective(logprobs, before, advantages, mx.array(mask), case["level"], case["eps"], high)
        return ((case["beta"] * kl_to_reference(logprobs, reference) - surrogate) * weights).sum()

    with mx.stream(mx.cpu):  # float64 runs on the CPU only
        value, gradient = mx.value_and_grad(loss)(mx.array(TRL["logps"], dtype=mx.float64))
        assert value.item() == pytest.approx(case["loss"], abs=1e-6)
        assert np.abs(np.array(gradient) - TRL["grads"][number]).max() < 1e-6


def test_group_advantages_are_standard_scores() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    advantages = group_advantages(rewards)
    assert advantages[0] == pytest.approx(np.array([0.5, -0.5, -0.5, 0.5]) / np.std(rewards[0], ddof=1), rel=1e-3)
    assert advantages[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(rewards, divide=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_leaving_one_out_compares_with_the_others() -> None:
    rewards = np.array([[1.0, 0.0, 0.25]])
    assert leave_one_out_advantages(rewards)[0] == pytest.approx([1 - 0.125, -0.625, 0.25 - 0.5])


def test_kl_is_never_negative_and_zero_only_for_equals() -> None:
    draw = np.random.default_rng(0)
    logprobs = mx.array(draw.normal(size=5000).astype(np.float32))
    for scale in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):  # rounding must not make it negative
        reference = logprobs + mx.array((scale * draw.normal(size=5000)).astype(np.float32))
        assert (kl_to_reference(logprobs, reference) >= 0).all().item()
    assert (kl_to_reference(logprobs, reference) > 0).all().item()
    assert kl_to_reference(logprobs, logprobs).tolist() == [0.0] * 5000


# A toy policy: one reasoning token out of three, then "1", "2" or something else.
REASONS, GROUP = 3, 3
REASON_LOGITS = np.array([0.3, -0.2, 0.1])
ANSWER_LOGITS = np.array([[0.5, -0.5, 0.0], [-1.0, 0.4, 0.2], [0.1, 0.0, -0.7]])


def expected_reward(reason: mx.array, answers: mx.array, reward: str, y: float) -> mx.array:
    """By enumeration of all reasoning strings; the answers are integrated out by the reward itself."""
    p, q = mx.softmax(reason), mx.softmax(answers, axis=-1)
    return (p * EXACT_REWARDS[reward](q[:, 0], q[:, 1], y, 0.2)).sum()  # type: ignore[operator, no-any-return]


def one_gradient(reasons: tuple[int, ...], reward: str, y: float) -> np.ndarray:
    """The gradient that one group of rollouts gives, through the code that trains."""
    settings = TrainSettings(reward=reward, group=GROUP, format_weight=0.2, loss_type="bnpo")
    q = np.exp(ANSWER_LOGITS) / np.exp(ANSWER_LOGITS).sum(axis=1, keepdims=True)
    earned = np.array([[EXACT_REWARDS[reward](q[r, 0], q[r, 1], y, 0.2) for r in reasons]], dtype=np.float64)
    targets = targets_of(
        [[1] * GROUP], np.ones((1, GROUP), bool), leave_one_out_advantages(earned), np.array([y]), [0], settings
    )

    def loss(reason: mx.array, answers: mx.array) -> mx.array:
        rows = mx.array(reasons)
        logprobs = (reason - mx.logsumexp(reason))[rows][:, None]
        labels = (answers - mx.logsumexp(answers, axis=-1, keepdims=True))[rows][:, :2]
        return loss_of(Scores(logprobs, labels), targets, settings)[0]

    gradients = mx.grad(loss, argnums=(0, 1))(mx.array(REASON_LOGITS), mx.array(ANSWER_LOGITS))
    # Two tokens a rollout share its weight: reasoning and answer position.
    return -2 * np.concatenate([np.array(g).reshape(-1) for g in gradients])


def hard_gradient(reasons: tuple[int, ...], answers: tuple[int, ...], y: float) -> np.ndarray:
    """The gradient of sampled answers with the hard reward, leave one out as well, by the score function."""
    p = np.exp(REASON_LOGITS) / np.exp(REASON_LOGITS).sum()
    q = np.exp(ANSWER_LOGITS) / np.exp(ANSWER_LOGITS).sum(axis=1, keepdims=True)
    earned = np.array([[{0: y + 0.2, 1: 1 - y + 0.2, 2: 0.0}[a] for a in answers]])
    advantages = leave_one_out_advantages(earned)[0]
    total = np.zeros(REASONS + 3 * REASONS)
    for reason, answer, advantage in zip(reasons, answers, advantages, strict=True):
        total[:REASONS] += advantage * (np.eye(REASONS)[reason] - p)
        part = slice(REASONS + 3 * reason, REASONS + 3 * reason + 3)
        total[part] += advantage * (np.eye(3)[answer] - q[reason])
    return total / GROUP


@pytest.mark.parametrize("reward", ["soft", "brier"])
@pytest.mark.parametrize("y", [1.0, 0.3])
def test_the_gradient_is_that_of_the_expected_reward(reward: str, y: float) -> None:
    exact = mx.grad(lambda r, a: expected_reward(r, a, reward, y), argnums=(0, 1))(
        mx.array(REASON_LOGITS), mx.array(ANSWER_LOGITS)
    )
    expected = np.concatenate([np.array(g).reshape(-1) for g in exact])
    p = np.exp(REASON_LOGITS) / np.exp(REASON_LOGITS).sum()
    mean, second = np.zeros_like(expected), 0.0
    for reasons in product(range(REASONS), repeat=GROUP):
        gradient = one_gradient(reasons, reward, y)
        mean += p[list(reasons)].prod() * gradient
        second += p[list(reasons)].prod() * (gradient**2).sum()
    assert mean == pytest.approx(expected, abs=1e-6)
    if reward == "soft" and y == 1.0:
        assert second - (mean**2).sum() < 0.5 * hard_variance(y, expected)


def hard_variance(y: float, expected: np.ndarray) -> float:
    """The variance of the gradient with sampled answers; its mean is checked to be the same."""
    p = np.exp(REASON_LOGITS) / np.exp(REASON_LOGITS).sum()
    q = np.exp(ANSWER_LOGITS) / np.exp(ANSWER_LOGITS).sum(axis=1, keepdims=True)
    mean, second = np.zeros_like(expected), 0.0
    for reasons in product(range(REASONS), repeat=GROUP):
        for answers in product(range(3), repeat=GROUP):
            chance = p[list(reasons)].prod() * np.prod([q[r, a] for r, a in zip(reasons, answers, strict=True)])
            gradient = hard_gradient(reasons, answers, y)
            mean += chance * gradient
            second += chance * (gradient**2).sum()
    assert mean == pytest.approx(expected, abs=1e-6)
    return float(second - (mean**2).sum())


def test_a_group_in_which_all_agree_still_gets_answer_gradient() -> None:
    gradient = one_gradient((1, 1, 1), "soft", 1.0)
    assert np.abs(gradient[:REASONS]).max() < 1e-7
    assert gradient[REASONS + 3] > 0.01  # "1" after this reasoning becomes likelier


def test_groups_that_are_left_out_stay_in_the_count() -> None:
    settings = TrainSettings(reward="soft", loss_type="dapo")
    lengths, answered = [[2, 3], [4, 1]], np.array([[True, False], [True, True]])
    arguments = (lengths, answered, np.ones((2, 2)), np.array([1.0, 0.0]))
    both: Targets = targets_of(*arguments, [0, 1], settings)
    one: Targets = targets_of(*arguments, [1], settings)
    assert np.array(both.weights).sum() + np.array(both.answer_weights).sum() == pytest.approx(1)
    assert np.array(one.answer_weights).tolist() == np.array(both.answer_weights)[2:].tolist()
    assert np.array(one.weights).tolist() == np.array(both.weights)[2:].tolist()
    assert np.array(both.answer_weights).tolist() == pytest.approx([1 / 13, 0, 1 / 13, 1 / 13])
