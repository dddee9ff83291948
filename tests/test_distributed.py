"""Several processes do what one does: gradients, logs, verdicts, rankings; and where one ends, the others end, too.

All are started for real, on this machine, with MLX's own ring between them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from mlxpref.training.run import resume_run
from mlxpref.training.run_record import read_record
from tests.data_layouts import make_layout

ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
WORKER = Path(__file__).with_name("distributed_worker.py")
SECONDS = 300
"""How long processes may take on a busy machine."""

STEPS: list[dict[str, Any]] = [
    {"kl": 0.1, "updates_per_rollout": 2, "micro_batch": 2, "reward": f"soft,{WORKER}:shortness=0.1"},
    {"reward": "brier", "loss_type": "grpo", "mask_truncated": True, "max_tokens": 48},
    {"reward": "hard", "loss_type": "dr_grpo", "comparisons": 2, "kl": 1.0, "max_tokens": 48},
    {"think": False, "comparisons": 1},
]
"""Settings of single steps; of three processes, some have no comparison in the last two."""
RUN: dict[str, Any] = {
    "steps": 4, "save_every": 2, "learning_rate": 5e-3, "warmup_steps": 1, "resample": 1,
    "held_out": 0.3, "held_out_limit": 3, "evaluate_every": 2, "patience": 2, "comparisons": 3,
}  # fmt: skip
FEW = ["--model", "demo", "--max-tokens", "16", "--json"]
EVAL = ["eval", "--data", "demo", "--limit", "5", *FEW]
RANK = ["rank", "--prompt", "a red circle", "--think-about", "all", "--pairs", "5", *FEW]


@contextmanager
def started(count: int, command: Sequence[str | Path], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A command as `count` processes that mlx.launch might have started; each writes to a file `err.RANK`.

    By hand, since mlx.launch itself keeps a core busy as long as it runs.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    (folder / "hosts.json").write_text(json.dumps(hosts) if count > 1 else "")
    processes = []
    for rank in range(count):
        variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
        with (folder / f"err.{rank}").open("wb") as err:
            processes.append(subprocess.Popen(command, env=ENVIRONMENT | variables, stdout=err, stderr=err))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def two_free_ports() -> int:
    """The first of two free ports that follow each other."""
    while True:
        with socket.socket() as first, socket.socket() as second, suppress(OSError, OverflowError):
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            second.bind(("127.0.0.1", port + 1))
            return port


def output_of(folder: Path, rank: int) -> list[str]:
    """What a process wrote, without the lines of MLX's ring."""
    return [line for line in (folder / f"err.{rank}").read_text().splitlines() if not line.startswith("[ring]")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    looks = [("red", "clean"), ("orange", "clean"), ("green", "noisy"), ("red", "blurry"), ("purple", "clean")]
    for number, (colour, quality) in enumerate(looks):
        render(PictureSpec(colour, "green", "blue", "red", quality), np.random.default_rng(number)).save(
            folder / f"{number}.png"
        )
    return folder


def work(count: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Let `count` processes do jobs, one after the other."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with started(count, [sys.executable, WORKER, folder / "jobs.json"], folder) as processes:
        codes = [process.wait(timeout=SECONDS) for process in processes]
    assert codes == [0] * count, [output_of(folder, rank) for rank in range(count)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[int, Path]:
    """The folders of what one, two and three processes did."""
    folders = {count: tmp_path_factory.mktemp(f"of{count}") for count in (1, 2, 3)}
    for count, folder in folders.items():
        jobs = [{"do": "gradients", "changes": step, "out": f"{folder}/{i}.npz"} for i, step in enumerate(STEPS)]
        if count < 3:
            jobs += [{"do": "train", "folder": f"{folder}/run", "settings": RUN}]
            jobs += [{"do": "command", "arguments": [*EVAL, "--no-store"], "out": f"{folder}/eval.json"}]
            rank = [*RANK, str(pictures), "--store", f"{folder}/store.sqlite", "--html", f"{folder}/page.html"]
            jobs += [{"do": "command", "arguments": rank, "out": f"{folder}/rank.json"}]
            jobs += damaged_jobs(folder, list(range(count)), "all")
        if count == 2:
            jobs += damaged_jobs(folder, [1], "one")
            jobs += [{"do": "train", "folder": f"{folder}/part", "settings": RUN, "until": 3}]
            jobs += [{"do": "drift", "by": by, "out": f"{folder}/drift{by}.json"} for by in (1e-6, 0.1)]
        work(count, jobs, folder)
    return folders


def damaged_jobs(folder: Path, ranks: list[int], name: str) -> list[dict[str, Any]]:
    """A training and an evaluation on ImageRewardDB, of which some processes cannot read an image."""
    data = make_layout("imagereward", folder / name)
    (path,) = (data / "images/train").glob("train_2.zip")
    with zipfile.ZipFile(path) as archive:
        image = archive.namelist()[0]
    source = ["--data", "imagereward", "--data-dir", str(data), "--model", "demo", "--no-think"]
    train = ["train", *source, "--output", str(data / "run"), "--comparisons", "4", "--steps", "5", "--held-out", "0.3"]
    evaluate = ["eval", *source, "--split", "train", "--json", "--store", str(data / "store.sqlite")]
    commands = [(train, "train.txt"), (evaluate, "eval.json"), (evaluate, "again.json")]
    shared = {"do": "damaged", "name": image, "ranks": ranks}
    return [shared | {"arguments": arguments, "out": str(data / out)} for arguments, out in commands]


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


def test_shards() -> None:
    for count in range(12):
        for size in range(1, 6):
            shards = [ProcessGroup(rank, size).shard(count) for rank in range(size)]
            assert [number for shard in shards for number in shard] == list(range(count))
            assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_single_process() -> None:
    tree = {"a": np.ones(2)}
    assert SINGLE_PROCESS.all_sum(tree) is tree
    assert SINGLE_PROCESS.all_gather(tree) == [tree]
    assert SINGLE_PROCESS.broadcast(3) == 3
    assert SINGLE_PROCESS.all_sum_numbers(1.5, 2.0) == [1.5, 2.0]
    assert SINGLE_PROCESS.sent_bytes == 0
    assert process_group() is SINGLE_PROCESS


def test_exchanges(tmp_path: Path) -> None:
    """Three processes get the same from every exchange; then one dies, and its peers know."""
    count = 3
    work(count, [{"do": "exchange", "out": f"{tmp_path}/out"}, {"do": "lose", "out": f"{tmp_path}/lost"}], tmp_path)
    results = json.loads((tmp_path / "out").read_text())
    assert len(results) == count
    for each in results:
        assert each["sum"] == [[6.0, 12.0], [[3.0] * 3] * 2, "mlx.core.bfloat16"]
        x, n, h = (each["arrays"][name] for name in ("x", "n", "h"))
        assert x == ["array([1.5, nan], dtype=float32)", "mlx.core.float32"]
        assert n == ["array(7, dtype=uint64)", "mlx.core.uint64"]
        assert h[1] == "mlx.core.bfloat16"
        assert each["values"] == [[rank, 0.1, "\ud800é", None] for rank in range(count)]
        assert each["numbers"] == pytest.approx([count * 0.1, 3.0])
        assert (each["main"], each["sent"]) == ({"of": 0}, True)
    assert "another of the 3 processes has ended" in json.loads((tmp_path / "lost").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(STEPS)))
@pytest.mark.parametrize("count", [2, 3])
def test_gradients(count: int, number: int, done: dict[int, Path]) -> None:
    one, several = (dict(np.load(done[n] / f"{number}.npz")) for n in (1, count))
    assert one.pop("texts").tolist() == several.pop("texts").tolist()
    np.testing.assert_allclose(several.pop("measured"), one.pop("measured"), rtol=1e-3, atol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in one.values())
    assert largest > 1e-4
    for name, gradient in one.items():
        np.testing.assert_allclose(several[name], gradient, rtol=0, atol=1e-4 * max(largest, 0.1))


@pytest.mark.slow
def test_run(done: dict[int, Path]) -> None:
    one, two = log_of(done[1] / "run"), log_of(done[2] / "run")
    assert close(one, two), (one, two)
    assert [line["step"] for line in one] == [0, 1, 2, 3, 4]  # 0 is the measurement before training
    assert [line["held_out"] is not None for line in one] == [True, False, True, False, True]
    assert all(line["sent_bytes"] == 0 for line in one[1:])
    assert all(line["sent_bytes"] > 0 for line in two[1:])
    texts = [(done[n] / "run" / "rollouts.jsonl").read_text().splitlines() for n in (1, 2)]
    assert close(*([json.loads(line) for line in part] for part in texts))
    assert read_record(done[2] / "run")["machine"]["processes"] == 2
    assert (done[2] / "run" / "report.html").is_file()


@pytest.mark.slow
def test_resume_with_another_number_of_processes(done: dict[int, Path]) -> None:
    run = resume_run(done[2] / "part", {})
    assert run
    assert run.done == 3
    for _ in run.reports():
        pass
    assert close(log_of(done[1] / "run"), log_of(done[2] / "part"))
    (resumed,) = read_record(done[2] / "part")["resumed"]
    assert (resumed["after_step"], resumed["changed"]["processes"]) == (3, [2, 1])


@pytest.mark.slow
def test_adapters_stay_equal(done: dict[int, Path]) -> None:
    """A difference of rounding is removed; a larger one is an error."""
    main_sum, other_sum = json.loads((done[2] / "drift1e-06.json").read_text())
    assert main_sum == other_sum
    assert float(main_sum)
    errors = json.loads((done[2] / "drift0.1.json").read_text())
    assert errors[0] == errors[1]
    assert "step 1: process 1 has another adapter than process 0" in errors[0]


@pytest.mark.slow
def test_eval(done: dict[int, Path]) -> None:
    one, two = (json.loads((done[n] / "eval.json").read_text()) for n in (1, 2))
    assert one["pairs"] == 5
    assert close(one, two)


@pytest.mark.slow
def test_processes_agree_on_what_is_left_out(done: dict[int, Path]) -> None:
    one, two = (log_of(done[count] / "all/run") for count in (1, 2))
    assert close(one, two)
    assert all(line["groups"] == 4 for line in one if line["step"])
    one, two = (json.loads((done[count] / "all/eval.json").read_text())["results"][0] for count in (1, 2))
    assert close(one | {"left_out": 0}, two | {"left_out": 0})
    assert [each["left_out"]["images"] for each in (one, two)] == [1, 1]
    assert one["left_out"]["pairs"] == 3
    # A process that can read everything leaves out what another one cannot read.
    alone, again = (json.loads((done[2] / f"one/{name}.json").read_text())["results"][0] for name in ("eval", "again"))
    assert log_of(done[2] / "one/run")[-1]["step"] == 5
    assert 17 <= alone["pairs"] <= again["pairs"] <= 20


@pytest.mark.slow
def test_rank_and_its_store(done: dict[int, Path], pictures: Path) -> None:
    one, two = (json.loads((done[n] / "rank.json").read_text()) for n in (1, 2))
    assert len(one["images"]) == 5
    assert close(one, two)
    assert (done[2] / "page.html").is_file()
    again = CliRunner().invoke(main, [*RANK, str(pictures), "--store", str(done[2] / "store.sqlite")])
    assert again.exit_code == 0
    recalled = json.loads(again.stdout)
    assert (recalled["tokens"], recalled["vision_runs"]) == (0, 0)
    assert close(two["images"], recalled["images"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["demo"], "mlxpref demo is the work of one process; run it without mlx.launch"),
        (["eval", "--data", "nowhere.jsonl", "--model", "demo"], "--data nowhere.jsonl: no such file or folder"),
    ],
)
def test_errors_name_their_process(arguments: list[str], line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mlxpref.cli import main; main(prog_name='mlxpref')", *arguments]
    with started(2, command, tmp_path) as processes:
        assert [process.wait(timeout=SECONDS) for process in processes] == [1, 1]
    (main_error,), (other_error,) = (output_of(tmp_path, rank) for rank in (0, 1))
    assert main_error.startswith("Error: ")
    assert line in main_error
    assert other_error.startswith(f"Error: process 1 of 2 (on {socket.gethostname()}): ")
    assert line in other_error


@pytest.mark.slow
def test_killed_process_ends_all(tmp_path: Path) -> None:
    """The run goes on from the last step that was saved."""
    run, out = tmp_path / "run", tmp_path / "out"
    train = ["train", "--data", "demo", "--limit", "24", "--model", "demo", "--no-think", "--comparisons", "4"]
    train += ["--save-every", "2", "--steps", "5000", "--output", str(run)]
    jobs = [{"do": "pid", "folder": str(tmp_path)}, {"do": "command", "arguments": train, "out": os.devnull}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    port = two_free_ports()
    command = [
        Path(sys.executable).with_name("mlx.launch"),
        "-n",
        "2",
        "--backend",
        "ring",
        "--starting-port",
        str(port),
    ]
    command += ["--python", sys.executable, "--", WORKER, tmp_path / "jobs.json"]
    pipe = subprocess.PIPE
    with (
        out.open("wb") as file,
        subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=file, stderr=file) as launched,
    ):
        try:
            deadline = time.monotonic() + SECONDS
            while not ((run / "log.jsonl").is_file() and (run / "log.jsonl").read_bytes().count(b"\n") >= 3):
                assert launched.poll() is None, out.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
            launched.wait(timeout=SECONDS)
        finally:
            launched.kill()
    assert "Node with rank 1 exited with code -9" in out.read_text()
    assert f"mlxpref train --resume --output {run}" in out.read_text()
    resumed = resume_run(run, {"save_every": 1})
    assert resumed
    done, reports = resumed.done, resumed.reports()
    assert done >= len(log_of(run)) - 2
    assert next(reports).step == done + 1
    reports.close()
