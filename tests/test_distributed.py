"""Several processes do what one does: gradients, logs, verdicts, rankings; and one that dies ends the others.

All are started for real, on this machine, with MLX's own ring between them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.company import are_several
from mlxpref.config import TrainSettings, settings_from
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.errors import MlxprefError
from mlxpref.heartbeat import Heartbeat, Peer
from mlxpref.training.resume import read_checkpoint
from mlxpref.training.run import resume_run
from mlxpref.training.run_record import read_record
from scripts.several import start, wait
from tests.distributed_worker import DEMO
from tests.messages import messages

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
SECONDS = 300
"""How long processes may take on a busy machine; none of them is waited for longer."""

STEPS: list[dict[str, Any]] = [
    {"kl": 0.1, "updates_per_rollout": 2, "micro_batch": 2},
    {"reward": "brier", "loss_type": "grpo", "mask_truncated": True, "max_tokens": 32},
    {"reward": "hard", "loss_type": "dr_grpo", "comparisons": 2, "kl": 1.0, "max_tokens": 32},
    {"think": False, "comparisons": 1},
]
"""Settings of single steps; of three processes some have no comparison in the last two."""
RUN: dict[str, Any] = {
    "steps": 4, "save_every": 2, "learning_rate": 5e-3, "warmup_steps": 1, "resample": 1,
    "held_out": 0.3, "held_out_limit": 3, "evaluate_every": 2, "patience": 2, "comparisons": 3,
}  # fmt: skip
EVAL = ["eval", "--data", "demo", "--model", "demo", "--limit", "5", "--max-tokens", "16", "--json"]
RANK = [
    "rank",
    "--prompt",
    "a red circle",
    "--model",
    "demo",
    "--think",
    "all",
    "--pairs",
    "5",
    "--max-tokens",
    "16",
    "--json",
]


def worked(count: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Let so many processes do jobs, one after the other."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.distributed_worker", str(file)]
    codes = wait(start(count, command, folder, ONE_THREAD), SECONDS)
    assert codes == [0] * count, [(folder / f"err.{rank}").read_text() for rank in range(count)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    looks = [("red", "circle", "clean"), ("red", "square", "clean"), ("green", "circle", "noisy"),
             ("red", "circle", "blurry"), ("purple", "star", "clean")]  # fmt: skip
    for number, look in enumerate(looks):
        render(PictureSpec(*look), np.random.default_rng(number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[int, Path]:
    """The folders of what one, two and three processes did."""
    folders = {count: tmp_path_factory.mktemp(f"of{count}") for count in (1, 2, 3)}
    for count, folder in folders.items():
        steps = [{"do": "gradients", "changes": each, "out": f"{folder}/{i}.npz"} for i, each in enumerate(STEPS)]
        jobs = [*steps, {"do": "train", "folder": f"{folder}/run", "settings": RUN}]
        jobs += [{"do": "exchange", "out": f"{folder}/exchanged.json"}]
        if count < 3:
            jobs += [{"do": "command", "arguments": [*EVAL, "--no-store"], "out": f"{folder}/eval.json"}]
            rank = [*RANK, str(pictures), "--store", f"{folder}/store.sqlite", "--html", f"{folder}/page.html"]
            jobs += [{"do": "command", "arguments": rank, "out": f"{folder}/rank.json"}]
            jobs += [{"do": "train", "folder": f"{folder}/left", "settings": RUN, "until": 3}]
        if count == 2:
            jobs += [{"do": "drift", "by": by, "out": f"{folder}/drift{by}.json"} for by in (1e-6, 0.1)]
            jobs += [{"do": "train", "folder": f"{folders[1]}/left", "settings": {}, "resume": True}]
        worked(count, jobs, folder)
    return folders


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def close(one: Any, other: Any) -> bool:
    """Whether two records are the same but for rounding, and for times, memory and bytes."""
    if isinstance(one, dict):
        measured = ("second", "bytes", "vision_runs")
        return one.keys() == other.keys() and all(
            close(one[key], other[key]) for key in one if not any(word in key for word in measured)
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=1e-3, abs=1e-5)
    return bool(one == other)


def test_shares_are_everything_once() -> None:
    for count in range(12):
        for size in range(1, 6):
            shares = [ProcessGroup(rank, size).share(count) for rank in range(size)]
            assert [number for share in shares for number in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_sends_nothing() -> None:
    tree = {"a": np.ones(2)}
    assert SINGLE_PROCESS.summed(tree) is tree
    assert SINGLE_PROCESS.gathered(tree) == [tree]
    assert (SINGLE_PROCESS.agreed(3), SINGLE_PROCESS.totals(1.5, 2.0), SINGLE_PROCESS.sent_bytes) == (3, [1.5, 2.0], 0)


@pytest.mark.parametrize("count", [2, 3])
def test_exchanges(count: int, done: dict[int, Path]) -> None:
    told = json.loads((done[count] / "exchanged.json").read_text())
    (alone,) = json.loads((done[1] / "exchanged.json").read_text())
    assert len(told) == count
    for each in told:
        factor = count * (count + 1) / 2
        assert each["sum"] == [[factor, 2 * factor], [[count] * 3] * 2, "mlx.core.bfloat16"]
        assert each["first"] == alone["first"]
        assert each["gathered"] == [[rank, 0.1, "\ud800é", None] for rank in range(count)]
        assert each["totals"] == pytest.approx([count * 0.1, count * (count - 1) / 2])
        assert (each["agreed"], each["sent"]) == ({"of": 0}, True)


@pytest.mark.parametrize("number", range(len(STEPS)))
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_fixed_rollouts_are_those_of_one_process(count: int, number: int, done: dict[int, Path]) -> None:
    one, several = (dict(np.load(done[n] / f"{number}.npz")) for n in (1, count))
    assert one.pop("texts").tolist() == several.pop("texts").tolist()
    np.testing.assert_allclose(several.pop("learned"), one.pop("learned"), rtol=1e-4, atol=1e-6)
    largest = max(np.abs(gradient).max() for gradient in one.values())
    assert largest > 1e-4
    for name, gradient in one.items():
        np.testing.assert_allclose(several[name], gradient, rtol=0, atol=1e-5 * min(largest, 1.0))


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_has_the_log_of_one_process(count: int, done: dict[int, Path]) -> None:
    one, several = log_of(done[1] / "run"), log_of(done[count] / "run")
    assert len(one) == 4
    assert close(one, several), (one, several)
    assert any(line["resampled"] for line in one)
    assert [line["held_out"] is not None for line in one] == [False, True, False, True]
    assert all(line["sent_bytes"] == 0 for line in one)
    assert all(line["sent_bytes"] > 0 for line in several)
    texts = [(done[n] / "run" / "rollouts.jsonl").read_text().splitlines() for n in (1, count)]
    assert close(*([json.loads(line) for line in part] for part in texts))
    assert read_record(done[count] / "run")["machine"]["processes"] == count
    assert (done[count] / "run" / "report.html").is_file()


def test_a_run_goes_on_with_any_number_of_processes(done: dict[int, Path]) -> None:
    """One that one process began and two have ended, and one that two began and one ends."""
    with messages() as said:
        run = resume_run(done[2] / "left", {})
    assert run
    assert any("processes is 1, was 2: the run goes on" in line for line in said)
    assert run.done == 3
    for _ in run.reports():
        pass
    for folder in (done[1], done[2]):
        assert close(log_of(done[1] / "run"), log_of(folder / "left"))
    resumed = read_record(done[1] / "left")["resumed"]
    assert [(each["after_step"], each["changed"]["processes"]) for each in resumed] == [(3, [1, 2])]


def test_adapters_are_kept_equal(done: dict[int, Path]) -> None:
    """What rounding moves is set right, what is more is said."""
    first, second = json.loads((done[2] / "drift1e-06.json").read_text())
    assert first == second
    assert float(first)
    said = json.loads((done[2] / "drift0.1.json").read_text())
    assert said[0] == said[1]
    assert "step 7: process 1 has another adapter than process 0" in said[0]


def test_an_evaluation_is_that_of_one_process(done: dict[int, Path]) -> None:
    one, two = (json.loads((done[n] / "eval.json").read_text()) for n in (1, 2))
    assert one["pairs"] == 5
    assert close(one, two)


def test_a_ranking_is_that_of_one_process_and_so_is_its_store(done: dict[int, Path], pictures: Path) -> None:
    one, two = (json.loads((done[n] / "rank.json").read_text()) for n in (1, 2))
    assert len(one["images"]) == 5
    assert close(one, two)
    assert (done[2] / "page.html").is_file()
    command = [*RANK, str(pictures), "--store", str(done[2] / "store.sqlite")]
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0
    found = json.loads(again.stdout)
    assert (found["tokens"], found["vision_runs"]) == (0, 0)
    assert close(two["images"], found["images"])


TRAIN = ["-m", "tests.distributed_command", "train", "--data", "demo", "--model", "demo", "--limit", "24"]
QUICK = ["--max-tokens", "16", "--group", "3", "--comparisons", "4", "--save-every", "2", "--steps", "500"]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], Path]]:
    """Two processes that train, and have done three steps."""
    command = [sys.executable, *TRAIN, *QUICK, "--output", str(tmp_path / "run")]
    processes = start(2, command, tmp_path, ONE_THREAD)
    log, until = tmp_path / "run" / "log.jsonl", time.monotonic() + SECONDS
    try:
        while not (log.is_file() and log.read_bytes().count(b"\n") >= 3):
            assert time.monotonic() < until
            assert all(process.poll() is None for process in processes), (tmp_path / "err.0").read_text()
            time.sleep(0.05)
        yield processes, tmp_path
    finally:
        for process in processes:
            process.kill()
            process.wait()


def errors_of(folder: Path) -> list[list[str]]:
    """What each process said, without what MLX's ring says itself."""
    lines = [(folder / f"err.{rank}").read_text().splitlines() for rank in (0, 1)]
    return [[line for line in part if not line.startswith("[ring]")] for part in lines]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_other(rank: int, training: tuple[list[Any], Path]) -> None:
    processes, folder = training
    os.kill(processes[rank].pid, signal.SIGKILL)
    started = time.monotonic()
    codes = wait(processes, 60)
    assert time.monotonic() - started < 60
    assert codes == ([-signal.SIGKILL, 1] if rank == 0 else [1, -signal.SIGKILL])
    (line,) = [line for said in errors_of(folder) for line in said if line.startswith("Error")]
    assert f"process {rank} of 2 (on {socket.gethostname()}) has died, so the others end as well" in line
    with messages() as said:
        checkpoint = read_checkpoint(folder / "run")
    assert checkpoint
    assert checkpoint.step >= 2
    assert said == []
    if rank == 1:
        assert any("go on with: mlxpref train --resume" in line for line in errors_of(folder)[0])
    run = resume_run(folder / "run", {"save_every": 1})
    assert run
    assert next(run.reports()).step == checkpoint.step + 1


