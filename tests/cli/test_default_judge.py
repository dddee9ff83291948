"""The first use of the default judge, from a hub of one's own: said, downloaded, converted once; and each fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import mlxpref
from mlxpref.checkpoints import first_use
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import ADAPTER_CONFIG, RECORD
from mlxpref.checkpoints.first_use import converted_judge, judges_dir
from mlxpref.cli import main
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, picture, start_together
from tests.default_judge import ID, recommend, recommended
from tests.hub_server import Cut, HubServer, Repository, serving, use_hub

GB = 10**9
WEIGHTS = "model.safetensors"
FACTS = (
    "to be converted to 4 bit",
    "of disk until the download is deleted",
    "licence mit",
    "to judge",
    "not tried here",
)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    folder = tmp_path / "origin"
    shutil.copytree(GOLDEN / "qwen3_vl", folder, ignore=shutil.ignore_patterns("*.npz"))
    return Repository(folder, "model", "mit")


@pytest.fixture
def hub(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that serves the recommended judge; neither that nor its conversion is here."""
    recommend(monkeypatch)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    with serving({ID: repository}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "hub")
        yield server


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def rank(images: Path, *arguments: object) -> Result:
    return run("rank", images, "--prompt", "a hat", "--no-think", "--no-store", "--json", *arguments)


def ranked(images: Path, *arguments: object) -> dict[str, Any]:
    result = rank(images, *arguments)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer | {"stderr": result.stderr}


