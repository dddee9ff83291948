"""Runs that were interrupted resume as if they had not been, and what cannot resume is said in one line."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from click.testing import CliRunner

import mlxpref
from mlxpref.cli import main
from mlxpref.cli.demo import demo_settings
from mlxpref.config import TrainSettings, settings_from
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError
from mlxpref.training import held_out, resume, run_folder, run_record
from mlxpref.training import run as run_module
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.run_folder import Run, held_out_change
from mlxpref.training.run_record import chosen_settings, read_record, resumed_settings
from tests.conftest import GOLDEN
from tests.messages import messages

TINY = GOLDEN / "qwen2_5_vl"
QUICK: dict[str, Any] = {
    "data": "demo", "model": str(TINY), "limit": 24, "comparisons": 3, "group": 2, "steps": 6, "think": False,
    "max_tokens": 4, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 2,
}  # fmt: skip
UPDATES = "updates_per_rollout"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the settings of `QUICK` that nothing interrupted."""
    return begin(tmp_path_factory.mktemp("runs") / "unbroken")


def begin(folder: Path, until: int | None = None, **changes: Any) -> Path:
    """Train into a folder, and leave after a number of steps."""
    advance(start_run(settings_from(TrainSettings, QUICK | changes), folder), until)
    return folder


def resumed(folder: Path, until: int | None = None, **given: Any) -> str:
    """Resume a run; the messages."""
    with messages() as lines:
        run = resume_run(folder, given)
        if run:
            advance(run, until)
    usual = ("memory at the peak", ": held-out", "no answer was found")  # the latter of so few tokens
    return "\n".join(line for line in lines if not any(words in line for words in usual))


def advance(run: Run, until: int | None) -> None:
    reports = run.reports()
    for report in reports:
        if report.step == until:
            reports.close()  # type: ignore[attr-defined]


def killed(folder: Path, until: int, **changes: Any) -> Path:
    """The folder of a run whose process died in the middle of a line, after a number of steps."""
    run = start_run(settings_from(TrainSettings, QUICK | changes), folder.with_name("alive"))
    for report in run.reports():
        if report.step == until:
            shutil.copytree(run.folder, folder)
            break
    for name in ("log.jsonl", "rollouts.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 99, "upd')
    return folder


def timeless(value: Any) -> Any:
    """A record without what no run repeats: times, memory, and what it finds on disk."""
    if isinstance(value, dict):
        return {
            k: timeless(v) for k, v in value.items() if not any(word in k for word in ("second", "bytes", "vision"))
        }
    return value


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved_step(folder: Path) -> int:
    return int(json.loads((folder / "checkpoint" / "state.json").read_text())["step"])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(one: Path, other: Path) -> None:
    for name in ("adapters.safetensors", "rollouts.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    logs = [list(map(timeless, log_of(folder))) for folder in (one, other)]
    assert logs[0] == logs[1]
    first = 0 if any(line.get("held_out") for line in logs[0]) else 1  # measured before training
    assert [line["step"] for line in logs[0]] == list(range(first, len(logs[0]) + first))


SMALL_DEMO = {"model": "demo", "think": True, "max_tokens": 24, "learning_rate": 5e-3, "limit": 24, "steps": 4}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"limit": 4}, id="several epochs"),
        pytest.param(
            SMALL_DEMO | {"kl": 0.1, UPDATES: 2, "reward": "hard", "clip_low": 0.02}, id="reasons, divergence, updates"
        ),
        pytest.param(
            SMALL_DEMO | {"held_out": 0.3, "held_out_limit": 3, "evaluate_every": 2, "patience": 3}, id="held-out"
        ),
    ],
)
def test_run_in_three_parts_equals_one(changes: dict[str, Any], tmp_path: Path) -> None:
    """Left after a step that was saved and after one that was not; then resumed to its end."""
    begin(tmp_path / "whole", **changes)
    folder = begin(tmp_path / "parts", until=1, **changes)
    assert saved_step(folder) == 1
    assert resumed(folder, until=3) == ""
    arrays = folder / "checkpoint" / "arrays.safetensors"
    before = arrays.read_bytes()
    assert resumed(folder) == ""
    assert arrays.read_bytes() != before
    assert_same(folder, tmp_path / "whole")
    assert read_record(folder)["resumed"][0]["after_step"] == 1


