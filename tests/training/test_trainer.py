"""Training: it learns, it repeats itself, it keeps what it learned, and it stops when it must."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxpref
from mlxpref.cli.demo import demo_settings
from mlxpref.config import TrainSettings, read_settings, settings_from
from mlxpref.demo.briefs import Requirement, count_met, prompt_text
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.demo.preferences import demo_pairs, demo_preferences
from mlxpref.engine.logprobs import Completions, Logprobs
from mlxpref.engine.lora import adapter_off, adapter_weights
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.preferences import Preference
from mlxpref.training import gradients, rollouts, trainer
from mlxpref.training.loss import LossInputs, step_loss
from mlxpref.training.rewards import RewardMix
from mlxpref.training.run import start_run, train
from mlxpref.training.step_report import StepReport
from mlxpref.training.trainer import Trainer
from tests.conftest import GOLDEN

TINY = GOLDEN / "qwen2_5_vl"
SMALL: dict[str, Any] = {
    "limit": 24, "steps": 2, "comparisons": 3, "group": 3, "max_tokens": 6, "learning_rate": 1e-2, "warmup_steps": 1,
}  # fmt: skip


@pytest.fixture
def fresh() -> VLM:
    """A tiny random model of its own; training changes it."""
    return load_vlm(TINY, 512 * 512)


def run_small(vlm: VLM, folder: Path, **changes: Any) -> list[StepReport]:
    settings = settings_from(TrainSettings, {"data": "demo", "reward": "soft"} | SMALL | changes)
    return list(start_run(settings, folder, vlm=vlm).reports())


def copied(vlm: VLM) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in adapter_weights(vlm.model).items()}


@pytest.mark.parametrize("think", [True, False])
def test_the_divergence_holds_the_answer_position(fresh: VLM, tmp_path: Path, think: bool) -> None:
    """With a large weight the adapter stays where it was, also without thinking, where no token is written."""
    adapters, divergences = [], []
    for kl in (0.0, 1e-9, 100.0):
        vlm = load_vlm(TINY, 512 * 512)
        reports = run_small(vlm, tmp_path / str(kl), kl=kl, think=think, steps=6, limit=9, learning_rate=0.01)
        adapters.append(copied(vlm))
        divergences.append([report.kl for report in reports])
    _, measured, held = adapters
    assert all(np.isnan(divergences[0]))
    assert divergences[1][0] == divergences[2][0] == 0
    assert 0 < divergences[2][-1] < 0.3 * divergences[1][-1]
    moved = [sum(float((w**2).sum()) for n, w in each.items() if n.endswith("lora_b")) for each in (measured, held)]
    assert moved[1] < moved[0]


@pytest.mark.parametrize("think", [True, False])
def test_seeds(think: bool, tmp_path: Path) -> None:
    adapters = []
    for number, seed in enumerate((0, 0, 1)):
        vlm = load_vlm(TINY, 512 * 512)
        run_small(vlm, tmp_path / str(number), seed=seed, think=think)
        adapters.append(copied(vlm))
    one, same, other = adapters
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k and k not in ("peak_bytes", "totals")}
            for line in (tmp_path / str(number) / "log.jsonl").read_text().splitlines()
        ]
        for number in range(2)
    ]
    assert len(logs[0]) == 2
    assert logs[0] == logs[1]


def test_untrained_adapter_changes_nothing(fresh: VLM, tmp_path: Path) -> None:
    base = load_vlm(TINY, 512 * 512)
    preference = demo_preferences("test", 1)[0]

    def answer(vlm: VLM) -> mx.array:
        return vlm.prefill([vlm.input(preference.a, preference.b, preference.prompt, "choice", False)])[1]

    reports = run_small(fresh, tmp_path / "run", kl=0.1, think=False, steps=3, learning_rate=0.05)
    assert reports[0].kl == 0
    trained = answer(fresh)
    assert not mx.allclose(mx.softmax(trained), mx.softmax(answer(base)), atol=1e-3)
    with adapter_off(fresh.model):
        assert mx.array_equal(answer(fresh), answer(base))


def test_divergence(fresh: VLM, tmp_path: Path) -> None:
    settings = settings_from(TrainSettings, {"data": "demo", "kl": 1.0} | SMALL)
    run = start_run(settings, tmp_path / "run", vlm=fresh)
    reports = run.reports()
    assert next(reports).kl == 0
    moved = {n: w + 0.05 * mx.random.normal(w.shape) for n, w in adapter_weights(fresh.model).items()}
    fresh.model.load_weights(list(moved.items()), strict=False)
    assert next(reports).kl > 0.01


def test_saved_adapter_is_the_trained_one(fresh: VLM, tmp_path: Path) -> None:
    from mlx_vlm import load

    from mlxpref.engine.adapters import load_adapter

    run_small(fresh, tmp_path / "run", think=False, learning_rate=0.05)
    again = load_vlm(TINY, 512 * 512)
    load_adapter(again.model, tmp_path / "run")
    preferences = demo_preferences("test", 4)
    answers = [
        [v.p_a for v in Judge(vlm, mlxpref.config.JudgeSettings(think=False)).pairs(_pairs(preferences))]
        for vlm in (fresh, again)
    ]
    assert answers[0] == answers[1]
    model, _ = load(str(TINY), adapter_path=str(tmp_path / "run"))
    theirs = adapter_weights(model)
    ours = adapter_weights(fresh.model)
    assert set(theirs) == set(ours)
    assert all(mx.array_equal(theirs[name], ours[name]) for name in ours)


def _pairs(preferences: list[Any]) -> list[Any]:
    from mlxpref.preferences import Pair

    return [Pair(p.a, p.b, p.prompt) for p in preferences]


def test_rollouts_differ_and_are_recorded(fresh: VLM, tmp_path: Path) -> None:
    reports = run_small(fresh, tmp_path / "run", kl=0.1)  # with which all rollouts are in the loss
    group = [record.text for record in reports[0].rollouts[:3]]
    assert len(set(group)) == 3
    assert all(report.mismatch < 1e-3 for report in reports)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"adapter_config.json", "adapters.safetensors", "log.jsonl", "rollouts.jsonl", "run.json"}
    record = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])
    assert set(record) == {
        "step", "prompt", "first", "second", "y", "text", "p_first", "label_mass", "reward", "advantage",
    }  # fmt: skip


def test_a_run_can_be_repeated(fresh: VLM, tmp_path: Path) -> None:
    run_small(fresh, tmp_path / "one")
    settings = settings_from(TrainSettings, read_settings(tmp_path / "one" / "run.json"))
    again = load_vlm(TINY, 512 * 512)
    list(start_run(settings, tmp_path / "two", vlm=again).reports())
    one, two = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_groups_without_gradient_are_skipped(fresh: VLM, tmp_path: Path) -> None:
    """A random model never answers, so hard rewards are all 0."""
    before = copied(fresh)
    reports = run_small(fresh, tmp_path / "run", reward="hard", read_weight=0.0)
    assert not before
    assert [report.skipped for report in reports] == [3, 3]
    assert not any(report.updated for report in reports)
    unmeasured = ("loss", "grad_norm", "kl", "clip_fraction", "mismatch", "read_accuracy")
    assert [report.to_json()[name] for report in reports for name in unmeasured] == [None] * 2 * len(unmeasured)
    weights = copied(fresh)
    assert all(not weight.any() for name, weight in weights.items() if name.endswith("lora_b"))


@pytest.mark.parametrize("reward", ["hard", "soft"])
def test_reading_learns_from_groups_that_reasons_learn_nothing_from(fresh: VLM, tmp_path: Path, reward: str) -> None:
    """A random model never answers after reasons; read at once it does, and `hard` teaches that side as `soft` does."""
    reports = run_small(fresh, tmp_path / "run", reward=reward, steps=4, read_weight=10.0, learning_rate=0.03)
    assert all(report.updated and report.skipped == 3 for report in reports)
    assert all(0 <= report.read_accuracy <= 1 for report in reports)
    assert reports[0].loss > -0.1
    assert reports[-1].loss < -0.5
    for line in (report.to_json() for report in reports):
        assert [line[name] for name in ("mismatch", "clip_fraction", "kl")] == [None] * 3


@pytest.mark.parametrize("reward", ["score", "custom"])
def test_what_reading_would_contradict_is_not_taught(fresh: VLM, tmp_path: Path, reward: str) -> None:
    reward = own_file(tmp_path, "return [0.0 for text in texts]") if reward == "custom" else reward
    reports = run_small(fresh, tmp_path / "run", reward=reward)
    assert not any(report.updated for report in reports)
    assert all(np.isnan(report.read_accuracy) for report in reports)


def test_fraction_of_the_data(fresh: VLM) -> None:
    preferences = demo_preferences("train", 40)
    quarter = Trainer(fresh, preferences, TrainSettings(fraction=0.25)).preferences
    assert len(quarter) == 10
    other = load_vlm(TINY, 512 * 512)
    half = Trainer(other, preferences, TrainSettings(fraction=0.5)).preferences
    assert {id(p) for p in quarter} <= {id(p) for p in half}


def test_ties_teach_brier_only(fresh: VLM) -> None:
    tied = [replace(p, p_people=0.5) for p in demo_preferences("train", 4)]
    with pytest.raises(DataError, match="all 4 preferences are ties"):
        Trainer(fresh, tied, TrainSettings())
    assert len(Trainer(fresh, tied, TrainSettings(reward="brier")).preferences) == 4


def test_infinite_loss_stops_the_run(fresh: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gradients.step_loss
    monkeypatch.setattr(
        gradients, "step_loss", lambda *arguments: (original(*arguments)[0] * mx.array(float("nan")), mx.zeros(4))
    )
    settings = settings_from(TrainSettings, {"data": "demo"} | SMALL | {"steps": 9, "think": False})
    reports: list[StepReport] = []
    with pytest.raises(ModelError, match="not finite 3 times in a row"):
        reports.extend(start_run(settings, tmp_path / "run", vlm=fresh).reports())
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3
    weights = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    assert all(mx.isfinite(weight).all().item() for weight in weights.values())


@pytest.mark.parametrize(("module", "phase"), [(rollouts, "roll_out"), (trainer, "policy_gradient")])
def test_ctrl_c_saves_the_adapter(
    fresh: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, phase: str
) -> None:
    original = getattr(module, phase)
    calls = iter(range(99))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, phase, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_small(fresh, tmp_path / "run", steps=5, think=False)
    weights = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    assert any(weight.any().item() for name, weight in weights.items() if name.endswith("lora_b"))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_breaking_the_loop_saves(tmp_path: Path) -> None:
    reports: Iterator[StepReport] = train("demo", TINY, tmp_path / "run", **SMALL | {"steps": 5})
    next(reports)
    reports.close()  # type: ignore[attr-defined]
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


def test_full_folder_is_refused(fresh: VLM, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        run_small(fresh, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("learning_rate = 1\nrewrad = 'soft'")
    with pytest.raises(ConfigError, match=r"run.toml: unknown setting 'rewrad'"):
        settings_from(TrainSettings, read_settings(tmp_path / "run.toml"), str(tmp_path / "run.toml"))
    assert settings_from(TrainSettings, {"learning_rate": 1}).learning_rate == 1.0
    with pytest.raises(ConfigError, match="none of token, sequence"):
        settings_from(TrainSettings, {"level": "word"})


def test_images_beyond_the_context_are_refused(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.language_model.args, "max_position_embeddings", 50)
    preference = demo_preferences("train", 1)[0]
    with pytest.raises(DataError, match=r"reads at most 50: give a smaller --max-pixels"):
        fresh.input(preference.a, preference.b, preference.prompt, "choice", True)


SHORT: dict[str, Any] = {"steps": 20, "comparisons": 16, "group": 8, "learning_rate": 1e-3, "warmup_steps": 3}
"""The beginning of the demo's training, with larger steps."""


