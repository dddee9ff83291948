"""Training a judge that is asked by a profile of its own: what is integrated out, what is recorded, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.config import TrainSettings, settings_from
from mlxpref.demo import JUDGE
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.logprobs import completion_logprobs, prefill
from mlxpref.engine.profile import read_profile
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError, ModelError
from mlxpref.training import run as run_module
from mlxpref.training.group_rewards import reward_groups
from mlxpref.training.loss import loss_inputs
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import sample_groups
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.run_record import chosen_settings, read_record
from mlxpref.training.sampler import ComparisonSampler
from tests.messages import messages
from tests.profiles import WITHOUT_THINKING, own_with

QUICK: dict[str, Any] = {
    "data": "demo", "model": "demo", "limit": 12, "comparisons": 3, "group": 4, "steps": 2, "max_tokens": 100,
    "learning_rate": 2e-3, "warmup_steps": 1, "rows": 64,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "last": {"counts": "last"},
    "tie": {"tie": "3"},
    "last tie": {"counts": "last", "tie": ["3", "4"]},
    "tie opening": {"tie_opening": "fits", **WITHOUT_THINKING},
}


def judge_by(profile: Path) -> VLM:
    return load_vlm(JUDGE, 84 * 84, profile=read_profile(profile))


def begin(folder: Path, **changes: Any) -> Path:
    """Train into a folder as the command does."""
    chosen = chosen_settings(QUICK | changes)
    for _ in start_run(settings_from(TrainSettings, chosen), folder, chosen=chosen).reports():
        pass
    return folder


def last_step(folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return line


@pytest.mark.parametrize("name", VARIANTS)
def test_scoring_gives_the_labels_and_tokens_of_the_rollouts(name: str, tmp_path: Path) -> None:
    vlm = judge_by(own_with(tmp_path / f"{name}.toml", **VARIANTS[name]))
    settings = settings_from(TrainSettings, QUICK | {"think": vlm.profile.thinks})
    mix = RewardMix.parse("brier")
    sampler = ComparisonSampler(demo_preferences("train", 12), settings)
    groups = sample_groups(vlm, sampler.for_step(1), settings, mix)
    rewards = reward_groups(groups, settings, mix)
    words = vlm.tokenizer
    inputs = loss_inputs(groups, rewards, settings, mix, words.at_once_ids, words.lead_ids)
    scores = completion_logprobs(vlm, prefill(vlm, inputs.prompts), inputs.completions)
    verdicts = [verdict for group in groups if group.input in inputs.prompts for verdict in group.verdicts]
    read = np.array([[v.p_label_first, v.p_label_second, v.p_label_tie] for v in verdicts])
    answered = read.sum(axis=1) > 0
    assert answered.mean() > 0.5
    assert np.array_equal(np.array(inputs.answer_weights) > 0, answered)
    scored = np.exp(np.array(scores.label_logprobs))
    np.testing.assert_allclose(scored[answered], read[answered][:, : scored.shape[1]], atol=2e-5)
    assert scored.shape[1] == 2 + bool(vlm.profile.tie or vlm.profile.tie_opening)
    mask = inputs.completions.mask
    assert inputs.sampled is not None
    np.testing.assert_allclose(np.array(scores.logprobs)[mask], inputs.sampled[mask], atol=2e-4)
    assert mask.any() == vlm.profile.thinks


def test_last_answer_that_never_came_earns_nothing(tmp_path: Path) -> None:
    """Before its end a completion may still take back its answer, so out of tokens it has none."""
    vlm = judge_by(own_with(tmp_path / "last.toml", counts="last"))
    own = load_vlm(JUDGE, 84 * 84)
    settings = settings_from(TrainSettings, QUICK)
    mix = RewardMix.parse("soft")
    comparisons = ComparisonSampler(demo_preferences("train", 12), settings).for_step(1)
    (longest, *_), *_ = sample_groups(own, comparisons, settings, mix)[0].rollouts, None
    reached = longest.verdict.answer_tokens
    assert longest.verdict.label_mass > 0
    cut = replace(settings, max_tokens=reached + 1, group=2)  # its answer is there, its end is not
    for vlm_, earns in ((own, True), (vlm, False)):
        groups = sample_groups(vlm_, comparisons[:1], cut, mix)
        rewards = reward_groups(groups, cut, mix)
        assert bool(rewards.rewards[0, 0] > 0) == earns
        assert groups[0].truncated[0] != earns


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"counts": "last"}, {"reward": "hard"}),
        ({"counts": "last", "tie": "3"}, {"reward": "brier", "kl": 0.1}),
        ({"counts": "last"}, {"updates_per_rollout": 2, "kl": 0.1, "read_weight": 1.0}),
        ({"tie_opening": "fits", **WITHOUT_THINKING}, {"kl": 0.1}),
        ({"tie": "3"}, {"think": False}),
    ],
)
def test_every_kind_of_training(changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    profile = own_with(tmp_path / "other.toml", **changes)
    step = last_step(begin(tmp_path / "run", profile=str(profile), **settings))
    assert step["updated"]
    assert step["mismatch"] is None or step["mismatch"] < 1e-5
    assert step["format_rate"] > 0.5 or not step["tokens"]


def test_a_single_answer_is_learned_alike_as_the_first_and_as_the_last(tmp_path: Path) -> None:
    """What was written behind it, to see that no other comes, is cut off again."""
    inputs = []
    for counts in ("first", "last"):
        vlm = judge_by(own_with(tmp_path / f"{counts}.toml", counts=counts))
        settings = settings_from(TrainSettings, QUICK)
        mix = RewardMix.parse("soft")
        comparisons = ComparisonSampler(demo_preferences("train", 12), settings).for_step(1)
        groups = sample_groups(vlm, comparisons, settings, mix)
        inputs.append(loss_inputs(groups, reward_groups(groups, settings, mix), settings, mix))
    first, last = inputs
    assert (np.array(first.answer_weights) > 0).mean() > 0.5
    assert np.array_equal(first.completions.tokens, last.completions.tokens)
    for name in ("mask", "weights", "answer_weights", "advantages", "form", "y"):
        np.testing.assert_allclose(
            np.array(getattr(first, name)), np.array(getattr(last, name)), atol=1e-5, err_msg=name
        )


def test_hard_reward_follows_the_last_answer(tmp_path: Path) -> None:
    """Both profiles read the same completions of one answer each."""
    rewards = []
    for counts in ("first", "last"):
        vlm = judge_by(own_with(tmp_path / f"{counts}.toml", counts=counts))
        settings = settings_from(TrainSettings, QUICK | {"reward": "hard"})
        mix = RewardMix.parse("hard")
        comparisons = ComparisonSampler(demo_preferences("train", 12), settings).for_step(1)
        rewards.append(reward_groups(sample_groups(vlm, comparisons, settings, mix), settings, mix).rewards)
    assert rewards[0].any()
    np.testing.assert_allclose(*rewards)


def test_a_profile_brings_its_settings(tmp_path: Path) -> None:
    """Where the user gives none."""
    long = own_with(tmp_path / "long.toml", max_tokens=44)
    given = {"limit": 4, "steps": 1, "profile": str(long), "model": str(JUDGE)}
    for number, (changes, tokens) in enumerate([({}, 44), ({"max_tokens": 40}, 40), ({"max_tokens": 256}, 256)]):
        folder = tmp_path / str(number)
        chosen = chosen_settings({"data": "demo", "group": 2, "comparisons": 1, **given, **changes})
        start_run(settings_from(TrainSettings, chosen), folder, chosen=chosen)
        record = read_record(folder)
        assert record["settings"]["max_tokens"] == tokens
        assert record["base"]["profile"] == {"name": "long", "version": read_profile(long).version()}
        assert read_profile(folder / "judge.toml") == read_profile(long)
    # A folder's profile is found by itself.
    begin(tmp_path / "run", profile=str(long), steps=1)
    chosen = chosen_settings({"data": "demo", "adapter": str(tmp_path / "run"), "limit": 4})
    run = start_run(settings_from(TrainSettings, chosen), tmp_path / "more", chosen=chosen)
    assert run.trainer.vlm.profile == read_profile(long)
    assert run.trainer.settings.max_tokens == QUICK["max_tokens"], "as the adapter was trained"


def test_a_judge_that_does_not_think(tmp_path: Path) -> None:
    profile = own_with(tmp_path / "at-once.toml", **WITHOUT_THINKING)
    with messages() as lines:
        begin(tmp_path / "run", profile=str(profile))
    assert any("the profile at-once answers at once: only its answer is learned" in line for line in lines)
    assert read_record(tmp_path / "run")["settings"]["think"] is False
    done = CliRunner().invoke(
        main, ["train", "--data", "demo", "--model", "demo", "--profile", str(profile), "--think", "-o", "x"]
    )
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("--think: the profile at-once answers at once; give --no-think")


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        (
            "rationalrewards",
            {},
            "the profile rationalrewards shows one image at a time, and training learns from pairs",
        ),
        ("unifiedreward-think", {"reward": "score"}, "the profile unifiedreward-think has no question for two scores"),
        ("unifiedreward-pair", {"reward": "hard"}, "reward hard: the profile unifiedreward-pair answers at once"),
        ("nobody", {}, "unknown profile 'nobody': known are mlxpref, plain"),
    ],
)
def test_what_a_profile_cannot_learn_is_refused_before_data_and_model(
    changes: str, settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(run_module, "load_vlm", load)
    monkeypatch.setattr(run_module, "load_preferences", load)
    with pytest.raises(ConfigError, match=words):
        begin(tmp_path / "run", profile=changes, **settings)
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_by_the_profile_in_its_folder(tmp_path: Path) -> None:
    """Also where the file that was given is gone, and under another name, but not by other words."""
    profile = own_with(tmp_path / "mine" / "other.toml", counts="last")
    whole = begin(tmp_path / "whole", profile=str(profile))
    chosen = chosen_settings(QUICK | {"profile": str(profile)})
    run = start_run(settings_from(TrainSettings, chosen), tmp_path / "run", chosen=chosen)
    reports = run.reports()
    next(reports)
    reports.close()  # type: ignore[attr-defined]
    moved = profile.rename(tmp_path / "moved.toml")
    with pytest.raises(ModelError) as error:
        resume_run(tmp_path / "run", {"profile": "plain"})
    assert str(error.value) == (
        f"{tmp_path / 'run'}: the run asks by the profile other, and plain asks in other words now; leave out "
        "--profile, restore what changed, or start another run"
    )
    for given in ({"profile": str(moved)}, {}):
        again = resume_run(tmp_path / "run", given)
        assert again is not None
        assert again.trainer.vlm.profile.counts == "last"
    for _ in again.reports():
        pass
    weights = [mx.load(str(folder / "adapters.safetensors")) for folder in (whole, tmp_path / "run")]
    assert all(np.array_equal(np.array(weights[0][name]), np.array(weights[1][name])) for name in weights[0])


def test_other_profile_with_an_adapter_is_said(tmp_path: Path) -> None:
    profile = own_with(tmp_path / "other.toml", counts="last")
    begin(tmp_path / "run", profile=str(profile), steps=1)
    chosen = chosen_settings({"data": "demo", "adapter": str(tmp_path / "run"), "limit": 4, "profile": "mlxpref"})
    with messages() as lines:
        start_run(settings_from(TrainSettings, chosen), tmp_path / "more", chosen=chosen)
    assert any("the adapter was trained with other words than those of the profile mlxpref" in line for line in lines)


def test_labels_that_cannot_be_read_are_refused_before_the_run_begins(tmp_path: Path) -> None:
    labels = own_with(tmp_path / "words.toml", first="one of these")
    with pytest.raises(ConfigError, match=r"^profile words: 'one of these' is no single token of this judge's"):
        begin(tmp_path / "run", profile=str(labels))
    assert not (tmp_path / "run").exists()
