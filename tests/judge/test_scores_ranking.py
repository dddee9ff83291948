"""Rankings by a judge of single images: the order of its scores, and one reading an image."""

from dataclasses import replace

import numpy as np
import pytest

from mlxpref.config import JudgeSettings
from mlxpref.judge.judge import Judge
from mlxpref.judge.point import SCORES_ONLY
from mlxpref.preferences import SingleImage
from mlxpref.ranking.temperature import TemperatureScaling
from tests.conftest import picture, tiny_model
from tests.engine.profile_models import asked_by

IMAGES = [picture(seed) for seed in range(14)]
PROMPT = "a hat"


@pytest.fixture
def judge() -> Judge:
    return Judge(asked_by(tiny_model("qwen3_vl"), "rationalrewards"), JudgeSettings(max_tokens=6))


def scores_of(judge: Judge, think: bool) -> list[float]:
    questions = [SingleImage(image, PROMPT) for image in IMAGES]
    return [each.verdicts[0].score or np.nan for each in judge.judgements(questions, think=think)]


@pytest.mark.parametrize("think_about", ["all", "top", "none"])
def test_the_order_is_that_of_the_scores(judge: Judge, think_about: str) -> None:
    ranking = judge.rank(IMAGES, PROMPT, think_about)  # type: ignore[arg-type]
    scores = scores_of(judge, think_about != "none")
    assert [entry.index for entry in ranking] == np.argsort(-np.array(scores), kind="stable").tolist()
    assert [entry.score for entry in ranking] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert np.diff([entry.strength for entry in ranking]) == pytest.approx(np.diff(sorted(scores)[::-1]), abs=1e-5)
    assert ranking.comparisons == len(IMAGES)
    assert ranking.vision_runs <= len(IMAGES)  # a test before this one may have encoded some
    assert SCORES_ONLY in ranking.warnings
    assert {pair.verdict.p_a for pair in ranking.pairs} <= {0.0, 0.5, 1.0}


def test_each_image_is_read_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    prefill = judge.vlm.input_of

    def counted(images, *arguments):  # type: ignore[no-untyped-def]
        runs.append(len(images))
        return prefill(images, *arguments)

    monkeypatch.setattr(judge.vlm, "input_of", counted)
    judge.rank(IMAGES, PROMPT)
    assert runs == [1] * len(IMAGES)


def test_equal_scores_share_a_place(judge: Judge) -> None:
    ranking = judge.rank([IMAGES[0], IMAGES[0].copy(), IMAGES[1]], PROMPT, "none")
    places = {entry.index: entry for entry in ranking}
    assert places[0].rank == places[1].rank
    assert places[0].tied_with == (1,)
    assert sum(entry.p_best for entry in ranking) == pytest.approx(1)


def test_a_temperature_makes_strengths_of_scores(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = judge.rank(IMAGES, PROMPT, "none")
    monkeypatch.setattr(Judge, "_rescaling", lambda *_: TemperatureScaling(0.25, 0.0))
    scaled = judge.rank(IMAGES, PROMPT, "none")
    assert [entry.strength for entry in scaled] == pytest.approx([4 * entry.strength for entry in plain])
    assert SCORES_ONLY not in scaled.warnings
    pair = scaled.pairs[0]
    a, b = (entry.strength for entry in (scaled[0], scaled[1]))
    p = pair.verdict.p_a if pair.a == scaled[0].index else 1 - pair.verdict.p_a
    assert p == pytest.approx(1 / (1 + np.exp(b - a)), abs=1e-6)


def test_an_image_without_a_score_is_an_average_one(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Judge.judgements

    def silent(self, questions, *arguments, **named):  # type: ignore[no-untyped-def]
        for number, each in enumerate(original(self, questions, *arguments, **named)):
            unread = replace(each.verdicts[0], score=None, p_label_first=0.0)
            yield replace(each, verdicts=(unread,)) if number == 0 else each

    monkeypatch.setattr(Judge, "judgements", silent)
    ranking = judge.rank(IMAGES, PROMPT, "none")
    first = next(entry for entry in ranking if entry.index == 0)
    assert first.score is None
    assert first.strength == pytest.approx(0)
    assert any("1 of 14 answers could not be read" in line for line in ranking.warnings)