@pytest.mark.slow
def test_training_teaches_the_demo_judge_to_check(tmp_path: Path) -> None:
    """A part of the README's example, on pictures that no training saw; an answer at once stays a guess."""
    preferences, spec = demo_preferences("test", 100, seed=1), EvaluationSpec("demo", "test")
    reports = list(train("demo", "demo", tmp_path / "run", **SHORT))
    assert len(reports) == 20
    for adapter in (None, tmp_path / "run"):
        judge = mlxpref.load("demo", adapter, max_tokens=80)
        accuracy = evaluate(judge, preferences, spec).metrics.accuracy
        assert (accuracy < 0.7) if adapter is None else (accuracy > 0.85)
        at_once = replace(judge, settings=replace(judge.settings, think=False))
        assert evaluate(at_once, preferences, spec).metrics.accuracy == pytest.approx(0.5, abs=0.15)
    lengths = [report.tokens / len(report.rollouts) for report in reports]
    assert np.mean(lengths[-5:]) > np.mean(lengths[:5]) + 5, "more is checked, in more words"


def equal_pairs(split: str, count: int) -> list[Preference]:
    """The pairs of the first `count` of which quality decides."""
    return [
        preference
        for preference, pair in zip(demo_preferences(split, count), demo_pairs(split, count), strict=True)
        if count_met(pair.brief, pair.a) == count_met(pair.brief, pair.b)
    ]


