"""A judge that answers in the form of another one is trained in that form, and keeps its profile."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxpref
from mlxpref.engine.profile import profile_named
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError
from mlxpref.preferences import Preference
from scripts.teach_profiles import MOST_TOKENS, examination
from tests.taught import taught_judge

PAIRS = ("unifiedreward-think", "unifiedreward-flex", "unifiedreward-pair")
LEARNING: dict[str, Any] = {
    "max_tokens": MOST_TOKENS, "comparisons": 8, "group": 4, "steps": 32, "learning_rate": 2.5e-3, "warmup_steps": 2,
    "recompute": False, "micro_batch": 64,
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_judge(tmp_path_factory)


def other_taste(count: int, seed: int) -> list[Preference]:
    """People who prefer the spoiled picture, unlike the judge."""
    return [replace(pair, p_people=1 - pair.p_people) for pair in examination(count, seed)]


def asked_by(folder: Path, name: str) -> VLM:
    return load_vlm(folder, 84 * 84, profile=profile_named(name))


@pytest.mark.parametrize("name", PAIRS)
def test_another_taste_is_learned(name: str, taught: Path, tmp_path: Path) -> None:
    reports = list(mlxpref.train(other_taste(96, 1), taught, tmp_path / "run", profile=name, **LEARNING))
    assert all(report.updated for report in reports)
    before = mlxpref.load(taught, profile=name, max_tokens=MOST_TOKENS)
    after = mlxpref.load(adapter=tmp_path / "run")
    assert after.profile == before.profile
    assert after.settings.max_tokens == MOST_TOKENS
    held_out = other_taste(30, 2)
    thinks = before.profile.thinks
    for think in [True, False] if thinks else [False]:
        accuracies = [
            mlxpref.evaluate(replace(judge, settings=replace(judge.settings, think=think)), held_out).metrics.accuracy
            for judge in (before, after)
        ]
        assert accuracies[0] < 0.25
        assert accuracies[1] > accuracies[0] + 0.5, think
    mismatches = [report.mismatch for report in reports]
    assert all(each < 1e-5 for each in mismatches) if thinks else np.isnan(mismatches).all()
    assert np.mean([report.format_rate for report in reports]) > 0.7
    asked = [mlxpref.load(adapter=tmp_path / "run", profile=given) for given in ("", name)]
    pair = held_out[0]
    one, other = (judge.compare(pair.a, pair.b, pair.prompt) for judge in asked)  # type: ignore[arg-type]
    assert one == other


def test_distilling(taught: Path, tmp_path: Path) -> None:
    """What is thought in one form is learned as what is answered at once, and the file says whose it is."""
    judge = mlxpref.load(taught, profile="unifiedreward-flex", max_tokens=MOST_TOKENS)
    path = tmp_path / "soft.jsonl"
    result = mlxpref.distill(judge, examination(12), path, held_out=0)
    assert result.train == 12
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert np.mean([(row["p_a"] > 0.5) == (row["people"] > 0.5) for row in rows]) > 0.8
    assert {row["judge"] for row in rows} == {f"{taught} by the profile unifiedreward-flex"}
    with pytest.raises(ConfigError, match=r"judged by .* by the profile unifiedreward-flex, not .*unifiedreward-think"):
        mlxpref.distill(replace(judge, vlm=asked_by(taught, "unifiedreward-think")), examination(12), path)
    with pytest.raises(ConfigError, match=r"^the profile rationalrewards shows one image at a time"):
        mlxpref.distill(replace(judge, vlm=asked_by(taught, "rationalrewards")), examination(12), path)
    settings = LEARNING | {"steps": 2, "think": False, "reward": "brier", "profile": "unifiedreward-flex"}
    (*_, last) = mlxpref.train(path, taught, tmp_path / "run", **settings)
    assert last.updated
    assert mlxpref.load(adapter=tmp_path / "run").profile.name == "unifiedreward-flex"
