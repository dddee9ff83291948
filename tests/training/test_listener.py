"""The listener: the judge without its adapter answers after a rollout's reasons, and is asked once."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlxpref
from mlxpref.config import TrainSettings
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.completion import Rollout
from mlxpref.engine.lora import adapter_off
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError
from mlxpref.preferences import Preference
from mlxpref.training import listener, trainer
from mlxpref.training.gradients import reference_scores, with_reference
from mlxpref.training.group_rewards import reward_groups
from mlxpref.training.listener import listen, with_heard
from mlxpref.training.loss import loss_inputs
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup
from mlxpref.training.sampler import TrainingComparison
from mlxpref.training.trainer import Trainer
from mlxpref.verdict import Verdict
from tests.conftest import GOLDEN, append_block, picture, read_verdict

MIX = RewardMix.parse("soft")
SHARES = (0.9, 0.2)


def settings(**changes: object) -> TrainSettings:
    return replace(TrainSettings(listener_weight=0.5, group=3, micro_batch=2), **changes)  # type: ignore[arg-type]


def groups_of(vlm: VLM) -> list[RolloutGroup]:
    """Two groups of three rollouts with reasons of any words, the last of which reached no answer."""
    rng = np.random.default_rng(0)
    groups = []
    for number, y in enumerate(SHARES):
        images = picture(2 * number), picture(2 * number + 1)
        comparison = TrainingComparison(*images, "a hat", Preference("a hat", *images, y), y, (1, number))
        rollouts = [
            Rollout(tuple(rng.integers(5, 200, n).tolist()), (0.0,) * n, verdict)
            for n, verdict in zip(
                (4 + number, 2, 7),
                [*[read_verdict("<think>so</think><answer>", 0.6, 0.3)] * 2, Verdict("<think>so")],
                strict=True,
            )
        ]
        prompt = vlm.input(*images, "a hat", "choice", True)
        groups.append(RolloutGroup(comparison, prompt, rollouts, [False, False, True]))
    return groups


@pytest.mark.parametrize("micro_batch", [2, 99])
def test_the_listener_is_the_judge_without_its_adapter(trained: VLM, family: str, micro_batch: int) -> None:
    """Beside a model that never had an adapter, one completion at a time, by the code that writes."""
    base = load_vlm(GOLDEN / family, 512 * 512, mx.float32)
    groups = listen(trained, groups_of(trained), settings(micro_batch=micro_batch), MIX)
    for group, y in zip(groups, SHARES, strict=True):
        expected = []
        for rollout in group.rollouts[:2]:
            assert group.input
            cache, _ = base.prefill([group.input])
            ids = np.array([rollout.tokens], np.int32)
            logits = append_block(base, cache, ids, np.array([group.input.next_position]))[0, -1]
            p1, p2 = (float(mx.softmax(logits)[mx.array(list(each))].sum()) for each in base.tokenizer.label_ids)
            expected.append((p1 * y + p2 * (1 - y)) / (p1 + p2))
        assert list(group.heard) == pytest.approx([*expected, 0.0], abs=1e-4)
        assert group.reference
        assert group.reference.logprobs.shape == (3, 7)
    rewards = reward_groups(groups, settings(kl=0.1), MIX)  # with which all rows are scored
    own = reference_scores(trained, loss_inputs(groups, rewards, settings(), MIX), settings())[0]
    theirs = [group.reference.label_logprobs for group in groups if group.reference]
    assert mx.abs(own.label_logprobs - mx.concatenate(theirs)).max().item() > 1e-3  # type: ignore[operator]


def test_its_probability_is_part_of_the_reward(trained: VLM) -> None:
    groups = listen(trained, groups_of(trained), settings(), MIX)
    with_it, without = reward_groups(groups, settings(), MIX), reward_groups(groups, settings(listener_weight=0.0), MIX)
    heard = np.array([group.heard for group in groups])
    assert heard[:, :2].min() > 0
    assert with_it.components["listener"].tolist() == heard.tolist()
    assert with_it.rewards == pytest.approx(without.rewards + 0.5 * heard)
    assert "listener" not in without.components


def test_what_it_gave_is_the_reference_of_the_divergence(trained: VLM) -> None:
    """Also where groups were heard apart, as after resampling."""
    options, at_once = settings(kl=0.1), trained.tokenizer.at_once_ids
    one, two = groups_of(trained)
    groups = [*listen(trained, [one], options, MIX), *listen(trained, [two], options, MIX)]
    inputs = loss_inputs(groups, reward_groups(groups, options, MIX), options, MIX, at_once)
    result = with_heard(inputs, groups)
    with adapter_off(trained.model):
        expected = with_reference(inputs, *reference_scores(trained, inputs, options))
    assert result.read
    assert expected.read
    pairs = [
        (result.reference, expected.reference),
        (result.reference_states, expected.reference_states),
        (result.read.reference_states, expected.read.reference_states),
    ]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert ours.shape == theirs.shape
        assert mx.abs(ours - theirs).max().item() < 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_step_asks_once(kl: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step the listener is the policy; `kl` adds no pass of its own."""
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return reference_scores(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(listener, "reference_scores", counted)
    monkeypatch.setattr(trainer, "reference_scores", counted)
    options = settings(kl=kl, steps=2, comparisons=3, max_tokens=48, learning_rate=1e-3)
    reports = list(Trainer(mlxpref.load("demo").vlm, demo_preferences("train", 6), options).steps())
    assert len(calls) == 2
    first = reports[0]
    p_right = [0.0 if r.p_first is None else r.p_first * r.y + (1 - r.p_first) * (1 - r.y) for r in first.rollouts]
    assert 0 < first.reward_parts["listener"] == pytest.approx(np.mean(p_right), abs=1e-3)
    for report in reports:
        parts = report.reward_parts
        assert report.reward == pytest.approx(parts["soft"] + 0.5 * parts["listener"])
        assert report.updated
        assert report.score_seconds > 0
        assert np.isnan(report.kl) == (kl == 0)


def test_where_there_is_nothing_to_hear() -> None:
    with pytest.raises(ConfigError, match="setting listener_weight: without thinking there are no reasons"):
        TrainSettings(listener_weight=1.0, think=False)
    with pytest.raises(ConfigError, match="setting listener_weight: reward hard does not integrate the answer out"):
        Trainer(load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512), [], TrainSettings(listener_weight=1.0, reward="hard"))
