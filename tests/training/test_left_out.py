"""Images that cannot be read in the middle of a run: other preferences take their places, in a resumed run too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.config import TrainSettings, settings_from
from mlxpref.data import load
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.errors import DataError
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.run_folder import Run, read_log
from mlxpref.training.run_record import read_record
from mlxpref.training.step_report import StepReport
from tests.data_layouts import damage_member, make_layout
from tests.messages import messages
from tests.training.test_run import TINY, assert_same, log_of

QUICK: dict[str, Any] = {
    "model": str(TINY), "comparisons": 3, "group": 2, "steps": 7, "think": False, "max_tokens": 4,
    "learning_rate": 1e-2, "save_every": 2,
}  # fmt: skip


@pytest.fixture
def public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ImageRewardDB with a damaged image outside the sample that is decoded before: 20 pairs, 3 of them damaged."""
    monkeypatch.setattr(load, "_drawn_runs", lambda count: range(0))
    folder = make_layout("imagereward", tmp_path / "data")
    damage_member(folder / "images/train/train_1.zip", "empty")
    return QUICK | {"data": "imagereward", "data_dir": str(folder)}


def begin(folder: Path, settings: dict[str, Any]) -> Run:
    return start_run(settings_from(TrainSettings, settings), folder)


def until(run: Run | None, step: int) -> Iterator[StepReport]:
    """Leave a run after a step."""
    assert run
    reports = run.reports()
    for report in reports:
        if report.step == step:
            return reports
    return reports


@pytest.mark.parametrize("changes", [{}, {"held_out": 0.25, "evaluate_every": 3}, {"resample": 1}, {"comparisons": 1}])
def test_a_resumed_run_is_the_same(public: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    settings = public | {"steps": 21 // changes.get("comparisons", 3) - 1} | changes
    with messages() as lines:
        list(begin(tmp_path / "unbroken", settings).reports())
    log = read_log(tmp_path / "unbroken")
    assert sum("1 of 16 images cannot be read; their pairs are left out" in line for line in lines) == 1
    if not changes.get("held_out"):  # else the image may be among the held-out ones
        assert sum(line["left_out"] for line in log) > 0
    assert all(line["groups"] == settings["comparisons"] for line in log)
    record = read_record(tmp_path / "unbroken")["left_out"]
    assert (record["images"], record["pairs"]) == (1, 3)
    first = next((line["step"] for line in log if line["left_out"]), 2)
    for stop in sorted({max(first - 1, 1), first, first + 1} - {len(log)}):
        folder = tmp_path / f"until {stop}"
        until(begin(folder, settings), stop).close()  # type: ignore[attr-defined]
        list(resume_run(folder, {}).reports())  # type: ignore[union-attr]
        assert_same(folder, tmp_path / "unbroken")
        assert read_record(folder)["left_out"] == record


def own(tmp_path: Path) -> dict[str, Any]:
    """A user's file of six preferences of eight pictures."""
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        render(PictureSpec("red", "green", "blue", "red"), rng).save(tmp_path / f"{i}.png")
    for i in range(6):
        rows.append({"prompt": f"picture {i}", "a": f"{i}.png", "b": f"{i + 2}.png", "p_a": 1})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return own_settings(tmp_path)


def own_settings(tmp_path: Path) -> dict[str, Any]:
    return QUICK | {"data": str(tmp_path / "mine.jsonl"), "comparisons": 2}


@pytest.mark.parametrize("content", [None, b"", b"<html>"])
def test_own_pictures_may_go_in_the_middle(content: bytes | None, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", own(tmp_path))
    with messages() as lines:
        for report in run.reports():
            if report.step == 2 and content is None:
                (tmp_path / "3.png").unlink()
            elif report.step == 2:
                (tmp_path / "3.png").write_bytes(content)
    assert sum(line["left_out"] for line in log_of(tmp_path / "run")) > 0
    assert [line for line in lines if "1 of 8 images cannot be read" in line and "3.png" in line]
    assert read_record(tmp_path / "run")["left_out"]["pairs"] == 2


def test_resuming_without_an_own_picture(tmp_path: Path) -> None:
    """Deleted in the middle, it stays left out; before the start it would be an error."""
    run = begin(tmp_path / "run", own(tmp_path))
    until(run, 3).close()  # type: ignore[attr-defined]
    (tmp_path / "3.png").unlink()
    resumed = resume_run(tmp_path / "run", {})
    assert resumed
    assert sum(report.left_out for report in resumed.reports()) > 0
    with pytest.raises(DataError, match=r'"3\.png": no such file'):
        begin(tmp_path / "other", own_settings(tmp_path))


def test_all_own_pictures_go(tmp_path: Path) -> None:
    """Such as those of a disk that was taken away: the last step is kept, and the run goes on when they are back."""
    settings = own(tmp_path)
    run = begin(tmp_path / "run", settings)
    contents = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    reports = until(run, 3)
    for path in contents:
        path.unlink()
    with pytest.raises(DataError, match="step 4: none of its images can be read"):
        next(reports)
    for path, content in contents.items():
        path.write_bytes(content)
    resumed = resume_run(tmp_path / "run", {})
    assert resumed
    assert resumed.done == 3
    list(resumed.reports())
    assert len(log_of(tmp_path / "run")) == 7


def test_too_many_in_the_middle(public: dict[str, Any], tmp_path: Path) -> None:
    damage_member(Path(public["data_dir"]) / "images/train/train_2.zip", "html")
    with pytest.raises(
        DataError, match="2 of 16 images cannot be read, more than one in a hundred: the download is da"
    ):
        list(begin(tmp_path / "run", public).reports())
