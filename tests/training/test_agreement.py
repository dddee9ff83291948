"""Agreement with oneself: both orders in a step, and the gradient of the expectation over two completions."""

from itertools import product
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.engine.completion import Rollout
from mlxpref.engine.logprobs import Logprobs
from mlxpref.engine.vlm import ComparisonInput, load_vlm
from mlxpref.errors import ConfigError
from mlxpref.preferences import Preference
from mlxpref.training.group_rewards import reward_groups
from mlxpref.training.loss import LossInputs, loss_inputs, step_loss
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup
from mlxpref.training.sampler import ComparisonSampler, TrainingComparison
from mlxpref.training.trainer import Trainer
from mlxpref.verdict import Verdict
from tests.conftest import GOLDEN, picture, read_verdict

# A toy policy: in each of two orders one reasoning token out of three, then "1", "2" or something else. After the last
# reason no answer is reached.
GROUP, WEIGHT, LONGEST = 2, 0.8, 1
REASON_LOGITS = np.array([[0.3, -0.2, 0.1], [-0.4, 0.2, 0.5]], np.float32)
ANSWER_LOGITS = np.array([[[0.5, -0.5, 0.0], [-1.0, 0.4, 0.2]], [[0.8, 0.1, -0.3], [0.2, -0.9, 0.4]]], np.float32)
ANSWERED, UNANSWERED = "<think>so</think><answer>", "<think>so"


def expected(reasons: mx.array, answers: mx.array, reward: str, share: float, format_weight: float) -> mx.array:
    """What both orders earn in expectation, with the agreement once, by enumeration; `share` prefers a."""
    chance, q = mx.softmax(reasons, axis=-1), mx.softmax(answers, axis=-1)  # (2, 3), (2, 2, 3)
    mix, total, p_a = RewardMix.parse(reward), mx.array(0.0), []
    for order, y in enumerate((share, 1 - share)):
        mass = q[order, :, 0] + q[order, :, 1]
        p_first = q[order, :, 0] / mass
        earned = mix.integrated(mass, p_first, mx.array(y), mx.array(format_weight))
        total = total + (chance[order, :2] * earned).sum()
        p_a.append(p_first if order == 0 else 1 - p_first)
    agreed = 1 - (p_a[0][:, None] - p_a[1]) ** 2  # (reasons of one order, reasons of the other)
    return total + WEIGHT * (chance[0, :2, None] * chance[1, :2] * agreed).sum()


def pair_groups(rollouts: list[list[Rollout]], share: float = 0.9) -> list[RolloutGroup]:
    """The two groups of a preference, with a shown first and then second."""
    place, prompt = Path(), cast(ComparisonInput, object())
    preference = Preference("", place, place, share)
    comparisons = [TrainingComparison(place, place, "", preference, y, ()) for y in (share, 1 - share)]
    return [
        RolloutGroup(comparison, prompt, group, [False] * len(group))
        for comparison, group in zip(comparisons, rollouts, strict=True)
    ]


def rollout(order: int, reason: int) -> Rollout:
    if reason == 2:
        return Rollout((reason,), (0.0,), Verdict(UNANSWERED))
    q = np.exp(ANSWER_LOGITS[order, reason]) / np.exp(ANSWER_LOGITS[order, reason]).sum()
    return Rollout((reason,), (0.0,), read_verdict(ANSWERED, float(q[0]), float(q[1])))


