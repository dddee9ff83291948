"""Judges of single images: their score is the expectation over the levels, of all aspects."""

from collections.abc import Sequence

import numpy as np
import pytest

from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM
from tests.engine.profile_models import count, follow, masses, model, question, write

UNTIL = pytest.mark.parametrize("until", ["answer", "end"])
LEVELS = np.array([1, 2, 3, 4])


def score_of(vlm: VLM, every: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean over the aspects of the expectation of the level, and the mean probability of all levels."""
    found = np.array([masses(vlm, p) for p in every])  # (aspects, levels)
    return float((found / found.sum(1, keepdims=True) @ LEVELS).mean()), float(found.sum(1).mean())


def assert_scored(vlm: VLM, rollout: Rollout, every: Sequence[np.ndarray]) -> None:
    score, mass = score_of(vlm, every)
    assert rollout.verdict.score == pytest.approx(score, rel=1e-5)
    assert rollout.verdict.p_label_first == pytest.approx(mass, rel=1e-5)
    assert rollout.verdict.p_first("soft") is None
    assert 1 < score < 4


@UNTIL
@pytest.mark.parametrize("behind", ["", "\nThat is all."])
def test_a_score_is_the_expectation_over_the_levels_of_each_aspect(
    until: str, behind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = model("rationalrewards")
    parts = [
        "Faithfulness\nThe hat is there.\nScore: ",
        "4",
        "\nQuality\nIt is sharp. Score: ",
        "2",
        "\nText\nScore: ",
        "3",
    ]
    p = follow(vlm, monkeypatch, [*parts, behind])
    rollout = write(vlm, until=until)
    places = [count(vlm, *parts[:number]) for number in (1, 3, 5)]
    assert_scored(vlm, rollout, [p(place) for place in places])
    assert not rollout.verdict.closed
    assert rollout.verdict.well_formed
    assert "It is sharp." in rollout.verdict.reasoning
    if until == "answer":
        assert rollout.verdict.text == "".join(parts[:5])
        assert len(rollout.tokens) == places[-1]


@UNTIL
def test_at_once_a_judge_of_single_images_is_led_from_aspect_to_aspect(
    until: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = model("rationalrewards")
    p = follow(vlm, monkeypatch, ["4", "3", "1"])
    rollout = write(vlm, think=False, until=until)
    assert_scored(vlm, rollout, [p(0), p(1), p(2)])
    text = rollout.verdict.text
    levels = [str(1 + int(np.argmax(masses(vlm, p(call))))) for call in range(3)]
    assert levels == ["4", "3", "1"]
    assert text.startswith("Faithfulness\nScore: 4\nQuality\nScore: 3\nText in the image\nScore: ")
    assert not rollout.verdict.closed
    assert rollout.verdict.well_formed


def test_a_single_images_reasons_out_of_tokens_are_led_to_the_aspects_that_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = model("rationalrewards")
    before = "Faithfulness\nThe hat is there.\nScore: "
    limit = count(vlm, before, "4", "\nQuality\nIt ")
    p = follow(vlm, monkeypatch, [before, "4", "\nQuality\nIt ", 5, "3", "2"])
    rollout = write(vlm, max_tokens=limit)
    assert_scored(vlm, rollout, [p(count(vlm, before)), p(limit + 1), p(limit + 2)])
    assert rollout.verdict.text == f"{before}4\nQuality\nIt \nQuality\nScore: 3\nText in the image\nScore: "
    assert rollout.verdict.closed


@pytest.mark.parametrize("close", [True, False])
def test_a_single_image_without_all_scores_has_none(close: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two images, each would be the mean of other aspects."""
    vlm = model("rationalrewards")
    follow(vlm, monkeypatch, ["Faithfulness\nScore: ", "4", "\nQuality\nScore: ", "3", "\nThat is it."])
    verdict = write(vlm, close=close).verdict
    assert (verdict.score, verdict.label_mass, verdict.closed) == (None, 0, False)
    assert not verdict.well_formed


@UNTIL
def test_batches_of_unequal_answers_are_read_each_at_its_own_place(until: str) -> None:
    """Sampled completions in one batch, judged by a score, equal those of each alone."""
    vlm = model("rationalrewards")
    asked = [question(vlm, (number,), f"{number} hats") for number in range(3)]
    sampling = Sampling(samples=2, temperature=1.0, max_tokens=5, until=until)  # type: ignore[arg-type]
    together = roll_out(vlm, asked, sampling, [(number,) for number in range(3)])
    for number, each in enumerate(asked):
        alone = roll_out(vlm, [each], sampling, [(number,)])[0]
        assert [one.tokens for one in alone] == [one.tokens for one in together[number]]
        for one, other in zip(alone, together[number], strict=True):
            assert one.verdict.text == other.verdict.text
            assert one.verdict.score == pytest.approx(other.verdict.score, abs=1e-4)