def test_training_without_thinking_teaches_what_can_be_seen(tmp_path: Path) -> None:
    """At once the demo judge guesses; which of two pictures is the cleaner one is learned without a word."""
    settings = SHORT | {"steps": 30, "learning_rate": 5e-3, "think": False}
    assert len(list(train(equal_pairs("train", 800), "demo", tmp_path / "run", **settings))) == 30
    before, after = (
        evaluate(mlxpref.load("demo", adapter, think=False), equal_pairs("test", 300), EvaluationSpec("demo", "test"))
        for adapter in (None, tmp_path / "run")
    )
    assert before.metrics.accuracy < 0.78
    assert after.metrics.accuracy > before.metrics.accuracy + 0.1
    assert after.metrics.accuracy > 0.8


@pytest.mark.slow
def test_ranking_uses_what_was_learned(tmp_path: Path) -> None:
    """Of 16 pictures that meet the first requirement, the 8 that meet the others, too, come first, though spoiled."""
    list(train("demo", "demo", tmp_path / "run", **SHORT))
    brief = Requirement("circle", "red"), Requirement("square", "cross"), Requirement("triangle", "circle")
    rng, colours = np.random.default_rng(3), ("yellow", "purple", "orange")
    specs = [PictureSpec("red", colours[i % 3], "red", colours[i % 3], ("noisy", "blurry")[i % 2]) for i in range(8)]
    specs += [PictureSpec("red", colours[i % 3], colours[i % 3 - 1], "blue", "clean") for i in range(8)]
    images = [render(spec, rng) for spec in specs]
    found = []
    for adapter in (None, tmp_path / "run"):
        ranking = mlxpref.load("demo", adapter, max_tokens=80).rank(images, prompt_text(brief), think_about="all")
        found.append(sum(image.index < 8 for image in ranking.strengths.images[:8]))
    assert found[0] <= 2
    assert found[1] >= 7


