"""Long runs on much data: no vision in a second epoch, bounded records, and the same results as without all that."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxpref.config import TrainSettings, settings_from
from mlxpref.engine.image_features import FeatureStore
from mlxpref.report.run_log import RunLog
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.run_folder import Run, held_out_change, read_log
from mlxpref.training.step_report import StepReport
from tests.conftest import GOLDEN, picture
from tests.messages import messages

QUICK: dict[str, Any] = {
    "data": "demo", "model": str(GOLDEN / "qwen2_5_vl"), "limit": 6, "comparisons": 3, "group": 2, "steps": 6,
    "think": False, "max_tokens": 4, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 2, "rank": 2,
}  # fmt: skip


def trained(folder: Path, until: int = 99, **changes: Any) -> list[StepReport]:
    return advance(start_run(settings_from(TrainSettings, QUICK | changes), folder), until)


def advance(run: Run | None, until: int = 99) -> list[StepReport]:
    assert run is not None
    reports, seen = run.reports(), []
    for report in reports:
        seen.append(report)
        if report.step == until:
            reports.close()  # type: ignore[attr-defined]
    return seen


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """The setting that names a file of six preferences, of twelve pictures."""
    path = tmp_path / "mine.jsonl"
    for i in range(12):
        picture(i, (56, 56)).save(tmp_path / f"{i}.png")
    rows = [{"prompt": f"{i}", "a": f"{i}.png", "b": f"{i + 6}.png", "p_a": i % 2} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": str(path)}


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the features of one image."""
    before = FeatureStore.__init__

    def small(self: FeatureStore, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        self.limit(1)

    monkeypatch.setattr(FeatureStore, "__init__", small)


@pytest.mark.usefixtures("forgetful")
def test_later_epochs_and_runs_run_no_vision(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [report.vision_runs for report in trained(tmp_path / "kept", until=3, **data)]
    assert sum(kept[:2]) == 12  # two steps are an epoch
    assert kept[2] == 0
    resumed = [report.vision_runs for report in advance(resume_run(tmp_path / "kept", {}))]
    assert resumed == [0, 0, 0]
    assert [report.vision_runs for report in trained(tmp_path / "next", seed=3, **data)] == [0] * 6
    totals = read_log(tmp_path / "kept")[-1]["totals"]
    assert totals["vision_runs"] == 12

    monkeypatch.setenv("MLXPREF_FEATURES_GB", "0")
    assert all(report.vision_runs for report in trained(tmp_path / "without", **data))


def test_the_disk_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "kept")
    trained(tmp_path / "again")
    monkeypatch.setenv("MLXPREF_FEATURES_GB", "0")
    trained(tmp_path / "without")
    for name in ("adapters.safetensors", "rollouts.jsonl"):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("kept", "again", "without")}
        assert len(contents) == 1, name