def refusal(result: Result) -> str:
    """The one line of a command that did nothing."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def no_conversion(*_: object) -> None:
    raise AssertionError("it is converted again")


def made() -> list[str]:
    """The converted judges, and whatever else lies beside them, but for locks."""
    return sorted(path.name for path in judges_dir().glob("*") if not path.name.endswith(".lock"))


def test_the_first_use_and_the_second(
    hub: HubServer, repository: Repository, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ranked(images, "--yes")
    assert first["model"] == f"{ID}@{repository.commit}"
    said = first["stderr"].splitlines()[0]
    assert said.startswith(f"first use of {ID} (")
    assert all(fact in said for fact in FACTS), said
    assert f"{tmp_path / 'hub'}" in first["stderr"]
    assert WEIGHTS in hub.downloaded()
    _, folder = converted_judge(ID) or ("", Path())
    assert folder.parent == judges_dir()
    assert Checkpoint(folder).config["quantization"]["bits"] == 4
    # Again: also where the download was deleted, and without a network.
    shutil.rmtree(tmp_path / "hub")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(first_use, "convert", no_conversion)
    second = ranked(images)
    assert second["model"] == first["model"]
    assert second["pairs"] == first["pairs"]
    assert hub.requests == []
    assert "first use" not in second["stderr"]


def test_the_same_folder_by_hand(hub: HubServer, images: Path, tmp_path: Path) -> None:
    ranked(images, "--yes")
    result = run("convert", ID, tmp_path / "by-hand", "--json")
    assert result.exit_code == 0, result.output
    _, folder = converted_judge(ID) or ("", Path())
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in (tmp_path / "by-hand").iterdir()}
    for name in names - {RECORD}:
        assert (folder / name).read_bytes() == (tmp_path / "by-hand" / name).read_bytes(), name
    ours, theirs = (json.loads((each / RECORD).read_text()) for each in (folder, tmp_path / "by-hand"))
    for name in ("source", "revision", "identity", "recipe", "dtype", "sha256"):
        assert ours[name] == theirs[name]
    assert ours["source"] == ID


def test_nobody_agrees(hub: HubServer, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(rank(images))
    assert all(fact in line for fact in (ID, "agree with --yes, or give --model MODEL", *FACTS)), line
    questions: list[str] = []
    monkeypatch.setattr("mlxpref.cli.judges.agree", lambda question: bool(questions.append(question)))
    refusal(rank(images))
    (question,) = questions
    assert question.startswith(f"No --model given: the recommended judge for this device is {ID} (")
    assert question.endswith("Download and convert it?")
    assert all(fact in question for fact in FACTS)
    with pytest.raises(ModelError, match="agree with --yes"):
        mlxpref.load()
    assert hub.downloaded() == []
    assert not judges_dir().exists()


def test_in_python(hub: HubServer, repository: Repository) -> None:
    judge = mlxpref.load(yes=True, think=False)
    assert judge.name == f"{ID}@{repository.commit}"
    assert mlxpref.load(think=False).name == judge.name


def test_a_user_who_names_it_gets_the_same(hub: HubServer, images: Path) -> None:
    named = ranked(images, "--model", ID)
    assert all(fact in named["stderr"] for fact in FACTS)
    assert ranked(images)["model"] == named["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion(
    error: Any, hub: HubServer, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves nothing but the download, which is not downloaded again."""

    def interrupt(folder: Path, *_: object) -> None:
        (folder / WEIGHTS).write_bytes(b"a part")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("mlxpref.conversion.convert.write_model", interrupt)
        result = rank(images, "--yes")
    assert result.exit_code == (130 if error is KeyboardInterrupt else 1)
    assert made() == []
    hub.requests.clear()
    line = refusal(rank(images))
    assert f"{ID} (downloaded, to be converted to 4 bit" in line
    folder = first_use.FirstUse.of(recommended(), None).folder
    killed = folder.with_name(f".{folder.name}.partial-1")
    killed.mkdir()
    (killed / WEIGHTS).write_bytes(b"of a process that was killed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ranked(images, "--yes")["model"].startswith(ID)
    assert hub.requests == []
    assert len(made()) == 1


def test_an_interrupted_download(hub: HubServer, repository: Repository, images: Path) -> None:
    repository.faults[WEIGHTS] = Cut(10_000, for_good=True)
    assert "answered 503; try again later" in rank(images, "--yes").stderr.splitlines()[-1]
    assert made() == []
    repository.faults.clear()
    hub.requests.clear()
    assert ranked(images, "--yes")
    assert hub.downloaded() == [WEIGHTS]


@pytest.mark.parametrize("for_download", [False, True])
def test_no_space(
    for_download: bool, hub: HubServer, repository: Repository, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For neither, or for the download alone; said before any of it."""
    size = sum(map(len, repository.files.values())) + 50_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=GB + for_download * size))
    line = rank(images, "--yes").stderr.splitlines()[-1]
    assert "must stay free, but only 1.0 GB are free; make room, or give other disks with HF_HOME and" in line
    assert hub.downloaded() == []


def test_disks_are_counted_each_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    free = {tmp_path: 3 * GB, other: 2 * GB}
    monkeypatch.setattr(first_use, "free_bytes", lambda path: next(free[p] for p in free if path.is_relative_to(p)))
    first_use.check_disks({tmp_path / "a": 2 * GB, other / "b": GB})
    first_use.check_disks({tmp_path / "a": GB, tmp_path / "c": GB, other / "b": 0})
    with pytest.raises(ModelError, match=r"a and .*c: 2\.5 GB are needed"):
        first_use.check_disks({tmp_path / "a": GB, tmp_path / "c": 3 * GB // 2, other / "b": 0})
    with pytest.raises(ModelError, match=r"b: 1\.5 GB are needed"):
        first_use.check_disks({tmp_path / "a": GB, other / "b": 3 * GB // 2})


def test_a_cache_that_cannot_be_written(hub: HubServer, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(images / "0.png"))
    assert "give another place with MLXPREF_CACHE" in rank(images, "--yes").stderr.splitlines()[-1]
    assert hub.downloaded() == []


def test_offline(hub: HubServer, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for arguments in ((), ("--yes",)):
        line = refusal(rank(images, *arguments))
        assert line.startswith(
            f"Error: {ID}: no such folder, not in the local cache, and it cannot be downloaded: HF_HUB"
        )
        assert "no --model was given, and this is the recommended judge: give --model MODEL" in line


def test_a_damaged_conversion_is_made_again(hub: HubServer, images: Path) -> None:
    ranked(images, "--yes")
    _, folder = converted_judge(ID) or ("", Path())
    (folder / "tokenizer.json").unlink()
    assert converted_judge(ID) is None
    hub.requests.clear()
    assert ranked(images, "--yes")["model"].startswith(ID)
    assert hub.downloaded() == []


# Adapters


TRAIN = ("--data", "demo", "--no-think", "--limit", "4", "--steps", "1", "--comparisons", "2", "--group", "2", "--json")


def train(output: Path, *arguments: object) -> Path:
    result = run("train", *TRAIN, "--output", output, "--yes", *arguments)
    assert result.exit_code == 0, result.output
    return output


def test_an_adapter_finds_its_judge_again(
    hub: HubServer, repository: Repository, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both caches are empty, and the hub has another version by now."""
    adapter = train(tmp_path / "run")
    name = f"{ID}@{repository.commit}"
    assert json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model"] == name
    assert json.loads((adapter / "run.json").read_text())["settings"]["model"] == name
    before = ranked(images, "--adapter", adapter)
    assert (before["model"], "which this model is not" in before["stderr"]) == (name, False)

    newer = tmp_path / "newer"
    shutil.copytree(repository.folder, newer)
    (newer / "generation_config.json").write_text('{"temperature": 0.5}')
    moved = Repository(newer, "model", "mit", branches={"earlier": repository})
    hub.repositories[ID] = moved
    shutil.rmtree(tmp_path / "hub")
    shutil.rmtree(judges_dir())
    line = refusal_after_notes(rank(images, "--adapter", adapter))
    assert f"{adapter}: its base cannot be had" in line
    assert "is not downloaded: agree with --yes" in line
    again = ranked(images, "--adapter", adapter, "--yes")
    assert (again["model"], again["pairs"]) == (name, before["pairs"])
    newest = ranked(images, "--model", f"{ID}@main")
    assert newest["model"] == f"{ID}@{moved.commit}"
    assert len(made()) == 2
    assert ranked(images, "--adapter", adapter)["model"] == name

    resumed = run("train", "--resume", "--output", adapter, "--steps", "2", "--json")
    assert resumed.exit_code == 0, resumed.output


def refusal_after_notes(result: Result) -> str:
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr.splitlines()[-1]


def test_an_adapter_fits_the_same_source_converted_elsewhere(hub: HubServer, images: Path, tmp_path: Path) -> None:
    adapter = train(tmp_path / "run")
    for bits in ("4", "8", "none"):
        folder = tmp_path / f"in{bits}"
        assert run("convert", ID, folder, "--bits", bits, "--no-fidelity").exit_code == 0
        answer = ranked(images, "--model", folder, "--adapter", adapter)
        assert answer["model"] == str(folder)
        assert "trained on" not in answer["stderr"]
    other = ("rank", images, "--prompt", "x", "--no-store", "--model", GOLDEN / "qwen2_vl", "--adapter", adapter)
    assert "which this model is not" in refusal_after_notes(run(*other))


# Processes


PROGRAM = """
import os, sys, time
from pathlib import Path
import pytest
from mlxpref.conversion import convert
from mlxpref.cli import main
from tests.default_judge import recommend

def stop(folder: Path, *_: object) -> None:
    (folder / "model.safetensors").write_bytes(b"a part")
    time.sleep(300)

recommend(pytest.MonkeyPatch())
if os.environ.get("STOPS"):
    convert.write_model = stop
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""


def started(hub: HubServer, tmp_path: Path, images: Path, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": root}
    command = [sys.executable, "-c", PROGRAM, "rank", str(images), "--prompt", "a hat", "--no-think", "--no-store"]
    # A suite that runs in the background ignores Ctrl-C, and so do its children.
    return subprocess.Popen(
        [*command, "--json", "--yes"], text=True, env=os.environ | own | environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_two_processes_convert_once(hub: HubServer, images: Path, tmp_path: Path) -> None:
    processes = [started(hub, tmp_path, images) for _ in range(2)]
    start_together(processes)
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert sorted(stderr.count("converting ") for _, stderr in ends) == [0, 1]
    assert len({json.dumps(json.loads(stdout)["pairs"]) for stdout, _ in ends}) == 1
    weights = [r for r in hub.requests if r.method == "GET" and r.path.endswith(WEIGHTS)]
    assert len(weights) == 1
    assert len(made()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_ends_while_another_waits(
    number: signal.Signals, hub: HubServer, images: Path, tmp_path: Path
) -> None:
    """The other one takes over."""
    first = started(hub, tmp_path, images, STOPS="1")
    start_together([first])
    deadline = time.monotonic() + 120
    while not list(judges_dir().glob(".*.partial-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = started(hub, tmp_path, images)
    start_together([second])
    assert second.stderr is not None
    lines = iter(second.stderr.readline, "")
    assert any("waiting for it" in line for line in lines)
    first.send_signal(number)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == (130 if number == signal.SIGINT else -9), stderr
    stdout, stderr = second.communicate(timeout=300)
    assert second.returncode == 0, stderr
    assert json.loads(stdout)["model"].startswith(ID)
    assert len(made()) == 1