def test_the_shared_judge_has_no_adapter(demo_judge: Callable[..., Judge]) -> None:
    """Training in these tests must not leak into the judge that other tests share."""
    assert not adapter_weights(demo_judge().vlm.model)


def test_a_custom_reward_is_learned(fresh: VLM, tmp_path: Path) -> None:
    """It sees what it should, and what it rewards is written more often."""
    (tmp_path / "own.py").write_text(
        "def short(texts, p_first, prompt, images, y):\n"
        "    assert prompt.startswith(('a ', 'an '))\n"
        "    assert [image.size for image in images] == [(84, 84)] * 2\n"
        "    assert len(p_first) == len(texts) and y in (0.0, 1.0)\n"
        "    return [-len(text) for text in texts]\n"
    )
    reports = run_small(
        fresh, tmp_path / "run", reward=f"{tmp_path}/own.py:short", steps=12, comparisons=6, group=6, limit=72
    )
    assert np.mean([r.reward for r in reports[-3:]]) > np.mean([r.reward for r in reports[:3]]) + 1


def test_failing_reward_keeps_the_adapter(fresh: VLM, tmp_path: Path) -> None:
    with pytest.raises(MlxprefError, match=r"own.py:2: the reward raised ZeroDivisionError"):
        run_small(fresh, tmp_path / "run", reward=own_file(tmp_path, "return [1 / 0]"))
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


