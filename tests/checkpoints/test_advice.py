"""Advice: what does not fit is refused before anything is loaded, and what is advised instead does fit."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlxpref.checkpoints import advice
from mlxpref.checkpoints.advice import gigabytes, images_seen, plan_judging, plan_training, require
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import ModelSize, Plan, judging_plan, training_plan
from mlxpref.checkpoints.model_shapes import Quantization
from mlxpref.cli import main
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.demo import JUDGE
from mlxpref.errors import ConfigError
from mlxpref.judge import loading
from mlxpref.training import run as runs
from scripts.memory_table import JUDGES
from tests.conftest import picture

GB = 10**9
SHAPES = replace(JUDGES["7B"], quantization=Quantization(4, 64))
MODEL = ModelSize(SHAPES, SHAPES.weight_bytes(2), 2)
ENOUGH = 1000 * GB


def halves(value: int, least: int) -> list[int]:
    return [value := value // 2 for _ in range(value.bit_length()) if value // 2 >= least]


LADDERS: dict[str, list[Any]] = {
    "recompute": [True],
    "micro_batch": halves(16, 1),
    "rows": halves(64, 1),
    "max_pixels": [384**2, 288**2, 216**2, 162**2],
    "max_tokens": halves(256, 32),
    "group": halves(8, 2),
}
"""What the defaults of training can be lowered to, mildest first."""


def test_what_the_defaults_can_be_lowered_to() -> None:
    found = {name: advice._smaller(TrainSettings(recompute=False), name) for name in advice._CHANGES}
    assert found == LADDERS
    assert (LADDERS["group"], LADDERS["max_tokens"]) == ([4, 2], [128, 64, 32])
    assert list(LADDERS) == list(found)  # what changes no result is advised first


def training(settings: TrainSettings) -> Plan:
    return training_plan(MODEL, settings, 2000)


def judging(settings: JudgeSettings) -> Plan:
    return judging_plan(MODEL, settings, 32)


def advised(plan_of: Callable[[Any], Plan], settings: Any, working_set: int, what: str = "training") -> list[Any]:
    """The changes that a refusal advises, each as settings by name, and checked to be what it says."""
    with pytest.raises(ConfigError) as caught:
        require(plan_of, settings, working_set, what)
    message = str(caught.value)
    assert "\n" not in message
    needs, _, tried = message.partition(": try ")
    assert needs == (
        f"{what} needs about {gigabytes(plan_of(settings).peak)}, this device recommends at most "
        f"{gigabytes(working_set)}"
    )
    found = []
    for option in re.split(r", | or ", tried):
        flags, size = re.fullmatch(r"(.*) \((.* [GM]B)\)", option).groups()  # type: ignore[union-attr]
        changes = {}
        for flag in flags.split(" with "):
            name, _, value = flag.partition(" ")
            changes[name.removeprefix("--").replace("-", "_")] = int(value) if value else True
        peak = plan_of(replace(settings, **changes)).peak
        assert peak <= working_set
        assert gigabytes(peak) == size
        found.append(changes)
    return found


def test_what_fits_is_planned() -> None:
    plan = training(TrainSettings())
    assert require(training, TrainSettings(), plan.peak, "training") == plan
    with pytest.raises(ConfigError):
        require(training, TrainSettings(), plan.peak - 1, "training")


@pytest.mark.parametrize(
    ("recompute", "share"), [(True, 0.999), (True, 0.95), (True, 0.9), (False, 0.999), (False, 0.5), (False, 0.2)]
)
def test_single_changes_are_the_mildest_that_fit(recompute: bool, share: float) -> None:
    """Every setting that helps alone is advised, with the largest value of its ladder that does."""
    settings = TrainSettings(recompute=recompute)
    whole = training(settings).peak
    working_set = int(whole * share) if recompute else int(MODEL.weights + share * (whole - MODEL.weights))
    expected = {}
    for name, steps in LADDERS.items():
        if name != "recompute" or not recompute:
            fitting = [v for v in steps if training(replace(settings, **{name: v})).peak <= working_set]
            expected |= {name: fitting[0]} if fitting else {}
    assert expected
    assert ("recompute" in expected) != recompute
    found = advised(training, settings, working_set)
    assert all(len(changes) == 1 for changes in found)
    assert {name: value for changes in found for name, value in changes.items()} == expected


def smallest(settings: Any) -> Any:
    known = {f.name for f in fields(settings)}
    return replace(settings, **{name: steps[-1] for name, steps in LADDERS.items() if name in known})


@pytest.mark.parametrize("recompute", [True, False])
def test_several_changes_are_all_needed(recompute: bool) -> None:
    settings = TrainSettings(recompute=recompute, group=32, max_tokens=1024, max_pixels=1344 * 1344, micro_batch=32)
    low, high, several = training(smallest(settings)).peak, training(settings).peak, 0
    for share in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9):
        working_set = int(low + share * (high - low))
        found = advised(training, settings, working_set)
        if len(found[0]) == 1:
            continue
        several += 1
        (changes,) = found
        for name in changes:
            fewer = {other: value for other, value in changes.items() if other != name}
            assert training(replace(settings, **fewer)).peak > working_set, (share, changes, name)
    assert several >= 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_judging_is_advised_on_what_judging_has(share: float) -> None:
    settings = JudgeSettings(max_tokens=1024, max_pixels=1024 * 1024)
    low, high = judging(smallest(settings)).peak, judging(settings).peak
    found = advised(judging, settings, int(low + share * (high - low)), "judging")
    assert {name for changes in found for name in changes} <= {"rows", "max_pixels", "max_tokens"}


def test_where_nothing_fits_the_weights_are_named() -> None:
    weights = gigabytes(MODEL.weights)
    for working_set, words in (
        (MODEL.weights - 1, f"its weights alone take {weights}"),
        (training(smallest(TrainSettings())).peak - 1, f"its weights take {weights}"),
    ):
        with pytest.raises(ConfigError, match=f"and no settings make it fit: {words}; take a smaller model") as caught:
            require(training, TrainSettings(), working_set, "training")
        assert "\n" not in str(caught.value)
        assert "--" not in str(caught.value)


def test_settings_that_are_as_small_as_can_be_are_left_alone() -> None:
    settings = TrainSettings(rows=1, micro_batch=1, max_tokens=20, max_pixels=784, group=2)
    with pytest.raises(ConfigError, match="no settings make it fit"):
        require(training, settings, training(settings).peak - 1, "training")


def test_bytes_as_a_person_reads_them() -> None:
    assert [gigabytes(size) for size in (3_067_648, 999_000_000, GB, 12_345_678_901)] == [
        "3 MB", "999 MB", "1.0 GB", "12.3 GB",
    ]  # fmt: skip


def test_as_many_images_as_a_run_can_see() -> None:
    assert images_seen(TrainSettings(), 50) == 100
    assert images_seen(TrainSettings(steps=3, comparisons=4), 50) == 24
    assert images_seen(TrainSettings(steps=100, comparisons=4), 50) == 100


# On this device


@pytest.fixture
def working_set(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make this device recommend a number of bytes."""
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    return lambda size: monkeypatch.setattr(advice, "device_working_set", lambda: size)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded, so nothing can be judged."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "load_vlm", never)
    monkeypatch.setattr(runs, "load_vlm", never)


