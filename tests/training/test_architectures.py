"""Training and judging with recurrent layers and with experts, end to end: adapters learn, are saved, and judge."""

import json
import math
from pathlib import Path

import pytest

import mlxpref
from mlxpref.config import TrainSettings, settings_from
from mlxpref.engine.lora import adapter_weights, lora_targets
from mlxpref.engine.vlm import load_vlm
from mlxpref.training.run import Run, resume_run, start_run
from tests.conftest import GOLDEN, picture

SMALL = {"data": "demo", "steps": 3, "comparisons": 2, "group": 3, "max_tokens": 12, "rank": 2, "held_out": 0.0}
MEASURED = ("seconds", "bytes", "second", "left", "runs", "totals")
pytestmark = pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl_moe"])


REWARD = """
def letters(texts, **others):
    return [len(set(text)) / 10 for text in texts]
"""


def started(family: str, folder: Path, **settings: object) -> Run:
    """A run of a tiny random model, which learns to use many letters: it never gives an answer."""
    (folder.parent / "reward.py").write_text(REWARD)
    model, reward = str(GOLDEN / family), f"{settings.pop('reward')}=1,{folder.parent / 'reward.py'}:letters=1"
    if settings.get("think") is False:
        reward = reward.partition("=")[0]
    chosen = SMALL | {"model": model, "reward": reward, "learning_rate": 0.01, "save_every": 1} | settings
    return start_run(settings_from(TrainSettings, chosen), folder, vlm=load_vlm(Path(model), 512 * 512))


@pytest.mark.parametrize(
    "settings",
    [
        {"reward": "soft"},
        {"reward": "hard", "kl": 0.1, "updates_per_rollout": 2, "read_weight": 0.0},
        {"reward": "brier", "think": False},
        {"reward": "soft", "micro_batch": 2, "rows": 3},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_run(family: str, settings: dict[str, object], tmp_path: Path) -> None:
    thinks = settings.get("think") is not False
    reports = list(started(family, tmp_path / "run", **settings).reports())
    assert [report.updated for report in reports] == [True] * 3
    for report in reports:
        assert math.isnan(report.mismatch) != thinks
        assert math.isnan(report.rerouted) != (thinks and family == "qwen3_vl_moe")
        assert not report.mismatch > 1e-5
        assert not report.rerouted > 0.01
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert all("rerouted" in json.loads(line) for line in log)


def test_a_judge_with_what_was_trained(family: str, tmp_path: Path) -> None:
    """The saved adapter gives the trained model's answers, in a ranking as in single comparisons."""
    vlm = load_vlm(GOLDEN / family, 512 * 512)
    settings = settings_from(TrainSettings, SMALL | {"think": False, "learning_rate": 0.05})
    list(start_run(settings, tmp_path / "run", vlm=vlm).reports())
    names = {name.rpartition(".")[0] for name in adapter_weights(vlm.model)}
    assert names == set(lora_targets(load_vlm(GOLDEN / family, 512 * 512).model))
    judge = mlxpref.load(str(GOLDEN / family), tmp_path / "run", max_tokens=12, think=True)
    base = mlxpref.load(str(GOLDEN / family), max_tokens=12, think=True)
    images = [picture(number, (96, 64 + 32 * (number % 2))) for number in range(5)]
    ranking = judge.rank(images, "a red circle", think_about="all", pairs="all")
    assert len(ranking.pairs) == 10
    for pair in ranking.pairs[:3]:
        alone = judge.compare(images[pair.a], images[pair.b], "a red circle")
        assert alone.p_a == pytest.approx(pair.verdict.p_a, abs=1e-5)
    p_trained, p_base = (each.compare(images[0], images[1], "a red circle").p_a for each in (judge, base))
    assert abs(p_trained - p_base) > 1e-4


def test_a_resumed_run_equals_an_unbroken_one(family: str, tmp_path: Path) -> None:
    list(started(family, tmp_path / "whole", reward="soft").reports())
    reports = started(family, tmp_path / "broken", reward="soft").reports()
    next(reports)
    reports.close()
    run = resume_run(tmp_path / "broken", {})
    assert run is not None
    list(run.reports())
    logs = []
    for name in ("whole", "broken"):
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        logs.append([{key: value for key, value in line.items() if not key.endswith(MEASURED)} for line in lines])
    assert len(logs[0]) == 3
    assert logs[0] == logs[1]
