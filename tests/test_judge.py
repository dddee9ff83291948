"""The judge: both orders, soft preferences, rankings that do not depend on names or places."""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

import mlxpref
from mlxpref.config import JudgeSettings
from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import ConfigError, ModelError
from mlxpref.image_ranking import TOP
from mlxpref.judge import Judge
from mlxpref.pairs import Comparison, Pair, PairVerdict, shown
from mlxpref.verdict import Verdict
from mlxpref.vlm import VLM
from tests.conftest import picture

MakeJudge = Callable[..., Judge]


def tiny_judge(vlm: VLM, **settings: object) -> Judge:
    return Judge(vlm, JudgeSettings(**({"max_tokens": 6} | settings)))  # type: ignore[arg-type]


def said(p_first: float) -> Verdict:
    return Verdict("<think>x</think><answer>", p_first, 1 - p_first)


def test_a_pair_is_shown_in_both_orders_whatever_the_file_says() -> None:
    a, b = picture(1), picture(2)
    assert shown(Pair(a, b, "x")) == (Comparison(a, b, "x"), Comparison(b, a, "x"))


def test_both_orders_are_combined_in_log_odds() -> None:
    verdict = PairVerdict((said(0.9),), (said(0.7),))
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
            assert PairVerdict((said(p[0]),), (said(p[1]),)).p_a == pytest.approx(1 / (1 + np.exp(-truth)))


def test_samples_are_averaged_and_unreadable_ones_left_out() -> None:
    verdict = PairVerdict((said(0.9), said(0.5), Verdict("?")), (Verdict("?"),))
    assert verdict.p_a_shown_first == pytest.approx(0.7)
    assert verdict.p_a_shown_second is None
    assert verdict.p_a == pytest.approx(0.7)
    assert PairVerdict((Verdict("?"),), (Verdict("?"),)).p_a == 0.5


@pytest.mark.parametrize("think", [True, False])
def test_exchanging_a_and_b_exchanges_the_preference(tiny_vlm: VLM, think: bool) -> None:
    judge = tiny_judge(tiny_vlm, think=think)
    for seed in range(3):
        a, b = picture(seed, (84, 84)), picture(seed + 9, (140, 84))
        assert judge.compare(a, b, "a hat").p_a == pytest.approx(1 - judge.compare(b, a, "a hat").p_a, abs=1e-5)


def test_batches_keep_the_order_of_comparisons(tiny_vlm: VLM) -> None:
    pictures = [picture(i, (84, 84 + 28 * (i % 3))) for i in range(5)]
    pairs = [Pair(a, b, f"hat {i}") for i, (a, b) in enumerate(pairwise(pictures))]
    one = [verdict.p_a for verdict in tiny_judge(tiny_vlm, think=False, rows=1).pairs(pairs)]
    many = [verdict.p_a for verdict in tiny_judge(tiny_vlm, think=False, rows=7).pairs(pairs)]
    assert many == pytest.approx(one, abs=1e-5)
    assert len(set(np.round(one, 6))) == len(pairs)


def test_samples_are_drawn_and_written_once_an_order(tiny_vlm: VLM) -> None:
    verdict = tiny_judge(tiny_vlm, samples=3).compare(picture(1), picture(2), "a hat")
    assert len(verdict.a_shown_first) == len(verdict.a_shown_second) == 3
    assert len({v.text for v in verdict.a_shown_first}) > 1


def test_sampling_depends_on_what_is_shown_not_on_when(tiny_vlm: VLM) -> None:
    judge = tiny_judge(tiny_vlm, samples=3)
    a, b = picture(1), picture(2)
    first = judge.compare(a, b, "a hat")
    judge.compare(b, picture(3), "a cat")
    again, swapped = judge.compare(a, b, "a hat"), judge.compare(b, a, "a hat")
    assert [v.text for v in again.verdicts] == [v.text for v in first.verdicts]
    assert swapped.p_a == pytest.approx(1 - first.p_a, abs=1e-5)


def test_half_precision_does_not_put_preferences_on_a_grid() -> None:
    from mlxpref.vlm import load_vlm
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
    assert judge.comparisons == 2 * 2 * 10


def test_permuting_the_images_permutes_the_ranking(tiny_vlm: VLM) -> None:
    images = [picture(i) for i in range(5)]
    order = [3, 0, 4, 2, 1]
    one = tiny_judge(tiny_vlm).rank(images, "a hat", "none").ranking
    other = tiny_judge(tiny_vlm).rank([images[i] for i in order], "a hat", "none").ranking
    strengths = {image.index: image.strength for image in one.images}
    for image in other.images:
        assert image.strength == pytest.approx(strengths[order[image.index]], abs=1e-5)


def test_the_best_are_thought_about_and_the_others_read(tiny_vlm: VLM) -> None:
    images = [picture(i) for i in range(TOP + 2)]
    ranking = tiny_judge(tiny_vlm, max_tokens=2).rank(images, "a hat", "top")
    thought = [pair for pair in ranking.pairs if pair.verdict.verdicts[0].tokens]
    assert len(ranking.pairs) == (TOP + 2) * (TOP + 1) // 2
    assert len(thought) == TOP * (TOP - 1) // 2
    assert len({i for pair in thought for i in (pair.a, pair.b)}) == TOP


def test_scores_average_one_half(tiny_vlm: VLM) -> None:
    images = [picture(i) for i in range(4)]
    scores = tiny_judge(tiny_vlm, think=False).score("a hat", images)
    assert len(scores) == 4
    assert np.mean(scores) == pytest.approx(0.5)


def test_reasons_speak_of_the_image_they_stand_beside(demo_judge: MakeJudge) -> None:
    preferences = demo_preferences("test", 3)
    images = [image for p in preferences for image in (p.a, p.b)]
    ranking = demo_judge().rank(images, preferences[0].prompt, "all")
    for image in ranking.ranking.images:
        reason = ranking.reason_text(image)
        if reason:
            assert reason.startswith(("as image 1 beside image ", "as image 2 beside image "))
            assert f"beside image {image.index}:" not in reason


def test_load_knows_the_demo_and_refuses_what_does_not_exist() -> None:
    judge = mlxpref.load("demo", think=False)
    assert judge.name == "demo"
    assert not judge.settings.think
    with pytest.raises(ConfigError, match="unknown setting 'thinking'"):
        mlxpref.load("demo", thinking=False)
    with pytest.raises(ConfigError, match="samples"):
        mlxpref.load("demo", samples=0)
    with pytest.raises(ModelError, match="no such model folder"):
        mlxpref.load("/no/such/folder")