def test_an_unknown_reward_is_refused(fresh: VLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'nice': neither soft, brier, hard or score nor a file"):
        run_small(fresh, tmp_path / "run", reward="nice")
    assert not (tmp_path / "run").exists()


def test_run_without_a_step_leaves_no_folder(fresh: VLM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model reads at most"):
        run_small(fresh, tmp_path / "run", max_tokens=10**7)
    assert not (tmp_path / "run").exists()


def test_the_adapter_is_saved_every_few_steps(fresh: VLM, tmp_path: Path) -> None:
    settings = settings_from(TrainSettings, {"data": "demo", "save_every": 2} | SMALL | {"steps": 4, "think": False})
    files = []
    for _ in start_run(settings, tmp_path / "run", vlm=fresh).reports():
        files.append((tmp_path / "run" / "adapters.safetensors").is_file())
    assert files == [False, True, True, True]


def test_interrupt_keeps_the_adapter(fresh: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_small(fresh, tmp_path / "run", think=False)
    before = copied(fresh)
    update = type(fresh.model).update

    def interrupted(*arguments: Any, **options: Any) -> Any:
        update(*arguments, **options)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(fresh.model), "update", interrupted)
    with pytest.raises(KeyboardInterrupt), adapter_off(fresh.model):
        pass
    assert all(np.array_equal(before[name], weight) for name, weight in copied(fresh).items())


def test_several_updates_clip(tmp_path: Path) -> None:
    """What has moved too far is clipped, from the second update on."""
    reports = {}
    for updates in (1, 3):
        changes = {"updates_per_rollout": updates, "clip_low": 1e-3, "clip_high": 1e-3, "learning_rate": 0.05}
        reward = own_file(tmp_path, "return [len(text) for text in texts]")
        reports[updates] = run_small(load_vlm(TINY, 512 * 512), tmp_path / str(updates), reward=reward, **changes)
    assert all(report.clip_fraction == 0 for report in reports[1])
    assert any(report.clip_fraction > 0 for report in reports[3])
    assert reports[1][0].loss == pytest.approx(reports[3][0].loss)


def test_an_unanswered_rollout_has_no_gradient() -> None:
    """Label probabilities that underflow, where no answer counts, must not become not-a-number."""
    for reward in ("soft", "brier"):
        inputs = LossInputs(
            prompts=[],
            completions=Completions.of([[1], [1]]),
            mix=RewardMix.parse(reward),
            mask=mx.ones((2, 1)) > 0,
            weights=mx.ones((2, 1)),
            answer_weights=mx.array([0.25, 0.0]),
            advantages=mx.zeros(2),
            y=mx.array([1.0, 1.0]),
            form=mx.array([0.2, 0.2]),
        )
        gradient = mx.grad(
            lambda labels, i=inputs: step_loss(Logprobs(mx.zeros((2, 1)), labels), i, TrainSettings())[0]
        )(mx.array([[-0.1, -2.4], [-200.0, -200.0]]))
        assert mx.isfinite(gradient).all().item()
        assert gradient[1].tolist() == [0, 0]


@pytest.mark.parametrize("reward", ["soft", "brier"])
@pytest.mark.parametrize("logprob", [-3.0, -30.0, -60.0, -100.0])
def test_unlikely_labels_have_a_finite_gradient(reward: str, logprob: float) -> None:
    """Equal to that by float64 in log space, where the ratio of both labels would underflow."""
    labels, y, form = np.array([[logprob, logprob - 1.0]]), 1.0, 0.2
    inputs = LossInputs(
        prompts=[],
        completions=Completions.of([[]]),
        mix=RewardMix.parse(reward),
        mask=mx.ones((1, 0)) > 0,
        weights=mx.ones((1, 0)),
        answer_weights=mx.ones(1),
        advantages=mx.zeros(1),
        y=mx.array([y]),
        form=mx.array([form]),
    )
    loss = lambda each: step_loss(Logprobs(mx.zeros((1, 0)), each), inputs, TrainSettings())[0]  # noqa: E731
    gradient = np.array(mx.grad(loss)(mx.array(labels.astype(np.float32))))[0]
    scale, p_first = np.exp(logprob), 1 / (1 + np.exp(-1.0))

    def earned(first: float, second: float) -> float:  # over `scale`
        mass, p = np.exp(first) + np.exp(second), 1 / (1 + np.exp(second - first))
        return float(mass * (form + p)) if reward == "soft" else float(mass * (form + 1 - (p - y) ** 2))

    step = 1e-6
    expected = [
        (earned(step, -1.0) - earned(-step, -1.0)) / (2 * step),
        (earned(0.0, -1.0 + step) - earned(0.0, -1.0 - step)) / (2 * step),
    ]
    assert np.isfinite(gradient).all()
    assert p_first > 0.5
    assert gradient == pytest.approx(-scale * np.array(expected), rel=1e-3, abs=1e-37)


def test_an_adapter_knows_its_base(fresh: VLM, tmp_path: Path) -> None:
    from mlxpref.checkpoints.checkpoint import Checkpoint
    from mlxpref.engine.adapters import base_name, check_base
    from mlxpref.engine.profile import own_profile
    from mlxpref.errors import ModelError

    run_small(fresh, tmp_path / "run", think=False)
    assert base_name(tmp_path / "run") == str(fresh.checkpoint.folder)
    assert check_base(tmp_path / "run", Checkpoint.open(TINY), own_profile()) == []
    with pytest.raises(ModelError, match=r"trained on .*qwen2_5_vl, which this model is not: .*--any-base"):
        check_base(tmp_path / "run", Checkpoint.open(GOLDEN / "qwen3_vl"), own_profile())
    (line,) = check_base(tmp_path / "run", Checkpoint.open(GOLDEN / "qwen3_vl"), own_profile(), any_base=True)
    assert "which this model is not" in line


def test_sampling_ignores_generation_config(fresh: VLM) -> None:
    """The golden checkpoint asks for top_k and repetition penalties; rollouts are drawn from the whole distribution."""
    from mlxpref.engine.completion import Sampling
    from mlxpref.engine.rollout import roll_out

    config = json.loads((fresh.checkpoint.folder / "generation_config.json").read_text())
    assert config["do_sample"]
    assert set(config) & {"top_k", "top_p", "repetition_penalty"}
    preference = demo_preferences("train", 1)[0]
    prompt = fresh.input(preference.a, preference.b, preference.prompt, "choice", True)
    _, logits = fresh.prefill([prompt])
    ranks = np.argsort(np.argsort(-np.array(logits[0])))
    sampling = Sampling(samples=200, temperature=1.0, max_tokens=1)
    tokens = [rollout.tokens[0] for rollout in roll_out(fresh, [prompt], sampling, [(0,)])[0]]
    assert max(ranks[token] for token in tokens) > 20


def own_file(folder: Path, body: str) -> str:
    (folder / "own.py").write_text(f"def own(texts, y, **rest):\n    {body}\n")
    return f"{folder}/own.py:own"


def test_report(tmp_path: Path) -> None:
    own = own_file(tmp_path, "return [len(text) / 100 for text in texts]")
    settings = demo_settings(
        steps=2, comparisons=2, group=3, reward=f"soft=2,{own}=0.5", length_budget=8, kl=0.1, limit=60,
        held_out=0.2, held_out_limit=4, evaluate_every=2,
    )  # fmt: skip
    reports = list(start_run(settings, tmp_path / "run", vlm=mlxpref.load("demo").vlm).reports())
    for report in reports:
        parts = report.reward_parts
        own = next(name for name in parts if name.endswith("own.py:own"))  # as it is named in reports
        assert set(parts) == {"soft", own, "length"}
        assert report.reward == pytest.approx(2 * parts["soft"] + 0.5 * parts[own] + parts["length"])
        assert parts[own] == pytest.approx(np.mean([len(record.text) / 100 for record in report.rollouts]))
        answered = [record.text for record in report.rollouts if record.label_mass]
        assert answered
        assert all(text.endswith("<answer>") for text in answered)
        assert -1 < parts["length"] < 0
        assert report.entropy > 0
        assert report.label_mass > 0.5
        assert report.format_rate == pytest.approx(len(answered) / 6)
        assert report.tokens_per_second == pytest.approx(report.tokens / report.rollout_seconds)
        phases = report.rollout_seconds + report.score_seconds + report.update_seconds + report.evaluation_seconds
        assert report.seconds == pytest.approx(phases, abs=1e-3)
    assert [report.held_out is None for report in reports] == [True, False]
    assert [report.evaluation_seconds > 0 for report in reports] == [False, True]
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert line["held_out"]["pairs"] == 4
    assert line["reward_parts"]["soft"] == reports[1].reward_parts["soft"]


def test_unmeasured_values_are_null(fresh: VLM, tmp_path: Path) -> None:
    (report,) = run_small(fresh, tmp_path / "run", think=False, steps=1)
    line = report.to_json()
    unmeasured = ("kl", "entropy", "held_out", "mismatch", "clip_fraction", "read_accuracy", "tokens_per_second")
    assert [line[name] for name in unmeasured] == [None] * len(unmeasured)
    assert report.score_seconds == 0


def test_entropy_of_the_policy(fresh: VLM) -> None:
    preference = demo_preferences("train", 1)[0]
    prompt = fresh.input(preference.a, preference.b, preference.prompt, "choice", True)
    p = np.array(mx.softmax(fresh.prefill([prompt])[1][0]), np.float64)
    settings = TrainSettings(reward="hard", steps=1, comparisons=1, group=300, max_tokens=1, rows=300)
    (report,) = Trainer(fresh, [preference], settings).steps()
    assert report.entropy == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), rel=0.1)