def one_gradient(drawn: tuple[tuple[int, ...], ...], settings: TrainSettings, rows_together: int) -> list[np.ndarray]:
    """The gradient that one group of each order gives, through the code that trains, some rows at a time."""
    mix = RewardMix.parse(settings.reward)
    groups = pair_groups([[rollout(order, reason) for reason in group] for order, group in enumerate(drawn)])
    rewards = reward_groups(groups, settings, mix)
    inputs = loss_inputs(groups, rewards, settings, mix)
    rows = [(order, reason) for order in np.flatnonzero(rewards.has_gradient).tolist() for reason in drawn[order]]

    def loss_of(part: LossInputs, of: list[tuple[int, int]], reasons: mx.array, answers: mx.array) -> mx.array:
        chosen = [(reasons[order] - mx.logsumexp(reasons[order]))[reason] for order, reason in of]
        labels = [answers[order, min(reason, 1)] for order, reason in of]
        label_logprobs = mx.stack([(each - mx.logsumexp(each))[:2] for each in labels])
        return step_loss(Logprobs(mx.stack(chosen)[:, None], label_logprobs), part, settings)[0]

    def loss(reasons: mx.array, answers: mx.array) -> mx.array:
        starts = range(0, len(rows), rows_together)
        slices = [slice(start, start + rows_together) for start in starts]
        parts = [loss_of(inputs.part(slice(None), each), rows[each], reasons, answers) for each in slices]
        return sum(parts, mx.array(0.0))

    gradients = mx.grad(loss, argnums=(0, 1))(mx.array(REASON_LOGITS), mx.array(ANSWER_LOGITS))
    # Every token weighs 1 / (rows * longest), with the answer position; the expectation is of one row of each order.
    return [-2 * (LONGEST + 1) * np.array(gradient) for gradient in gradients]


@pytest.mark.parametrize("rows_together", [2 * GROUP, GROUP, 1])
@pytest.mark.parametrize("reward", ["soft", "brier"])
def test_the_gradient_is_that_of_the_expectation_over_all_pairs_of_completions(reward: str, rows_together: int) -> None:
    settings = TrainSettings(
        reward=reward, agreement=WEIGHT, group=GROUP, loss_type="dr_grpo", max_tokens=LONGEST, format_weight=0.2,
        read_weight=0.0,
    )  # fmt: skip
    exact = mx.grad(lambda *logits: expected(*logits, reward, 0.9, 0.2), argnums=(0, 1))(
        mx.array(REASON_LOGITS), mx.array(ANSWER_LOGITS)
    )
    chances = np.exp(REASON_LOGITS) / np.exp(REASON_LOGITS).sum(axis=1, keepdims=True)
    mean = [np.zeros(REASON_LOGITS.shape), np.zeros(ANSWER_LOGITS.shape)]
    for one in product(range(3), repeat=GROUP):
        for other in product(range(3), repeat=GROUP):
            chance = chances[0][list(one)].prod() * chances[1][list(other)].prod()
            for total, gradient in zip(mean, one_gradient((one, other), settings, rows_together), strict=True):
                total += chance * gradient
    for total, gradient in zip(mean, exact, strict=True):
        assert total == pytest.approx(np.array(gradient), abs=2e-6)


def test_without_thinking_the_gradient_is_exact() -> None:
    settings = TrainSettings(reward="brier", agreement=WEIGHT, loss_type="bnpo", think=False, format_weight=0.2)
    logits = mx.array(ANSWER_LOGITS[:, 0])  # (orders, answers)
    q, mix = np.array(mx.softmax(logits, axis=-1)), RewardMix.parse("brier")
    at_once = "<think></think><answer>"
    rollouts = [Rollout((), (), read_verdict(at_once, float(each[0]), float(each[1]), think=False)) for each in q]
    groups = pair_groups([[rollout] for rollout in rollouts])
    inputs = loss_inputs(groups, reward_groups(groups, settings, mix), settings, mix)

    def loss(logits: mx.array) -> mx.array:
        labels = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[:, :2]
        return step_loss(Logprobs(mx.zeros((2, 0)), labels), inputs, settings)[0]

    def earned(logits: mx.array) -> mx.array:
        q = mx.softmax(logits, axis=-1)
        mass, p = q[:, 0] + q[:, 1], q[:, 0] / (q[:, 0] + q[:, 1])
        own = mix.integrated(mass, p, mx.array([0.9, 0.1]), mx.array(0.2))
        return own.sum() + WEIGHT * (1 - (p[0] - (1 - p[1])) ** 2)

    assert -2 * np.array(mx.grad(loss)(logits)) == pytest.approx(np.array(mx.grad(earned)(logits)), abs=1e-6)


