"""The doctor: what it finds, what it advises, and that nothing makes it fail itself."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import constants

from mlxpref.checkpoints.first_use import judges_dir
from mlxpref.cli.doctor import CheckResult, check_builds, check_device, check_packages, installed_versions, safely
from mlxpref.demo import JUDGE
from tests.cli.test_commands import SCRIPT, run
from tests.hub_server import HubServer, serving, use_hub

GB = 10**9
DEFAULT = "CodeGoat24/UnifiedReward-Think-qwen3vl-8b"
KNOWN = (
    "; licence mit, profile unifiedreward-think, MMRB2, text to image: 66.0 for UnifiedReward-Think, of which size is "
    "not said; not tried here"
)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that answers, an empty cache, a device with room for a judge, and no judge that is named."""
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "M2", "max_recommended_working_set_size": 20 * GB})
    (tmp_path / "hub").mkdir()
    with serving({}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "hub")
        yield server


def run_doctor() -> tuple[int, dict[str, CheckResult]]:
    """The exit code of the command, and its results by name; of several judges, the last one."""
    result = run("doctor", "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {"ok", "findings"}
    assert answer["ok"] == (result.exit_code == 0) == all(each["state"] != "fails" for each in answer["findings"])
    return result.exit_code, {each["name"]: CheckResult(**each) for each in answer["findings"]}


def test_all_is_well(hub: HubServer) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) <= 24
    assert lines[-1] == "nothing would fail"
    for part in (hub.endpoint, "mlx 0.32", "M2, 20.0 GB for a model", DEFAULT, "hub cache", "mlxpref cache"):
        assert part in result.stdout, part


def test_json() -> None:
    code, results = run_doctor()
    assert code == 0
    assert {"system", "packages", "MLX build", "device", "default judge", "judge", "hub", "hub cache"} <= set(results)
    assert all(each.found for each in results.values())
    assert results["default judge"].found == (
        f"{DEFAULT}: to download (17.5 GB) and to convert to 4 bit (5.8 GB) at its first use{KNOWN}"
    )