@pytest.mark.parametrize("until", [1, 5])
def test_killed_run_resumes(until: int, unbroken: Path, tmp_path: Path) -> None:
    folder = killed(tmp_path / "run", until)
    assert len((folder / "log.jsonl").read_text().splitlines()) == until + 1
    assert resumed(folder) == (f"{folder}: no step was saved yet: the run starts over" if until == 1 else "")
    assert_same(folder, unbroken)
    assert read_record(folder)["resumed"] == [{"after_step": until // 2 * 2, "changed": {}}]


@pytest.mark.parametrize("update", [2, 5])
def test_an_interrupted_update_is_forgotten(update: int, tmp_path: Path) -> None:
    """Of the two updates of a step, the first one must be forgotten: the step is done again as a whole."""
    changes = {UPDATES: 2, "kl": 0.1, "steps": 4}
    begin(tmp_path / "whole", **changes)
    count = 0
    original = optim.Optimizer.update

    def interrupted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        original(*arguments)
        if count == update:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(optim.Optimizer, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path / "parts", **changes)
    done = (update - 1) // 2
    assert saved_step(tmp_path / "parts") == done
    weights = mx.load(str(tmp_path / "parts" / "adapters.safetensors"))
    assert any(weight.any().item() for name, weight in weights.items() if name.endswith("lora_b")) == bool(done)
    assert resumed(tmp_path / "parts") == ""
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_run_without_updates_resumes(tmp_path: Path) -> None:
    """A random model never answers, so hard rewards are all 0 and the optimizer has done nothing."""
    folder = begin(tmp_path / "run", until=2, reward="hard", steps=3)
    assert resumed(folder) == ""
    assert [line["updated"] for line in log_of(folder)] == [False] * 3


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damaged", "words", "after"),
    [
        (["checkpoint"], "checkpoint: damaged; the run continues from the one before, of step 2", 2),
        (["checkpoint", "checkpoint.previous"], "damaged, and there is no other: the run starts over", 0),
    ],
)
def test_damaged_state_costs_only_steps(
    damaged: Sequence[str], words: str, after: int, unbroken: Path, tmp_path: Path
) -> None:
    folder = killed(tmp_path / "run", 5)
    for name in damaged:
        flip(folder / name / "arrays.safetensors")
    assert words in resumed(folder)
    assert_same(folder, unbroken)
    assert read_record(folder)["resumed"][0]["after_step"] == after


def test_missing_log_lines(unbroken: Path, tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", until=4)
    log = folder / "log.jsonl"
    log.write_text(log.read_text()[:-5])
    (folder / "rollouts.jsonl").unlink()
    warnings = resumed(folder)
    assert f"{log}: lines of steps up to 4 are missing" in warnings
    assert f"{folder / 'rollouts.jsonl'}: lines of steps up to 4 are missing" in warnings
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 5, 6]
    adapters = [(f / "adapters.safetensors").read_bytes() for f in (folder, unbroken)]
    assert adapters[0] == adapters[1]


def test_complete_run_is_unchanged(unbroken: Path) -> None:
    before = contents(unbroken)
    assert resumed(unbroken) == (
        f"{unbroken}: this run is complete after 6 steps; nothing is left to do, unless --steps is more"
    )
    done = CliRunner().invoke(main, ["train", "--resume", "--output", str(unbroken), "--json"])
    assert done.exit_code == 0
    assert "this run is complete after 6 steps" in done.stderr
    assert json.loads(done.stdout)["last_step"]["step"] == 6
    assert list(mlxpref.train("demo", output=unbroken, resume=True)) == []
    assert before == contents(unbroken)


def test_python_resumes_too(unbroken: Path, tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", until=4)
    assert [report.step for report in mlxpref.train("demo", TINY, folder, resume=True)] == [5, 6]
    assert_same(folder, unbroken)


def test_settings_that_change_results_are_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", until=1)
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        resumed(folder, learning_rate=0.5, group=2, seed=4)
    assert "cannot continue with learning_rate 0.5 (it has 0.01), seed 4 (it has 0)" in str(caught.value)
    others = {
        int: lambda value: value + 1,
        float: lambda value: value / 2 + 0.25,
        bool: lambda value: not value,
        str: lambda value: value + "x",
    }
    free = {
        "data",
        "data_dir",
        "model",
        "adapter",
        "save_every",
        "log_every",
        "steps",
        "rows",
        "micro_batch",
        "recompute",
    }
    for name, value in asdict(settings_from(TrainSettings, QUICK)).items():
        if name not in free:
            with pytest.raises(ConfigError, match=name):
                resumed(folder, **{name: others[type(value)](value)})
    assert before == contents(folder)


def test_memory_settings_may_change(unbroken: Path, tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", until=3)
    warnings = resumed(folder, save_every=1, micro_batch=2, recompute=False)
    assert (
        "micro_batch is 2, was 16, recompute is False, was True: the run continues, but not to the last bit" in warnings
    )
    record = read_record(folder)
    assert record["resumed"] == [{"after_step": 3, "changed": {"micro_batch": [16, 2], "recompute": [True, False]}}]
    assert (record["settings"]["save_every"], record["settings"]["micro_batch"]) == (1, 2)
    weights = [mx.load(str(f / "adapters.safetensors")) for f in (folder, unbroken)]
    assert all(mx.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])


def test_other_machine_or_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path / "run", until=1)
    machine = read_record(folder)["machine"]
    if sys.platform == "linux" and machine["device"].startswith("cpu"):
        assert machine["blas_threads"] >= 1
    blas = {"blas_threads": 77, "blas_kernels": machine["blas_kernels"]}
    monkeypatch.setattr(run_record, "blas_in_use", lambda: blas)
    version = run_record.version
    monkeypatch.setattr(run_record, "version", lambda name: "0.99" if name == "mlx" else version(name))
    warnings = resumed(folder, until=2)
    assert f"mlx is 0.99, was {version('mlx')}, blas_threads is 77, was {machine['blas_threads']}: the run" in warnings
    record = read_record(folder)
    assert record["machine"]["blas_threads"] == 77
    assert set(record["resumed"][0]["changed"]) == {"mlx", "blas_threads"}
    assert resumed(folder, until=3) == ""  # as it was the last time


@pytest.fixture
def file_of_rows(tmp_path: Path) -> Callable[[float], Path]:
    """Preferences in a file; the first one's share can be chosen."""

    def written(share: float) -> Path:
        rows = []
        for index, preference in enumerate(demo_preferences("train", 4)):
            for side in "ab":
                getattr(preference, side).save(tmp_path / f"{index}{side}.png")
            p_people = preference.p_people if index else share
            rows.append({"prompt": preference.prompt, "a": f"{index}a.png", "b": f"{index}b.png", "p_a": p_people})
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return written


def test_other_data_is_refused(file_of_rows: Callable[[float], Path], tmp_path: Path) -> None:
    data = file_of_rows(1.0)
    folder = begin(tmp_path / "run", until=1, data=str(data), limit=0, steps=2)
    file_of_rows(0.9)
    with pytest.raises(DataError, match=r"rows.jsonl, whose preferences are not the same now \(1 differ"):
        resumed(folder)
    file_of_rows(1.0)
    moved = data.rename(tmp_path / "moved.jsonl")
    assert resumed(folder, data=str(moved)) == ""  # the name of the file does not matter
    assert read_record(folder)["settings"]["data"] == str(moved)


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path / "run", until=1)
    with pytest.raises(ModelError, match=r"the run trains .*qwen2_5_vl, and .*qwen2_vl is not that model now"):
        resumed(folder, model=str(GOLDEN / "qwen2_vl"))
    monkeypatch.setattr("mlxpref.engine.profile.Profile.version", lambda profile: "other")
    with pytest.raises(ModelError, match="other words"):
        resumed(folder)