TRAIN = ("train", "--data", "demo", "--model", "demo", "--limit", "8", "--steps", "1", "--comparisons", "4")


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(*arguments: str | Path) -> str:
    """The one line of a refused command."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def options(line: str) -> list[list[str]]:
    """The options that a refusal advises, as the command line takes them."""
    return [part.split(" (")[0].replace(" with ", " ").split() for part in re.split(r", | or ", line.split("try ")[1])]


def test_training_says_what_it_will_take(working_set: Callable[[int], None], tmp_path: Path) -> None:
    working_set(ENOUGH)
    chosen = TrainSettings(steps=1, comparisons=4, group=2, max_tokens=4)
    plan = plan_training(Checkpoint.open(JUDGE), chosen, 8)
    assert plan == training_plan(advice.checkpoint_at(Checkpoint.open(JUDGE)), chosen, 8)
    result = run(*TRAIN, "--group", "2", "--max-tokens", "4", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    line = f"about {gigabytes(plan.peak)} of memory at the peak, {gigabytes(plan.weights)} of it weights"
    assert line in " ".join(result.stderr.split())
    assert (tmp_path / "run" / "run.json").exists()
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert log["peak_bytes"] > plan.weights


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_training_that_does_not_fit_leaves_nothing_behind(
    working_set: Callable[[int], None], tmp_path: Path, share: float
) -> None:
    working_set(ENOUGH)
    plan = plan_training(Checkpoint.open(JUDGE), TrainSettings(steps=1, comparisons=4), 8)
    size = int(plan.weights + share * (plan.peak - plan.weights))
    working_set(size)
    line = refusal(*TRAIN, "--output", tmp_path / "folder" / "run")
    assert f"training needs about {gigabytes(plan.peak)}, this device recommends at most {gigabytes(size)}" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_training_as_advised_is_begun(working_set: Callable[[int], None], tmp_path: Path, share: float) -> None:
    """What is said can be typed, and is taken."""
    working_set(ENOUGH)
    plan = plan_training(Checkpoint.open(JUDGE), TrainSettings(steps=1, comparisons=4, max_tokens=64), 8)
    working_set(int(plan.weights + share * (plan.peak - plan.weights)))
    command = (*TRAIN, "--max-tokens", "64")
    for number, changes in enumerate(options(refusal(*command, "--output", tmp_path / "run"))[:2]):
        result = run(*command, *changes, "--output", tmp_path / f"run {number}")
        assert result.exit_code == 0, result.output


def test_training_on_a_device_that_is_too_small(working_set: Callable[[int], None], tmp_path: Path) -> None:
    working_set(GB // 1000)
    line = refusal(*TRAIN, "--output", tmp_path / "run")
    assert "no settings make it fit: its weights alone take 3 MB; take a smaller model" in line


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    return paths


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("command", ["compare", "rank"])
def test_judging_that_does_not_fit_is_refused(
    command: str, working_set: Callable[[int], None], pictures: list[Path]
) -> None:
    working_set(ENOUGH)
    plan = plan_judging(Checkpoint.open(JUDGE), JudgeSettings(), 2)
    working_set(plan.weights + 9 * (plan.peak - plan.weights) // 10)
    line = refusal(command, *pictures, "--prompt", "a hat", "--model", "demo")
    assert f"judging needs about {gigabytes(plan.peak)}, this device" in line
    assert " try --" in line


@pytest.mark.parametrize("command", ["compare", "rank"])
def test_judging_as_advised_is_done(command: str, working_set: Callable[[int], None], pictures: list[Path]) -> None:
    working_set(ENOUGH)
    plan = plan_judging(Checkpoint.open(JUDGE), JudgeSettings(), 2)
    working_set(plan.weights + 9 * (plan.peak - plan.weights) // 10)
    judge = (command, *pictures, "--prompt", "a hat", "--model", "demo")
    for changes in options(refusal(*judge)):
        assert run(*judge, *changes, "--json").exit_code == 0


@pytest.mark.usefixtures("unloaded")
def test_evaluating_what_does_not_fit_is_refused(working_set: Callable[[int], None]) -> None:
    working_set(4_000_000)
    assert "judging needs about" in refusal("eval", "--data", "demo", "--model", "demo", "--limit", "2")