def test_resampling(tmp_path: Path) -> None:
    """Only where the first image is the better one do rollouts earn anything, and only there is an advantage."""
    own = own_file(tmp_path, "return [y * len(text) for text in texts]")
    reports = {}
    changed: dict[str, dict[str, Any]] = {
        "none": {},
        "some": {"resample": 3},
        "rows": {"resample": 3, "rows": 1},
        "divergence": {"resample": 3, "kl": 0.1},
    }
    for name, changes in changed.items():
        vlm = load_vlm(TINY, 512 * 512)
        reports[name] = run_small(vlm, tmp_path / name, reward=own, comparisons=6, steps=1, **changes)
    assert any(report.skipped for report in reports["none"])
    for before, after in zip(reports["none"], reports["some"], strict=True):
        assert before.resampled == 0
        assert after.resampled >= before.skipped
        assert after.groups == 6
        assert after.skipped < before.skipped or not before.skipped
        assert (after.tokens > before.tokens) == (after.resampled > 0)
    # A divergence gives every group a gradient, and none an advantage: the step writes the same.
    assert reports["divergence"][0].resampled == reports["some"][0].resampled
    # What is drawn depends neither on what runs together nor on the machine.
    without_time = [
        [[(r.y, r.text, r.reward, r.advantage) for r in report.rollouts] for report in reports[name]]
        for name in ("some", "rows")
    ]
    assert without_time[0] == without_time[1]