def test_model_in_memory_resumes(unbroken: Path, tmp_path: Path) -> None:
    """As the demo trains it: run.json names no model."""
    settings = settings_from(TrainSettings, QUICK | {"model": ""})
    advance(start_run(settings, tmp_path / "run", vlm=load_vlm(TINY, settings.max_pixels)), 3)
    assert resumed(tmp_path / "run") == ""
    assert_same(tmp_path / "run", unbroken)


def test_one_process_a_folder(tmp_path: Path) -> None:
    run = start_run(settings_from(TrainSettings, QUICK), tmp_path / "run")
    reports = run.reports()
    next(reports)
    before = contents(run.folder)
    with pytest.raises(ConfigError, match="another process is training there"):
        resumed(run.folder)
    assert before == contents(run.folder)
    reports.close()  # type: ignore[attr-defined]
    assert resumed(run.folder, until=2) == ""


class Full:
    """A file without room for a third step."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, line: bytes) -> int:
        if json.loads(line)["step"] > 2:
            self.file.write(line[:10])
            self.file.flush()
            no_space()
        return int(self.file.write(line))


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", ["checkpoint", "log.jsonl", "rollouts.jsonl"])
def test_full_disk_keeps_the_saved_state(
    full: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the third step on; then there is room again."""
    folder, write_state, open_file = tmp_path / "run", resume.write_state, run_folder.open_for_append

    def write(run: Path, state: Any) -> None:
        with pytest.MonkeyPatch.context() as context:
            if state.step > 2:
                context.setattr(mx, "save_safetensors", lambda *_: no_space())
            write_state(run, state)

    @contextmanager
    def open_for_append(path: Path) -> Iterator[Any]:
        with open_file(path) as file:
            yield Full(file) if path.name == full else file

    monkeypatch.setattr(run_folder, "open_for_append", open_for_append)
    if full == "checkpoint":
        monkeypatch.setattr(run_folder, "write_state", write)
    done = cli("train", *options(), "--output", folder)
    assert done.exit_code == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert f"{folder / full}: " in error
    assert "No space left on device" in error
    assert f"--resume --output {folder}" in error
    assert "Traceback" not in done.stderr
    monkeypatch.undo()
    assert saved_step(folder) == 2
    assert resumed(folder) == ""
    assert_same(folder, unbroken)


