"""Rejection sampling: what is kept, that its likelihood is learned, and that training goes on from there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.engine.completion import Rollout
from mlxpref.engine.logprobs import Logprobs
from mlxpref.engine.profile import own_profile
from mlxpref.engine.reading import Reader
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ConfigError
from mlxpref.report.run_log import RunLog
from mlxpref.training.gradients import policy_gradient
from mlxpref.training.group_rewards import GroupRewards, reward_groups
from mlxpref.training.loss import loss_inputs, step_loss
from mlxpref.training.policy_update import update_policy
from mlxpref.training.rewards import RewardMix
from mlxpref.training.run import train
from tests.conftest import picture, read_verdict
from tests.training.test_agreement import pair_groups

SETTINGS = TrainSettings(method="rejection", read_weight=0.0)


def wrote(answer: str, reasons: str = "so", length: int = 3) -> Rollout:
    text = f"<think>{reasons}</think><answer>{answer}"
    return Rollout((5,) * length, (0.0,) * length, read_verdict(text, 0.5, 0.5, tokens=length))


def rewarded(*pairs: tuple[list[Rollout], list[Rollout]]) -> GroupRewards:
    """The rewards of preferences of a, in both orders."""
    groups = [group for pair in pairs for group in pair_groups(list(pair), share=1.0)]
    return reward_groups(groups, SETTINGS, RewardMix.parse(SETTINGS.rewards))


def test_completions_that_are_right_in_both_orders_are_kept() -> None:
    one, two, nothing = wrote("1</answer>"), wrote("2</answer>"), wrote("")
    bare, cut = wrote("1</answer>", reasons=""), wrote("1")
    result = rewarded(
        ([one, two, one], [one, two, nothing]),  # some are right in both
        ([one, one, one], [one, one, nothing]),  # none where a is second
        ([bare, cut, two], [two, two, two]),  # right sides without the form, of which nothing is learned
    )
    assert result.advantages.tolist() == [[1, 0, 1], [0, 1, 0], *[[0, 0, 0]] * 4]
    assert result.has_advantage.tolist() == [True, True, False, False, False, False]
    assert result.has_gradient.tolist() == result.has_advantage.tolist()


@pytest.mark.parametrize("old", [False, True])
def test_the_gradient_is_that_of_the_likelihood(old: bool) -> None:
    """Of all tokens of what is kept, over all tokens of the step; the policy may have moved since they were drawn."""
    lengths = [[2, 4, 3], [3, 1, 5]]
    answers = [["1</answer>", "2</answer>", "1</answer>"], ["1</answer>", "2</answer>", "x"]]
    rollouts = [
        [wrote(answer, length=n) for answer, n in zip(*each, strict=True)]
        for each in zip(answers, lengths, strict=True)
    ]
    groups, mix = pair_groups(rollouts, share=1.0), RewardMix.parse("hard")
    inputs = loss_inputs(groups, reward_groups(groups, SETTINGS, mix), SETTINGS, mix)
    logprobs = mx.random.normal(inputs.mask.shape, key=mx.random.key(0)) - 3
    gradient = mx.grad(lambda each: step_loss(Logprobs(each, mx.zeros((6, 2))), inputs, SETTINGS)[0])(logprobs)
    kept = np.array([1, 0, 1, 0, 1, 0])[:, None] * np.array(inputs.mask)
    assert np.array(gradient) == pytest.approx(-kept / sum(map(sum, lengths)))
    assert inputs.old is None


def test_a_run_learns_what_is_right_in_both_orders(tmp_path: Path) -> None:
    """The demo judge writes answers in our form, right or not; GRPO goes on from the adapter."""
    settings: dict[str, Any] = {
        "steps": 2, "limit": 12, "comparisons": 4, "group": 4, "method": "rejection", "read_weight": 0.0,
        "updates_per_rollout": 2, "clip_low": 1e-6, "clip_high": 1e-6, "kl": 0.1,
    }  # fmt: skip
    reports = list(train("demo", "demo", tmp_path / "run", **settings))
    reader, kept = Reader(own_profile()), []
    for report in reports:
        groups = [report.rollouts[start : start + 4] for start in range(0, 16, 4)]
        right = [[r.y == reader.written(r.text) and reader.is_well_formed(r.text) for r in group] for group in groups]
        both = [any(right[i]) and any(right[i ^ 1]) for i in range(4)]
        expected = [[float(each and both[i]) for each in group] for i, group in enumerate(right)]
        assert [[r.advantage for r in group] for group in groups] == expected
        assert all("</answer>" in r.text for group in groups for r in group if r.advantage)
        assert report.kept == pytest.approx(np.mean(expected))
        assert report.updated
        assert report.clip_fraction == 0
        kept.append(report.kept)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in log] == kept
    assert "right in both orders, and learned" in [change.name for change in RunLog(log).changes()]
    (report,) = train(
        "demo", "demo", tmp_path / "on", adapter=tmp_path / "run", steps=1, limit=12, comparisons=2, group=2
    )
    assert report.updated
    assert report.to_json()["kept"] is None


def test_what_is_kept_becomes_likelier(trained: VLM) -> None:
    """And what is not kept becomes so by less. The tokens of a random model stand for what a judge wrote."""
    rng = np.random.default_rng(0)
    rollouts = [
        [replace(wrote(f"{answer}</answer>"), tokens=tuple(rng.integers(5, 200, 3).tolist())) for answer in answers]
        for answers in ("12", "22")
    ]
    prompts = [trained.input(picture(i), picture(1 - i), "a hat", "choice", True) for i in range(2)]
    pair = zip(pair_groups(rollouts, share=1.0), prompts, strict=True)
    groups = [replace(group, input=prompt) for group, prompt in pair]
    rewards = reward_groups(groups, SETTINGS, RewardMix.parse("hard"))
    assert rewards.advantages.tolist() == [[1, 0], [1, 1]]
    inputs = loss_inputs(groups, rewards, SETTINGS, RewardMix.parse("hard"))
    before = policy_gradient(trained, inputs, SETTINGS)
    update_policy(trained, optim.SGD(learning_rate=0.3), before, inputs, SETTINGS)
    gain = np.array(policy_gradient(trained, inputs, SETTINGS).logprobs - before.logprobs).sum(axis=1)
    assert gain[[0, 2, 3]].min() > 0
    assert gain[1] < gain[[0, 2, 3]].mean()


def test_rejection_has_no_other_reward() -> None:
    changes = {"agreement": 1.0, "listener_weight": 1.0, "length_budget": 9, "reward": "brier"}
    for name, value in changes.items():
        with pytest.raises(ConfigError, match=f"setting {name}: rejection sampling has no reward but the people's"):
            TrainSettings(method="rejection", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="setting comparisons: 5 is odd, and rejection sampling shows each"):
        TrainSettings(method="rejection", comparisons=5)