def test_resampling_ends_with_the_data(fresh: VLM, tmp_path: Path) -> None:
    reports = run_small(fresh, tmp_path / "run", reward="hard", limit=5, resample=9)
    assert [report.resampled for report in reports] == [2, 2]
    assert [report.skipped for report in reports] == [3, 3]


def test_truncated_completions_may_be_masked(fresh: VLM, tmp_path: Path) -> None:
    """A random model hardly ever comes to an end, least of all so soon."""
    brief = {"max_tokens": 2, "seed": 2}
    own = own_file(tmp_path, "return [len(text) for text in texts]")
    masked = run_small(fresh, tmp_path / "masked", reward=own, mask_truncated=True, **brief)
    assert [report.truncated for report in masked] == [1, 1]
    assert [report.skipped for report in masked] == [3, 3]
    assert not any(report.updated for report in masked)
    reports = {}
    for mask in (True, False):  # with a divergence no group is skipped, and still nothing flows from its tokens
        vlm = load_vlm(TINY, 512 * 512)
        reports[mask] = run_small(vlm, tmp_path / str(mask), reward=own, mask_truncated=mask, kl=0.1, **brief)
    assert [report.grad_norm for report in reports[True]] == [0, 0]
    assert all(report.updated and report.grad_norm > 0 for report in reports[False])