def options(**changes: Any) -> list[str]:
    """Settings as options of the command line."""
    result = []
    for name, value in (QUICK | changes).items():
        flag = name.replace("_", "-")
        result += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return result


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("folder", [None, "nowhere", "empty", "file", "other"])
def test_folder_without_a_run_is_refused(folder: str | None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"settings": []}')
    done = cli("train", "--resume", *(("--output", tmp_path / folder) if folder else ()))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    words = {None: "give its folder with --output", "other": "run.json: not "}.get(folder, "no run to continue")
    assert line.startswith("Error: ")
    assert words in line


def test_a_folder_with_a_run_is_refused(unbroken: Path) -> None:
    with pytest.raises(MlxprefError, match="is not empty; give another --output, or continue the run in it with --res"):
        begin(unbroken)


def test_folder_of_empty_folders_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    begin(tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "checkpoint.previous").exists()


@pytest.mark.slow
def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL in the middle of a real run, then `--resume` with nothing but the folder."""
    arguments = options(steps=20, comparisons=2, limit=40)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert cli("train", *arguments, "--output", whole).exit_code == 0
    script = [sys.executable, "-c", "from mlxpref.cli import main; main()"]
    with subprocess.Popen([*script, "train", *arguments, "--output", folder], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") >= 5:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    unfinished = [folder / name for name in (".7.adapters.safetensors", ".adapter_config.json.7", ".run.json.7")]
    for path in unfinished:
        path.write_text("begun")
    done = cli("train", "--resume", "--output", folder)
    assert done.exit_code == 0, done.stderr
    (resumption,) = read_record(folder)["resumed"]
    assert 2 <= resumption["after_step"] < 20
    assert not any(path.exists() for path in unfinished)
    assert f"20 steps, {resumption['after_step']} of them done, into {folder}" in done.stderr
    assert_same(folder, whole)


def test_interrupt_names_the_resume_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, append = tmp_path / "a run", run_folder.append_record

    def interrupted(file: Any, record: Any) -> None:
        if record["step"] == 4:
            raise KeyboardInterrupt
        append(file, record)

    monkeypatch.setattr(run_folder, "append_record", interrupted)
    done = cli("train", *options(), "--output", folder)
    assert done.exit_code == 130
    assert f"mlxpref train --resume --output '{folder}'" in done.stderr
    assert saved_step(folder) == 3


def test_patience_saves_the_best_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, accuracies = held_out.evaluate, iter([0.9, 0.5, 0.7, 0.6, 0.6])  # the first before training

    def scripted(*arguments: Any, **options: Any) -> Any:
        evaluation = measure(*arguments, **options)
        return replace(evaluation, metrics=replace(evaluation.metrics, accuracy=next(accuracies)))

    monkeypatch.setattr(held_out, "evaluate", scripted)
    changes = {"held_out": 0.3, "held_out_limit": 3, "evaluate_every": 1, "patience": 2, "save_every": 1}
    run = start_run(settings_from(TrainSettings, QUICK | changes), tmp_path)
    reports, adapters = run.reports(), []
    for report in reports:
        adapters.append((tmp_path / "adapters.safetensors").read_bytes())
        if report.step == 3:
            reports.close()  # type: ignore[attr-defined]
    assert adapters[0] != adapters[1] == adapters[2] == (tmp_path / "adapters.safetensors").read_bytes()
    assert any(not mx.array_equal(run.state.arrays[f"adapter.{n}"], w) for n, w in run.trainer.adapter.items())
    assert resumed(tmp_path) == ""
    assert (tmp_path / "adapters.safetensors").read_bytes() == adapters[1]
    assert read_record(tmp_path)["ended"] == {"step": 4, "early": True}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["step"] == 2
    expected = {"step": 2, "best_of": 4, "pairs": 3, "before": 0.9, "after": 0.7}
    assert held_out_change(tmp_path) == expected
    assert "<dt>steps</dt><dd>4 of 6</dd>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("reward", ["soft=none", "soft,hard", "nowhere.py:reward"])
def test_wrong_reward_is_refused_before_loading(reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_module, "load_vlm", load)
    with pytest.raises(ConfigError, match=r"^reward "):
        begin(tmp_path / "run", reward=reward)
    assert not (tmp_path / "run").exists()


def test_the_demo_judge_brings_its_settings(monkeypatch: pytest.MonkeyPatch, unbroken: Path) -> None:
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    own = demo_settings()

    def run_settings(values: dict[str, Any]) -> TrainSettings:
        return settings_from(TrainSettings, chosen_settings(values))

    assert run_settings({"data": "demo", "model": "demo"}) == own
    assert run_settings({"data": "demo", "model": "demo", "kl": 0.5, "steps": 3}) == replace(own, kl=0.5, steps=3)
    mine = run_settings({"data": "mine.jsonl", "model": "demo"})
    assert mine == replace(own, data="mine.jsonl", limit=0, steps=0)
    other = run_settings({"data": "demo", "model": "owner/name"})
    assert other == TrainSettings(data="demo", model="owner/name")
    # Training goes on as the adapter was trained.
    further = run_settings({"data": "demo", "adapter": str(unbroken), "max_tokens": 9})
    assert further == TrainSettings(data="demo", adapter=str(unbroken), think=False, max_tokens=9)
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    assert run_settings({"data": "demo"}) == replace(own, model="")
    assert run_settings({"data": "demo", "model": "owner/name"}) == other


def test_runs_before_the_answer_was_read_at_once_resume_without_it(tmp_path: Path) -> None:
    settings = asdict(settings_from(TrainSettings, QUICK))
    assert resumed_settings(tmp_path, {"settings": settings, "base": {}}, {}).read_weight == 1.0
    del settings["read_weight"]
    assert resumed_settings(tmp_path, {"settings": settings, "base": {}}, {}).read_weight == 0.0