@pytest.mark.usefixtures("forgetful")
def test_more_features_than_fit(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the same ones stay, in the order of any run; how many is said once."""
    monkeypatch.setenv("MLXPREF_FEATURES_GB", str(6 * (1 << 16) / 1e9))
    runs = list[int]()
    with messages() as lines:
        for seed in (0, 1, 2):
            runs += [report.vision_runs for report in trained(tmp_path / f"{seed}", seed=seed, **data)]
    said = [line for line in lines if "images fit in" in line]
    assert len(said) == 3
    assert "features of about 5 of 12 images fit in 393 kB (MLXPREF_FEATURES_GB)" in said[0]
    epochs = [sum(runs[i : i + 2]) for i in range(0, len(runs), 2)]
    assert epochs[0] == 12
    assert {*epochs[1:]} <= {5, 6}  # half are kept, and memory has one more


HELD_OUT = {"limit": 24, "held_out": 0.3, "held_out_limit": 3, "evaluate_every": 4, "steps": 10, "save_every": 1}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    trained(tmp_path / "whole", **HELD_OUT)
    return tmp_path / "whole"


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without what no run repeats."""
    measured = ("second", "bytes", "vision")

    def timeless(values: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in values.items() if not any(word in k for word in measured)}
        return {k: timeless(v) if isinstance(v, dict) else v for k, v in kept.items()}

    return [timeless(line) for line in lines]


def log_of(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_third_step_is_logged(whole: Path, tmp_path: Path) -> None:
    """Others are yielded and count in totals; the lines are those of the whole log, also of a run that was resumed."""
    folder, broken = tmp_path / "run", tmp_path / "broken"
    assert [report.step for report in trained(folder, log_every=3, **HELD_OUT)] == list(range(1, 11))
    trained(broken, until=5, log_every=3, **HELD_OUT)
    assert [line["step"] for line in log_of(broken)] == [0, 1, 3, 4, 5]  # its last one, until it is resumed
    advance(resume_run(broken, {}))
    steps = [0, 1, 3, 4, 6, 8, 9, 10]  # every third, the first and the last, and those with a measurement
    assert [line["step"] for line in log_of(folder)] == steps
    expected = numbers([line for line in log_of(whole) if line["step"] in steps])
    assert numbers(log_of(folder)) == numbers(log_of(broken)) == expected
    for name in ("rollouts.jsonl", "adapters.safetensors"):
        assert (folder / name).read_bytes() == (broken / name).read_bytes(), name
    assert {line["step"] for line in log_of(folder, "rollouts.jsonl")} == {*steps} - {0}
    assert held_out_change(folder) == held_out_change(whole)
    assert RunLog(read_log(folder)).total("updated") == RunLog(read_log(whole)).total("updated")
    timed = ("time", "tokens a second", "peak memory")
    facts = [[fact for fact in RunLog(log_of(each)).facts() if fact[0] not in timed] for each in (whole, folder)]
    assert facts[0] == facts[1]


def test_a_run_that_ends_between_two_lines(tmp_path: Path) -> None:
    """It becomes as short as it is: the last step has its line, and the page counts all."""
    folder = tmp_path / "run"
    trained(folder, until=5, log_every=4)
    assert [line["step"] for line in log_of(folder)] == [1, 4, 5]
    advance(resume_run(folder, {"steps": 5}))
    assert [line["step"] for line in log_of(folder)] == [1, 4, 5]
    assert RunLog(read_log(folder)).total("updated") == 5
    assert dict(RunLog(log_of(folder)).facts())["steps"].startswith("5")


@pytest.mark.usefixtures("forgetful")
def test_features_of_what_a_run_shows(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for half of all images is enough for a run that shows a quarter of them."""
    monkeypatch.setenv("MLXPREF_FEATURES_GB", str(6 * (1 << 16) / 1e9))
    with messages() as lines:
        for name in ("one", "two"):
            reports = trained(tmp_path / name, steps=1, comparisons=2, **data)
    assert not any("images fit in" in line for line in lines)
    assert reports[0].vision_runs == 0


def test_totals_are_sums(whole: Path) -> None:
    lines = read_log(whole)
    for name in ("tokens", "groups", "skipped", "vision_runs", "updated"):
        assert lines[-1]["totals"][name] == sum(line[name] for line in lines), name
    assert lines[-1]["totals"]["peak_bytes"] == max(line["peak_bytes"] for line in lines)


def test_a_run_of_an_earlier_version_logs_every_step(tmp_path: Path) -> None:
    """Its log has no totals, so that each line counts."""
    from mlxpref.training.resume import read_state, write_state

    folder = tmp_path / "run"
    trained(folder, until=2)
    state = read_state(folder)
    assert state is not None
    write_state(folder, type(state)(state.step, state.arrays, state.numbers, state.sizes))
    with messages() as lines:
        advance(resume_run(folder, {"log_every": 4}))
    assert sum("every step is logged" in line for line in lines) == 1
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4, 5, 6]
    assert "totals" not in log_of(folder)[-1]