def test_finished_completions_are_not_truncated(tmp_path: Path) -> None:
    judge = mlxpref.load("demo")
    settings = demo_settings(steps=1, comparisons=1, group=2, max_tokens=100)
    for number, (changes, share) in enumerate(
        [({"reward": "soft"}, 0.0), ({"reward": "hard"}, 0.0), ({"reward": "hard", "max_tokens": 2}, 1.0)]
    ):
        vlm = judge.vlm if not number else mlxpref.load("demo").vlm
        (report,) = start_run(replace(settings, **changes), tmp_path / str(number), vlm=vlm).reports()
        assert report.truncated == share


@pytest.mark.parametrize("updates", [1, 2])
def test_learning_rate(fresh: VLM, updates: int) -> None:
    settings = TrainSettings(steps=6, warmup_steps=2, learning_rate=1e-2, updates_per_rollout=updates)
    rate = Trainer(fresh, demo_preferences("train", 4), settings)._learning_rate()
    assert [float(rate(mx.array(number))) for number in (0, updates)] == pytest.approx(
        [5e-3 / updates, 7.5e-3], rel=0.2
    )
    result = [float(rate(mx.array(updates * step))) for step in (2, 3, 4, 5, 6)]
    assert result == pytest.approx([1e-2, 8.68198e-3, 5.5e-3, 2.31802e-3, 1e-3], rel=1e-4)


def test_infinite_update_ends_the_step(fresh: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = trainer.policy_gradient, iter(range(99))

    def descend(*arguments: Any) -> Any:
        result = original(*arguments)
        return replace(result, loss=result.loss * float("nan")) if next(calls) == 1 else result

    monkeypatch.setattr(trainer, "policy_gradient", descend)
    first, second = run_small(fresh, tmp_path / "run", think=False, updates_per_rollout=3)
    assert first.updated
    assert not np.isfinite(first.loss)
    assert next(calls) == 5
    assert np.isfinite(second.loss)
    assert all(np.isfinite(weight).all() for weight in copied(fresh).values())


def test_a_mix_without_texts_is_refused(fresh: VLM, tmp_path: Path) -> None:
    own = own_file(tmp_path, "return [0 for _ in texts]")
    with pytest.raises(ConfigError, match=r"without thinking nothing is written that .*own.py:own could judge"):
        run_small(fresh, tmp_path / "run", reward=f"soft,{own}", think=False)
    run_small(fresh, tmp_path / "run", reward=own, think=False)
