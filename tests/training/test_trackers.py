"""Trackers get the numbers of every step; one that is not installed is refused, one that fails stops nothing."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mlxpref.errors import ConfigError
from mlxpref.training.run_record import read_record
from mlxpref.training.trackers import check_trackers
from tests.messages import messages
from tests.training.test_run import QUICK, begin, cli, log_of, resumed

MEASURED: dict[str, Any] = {"held_out": 0.3, "held_out_limit": 3, "evaluate_every": 2, "steps": 4}


class Recorder:
    """Stands in for a run of wandb and a writer of TensorBoard; keeps what is sent."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options, self.sent, self.ended = arguments, options, dict[int, dict[str, float]](), False

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.sent[step] = numbers

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.sent.setdefault(step, {})[name] = value

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        self.ended = True

    close = finish


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The runs that both trackers were asked for, in order."""
    runs: list[Recorder] = []

    def new(*arguments: Any, **options: Any) -> Recorder:
        runs.append(Recorder(*arguments, **options))
        return runs[-1]

    contents = {
        "wandb": {"init": new, "Settings": lambda **options: options},
        "tensorboard": {"summary": SimpleNamespace(Writer=new)},
        "tensorboard.summary": {"Writer": new},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return runs


def test_every_number_is_sent(opened: list[Recorder], tmp_path: Path) -> None:
    folder = begin(tmp_path / "a run", report_to="wandb, tensorboard", **MEASURED)
    wandb, tensorboard = opened
    assert wandb.options["name"] == "a run"
    assert wandb.options["config"]["learning_rate"] == QUICK["learning_rate"]
    assert tensorboard.arguments == (str(folder / "tensorboard"),)
    assert wandb.sent == tensorboard.sent
    assert wandb.ended
    assert tensorboard.ended
    lines = {line["step"]: line for line in log_of(folder)}
    assert sorted(wandb.sent) == sorted(lines) == [0, 1, 2, 3, 4]
    for step, numbers in wandb.sent.items():
        assert numbers.get("held_out/accuracy") == (lines[step].get("held_out") or {}).get("accuracy")
        assert numbers.get("reward") == lines[step].get("reward")
        assert all(type(value) is float for value in numbers.values())


def test_a_resumed_run_goes_on_there(opened: list[Recorder], tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", until=2, report_to="wandb")
    assert opened[0].ended
    assert resumed(folder) == ""
    assert opened[0].options["id"] == opened[1].options["id"] == read_record(folder)["id"]
    assert [sorted(run.sent) for run in opened] == [[1, 2], [3, 4, 5, 6]]
    assert "nothing is left" in resumed(folder, report_to="none")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_stops_nothing(
    broken: str, opened: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(*(sys.modules["wandb"], "init") if broken == "init" else (Recorder, broken), fail)
    with messages() as lines:
        folder = begin(tmp_path / "run", report_to="wandb,tensorboard", steps=3)
    assert sum("wandb: RuntimeError: no network: nothing more is sent there" in line for line in lines) == 1
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3]
    assert sorted(opened[-1].sent) == [1, 2, 3]
    assert opened[-1].ended


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = cli("train", "--data", "demo", "--model", "demo", "--report-to", "wandb", "--output", tmp_path / "run")
    assert done.exit_code == 1
    assert "the package wandb is not installed here" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"report_to 'mlflow': known are tensorboard, wandb, none"):
        check_trackers("mlflow")


def test_the_option_can_be_repeated(opened: list[Recorder], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = QUICK | {"steps": 1}
    values = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if name != "think"]
    both = ("--report-to", "wandb", "--report-to", "tensorboard")
    done = cli("train", *(part for pair in values for part in pair), "--no-think", *both, "--output", folder)
    assert done.exit_code == 0, done.stderr
    assert json.loads((folder / "run.json").read_text())["settings"]["report_to"] == "wandb,tensorboard"
    assert len(opened) == 2