def test_a_rollout_earns_its_mean_agreement_with_the_other_order() -> None:
    settings = TrainSettings(agreement=2.0, group=3, format_weight=0.0)
    of_a = [read_verdict(ANSWERED, 0.8, 0.2), read_verdict(ANSWERED, 0.3, 0.3), Verdict(UNANSWERED)]
    of_b = [read_verdict(ANSWERED, 0.1, 0.4), Verdict(UNANSWERED), read_verdict(ANSWERED, 0.6, 0.4)]
    groups = pair_groups([[Rollout((1,), (0.0,), verdict) for verdict in group] for group in (of_a, of_b)])
    result = reward_groups(groups, settings, RewardMix.parse("soft"))
    p, q = [0.8, 0.5, None], [0.8, None, 0.4]  # of a in both orders
    terms = np.array([[0.0 if one is None or two is None else 1 - (one - two) ** 2 for two in q] for one in p])
    assert result.components["agreement"] == pytest.approx(np.stack([terms.mean(axis=1), terms.mean(axis=0)]))
    assert result.rewards == pytest.approx(result.components["soft"] + 2 * result.components["agreement"])
    assert result.advantages.sum(axis=1) == pytest.approx([0, 0], abs=1e-12)


def preferences(count: int) -> list[Preference]:
    return [Preference(f"{i} hats", picture(2 * i), picture(2 * i + 1), float(i % 2)) for i in range(count)]


@pytest.mark.parametrize("changes", [{"agreement": 1.0}, {"method": "rejection"}])
def test_a_step_shows_both_orders(changes: dict[str, Any]) -> None:
    data = preferences(5)
    sampler = ComparisonSampler(data, TrainSettings(comparisons=4, **changes))
    steps = [sampler.for_step(step) for step in range(1, 6)]  # two epochs
    for comparisons in steps:
        assert [comparison.place for comparison in comparisons] == [0, 1, 2, 3]
        for one, other in zip(comparisons[::2], comparisons[1::2], strict=True):
            assert one.preference is other.preference
            assert (one.first, one.second) == (other.second, other.first) == (one.preference.a, one.preference.b)
            assert one.y == 1 - other.y == one.preference.p_people
    shown = [id(comparison.preference) for comparisons in steps for comparison in comparisons[::2]]
    assert len(set(shown[:5])) == len(set(shown[5:])) == 5
    others = sampler.replacements(1, [2, 3], iter([4, 3]), 1)
    assert [(each.place, each.preference is data[4]) for each in others] == [(2, True), (3, True)]
    assert [each.key for each in sampler.replacements(1, [0, 1, 2, 3], iter([4]), 1)] == [(1, 0, 1), (1, 1, 1)]


def test_a_judge_learns_to_agree_with_itself() -> None:
    """The random model answers at once; what it prefers depends on the order until that is rewarded."""
    agreed = {}
    for weight in (1e-9, 10.0):
        settings = TrainSettings(
            think=False, agreement=weight, steps=8, comparisons=4, learning_rate=0.005, warmup_steps=1, micro_batch=1
        )
        reports = list(Trainer(load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512), preferences(2), settings).steps())
        agreed[weight] = [1 - report.reward_parts["agreement"] for report in reports]
        assert reports[0].reward == pytest.approx(
            reports[0].reward_parts["soft"] + weight * reports[0].reward_parts["agreement"]
        )
    assert agreed[10.0][-1] < 0.5 * agreed[10.0][0]
    assert agreed[10.0][-1] < 0.5 * agreed[1e-9][-1]


def test_an_unreadable_image_takes_both_orders_out(tmp_path: Path) -> None:
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    data = [Preference(f"{i} hats", tmp_path / f"{2 * i}.png", tmp_path / f"{2 * i + 1}.png", 1.0) for i in range(3)]
    settings = TrainSettings(think=False, agreement=1.0, steps=3, comparisons=4)
    reports = list(Trainer(load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512), data, settings).steps())
    assert sum(report.left_out for report in reports) > 0
    for report in reports:
        assert len(report.rollouts) == 4
        for one, other in zip(report.rollouts[::2], report.rollouts[1::2], strict=True):
            assert (one.first, one.second) == (other.second, other.first)
            assert not {str(tmp_path / "0.png")} & {one.first, one.second}


def test_what_cannot_agree_is_refused() -> None:
    with pytest.raises(ConfigError, match="setting comparisons: 3 is odd, and agreement shows each preference in both"):
        TrainSettings(agreement=0.1, comparisons=3)
    for reward in ("hard", "score"):
        with pytest.raises(ConfigError, match=f"setting agreement: reward {reward} does not integrate the answer out"):
            Trainer(
                load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512), preferences(2), TrainSettings(agreement=1, reward=reward)
            )
