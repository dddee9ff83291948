"""The judge: both orders, soft preferences, rankings that do not depend on names or places."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxpref
from mlxpref.config import JudgeSettings
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.adapters import load_adapter
from mlxpref.engine.image_features import FeatureStore
from mlxpref.engine.profile import own_profile
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ConfigError, DataError, ModelError
from mlxpref.judge import judge as module
from mlxpref.judge import verdict_source
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.fingerprint import Fingerprint
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_budget import TOP
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.store import Store
from mlxpref.preferences import Comparison, Pair, shown
from mlxpref.verdict import Verdict
from tests.conftest import picture, tiny_model, write_adapter
from tests.tolerance import PROBABILITY

MakeJudge = Callable[..., Judge]


def tiny_judge(vlm: VLM, **settings: object) -> Judge:
    return Judge(vlm, JudgeSettings(**({"max_tokens": 6} | settings)))  # type: ignore[arg-type]


def make_verdict(p_first: float) -> Verdict:
    return Verdict("<think>x</think><answer>", p_first, 1 - p_first)


def test_a_pair_is_shown_in_both_orders() -> None:
    a, b = picture(1), picture(2)
    assert shown(Pair(a, b, "x")) == (Comparison(a, b, "x"), Comparison(b, a, "x"))


def test_both_orders_are_combined_in_log_odds() -> None:
    verdict = PairVerdict((make_verdict(0.9),), (make_verdict(0.7),))
    assert verdict.p_a_shown_first == pytest.approx(0.9)
    assert verdict.p_a_shown_second == pytest.approx(0.3)
    mean = (np.log(0.9 / 0.1) + np.log(0.3 / 0.7)) / 2
    assert verdict.p_a == pytest.approx(1 / (1 + np.exp(-mean)))
    swapped = PairVerdict(verdict.a_shown_second, verdict.a_shown_first)
    assert swapped.p_a == 1 - verdict.p_a


def test_an_additive_position_bias_cancels() -> None:
    for truth in (-2.0, 0.0, 0.5):
        for bias in (-1.0, 0.0, 3.0):
            p = [1 / (1 + np.exp(-x)) for x in (truth + bias, -truth + bias)]
            assert PairVerdict((make_verdict(p[0]),), (make_verdict(p[1]),)).p_a == pytest.approx(
                1 / (1 + np.exp(-truth))
            )


def test_samples_are_averaged() -> None:
    verdict = PairVerdict((make_verdict(0.9), make_verdict(0.5), Verdict("?")), (Verdict("?"),))
    assert verdict.p_a_shown_first == pytest.approx(0.7)
    assert verdict.p_a_shown_second is None
    assert verdict.p_a == pytest.approx(0.7)
    assert PairVerdict((Verdict("?"),), (Verdict("?"),)).p_a == 0.5


@pytest.mark.parametrize("think", [True, False])
def test_preference_is_antisymmetric(tiny_vlm: VLM, think: bool) -> None:
    judge = tiny_judge(tiny_vlm, think=think)
    for seed in range(3):
        a, b = picture(seed, (84, 84)), picture(seed + 9, (140, 84))
        assert judge.compare(a, b, "a hat").p_a == pytest.approx(1 - judge.compare(b, a, "a hat").p_a, abs=PROBABILITY)


def test_batches_keep_the_order_of_comparisons(tiny_vlm: VLM) -> None:
    pictures = [picture(i, (84, 84 + 28 * (i % 3))) for i in range(5)]
    pairs = [Pair(a, b, f"hat {i}") for i, (a, b) in enumerate(pairwise(pictures))]
    one = [verdict.p_a for verdict in tiny_judge(tiny_vlm, think=False, rows=1).pairs(pairs)]
    many = [verdict.p_a for verdict in tiny_judge(tiny_vlm, think=False, rows=7).pairs(pairs)]
    assert many == pytest.approx(one, abs=PROBABILITY)
    assert len(set(np.round(one, 6))) == len(pairs)


def test_each_order_is_sampled_once(tiny_vlm: VLM) -> None:
    verdict = tiny_judge(tiny_vlm, samples=3).compare(picture(1), picture(2), "a hat")
    assert len(verdict.a_shown_first) == len(verdict.a_shown_second) == 3
    assert len({v.text for v in verdict.a_shown_first}) > 1


def test_sampling_follows_the_comparison(tiny_vlm: VLM) -> None:
    judge = tiny_judge(tiny_vlm, samples=3)
    a, b = picture(1), picture(2)
    first = judge.compare(a, b, "a hat")
    judge.compare(b, picture(3), "a cat")
    again, swapped = judge.compare(a, b, "a hat"), judge.compare(b, a, "a hat")
    assert [v.text for v in again.verdicts] == [v.text for v in first.verdicts]
    assert swapped.p_a == pytest.approx(1 - first.p_a, abs=PROBABILITY)


def test_half_precision_leaves_no_grid() -> None:
    from mlxpref.engine.vlm import load_vlm
    from tests.conftest import GOLDEN

    for name in ("qwen2_vl", "qwen2_5_vl"):
        judge = Judge(load_vlm(GOLDEN / name, 512 * 512, mx.bfloat16), JudgeSettings(think=False))
        pairs = [Pair(picture(i), picture(i + 50), "a hat") for i in range(12)]
        odds = [np.log(v.p_label_first / v.p_label_second) for pair in judge.pairs(pairs) for v in pair.verdicts]
        grid = np.abs(np.array(odds) * 64 - np.round(np.array(odds) * 64))
        assert (grid > 0.05).mean() > 0.5


def test_each_image_is_encoded_once_a_ranking(tiny_vlm: VLM) -> None:
    judge = tiny_judge(tiny_vlm, think=False)
    images = [picture(100 + i) for i in range(5)]
    ranking = judge.rank(images, "a hat", "none")
    assert ranking.vision_runs == 5
    assert judge.rank(images, "another hat", "none").vision_runs == 0


def test_permuting_the_images_permutes_the_ranking(tiny_vlm: VLM) -> None:
    images = [picture(i) for i in range(5)]
    order = [3, 0, 4, 2, 1]
    one = tiny_judge(tiny_vlm).rank(images, "a hat", "none").strengths
    other = tiny_judge(tiny_vlm).rank([images[i] for i in order], "a hat", "none").strengths
    strengths = {image.index: image.strength for image in one.images}
    for image in other.images:
        assert image.strength == pytest.approx(strengths[order[image.index]], abs=10 * PROBABILITY)


def test_only_the_top_is_thought_about() -> None:
    images = [picture(i) for i in range(TOP + 2)]
    ranking = tiny_judge(tiny_model("qwen2_5_vl"), max_tokens=2).rank(images, "a hat", "top", pairs="all")
    thinking_pairs = [pair for pair in ranking.pairs if pair.verdict.verdicts[0].tokens]
    assert len(ranking.pairs) == (TOP + 2) * (TOP + 1) // 2
    assert len(thinking_pairs) == TOP * (TOP - 1) // 2
    assert len({i for pair in thinking_pairs for i in (pair.a, pair.b)}) == TOP


def test_scores_average_one_half(tiny_vlm: VLM) -> None:
    images = [picture(i) for i in range(4)]
    scores = tiny_judge(tiny_vlm, think=False).score(images, "a hat")
    assert len(scores) == 4
    assert np.mean(scores) == pytest.approx(0.5)


def test_reasons_are_with_their_image(demo_judge: MakeJudge) -> None:
    preferences = demo_preferences("test", 3)
    images = [image for p in preferences for image in (p.a, p.b)]
    ranking = demo_judge().rank(images, preferences[0].prompt, "all")
    for image in ranking:
        if reason := image.reason:
            assert reason.startswith(("as image 1 beside image ", "as image 2 beside image "))
            assert f"beside image {image.index}:" not in reason


def test_a_criterion_asks_another_question(demo_judge: MakeJudge) -> None:
    images = [picture(i) for i in range(3)]
    by_prompt, sharper, brighter = (
        demo_judge(think=False, criterion=criterion) for criterion in ("", "the sharper eyes", "the brighter one")
    )
    rankings = [
        by_prompt.rank(images, "a hat"), sharper.rank(images, "a hat"), sharper.rank(images), brighter.rank(images)
    ]  # fmt: skip
    assert len({ranking.pairs[0].verdict.p_a for ranking in rankings}) == 4
    assert [ranking.title for ranking in rankings] == [
        "“a hat”", "“a hat”, by “the sharper eyes”", "by “the sharper eyes”", "by “the brighter one”"
    ]  # fmt: skip
    assert [ranking.to_json()["criterion"] for ranking in rankings[1:3]] == ["the sharper eyes"] * 2
    assert not any("prompt" in warning for ranking in rankings for warning in ranking.warnings)
    p_a = rankings[2].pairs[0].verdict.p_a
    assert sharper.compare(images[0], images[1]).p_a == pytest.approx(p_a, abs=1e-5)
    assert sharper.score(images[:2]) == pytest.approx([p_a, 1 - p_a], abs=1e-5)
    for call in (
        lambda: by_prompt.rank(images),
        lambda: by_prompt.compare(*images[:2]),
        lambda: by_prompt.score(images),
    ):
        with pytest.raises(DataError, match=r"the prompt is empty; give .* or a criterion"):
            call()


@pytest.mark.parametrize("criterion", [" \n", "\ud800", 3, None])
def test_a_criterion_is_text(criterion: Any) -> None:
    with pytest.raises(ConfigError, match="setting criterion"):
        mlxpref.load("demo", criterion=criterion)


def test_load() -> None:
    judge = mlxpref.load("demo", think=False)
    assert judge.name == "demo"
    assert not judge.settings.think
    with pytest.raises(ConfigError, match="unknown setting 'thinking'"):
        mlxpref.load("demo", thinking=False)
    with pytest.raises(ConfigError, match="samples"):
        mlxpref.load("demo", samples=0)
    with pytest.raises(ModelError, match="no such model folder"):
        mlxpref.load("/no/such/folder")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "comparisons.sqlite") as store:
        yield store


def judge_with_store(store: Store | None, **settings: Any) -> Judge:
    """The demo judge of another process: nothing is in memory, `store` is all there is."""
    return replace(mlxpref.load("demo", **({"think": False} | settings)), store=store)


def stored_count(store: Store) -> int:
    """How many comparisons a store holds."""
    with sqlite3.connect(store.path) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM comparisons").fetchone()
    connection.close()
    return int(count)


def all_of(images: list[Image.Image]) -> list[Pair]:
    return [Pair(a, b, "a red circle") for a, b in combinations(images, 2)]


def test_known_comparisons_are_recalled_exactly(store: Store) -> None:
    images = [picture(i) for i in range(TOP + 1)]
    settings = {"think": True, "samples": 2, "max_tokens": 4}
    before, again = judge_with_store(store, **settings), judge_with_store(store, **settings)
    first, second = before.rank(images, "a red circle"), again.rank(images, "a red circle")
    assert (first.recalled, first.vision_runs) == (0, len(images))
    assert (second.recalled, second.vision_runs) == (first.planned, 0)
    assert first.tokens > second.tokens == 0
    assert second.pairs == first.pairs
    assert second.strengths.images == first.strengths.images
    assert stored_count(store) == first.planned == first.comparisons


def test_scores_and_evaluations_are_recalled_too(store: Store) -> None:
    images = [picture(i) for i in range(3)]
    preferences = demo_preferences("test", 4)
    before, again = judge_with_store(store), judge_with_store(store)
    assert before.score(images, "a red circle") == again.score(images, "a red circle")
    spec = EvaluationSpec("demo", "test")
    assert evaluate(before, preferences, spec).metrics == evaluate(again, preferences, spec).metrics
    assert again.vlm.features.runs == 0


def test_added_images_reuse_comparisons(store: Store) -> None:
    images = [picture(i) for i in range(7)]
    list(judge_with_store(store).pairs(all_of(images[:5])))
    judge = judge_with_store(store)
    pairs = list(judge.pairs(all_of(images)))
    assert JudgingCounts.of(pairs) == JudgingCounts(comparisons=2 * (21 - 10), recalled=2 * 10, tokens=0)
    assert judge.vlm.features.runs == 7
    expected = [pair.p_a for pair in judge_with_store(None).pairs(all_of(images))]
    assert [pair.p_a for pair in pairs] == pytest.approx(expected, abs=PROBABILITY)


def test_known_images_are_not_encoded(store: Store) -> None:
    images = [picture(i) for i in range(6)]
    pairs = all_of(images)
    list(judge_with_store(store).pairs(pairs[:-1]))
    judge = judge_with_store(store)
    assert len(list(judge.pairs(pairs))) == len(pairs)
    assert judge.vlm.features.runs == 2


def test_unknown_comparisons_fill_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(i) for i in range(8)]
    pairs = all_of(images)
    known = [pair for number, pair in enumerate(pairs) if number % 3]
    before = list(judge_with_store(store).pairs(known))
    sizes = []
    roll_out = verdict_source.roll_out

    def counting(vlm: VLM, prompts: Any, *args: Any, **others: Any) -> Any:
        sizes.append(len(prompts))
        return roll_out(vlm, prompts, *args, **others)

    monkeypatch.setattr(verdict_source, "roll_out", counting)
    verdicts = list(judge_with_store(store, rows=8).pairs(pairs))
    assert sizes == [8, 8, 4]
    assert [v for number, v in enumerate(verdicts) if number % 3] == before
    expected = [verdict.p_a for verdict in judge_with_store(None).pairs(pairs)]
    assert [verdict.p_a for verdict in verdicts] == pytest.approx(expected, abs=PROBABILITY)


def test_batch_is_stored_before_it_is_yielded(store: Store) -> None:
    calls = []

    def pairs() -> Iterator[Pair]:
        for pair in all_of([picture(i) for i in range(6)]):
            calls.append(pair)
            yield pair

    work = judge_with_store(store, rows=6).pairs(pairs())
    assert stored_count(store) == 0
    next(work)
    assert stored_count(store) == 6
    assert len(calls) == 3
    list(work)
    calls.clear()
    next(judge_with_store(store, rows=6).pairs(pairs()))
    assert len(calls) == 3  # no more is asked for where everything is known


A, B = picture(1), picture(2)
ASKED: dict[str, Any] = {"first": A, "second": B, "prompt": "a red circle", "form": "choice", "write_answer": False}
THINKING = {"think": True, "samples": 2, "max_tokens": 4, "seed": 0}


def one_more(image: Image.Image) -> Image.Image:
    """The image with one value of one pixel changed by one."""
    pixels = np.array(image)
    pixels[-1, -1, -1] ^= 1
    return Image.fromarray(pixels)


def recalls(judge: Judge, **request: Any) -> bool:
    """Ask about one comparison; whether it was recalled."""
    request = ASKED | request
    comparison = Comparison(request.pop("first"), request.pop("second"), request.pop("prompt"))
    (judgement,) = judge.judgements([comparison], **request)
    return judgement.recalled


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"samples": 3}, {}),
        ({"samples": 1}, {}),
        ({"max_tokens": 5}, {}),
        ({"seed": 1}, {}),
        ({"think": False}, {}),
        ({"criterion": "the sharper eyes"}, {}),
        ({"criterion": "the sharper eyes"}, {"prompt": ""}),
        ({}, {"prompt": "a red circle "}),
        ({}, {"first": one_more(A)}),
        ({}, {"second": one_more(B)}),
        ({}, {"first": B, "second": A}),
        ({}, {"form": "scores"}),
        ({}, {"write_answer": True}),
        ({}, {"think": False}),
    ],
)
def test_other_settings_are_judged(
    demo_judge: MakeJudge, store: Store, settings: dict[str, Any], asked: dict[str, Any]
) -> None:
    def judge(**changed: Any) -> Judge:
        return replace(demo_judge(**(THINKING | changed)), store=store)

    assert not recalls(judge())
    assert not recalls(judge(**settings), **asked)
    assert recalls(judge(**settings), **asked)
    assert recalls(judge())


def test_thinking_is_in_the_key(demo_judge: MakeJudge, store: Store) -> None:
    judge = replace(demo_judge(max_tokens=4), store=store)
    assert not recalls(judge, write_answer=True, think=True)
    assert not recalls(judge, write_answer=True, think=False)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (THINKING, {"rows": 1}),
        (THINKING | {"samples": 1}, {"seed": 1}),
        (THINKING | {"think": False}, {"samples": 3, "seed": 1, "max_tokens": 9}),
        (THINKING | {"criterion": "the sharper eyes"}, {"criterion": " the sharper eyes\n"}),
    ],
)
def test_irrelevant_settings_are_recalled(
    demo_judge: MakeJudge, store: Store, settings: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert not recalls(replace(demo_judge(**settings), store=store))
    assert recalls(replace(demo_judge(**(settings | changed)), store=store))


def test_profile_method_and_pixels_are_in_the_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_with_store(store)
    assert not recalls(judge)
    for place, name, value in (
        (judge.vlm, "profile", replace(own_profile(), system="other words")),
        (module, "_METHOD", module._METHOD + 1),
        (judge.vlm, "features", small_budget(judge.vlm)),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, value)
            assert not recalls(judge)
        assert recalls(judge)


def small_budget(vlm: VLM) -> FeatureStore:
    return FeatureStore(vlm.model.vision_tower, vlm.features.processor, 28 * 28 * 6)


def test_another_adapter_is_another_judge(store: Store, tmp_path: Path) -> None:
    judge = judge_with_store(store)
    assert not recalls(judge)
    load_adapter(judge.vlm.model, write_adapter(tmp_path / "adapter", judge.vlm))
    assert not recalls(judge)
    assert recalls(judge)
    layer = next(layer for name, layer in judge.vlm.model.named_modules() if name.endswith("0.self_attn.q_proj"))
    layer.lora_b = layer.lora_b * 1.001  # as training does, in memory
    assert not recalls(judge)
    assert recalls(judge_with_store(store))


def test_no_store(demo_judge: MakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path))
    monkeypatch.setattr(Fingerprint, "now", None)
    judge = demo_judge(think=False)
    assert not recalls(judge)
    assert not recalls(judge)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_judge_says_that_it_knows_no_other_pictures() -> None:
    judge = mlxpref.load("demo", think=False)
    known, other = [picture(i, (84, 84)) for i in range(2)], picture(3, (40, 64))
    assert not any("mean nothing" in warning for warning in judge.rank(known, "a cube", "none").warnings)
    ranking = judge.rank([*known, other], "a cube", "none")
    assert "mean nothing" in ranking.warnings[0]
    assert ranking.to_json()["remarks"] == list(ranking.warnings)
