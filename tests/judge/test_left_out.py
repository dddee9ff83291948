"""Judging goes on where an image cannot be read: its pairs are left out of what is measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlxpref.data.left_out import LeftOut
from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import ImageError
from mlxpref.judge.calibrate import calibrate
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.store import Store
from mlxpref.judge.strategies import compare_strategies, strategy_variants
from mlxpref.preferences import Pair, Preference

SPEC = EvaluationSpec("mine", "test")


@pytest.fixture
def preferences(tmp_path: Path) -> list[Preference]:
    """Sixteen preferences of files, of which one is damaged and one is gone: both images of the fourth."""
    saved = []
    for i, each in enumerate(demo_preferences("test", 16)):
        paths = tmp_path / f"{i}a.png", tmp_path / f"{i}b.png"
        each.a.save(paths[0])  # type: ignore[union-attr]
        each.b.save(paths[1])  # type: ignore[union-attr]
        saved.append(replace(each, a=paths[0], b=paths[1]))
    (tmp_path / "3a.png").write_bytes(b"<html>")
    (tmp_path / "3b.png").unlink()
    return saved


@pytest.mark.parametrize("stored", [False, True])
def test_the_others_are_judged_as_without_it(
    stored: bool, preferences: list[Preference], demo_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    others = [*preferences[:3], *preferences[4:]]
    expected = evaluate(demo_judge(think=False), others, SPEC)
    with Store(tmp_path / "store.sqlite") as store:
        for _ in range(2):
            judge = replace(demo_judge(think=False), store=store if stored else None)
            found = evaluate(judge, preferences, SPEC)
            assert found.metrics == expected.metrics
            assert found.to_json()["left_out"] == {
                "images": 2,
                "pairs": 1,
                "reasons": {str(preferences[3].a): "is damaged or not an image of a format that is read, whatever its "
                            "name says; convert or remove it",
                            str(preferences[3].b): "cannot be opened (No such file or directory); check the name"},
            }  # fmt: skip


def test_without_a_place_for_them_it_is_an_error(
    preferences: list[Preference], demo_judge: Callable[..., Judge]
) -> None:
    pairs = [Pair(p.a, p.b, p.prompt) for p in preferences]
    with pytest.raises(ImageError, match=r"3a\.png: is damaged"):
        list(demo_judge(think=False).pairs(pairs))


def test_no_strategy_counts_what_another_left_out(
    preferences: list[Preference], demo_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    """The second strategy finds another image damaged."""
    left_out, judge = LeftOut("mine", preferences), demo_judge(max_tokens=16)
    damaged = iter([None, preferences[5].a])

    class Damaging(Judge):
        def pairs(self, *arguments, **options):  # type: ignore[no-untyped-def]
            if path := next(damaged, None):
                Path(path).write_bytes(b"")
            return super().pairs(*arguments, **options)

    variants = strategy_variants(["soft", "score"], [1], [False])
    damaging = Damaging(judge.vlm, judge.settings, "demo")
    rows = compare_strategies(damaging, preferences, SPEC, variants, (), left_out).rows
    assert [row.evaluation.metrics.pairs for row in rows] == [14, 14]
    assert (len(left_out.reasons), left_out.pairs) == (3, 2)


def test_calibrating(preferences: list[Preference], demo_judge: Callable[..., Judge]) -> None:
    calibration = calibrate(demo_judge(), preferences, "mine", "test", think=False)
    assert calibration.pairs == 15
    assert calibration.warnings[0] == "2 images could not be read: 1 pairs are left out"


def test_nothing_is_left(preferences: list[Preference], demo_judge: Callable[..., Judge]) -> None:
    with pytest.raises(ImageError, match="no pair is left to judge: an image of each of the 1 cannot be read"):
        evaluate(demo_judge(think=False), preferences[3:4], SPEC)
