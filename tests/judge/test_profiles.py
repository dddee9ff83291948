"""A judge that answers in the form of other judges is compared, ranked, measured and calibrated by their profiles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxpref
from mlxpref.cli.demo import SAMPLE_PROMPT
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.judge.calibrate import calibrate
from mlxpref.judge.calibration import CalibrationFile
from mlxpref.judge.evaluation import EvaluationSpec
from mlxpref.judge.judge import Judge
from mlxpref.judge.point import SCORES_ONLY
from mlxpref.judge.strategies import StrategyVariant, compare_strategies
from mlxpref.preferences import SingleImage
from scripts.teach_profiles import MOST_TOKENS, examination
from tests.taught import taught_judge

PAIRS = ("unifiedreward-think", "unifiedreward-flex", "unifiedreward-pair")
POINT = "rationalrewards"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_judge(tmp_path_factory)


def asked(folder: Path, name: str, **settings: Any) -> Judge:
    return mlxpref.load(folder, profile=name, max_tokens=MOST_TOKENS, **settings)


def pictures(clean: int, spoiled: int) -> list[Any]:
    rng = np.random.default_rng(5)
    qualities = ["clean"] * clean + [("noisy", "blurry")[i % 2] for i in range(spoiled)]
    return [render(PictureSpec("green", "blue", "red", "red", each), rng) for each in qualities]


@pytest.mark.parametrize("name", PAIRS)
def test_strategies(name: str, taught: Path) -> None:
    judge, pairs = asked(taught, name), examination(40)
    thinking = [True, False] if judge.profile.thinks else [False]
    variants = [StrategyVariant(strategy, think, 1) for think in thinking for strategy in ("soft", "select")]
    rows = compare_strategies(judge, pairs, EvaluationSpec("pictures", "all"), variants).rows
    by_variant = {row.variant: row.evaluation for row in rows}
    for think in thinking:
        soft, select = (by_variant[StrategyVariant(each, think, 1)] for each in ("soft", "select"))
        assert soft.metrics.accuracy > 0.85
        assert soft.metrics.accuracy >= select.metrics.accuracy - 0.05
        assert soft.unreadable == 0
        verdicts = [verdict for pair in soft.verdicts for verdict in pair.verdicts]
        assert np.mean([verdict.label_mass for verdict in verdicts]) > 0.9
        if think:
            assert np.mean([verdict.well_formed for verdict in verdicts]) > 0.8
            assert select.unreadable < 0.2
            assert all("Image 1" in verdict.reasoning for verdict in verdicts)


def test_the_last_winner_counts(taught: Path) -> None:
    """The one before it is always the first image."""
    judge = asked(taught, "unifiedreward-flex")
    pairs = [pair if pair.p_people == 0 else pair.swapped() for pair in examination(12)]  # the second one is better
    for verdict in judge.pairs(pairs, "select"):  # type: ignore[arg-type]
        (written,) = verdict.a_shown_first
        assert '"place": {"winner": "Image 1"}' in written.text
        assert written.written == 0
        assert written.p_label_second > written.p_label_first


@pytest.mark.parametrize(
    ("name", "think_about"),
    [(name, each) for name in PAIRS[:2] for each in ("none", "top", "all")] + [(PAIRS[2], None)],
)
def test_rankings_put_the_clean_pictures_first(name: str, think_about: Any, taught: Path) -> None:
    judge = asked(taught, name)
    best = 8 if think_about == "top" else 4  # of more pictures than are thought about
    ranking = judge.rank(pictures(best, best + 1), SAMPLE_PROMPT, think_about)
    assert {each.index for each in ranking[:best]} == set(range(best))
    assert set(ranking.modes) == {None: {False}, "none": {False}, "all": {True}, "top": {False, True}}[think_about]


def test_ties_are_told(taught: Path) -> None:
    judge = asked(taught, "unifiedreward-pair")

    def tie_mass(ties: bool) -> tuple[float, Sequence[float]]:
        verdicts = list(judge.pairs(examination(20, ties=ties)))  # type: ignore[arg-type]
        mass = [verdict.p_label_tie / verdict.label_mass for pair in verdicts for verdict in pair.verdicts]
        return float(np.mean(mass)), [pair.p_a for pair in verdicts]

    of_ties, even = tie_mass(True)
    of_others, decided = tie_mass(False)
    assert of_ties > of_others + 0.3
    assert np.mean(np.abs(np.array(even) - 0.5)) < np.mean(np.abs(np.array(decided) - 0.5)) - 0.1
    (pair,) = judge.pairs(examination(1, ties=True), "select")  # type: ignore[arg-type]
    assert pair.a_shown_first[0].written == 0.5


def test_a_judge_of_single_images_reads_each_once(taught: Path) -> None:
    judge, images = asked(taught, POINT), pictures(4, 5)
    scores = [
        each.verdicts[0].score for each in judge.judgements(SingleImage(image, SAMPLE_PROMPT) for image in images)
    ]
    ranking = judge.rank(images, SAMPLE_PROMPT)
    assert ranking.vision_runs <= ranking.comparisons == len(images)
    assert SCORES_ONLY in ranking.warnings
    order = [each.index for each in ranking]
    assert order == sorted(range(len(images)), key=lambda index: -scores[index])  # type: ignore[operator]
    assert set(order[:4]) == set(range(4))


def test_a_judge_of_single_images_is_soft_with_a_temperature(taught: Path) -> None:
    judge, pairs = asked(taught, POINT), examination(40)
    pair = pairs[0]
    by_score = judge.compare(pair.a, pair.b, pair.prompt)  # type: ignore[arg-type]
    assert (by_score.strategy, by_score.p_a_shown_first) == ("select", pair.p_people)
    fitted = calibrate(judge, pairs, "pictures", "all", think=judge.settings.think)
    assert fitted.after.nll < np.log(2)
    soft = replace(judge, calibration=CalibrationFile(Path("fitted.json"), (fitted,)))
    p_a = soft.compare(pair.a, pair.b, pair.prompt).p_a  # type: ignore[arg-type]
    assert 0.5 < max(p_a, 1 - p_a) < 1
    assert (p_a > 0.5) == (pair.p_people > 0.5)
