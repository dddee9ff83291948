"""A judge that is taught to answer in another form: it is trained, found, measured and ranks by that profile."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxpref
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.demo.preferences import demo_preferences, prompt_text
from mlxpref.engine.profile import read_profile
from mlxpref.judge.judge import Judge
from tests.profiles import own_with

FORMS: dict[str, dict[str, Any]] = {
    "tags": {
        "lead": "<answer>Image ",
        "closing": "</think>\n<answer>Image ",
        "at_once": "<think></think>\n<answer>Image ",
    },
    "JSON": {
        "lead": '"winner": "Image ',
        "end": '"',
        "counts": "last",
        "think_begin": "",
        "think_end": "",
        "closing": '"winner": "Image ',
        "at_once": '{"winner": "Image ',
    },
}
"""The answers of UnifiedReward-Think and -Flex; the question is the demo judge's, which knows no other."""


def share_right(judge: Judge) -> float:
    """The share of pairs in which the judge and people prefer the same picture."""
    preferences = demo_preferences("test", 32)
    found = [judge.compare(each.a, each.b, each.prompt).p_a > 0.5 for each in preferences]
    return float(
        np.mean([each == (preference.p_people > 0.5) for each, preference in zip(found, preferences, strict=True)])
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_judge_learns_to_answer_in_another_form(form: str, tmp_path: Path) -> None:
    """At once, by the exact gradient of the answer: from chance to the demo judge's own."""
    path = own_with(tmp_path / "other.toml", **FORMS[form])
    before = mlxpref.load("demo", profile=path, think=False)
    assert share_right(before) < 0.75
    settings: dict[str, Any] = {"think": False, "steps": 20, "comparisons": 16, "learning_rate": 3e-3, "limit": 800}
    for _ in mlxpref.train("demo", "demo", tmp_path / "adapter", profile=path, **settings):
        pass
    judge = mlxpref.load("demo", adapter=tmp_path / "adapter", think=False)
    assert judge.profile == read_profile(path)
    assert share_right(judge) > 0.9
    rng = np.random.default_rng(5)
    specs = [
        ("red", "circle", "clean"),
        ("blue", "circle", "clean"),
        ("red", "square", "clean"),
        ("red", "circle", "noisy"),
    ]
    pictures = [render(PictureSpec(*spec), rng) for spec in specs]
    ranking = judge.rank(pictures, prompt_text("red", "circle"))
    assert ranking[0].image is pictures[0]