def test_an_interrupt_of_one_process_ends_both_and_saves(training: tuple[list[Any], Path]) -> None:
    processes, folder = training
    processes[1].send_signal(signal.SIGINT)
    assert wait(processes, 60) == [130, 130]
    said = errors_of(folder)
    assert said[1] == []
    assert said[0][-1] == "interrupted"
    assert "go on with: mlxpref train --resume" in said[0][-2]
    checkpoint = read_checkpoint(folder / "run")
    assert checkpoint
    assert checkpoint.step == len(log_of(folder / "run"))


def test_a_process_that_stands_still_ends_the_other(training: tuple[list[Any], Path]) -> None:
    """It waits in an exchange that cannot end: no error of Python would end it."""
    processes, folder = training
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(timeout=60) == 1
    (line,) = [line for line in errors_of(folder)[0] if line.startswith("Error")]
    assert "process 1 of 2" in line
    assert "has not been heard of for 3 s" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["demo"], "mlxpref demo is the work of one process; run it without mlx.launch"),
        (["eval", "--data", "nowhere.jsonl", "--model", "demo"], "--data nowhere.jsonl: no such file or folder"),
    ],
)
def test_an_error_is_said_once(arguments: list[str], line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed_command", *arguments]
    assert wait(start(2, command, tmp_path), SECONDS) == [1, 1]
    said = errors_of(tmp_path)
    assert said[1] == []
    assert len(said[0]) == 1
    assert said[0][0].startswith("Error: ")
    assert line in said[0][0]


def test_mlx_launch_trains(tmp_path: Path) -> None:
    launch = Path(sys.executable).with_name("mlx.launch")
    command: list[Any] = [launch, "-n", "2", "--starting-port", str(free_port())]
    command += [f"--env={name}={value}" for name, value in ONE_THREAD.items()]
    command += ["--", Path(sys.executable).with_name("mlxpref"), "train", "--data", "demo", "--model", "demo"]
    command += ["--no-think", "--limit", "8", "--comparisons", "4", "--output", tmp_path / "run", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, text=True) as launched:
        try:
            out, err = launched.communicate(timeout=SECONDS)
        finally:
            if launched.poll() is None:
                os.killpg(launched.pid, signal.SIGKILL)
    assert "8 preferences, 2 steps" in err
    assert json.loads(out)["last_step"]["step"] == 2
    assert read_record(tmp_path / "run")["machine"]["processes"] == 2


def free_port() -> int:
    """A port that was free just now, and the next one most likely too."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return min(int(found.getsockname()[1]), 60000)


@pytest.fixture
def wired() -> Iterator[tuple[Heartbeat, socket.socket]]:
    """A heartbeat of process 0 that has one other to listen to, in this test's hand."""
    near, far = socket.socketpair()
    heartbeat = Heartbeat(0, 2, {1: Peer("elsewhere", near)})
    heartbeat.start()
    yield heartbeat, far
    heartbeat.leave("done")
    far.close()


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ({"end": "failed", "why": "no such image"}, MlxprefError, r"process 1 of 2 \(on elsewhere\): no such image"),
        ({"end": "interrupted", "why": ""}, KeyboardInterrupt, "^$"),
    ],
)
def test_what_another_process_says_ends_the_work(
    message: dict[str, str], error: type[BaseException], words: str, wired: tuple[Heartbeat, socket.socket]
) -> None:
    _, far = wired
    far.sendall(json.dumps(message).encode() + b"\n")
    with pytest.raises(error, match=words):
        time.sleep(20)
    far.sendall(json.dumps(message).encode() + b"\n")
    time.sleep(0.5)  # it ends once: how it ends is not interrupted


