"""Training on what a program has in memory: the same as on data by name."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxpref
from mlxpref.demo.preferences import demo_preferences
from mlxpref.training.run_record import read_record
from tests.conftest import GOLDEN

TINY = GOLDEN / "qwen2_5_vl"
SETTINGS: dict[str, Any] = {
    "comparisons": 2, "group": 2, "steps": 3, "think": False, "learning_rate": 1e-2, "warmup_steps": 1,
    "max_tokens": np.int64(4),
}  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_lists_train_as_named_data(tmp_path: Path) -> None:
    preferences = demo_preferences("train", 8)
    rows = [
        {"prompt": p.prompt, "a": np.asarray(p.a), "b": p.b, "p_a": p.p_people, "votes": p.votes, "group": p.group}
        for p in preferences
    ]
    named, listed, dicts = (tmp_path / name for name in ("named", "listed", "dicts"))
    reports = list(mlxpref.train("demo", TINY, named, limit=8, **SETTINGS))
    list(mlxpref.train(preferences, TINY, listed, **SETTINGS))
    list(mlxpref.train(iter(rows), str(TINY), str(dicts), **SETTINGS))
    assert weights(named) == weights(listed) == weights(dicts)
    assert read_record(listed)["settings"]["data"] == "list of preferences"
    assert (listed / "report.html").is_file()
    assert len(repr(reports[-1])) < 200
    assert repr(reports[-1]).startswith("StepReport(step 3 of 3: reward ")


def test_a_run_of_named_data_resumes_without_them(tmp_path: Path) -> None:
    run = mlxpref.train("demo", TINY, tmp_path / "run", limit=8, **SETTINGS)
    assert [report.step for report in islice(run, 2)] == [1, 2]
    run.close()  # type: ignore[attr-defined]
    assert [report.step for report in mlxpref.train(output=tmp_path / "run", resume=True)] == [3]
    with pytest.raises(mlxpref.ConfigError, match="no --data"):
        next(mlxpref.train(output=tmp_path / "other"))


@pytest.mark.parametrize("data", [[], "pairs.jsonl"])
def test_data_in_the_place_of_the_model(tmp_path: Path, data: Any) -> None:
    with pytest.raises(mlxpref.ConfigError, match=r"the order is \(data, model\)"):
        next(mlxpref.train("demo", data, tmp_path / "run"))


def test_a_run_from_a_list_resumes_with_it(tmp_path: Path) -> None:
    preferences = demo_preferences("train", 8)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    list(mlxpref.train(preferences, TINY, whole, **SETTINGS))
    run = mlxpref.train(preferences, TINY, parted, **SETTINGS)
    assert [report.step for report in islice(run, 2)] == [1, 2]
    run.close()  # type: ignore[attr-defined]
    with pytest.raises(mlxpref.DataError, match="not the same"):
        next(mlxpref.train(preferences[:7], output=parted, resume=True))
    assert [report.step for report in mlxpref.train(preferences, output=parted, resume=True)] == [3]
    assert weights(parted) == weights(whole)


def test_paths_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows: list[Any] = [
        {"prompt": p.prompt, "a": p.a, "b": p.b, "p_a": p.p_people, "split": split}
        for split in ("train", "test")
        for p in demo_preferences(split, 4)
    ]
    list(mlxpref.train(rows, TINY, "~/run", **SETTINGS))
    assert read_record(tmp_path / "run")["preferences"] == 4
    for wrong, message in ((Path("missing.jsonl"), "no such file"), ("~/missing.jsonl", "no such file"), (3, "an int")):
        with pytest.raises(mlxpref.MlxprefError, match=message):
            next(mlxpref.train(wrong, TINY, tmp_path / "other"))  # type: ignore[arg-type]
