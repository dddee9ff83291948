"""Advantages and losses: equal to TRL's, and unbiased where they claim to be."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.engine.completion import Rollout
from mlxpref.engine.logprobs import Logprobs
from mlxpref.preferences import Preference
from mlxpref.training.group_rewards import GroupRewards, reward_groups
from mlxpref.training.grpo import (
    group_advantages,
    kl_to_reference,
    leave_one_out_advantages,
    policy_objective,
    token_weights,
)
from mlxpref.training.loss import LossInputs, loss_inputs, step_loss
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict
from tests.conftest import GOLDEN, read_verdict
from tests.training.test_group_rewards import mix_of

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


def test_golden_cases_cover_all_settings() -> None:
    kinds = {(c["loss_type"], c["level"], c["on_policy"], c["beta"] > 0, c["eps_high"] is not None) for c in CASES}
    assert len(kinds) == len(CASES) == 4 * 2 * 2 * 2 * 2
    assert not TRL["mask"].all(axis=1).all()
    assert (TRL["mask"].sum(axis=1) == 0).any()  # an empty completion
    ratio, positive = np.exp(TRL["logps"] - TRL["old"]), TRL["adv"][:, None] > 0
    low, between, high = ratio < 0.8, (ratio > 1.2) & (ratio <= 1.28), ratio > 1.28
    for clipped in (low & ~positive, between & positive, high & positive):
        assert (clipped & TRL["mask"]).any()  # both bounds are reached, and so is what the asymmetric one allows


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_tokens_have_no_gradient(level: Any) -> None:
    """The golden cases check neither the clip fraction nor, at the level of sequences, a ratio that is clipped."""
    mask, advantages = mx.array(TRL["mask"]), mx.array(TRL["adv"].astype(np.float32))
    old = mx.array(TRL["old"].astype(np.float32))

    def objective(logprobs: mx.array) -> tuple[mx.array, mx.array]:
        surrogate, clipped = policy_objective(logprobs, old, advantages, mask, level, 0.02, 0.03)
        return (surrogate * mask).sum(), clipped

    (value, clipped), gradient = mx.value_and_grad(objective)(mx.array(TRL["logps"].astype(np.float32)))
    result, expected = (np.array(gradient) == 0)[TRL["mask"]], np.array(clipped)[TRL["mask"]]
    assert result.tolist() == expected.tolist()
    assert 0 < expected.sum() < expected.size
    difference, lengths = (TRL["logps"] - TRL["old"]) * TRL["mask"], TRL["mask"].sum(axis=1, keepdims=True)
    if level == "sequence":
        difference = difference.sum(axis=1, keepdims=True) / np.maximum(lengths, 1)
    ratio, advantage = np.exp(difference), TRL["adv"][:, None]
    objectives = np.minimum(ratio * advantage, np.clip(ratio, 0.98, 1.03) * advantage)
    assert value.item() == pytest.approx((objectives * TRL["mask"]).sum(), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_empty_completions_count(loss_type: Any) -> None:
    mask = TRL["mask"]
    nonempty = mask.any(axis=1)
    assert (nonempty.sum(), len(nonempty)) == (7, 8)
    with_it, without = token_weights(mask, loss_type, 12), token_weights(mask[nonempty], loss_type, 12)
    share = 7 / 8 if loss_type in ("grpo", "dr_grpo") else 1.0
    assert with_it[nonempty] == pytest.approx(share * without)
    assert not with_it[~nonempty].any()
    nothing = token_weights(np.zeros_like(mask), loss_type, 12)
    assert np.isfinite(nothing).all()
    assert not nothing.any()


def test_dr_grpo_weights() -> None:
    """The longest that a completion may be, not the longest that there is: golden cases have one for both."""
    mask = TRL["mask"]
    assert token_weights(mask, "dr_grpo", 48)[mask] == pytest.approx(1 / (8 * 48))
    assert token_weights(mask[:, :3], "dr_grpo", 48)[mask[:, :3]] == pytest.approx(1 / (8 * 48))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_losses_are_of_the_whole_step(loss_type: Any, batches: int) -> None:
    """Ours adds up over micro-batches to what one batch gives. TRL's bnpo does not: it is a mean of means."""
    mask = TRL["mask"]
    terms = np.repeat(np.arange(1.0, 9.0)[:, None], mask.shape[1], axis=1)
    weights = token_weights(mask, loss_type, 12)
    whole = (terms * weights).sum()
    parts = [slice(start, start + 8 // batches) for start in range(0, 8, 8 // batches)]
    ours = sum((terms[part] * weights[part]).sum() for part in parts)
    assert ours == pytest.approx(whole)

    def in_trl(part: slice) -> float:
        """A micro-batch's contribution with gradients accumulated; dapo counts the tokens of all of them."""
        terms_of, mask_of = terms[part] * mask[part], mask[part]
        if loss_type == "grpo":
            return float((terms_of.sum(axis=1) / np.maximum(mask_of.sum(axis=1), 1)).mean()) / batches
        if loss_type == "bnpo":
            return float(terms_of.sum() / max(mask_of.sum(), 1)) / batches
        if loss_type == "dr_grpo":
            return float(terms_of.sum() / (len(mask_of) * 12)) / batches
        return float(terms_of.sum() / mask.sum())

    theirs = sum(map(in_trl, parts))
    if loss_type == "bnpo" and batches > 1:
        assert abs(theirs - whole) > 0.01 * abs(whole)
    else:
        assert theirs == pytest.approx(whole)


def test_group_advantages_are_standard_scores() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    advantages = group_advantages(rewards)
    assert advantages[0] == pytest.approx(np.array([0.5, -0.5, -0.5, 0.5]) / np.std(rewards[0], ddof=1), rel=1e-3)
    assert advantages[1].tolist() == [0, 0, 0, 0]


def test_leaving_one_out_compares_with_the_others() -> None:
    rewards = np.array([[1.0, 0.0, 0.25]])
    assert leave_one_out_advantages(rewards)[0] == pytest.approx([1 - 0.125, -0.625, 0.25 - 0.5])


def test_kl() -> None:
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
OWN_REWARDS = np.array([0.3, -0.5, 0.9])
"""What a reward of one's own gives to each reasoning token."""
ANSWER_LOGITS = np.array([[0.5, -0.5, 0.0], [-1.0, 0.4, 0.2], [0.1, 0.0, -0.7]])
READ_LOGITS = np.array([0.2, 0.3, -0.1])
"""Of the answer that is read at once."""
TEXTS = [f"<think>{reason}</think><answer>" for reason in ("red", "blue", "")]
"""The last one has no reasons, so that its form is not right."""
FORM = 0.2 * np.array([1.0, 1.0, 0.0])
READ_WEIGHT = 0.7


def earned(mix: RewardMix, q: mx.array, y: float, form: mx.array) -> mx.array:
    """What the distributions (N, 3) of answers earn, with the answer integrated out."""
    mass = q[:, 0] + q[:, 1]
    return mix.integrated(mass, q[:, 0] / mass, mx.array(y), form)


def expected_reward(reason: mx.array, answers: mx.array, read: mx.array, reward: str, y: float) -> mx.array:
    """By enumeration of all reasoning strings; the answers are integrated out by the reward itself."""
    p, q = mx.softmax(reason), mx.softmax(answers, axis=-1)
    mix = RewardMix.parse(reward)
    own = sum(part.weight for part in mix.parts if part.name in mix.custom) * mx.array(OWN_REWARDS)
    assert mix.reading
    at_once = earned(mix.reading, mx.softmax(read)[None], y, mx.array([0.2]))[0]
    return (p * (earned(mix, q, y, mx.array(FORM)) + own)).sum() + READ_WEIGHT * at_once


def groups_of(rollouts: list[list[Rollout]], shares: list[float]) -> list[RolloutGroup]:
    """Groups of rollouts, whose comparisons have these shares of people for the first image."""
    place = Path()
    comparisons = [TrainingComparison(place, place, "", Preference("", place, place, y), y, ()) for y in shares]
    prompt: Any = object()
    return [
        RolloutGroup(comparison, prompt, group, [False] * len(group))
        for comparison, group in zip(comparisons, rollouts, strict=True)
    ]


def one_gradient(reasons: tuple[int, ...], reward: str, y: float) -> np.ndarray:
    """The gradient that one group of rollouts gives, through the code that trains."""
    settings = TrainSettings(reward=reward, group=GROUP, format_weight=0.2, loss_type="bnpo", read_weight=READ_WEIGHT)
    q = np.exp(ANSWER_LOGITS) / np.exp(ANSWER_LOGITS).sum(axis=1, keepdims=True)
    groups = groups_of([[Rollout((r,), (0.0,), read_verdict(TEXTS[r], *q[r, :2])) for r in reasons]], [y])
    mix = mix_of(reward, lambda _, group: [OWN_REWARDS[TEXTS.index(v.text)] for v in group])
    inputs = loss_inputs(groups, reward_groups(groups, settings, mix), settings, mix, at_once=(7, 8))
    assert inputs.read
    assert inputs.read.completions.tokens.tolist() == [[7, 8]]

    def loss(reason: mx.array, answers: mx.array, read: mx.array) -> mx.array:
        rows = mx.array(reasons)
        logprobs = (reason - mx.logsumexp(reason))[rows][:, None]
        labels = (answers - mx.logsumexp(answers, axis=-1, keepdims=True))[rows][:, :2]
        at_once = Logprobs(mx.zeros((1, 2)) - 3, (read - mx.logsumexp(read))[None, :2])
        assert inputs.read
        return step_loss(Logprobs(logprobs, labels), inputs, settings)[0] + step_loss(at_once, inputs.read, settings)[0]

    logits = [mx.array(each) for each in (REASON_LOGITS, ANSWER_LOGITS, READ_LOGITS)]
    gradients = mx.grad(loss, argnums=(0, 1, 2))(*logits)
    # Two tokens a rollout share its weight: reasoning and answer position.
    return -2 * np.concatenate([np.array(g).reshape(-1) for g in gradients])


def hard_gradient(reasons: tuple[int, ...], answers: tuple[int, ...], y: float) -> np.ndarray:
    """The gradient of sampled answers with the hard reward, leave one out as well, by the score function."""
    p = np.exp(REASON_LOGITS) / np.exp(REASON_LOGITS).sum()
    q = np.exp(ANSWER_LOGITS) / np.exp(ANSWER_LOGITS).sum(axis=1, keepdims=True)
    both = zip(reasons, answers, strict=True)
    rewards = np.array([[{0: y + FORM[r], 1: 1 - y + FORM[r], 2: 0.0}[a] for r, a in both]])
    advantages = leave_one_out_advantages(rewards)[0]
    total = np.zeros(REASONS + 3 * REASONS)
    for reason, answer, advantage in zip(reasons, answers, advantages, strict=True):
        total[:REASONS] += advantage * (np.eye(REASONS)[reason] - p)
        part = slice(REASONS + 3 * reason, REASONS + 3 * reason + 3)
        total[part] += advantage * (np.eye(3)[answer] - q[reason])
    return total / GROUP


@pytest.mark.parametrize("reward", ["soft", "brier", "soft=0.5,brier=2", "soft=0.7,own.py:f=0.4"])
@pytest.mark.parametrize("y", [1.0, 0.3])
def test_gradient_of_the_expected_reward(reward: str, y: float) -> None:
    exact = mx.grad(lambda *logits: expected_reward(*logits, reward, y), argnums=(0, 1, 2))(
        *(mx.array(each) for each in (REASON_LOGITS, ANSWER_LOGITS, READ_LOGITS))
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
        assert second - (mean**2).sum() < 0.5 * hard_variance(y, expected[: -len(READ_LOGITS)])


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


def test_answer_gradient_of_a_group_that_agrees() -> None:
    gradient = one_gradient((1, 1, 1), "soft", 1.0)
    assert np.abs(gradient[:REASONS]).max() < 1e-7
    assert gradient[REASONS + 3] > 0.01  # "1" after this reasoning becomes likelier


def inputs_of(
    lengths: list[list[int]], settings: TrainSettings, has_gradient: tuple[bool, bool] = (True, True), **rewards: Any
) -> LossInputs:
    """Of two groups of two rollouts with these lengths, of which one has no answer."""
    groups = groups_of([[Rollout((5,) * n, (0.0,) * n, Verdict("")) for n in group] for group in lengths], [1.0, 0.0])
    every = np.ones((2, 2), bool)
    rewarded = GroupRewards(
        rewards=np.ones((2, 2)),
        components={"soft": np.ones((2, 2))},
        advantages=np.ones((2, 2)),
        correct=every,
        well_formed=every,
        answered=np.array([[True, False], [True, True]]),
        in_loss=rewards.get("in_loss", every),
        has_advantage=every[0],
        has_gradient=np.array(has_gradient),
    )
    return loss_inputs(groups, rewarded, settings, RewardMix.parse(settings.reward))


def test_groups_without_a_gradient_count() -> None:
    settings = TrainSettings(reward="soft", loss_type="dapo", read_weight=0.0)
    both, one = (inputs_of([[2, 3], [4, 1]], settings, (first, True)) for first in (True, False))
    assert (len(both.prompts), len(one.prompts)) == (2, 1)
    assert np.array(both.weights).sum() + np.array(both.answer_weights).sum() == pytest.approx(1)
    assert np.array(one.answer_weights).tolist() == np.array(both.answer_weights)[2:].tolist()
    assert np.array(one.weights).tolist() == np.array(both.weights)[2:].tolist()
    assert np.array(both.answer_weights).tolist() == pytest.approx([1 / 13, 0, 1 / 13, 1 / 13])
    assert (both.step_tokens, one.step_tokens) == (10, 5)
    assert (both.step_positions, one.step_positions) == (13, 7)


def test_a_group_without_a_gradient_is_still_read() -> None:
    settings = TrainSettings(reward="soft", read_weight=0.5)
    both, one = (inputs_of([[2, 3], [4, 1]], settings, (first, True)) for first in (True, False))
    assert both.read
    assert one.read
    assert one.completions.lengths.tolist() == [0, 0, 4, 1]
    assert not np.array(one.weights)[:2].any()
    assert not np.array(one.answer_weights)[:2].any()
    for inputs in (both, one):  # half of what the two answer positions of a group weigh
        assert inputs.read
        assert np.array(inputs.read.answer_weights).tolist() == pytest.approx([0.5 * 2 / 13] * 2)
        assert np.array(inputs.read.y).tolist() == [1.0, 0.0]
    assert (both.step_positions, one.step_positions) == (15, 9)
    alone = inputs_of([[2, 3], [4, 1]], settings, (False, False))
    assert alone.read
    assert len(alone.prompts) == len(alone.read.prompts) == 2
    for off in (replace(settings, read_weight=0.0), replace(settings, think=False), replace(settings, reward="score")):
        assert inputs_of([[2, 3], [4, 1]], off).read is None


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_rollouts_outside_the_loss(loss_type: Any) -> None:
    settings = TrainSettings(reward="soft", loss_type=loss_type, max_tokens=4)
    masked = inputs_of([[2, 3], [4, 1]], settings, in_loss=np.array([[True, False], [True, True]]))
    empty = inputs_of([[2, 0], [4, 1]], settings)
    for name in ("mask", "weights", "answer_weights"):
        assert np.array(getattr(masked, name)).tolist() == np.array(getattr(empty, name)).tolist(), name
    assert not np.array(masked.mask)[1].any()