def test_a_process_that_is_done_may_go(wired: tuple[Heartbeat, socket.socket]) -> None:
    _, far = wired
    far.sendall(b'{"end": "done", "why": ""}\n')
    far.shutdown(socket.SHUT_RDWR)
    time.sleep(1.5)


def test_an_exchange_that_all_are_stuck_in_ends(
    wired: tuple[Heartbeat, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, far = wired
    monkeypatch.setattr("mlxpref.heartbeat._STUCK", 0.5)
    heartbeat.exchange = 4
    far.sendall(b'{"exchange": 3}\n')
    time.sleep(2.5)  # they are not in the same one: somebody is at work
    far.sendall(b'{"exchange": 4}\n')
    with pytest.raises(MlxprefError, match="all processes have waited for each other"):
        time.sleep(20)


@pytest.mark.parametrize(
    ("variables", "hosts", "several"),
    [
        ({}, None, False),
        ({"MLX_RANK": "0"}, "\n", False),  # mlx.launch -n 1
        ({"MLX_RANK": "0"}, '[["127.0.0.1:1"], ["127.0.0.1:2"]]', True),
        ({"MLX_RANK": "0"}, None, True),  # jaccl and nccl have no such file
        ({"OMPI_COMM_WORLD_RANK": "1"}, None, True),
    ],
)
def test_a_launcher_is_known_by_its_variables(
    variables: dict[str, str], hosts: str | None, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert are_several() == several


def test_settings_are_those_of_the_worker() -> None:
    """A wrong name in what the processes are asked for would be found out late."""
    for changes in [*STEPS, RUN]:
        settings_from(TrainSettings, DEMO | changes)