def test_failures_come_first(monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", "./nowhere")
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:9/hub")
    result = run("doctor")
    assert result.exit_code == 1
    table, remedies = result.stdout.split("\n\n")
    assert "$MLXPREF_MODEL is ./nowhere, which does not exist" in table
    assert "http://127.0.0.1:9/hub is not reached" in table
    assert "secret" not in result.output
    first, second, *_, last = remedies.splitlines()
    assert first.startswith("fails: default judge: set MLXPREF_MODEL")
    assert second.startswith("note: ")
    assert last.startswith("1 of ")


def test_failing_check_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no\nluck")

    result = safely("it", broken)
    assert (result.name, result.state, result.found) == ("it", "note", "could not be checked: RuntimeError: no luck")
    monkeypatch.setattr(shutil, "disk_usage", broken)
    code, results = run_doctor()
    assert (code, results["hub cache"].state, results["mlxpref cache"].state) == (0, "note", "note")


def test_mlx_that_cannot_be_imported(tmp_path: Path) -> None:
    """In a process of its own: no traceback, and what needs MLX is left out."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: undefined symbol: sgemm_')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*SCRIPT, "doctor", "--json"], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    results = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert results["MLX"]["found"] == "cannot be used: ImportError: libmlx.so: undefined symbol: sgemm_"
    assert not {"device", "default judge", "judge"} & set(results)
    assert {"hub", "hub cache", "mlxpref cache"} <= set(results)


def test_installed_packages() -> None:
    versions = installed_versions()
    assert check_packages(versions).state == check_builds(versions).state == "ok"


@pytest.mark.parametrize(
    ("name", "version", "value"),
    [
        ("mlx-vlm", "0.6.15", "mlx-vlm 0.6.15, not <0.8,>=0.7.10"),
        ("mlx-vlm", "0.8.0", "mlx-vlm 0.8.0, not"),
        ("numpy", None, "numpy is missing"),
    ],
)
def test_wrong_packages_fail(name: str, version: str | None, value: str) -> None:
    versions = {key: each for key, each in (installed_versions() | {name: version}).items() if each}
    result = check_packages(versions)
    assert result.state == "fails"
    assert result.found.startswith(value)
    assert result.remedy.startswith(f'pip install "{name}')


@pytest.mark.parametrize(
    "builds", [{}, {"mlx-cpu": "0.31.0"}, {"mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.4"}], ids=["none", "old", "two"]
)
def test_mlx_needs_one_build_of_its_version(builds: dict[str, str]) -> None:
    result = check_builds({"mlx": "0.32.4", "mlx-lm": "1", **builds})
    assert result.state == "fails"
    assert all(name in result.found and name in result.remedy for name in builds)
    assert check_builds({"mlx": "0.32.4", "mlx-metal": "0.32.4"}).state == "ok"


@pytest.mark.parametrize(("metal", "backend"), [(True, "Metal"), (False, "CUDA")])
def test_devices(metal: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    on_cpu = check_device(12 * GB)
    assert (on_cpu.state, "use the NVIDIA GPU" in on_cpu.remedy) == ("note", True)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert check_device(12 * GB) == CheckResult(f"{backend}, M2, 12.0 GB for a model")


@pytest.mark.parametrize(
    ("model", "reached", "state", "value"),
    [
        ("demo", False, "ok", "coloured shapes only"),
        (str(JUDGE), False, "ok", str(JUDGE)),
        ("~nobody-here/x", True, "fails", "does not exist"),
        ("  ", True, "fails", "does not exist"),
        (str(Path(__file__).parent), True, "fails", "no judge that can be used"),
        ("owner/name", True, "ok", "owner/name: to download at its first use"),
        ("owner/name@v1", False, "fails", "not here and cannot be downloaded"),
        ("", False, "fails", f"{DEFAULT}, which is not here and cannot be downloaded{KNOWN}"),
    ],
)
def test_default_judge(model: str, reached: bool, state: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", model)
    if not reached:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, results = run_doctor()
    judge = results["default judge"]
    assert (judge.state, value in judge.found, code) == (state, True, int(state == "fails")), judge
    assert bool(judge.remedy) == (state == "fails")


def test_a_judge_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / f"models--{DEFAULT.replace('/', '--')}"
    shutil.copytree(JUDGE, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, results = run_doctor()
    assert code == 0
    found = f"{DEFAULT}: in the cache, to convert to 4 bit (5.8 GB)"
    assert results["default judge"].found == found + KNOWN
    folder = judges_dir() / f"{DEFAULT.replace('/', '--')}@{'0' * 40}-4bit"
    shutil.copytree(JUDGE, folder)
    shutil.rmtree(repository)
    code, results = run_doctor()
    assert code == 0
    assert results["default judge"].found == f"{DEFAULT}: converted, in {folder}{KNOWN}"


@pytest.mark.parametrize(("gigabytes", "state"), [(2, "fails"), (200, "ok")])
def test_which_judges_fit(gigabytes: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": gigabytes * GB})
    _, results = run_doctor()
    assert results["default judge"].state == state
    assert ("too large to judge" in results["judge"].found) == (state == "fails")


def test_training_may_take_a_smaller_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10 * GB})
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    found = run_doctor()[1]["default judge"].found
    assert found.startswith(f"{DEFAULT}: ")
    assert found.endswith("; train takes CodeGoat24/UnifiedReward-Think-qwen3vl-4b")


def test_the_token_stays_here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_hub(monkeypatch, hub.endpoint, tmp_path / "hub", token="hf_secret")
    result = run("doctor", "--json")
    assert "a token is set" in result.stdout
    assert "hf_secret" not in result.output
    assert [(request.method, request.authorization) for request in hub.requests] == [("HEAD", None)]


def test_a_hub_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=503))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    assert "is not reached (it answered 503)" in run_doctor()[1]["hub"].found


def test_offline_makes_no_request(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run_doctor()[1]["hub"].found.startswith("HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / "hub" / "blob"
    blob.write_bytes(bytes(3_000_000))
    (tmp_path / "hub" / "linked").symlink_to(blob)
    monkeypatch.setenv("MLXPREF_CACHE", str(blob / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=GB))
    code, results = run_doctor()
    assert (code, results["mlxpref cache"].state) == (1, "fails")
    assert results["hub cache"].found == f"{tmp_path / 'hub'}: 3.0 MB, 1.0 GB free"
    assert (results["hub cache"].state, results["hub cache"].remedy.startswith("make room")) == ("note", True)


def test_words_of_our_own_are_said() -> None:
    """The exact words of other judges may matter; the remedy names a file that is there."""
    result = run_doctor()[1]["profiles"]
    assert result.state == "note"
    assert "unifiedreward-think" in result.found
    assert "own words" in result.found
    path = Path(result.remedy.partition("(")[2].partition(")")[0])
    assert path.suffix == ".toml"
    assert path.is_file()
