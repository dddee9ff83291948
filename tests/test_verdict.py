"""A verdict's preference for the first image, by each strategy."""

import json

import pytest

from mlxpref.verdict import STRATEGIES, Verdict, verdicts_from_json, verdicts_to_json


def test_strategies_read_a_verdict_differently() -> None:
    verdict = Verdict("2", 0.3, 0.1, written=0.0)
    assert verdict.p_first("soft") == pytest.approx(0.75)
    assert verdict.p_first("select") == 0
    assert verdict.label_mass == pytest.approx(0.4)


def test_a_tie_counts_half_for_each_image() -> None:
    verdict = Verdict("Both", 0.3, 0.1, p_label_tie=0.4, written=0.5)
    assert verdict.p_first("soft") == pytest.approx(0.5 / 0.8)
    assert verdict.label_mass == pytest.approx(0.8)
    assert verdict.p_first("select") == 0.5


def test_no_answer_is_unreadable() -> None:
    assert [Verdict("I like both").p_first(strategy) for strategy in STRATEGIES] == [None, None, None]


def test_a_score_of_one_image_is_no_preference() -> None:
    assert Verdict("Score: 3", 0.9, score=2.8).p_first("soft") is None


def test_verdicts_come_back_from_json_as_they_were() -> None:
    verdicts = Verdict("text", 1 / 3, 0.1, True, 5, 0.2, "why", 1.0, True, 4, 2, 2.5), Verdict("?")
    assert verdicts_from_json(json.loads(json.dumps(verdicts_to_json(verdicts)))) == verdicts
