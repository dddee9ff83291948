"""The page of scores: what a judge of single images did not say does not stand there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import BY_SCORES
from mlxpref.verdict import Verdict
from tests.browser import Browser
from tests.pages import Tags, complaints
from tests.report.test_ranking_page import page_of, ranking, text_at


def test_scores_have_no_intervals(browser: Browser, tmp_path: Path) -> None:
    """Two images of a judge of single images are compared without an interval and without what one would mean."""
    result = replace(ranking(), orders=BY_SCORES)
    data = json.loads(Tags(page_of(tmp_path, result, ranking())).scripts[0])
    assert [data[0][name] for name in ("deviations", "errors", "paired")] == [[], [], []]
    strengths = result.strengths.fit.strengths
    browser.open(tmp_path / "page.html")
    for a, b in ((0, 1), (0, 3)):  # judged, and not
        browser.run(f"compare(0, {a}, {b})")
        p = 100 / (1 + np.exp(strengths[b] - strengths[a]))
        assert f"{p:.1f} % for image {a}, by the difference of their scores." in text_at(browser, "#compare")
        assert not any(word in text_at(browser, "#compare") for word in ("interval", "Not judged", "estimate"))
        browser.press("Escape")
    browser.run("compare(1, 0, 1)")
    assert "95 % interval" in text_at(browser, "#compare")
    assert "it does not say what people think" in text_at(browser, "#compare")
    assert complaints(browser) == []


def test_scores_without_a_temperature_say_no_share(browser: Browser, tmp_path: Path) -> None:
    def decided(verdicts: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
        return tuple(replace(each, written=float(each.p_label_first > each.p_label_second)) for each in verdicts)

    pairs = [
        replace(pair, verdict=PairVerdict(decided(v.a_shown_first), decided(v.a_shown_second), strategy="select"))
        for pair in ranking().pairs
        for v in (pair.verdict,)
    ]
    strengths = ranking().strengths.fit.strengths
    scores = (3.5, 2.25, None, 1.0)
    page = page_of(tmp_path, replace(ranking(), orders=BY_SCORES, pairs=tuple(pairs), scores=scores))
    assert [page.count(f"<dd>{score}</dd>") for score in ("3.50", "2.25", "unreadable", "1.00")] == [1, 1, 1, 1]
    browser.open(tmp_path / "page.html")
    for a, b in ((0, 1), (0, 3)):  # judged, and not
        browser.run(f"compare(0, {a}, {b})")
        better, worse = (a, b) if strengths[a] > strengths[b] else (b, a)
        text = text_at(browser, "#compare")
        assert f"image {better} has a higher score than image {worse}. How many people would prefer it" in text
        assert "%" not in text
        browser.press("Escape")
    browser.run("openPicture(0, 0)")
    text = text_at(browser, "#picture")
    assert "a higher score than rank " in text
    assert "%" not in text
    assert complaints(browser) == []
