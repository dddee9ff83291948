"""The doctor: what it finds on machines that are not there, what it advises, and that nothing makes it fail itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from click.testing import Result
from huggingface_hub import constants

from mlxpref import power as long_runs
from mlxpref.checkpoints import resolve as models
from mlxpref.checkpoints.resolve import recommended_judges
from mlxpref.cli import doctor_checkup as checkup
from mlxpref.cli import doctor_device as device_checks
from mlxpref.cli import doctor_judges as judge_checks
from mlxpref.cli import doctor_places as place_checks
from mlxpref.cli import doctor_run as doctor
from mlxpref.cli.doctor_checkup import (
    CheckResult,
    Machine,
    check_builds,
    check_packages,
    check_system,
    safely,
    this_machine,
)
from mlxpref.cli.doctor_device import Device, check_arithmetic, check_blas, check_device, check_mlx, look_at_device
from mlxpref.cli.doctor_judges import check_default_judge, check_demo, check_judge
from mlxpref.cli.doctor_places import Hub, check_hub, check_hub_cache, check_own_cache, probe_hub
from mlxpref.demo import JUDGE
from tests.cli.test_commands import SCRIPT, run
from tests.conftest import GOLDEN
from tests.hub_server import TOKEN, HubServer, serving, use_hub
from tests.test_power import BATTERY, Mac

GB = 10**9
HERE = this_machine()
MAC = Machine(
    name="Darwin",
    kind="darwin",
    architecture="arm64",
    python=(3, 12, 4),
    macos=(15, 3),
    translated=False,
    installed={"mlxpref": "0.1.0", "mlx": "0.32.4", "mlx-metal": "0.32.4", "mlx-vlm": "0.7.10", "numpy": "2.1"},
    demands=["mlx<0.33,>=0.32.4; sys_platform == 'darwin'", "mlx[cpu]<9,>=8; sys_platform != 'darwin'",
             "mlx-vlm<0.8,>=0.7.10", "numpy>=2.0", 'torch>=2; extra == "torch"'],
)  # fmt: skip
REACHED = Hub("https://hub", reached=True)
APART = Hub("https://hub", reached=False, why="ConnectError")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


@pytest.fixture
def real_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A hub that answers, an empty cache, and no judge that is named."""
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    monkeypatch.setattr(models, "device_working_set", lambda: 12 * GB)
    monkeypatch.setattr(device_checks, "device_working_set", lambda: 12 * GB)
    with serving({}) as server:
        use_hub(monkeypatch, server.endpoint, cache)
        yield server


@pytest.fixture
def hub(real_hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The same, and the demo judge is not loaded each time."""
    monkeypatch.setattr(doctor, "check_demo", lambda: CheckResult("demo judge", "loads and judges rightly"))
    return real_hub


def examined(*arguments: str) -> tuple[Result, dict[str, CheckResult]]:
    """The command as JSON, its findings by name (of judges the last one)."""
    result = run("doctor", "--json", *arguments)
    told = json.loads(result.stdout)
    assert set(told) == {"ok", "findings"}
    assert told["ok"] == (result.exit_code == 0) == all(f["state"] != "fails" for f in told["findings"])
    return result, {f["name"]: CheckResult(**f) for f in told["findings"]}


def installed(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(doctor, "this_machine", lambda: machine)


# All of it


def test_where_all_is_well_it_says_so_on_one_screen(real_hub: HubServer) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 150
    assert lines[-1] == "nothing would fail"
    assert result.stderr == ""
    for part in (real_hub.endpoint, "GFLOP/s", "mlx 0.32", "default judge", "hub cache", "mlxpref cache", "demo judge"):
        assert part in result.stdout, part
    head, *table = lines[: lines.index("")]
    assert {line.split()[0] for line in table} <= {"ok", "note"}
    for column in ("checked", "found"):
        start = head.index(column)
        assert all(line[start - 1] == " " != line[start] for line in table), "the columns are aligned"


def test_json_says_the_same(hub: HubServer) -> None:
    result, found = examined()
    assert result.exit_code == 0
    assert {"system", "packages", "MLX build", "device", "arithmetic", "demo judge", "hub", "default judge"} <= set(
        found
    )
    assert all(finding.found for finding in found.values())
    assert all(finding.remedy for finding in found.values() if finding.state == "fails")
    assert found["default judge"].found.endswith("downloaded at its first use")


def test_what_would_fail_comes_first_and_is_an_exit_of_1(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", "./nowhere")
    monkeypatch.setattr(device_checks, "blas_in_use", lambda: {"blas_threads": None, "blas_kernels": None})
    result = run("doctor")
    assert result.exit_code == 1
    table, remedies = result.stdout.split("\n\n")
    assert "$MLXPREF_MODEL is ./nowhere, which does not exist" in table
    lines = remedies.splitlines()
    assert lines[0] == "fails: default judge: set MLXPREF_MODEL to a folder or a Hugging Face id, or unset it"
    if sys.platform == "linux":
        assert lines[1].startswith("note: BLAS: pip install")
    assert re.fullmatch(r"1 of \d+ checks failed", lines[-1])


def test_a_check_that_fails_itself_is_a_note() -> None:
    def broken() -> CheckResult:
        raise ZeroDivisionError("by\nzero")

    assert safely("it", broken) == CheckResult(
        "it", "could not be checked: ZeroDivisionError: by zero", "note", "please report this"
    )


def test_no_check_ends_the_others(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such luck")

    checks = [name for name in dir(doctor) if name.startswith(("check_", "look_")) and name != "check_mlx"]
    assert len(checks) >= 13
    for name in checks:
        with monkeypatch.context() as patch:
            patch.setattr(doctor, name, broken)
            systems = Mac().system, replace(Mac().system, name="Linux")
            found = [finding for system in systems for finding in doctor.examine(system=system)]
            assert any("no such luck" in finding.found for finding in found), name
            assert {"system", "hub cache", "mlxpref cache"} <= {finding.name for finding in found}


def test_the_help_imports_nothing_heavy() -> None:
    code = "import sys; from mlxpref.cli import main\ntry: main(['doctor', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('mlx.core', 'mlx_vlm', 'transformers', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Machines


def test_this_machine_is_as_it_must_be() -> None:
    for check in (check_system, check_packages, check_builds):
        assert check(HERE).state == "ok", check(HERE)
    assert "mlx-vlm" in check_packages(HERE).found


def test_a_mac_is_as_it_must_be() -> None:
    assert check_system(MAC) == CheckResult("system", "macOS 15.3, arm64, Python 3.12.4")
    assert check_packages(MAC).state == check_builds(MAC).state == "ok"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"architecture": "x86_64", "translated": True}, "install a Python for arm64"),
        ({"architecture": "x86_64"}, "MLX needs Apple silicon"),
        ({"macos": (13, 6)}, "update macOS: MLX needs 14 or later"),
        ({"python": (3, 10, 1)}, "install Python 3.11 or later"),
    ],
)
def test_a_mac_that_cannot_run_it_fails(changes: dict[str, Any], remedy: str) -> None:
    found = check_system(replace(MAC, **changes))
    assert found.state == "fails"
    assert found.remedy.startswith(remedy)


@pytest.mark.parametrize(("said", "translated"), [("1\n", True), ("0\n", False), (None, False)])
def test_rosetta_is_seen(said: str | None, translated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(command: list[str], **_: Any) -> Any:
        assert command == ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"]
        if said is None:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(checkup.subprocess, "run", asked)
    monkeypatch.setattr(checkup.platform, "system", lambda: "Darwin")
    assert this_machine().translated == translated


@pytest.mark.parametrize(
    ("versions", "found", "remedy"),
    [
        ({"mlx-vlm": "0.6.15"}, "mlx-vlm 0.6.15, not <0.8,>=0.7.10", 'pip install "mlx-vlm<0.8,>=0.7.10"'),
        ({"mlx-vlm": "0.8.0"}, "mlx-vlm 0.8.0, not", 'pip install "mlx-vlm'),
        ({"mlx": "0.33.0rc1"}, "mlx 0.33.0rc1, not <0.33,>=0.32.4", 'pip install "mlx<0.33,>=0.32.4"'),
        ({"numpy": None}, "numpy is missing", 'pip install "numpy>=2.0"'),
        ({"numpy": "1.26", "mlx": "0.31"}, "mlx 0.31, not <0.33,>=0.32.4; numpy 1.26, not >=2.0", "pip install"),
    ],
)
def test_versions_that_are_not_asked_for_fail(versions: dict[str, str | None], found: str, remedy: str) -> None:
    have = {name: v for name, v in {**MAC.installed, **versions}.items() if v is not None}
    finding = check_packages(replace(MAC, installed=have))
    assert finding.state == "fails"
    assert finding.found.startswith(found)
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize("version", ["0.7.10", "0.7.10.post1", "0.7.99", "0.7.10+local"])
def test_versions_within_the_range_do(version: str) -> None:
    assert check_packages(replace(MAC, installed={**MAC.installed, "mlx-vlm": version})).state == "ok"


def test_what_is_for_another_system_is_not_asked_for() -> None:
    assert check_packages(replace(MAC, kind="linux")).found.startswith("mlx 0.32.4, not <9,>=8")


def test_without_metadata_it_is_not_known_what_is_needed() -> None:
    found = check_packages(replace(MAC, demands=[]))
    assert (found.state, found.remedy) == ("note", "install it: `pip install .` in its folder")


def test_a_package_whose_files_are_broken_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("whole", "Name: Whole_One\nVersion: 1.2\n"), ("broken", "")):
        folder = tmp_path / f"{name}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert this_machine().installed["whole-one"] == "1.2"
    assert this_machine().installed["mlx"] == HERE.installed["mlx"]


def test_two_builds_of_mlx_fail() -> None:
    both = replace(HERE, installed={"mlx": "0.32.4", "mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.4"})
    found = check_builds(both)
    assert found.state == "fails"
    assert "each overwrites the other's library" in found.found
    assert found.remedy == 'pip uninstall --yes mlx-cpu mlx-cuda-13 && pip install "mlx[cuda13]" (or "mlx[cpu]")'


def test_a_build_of_another_version_or_none_fails() -> None:
    other = check_builds(replace(HERE, installed={"mlx": "0.32.4", "mlx-cpu": "0.31.0"}))
    assert (other.state, other.remedy) == ("fails", 'pip install --force-reinstall "mlx-cpu==0.32.4"')
    none = check_builds(replace(HERE, name="Linux", installed={"mlx": "0.32.4", "mlx-lm": "1", "mlx-audio": "1"}))
    assert (none.state, none.remedy) == ("fails", 'pip install --force-reinstall "mlx[cpu]"')


def test_a_machine_that_cannot_run_it_is_an_exit_of_1(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in (replace(MAC, translated=True), replace(MAC, macos=(13,))):
        installed(monkeypatch, machine)
        result, found = examined()
        assert result.exit_code == 1
        assert found["system"].remedy in run("doctor").stdout


@pytest.mark.usefixtures("hub")
def test_a_mac_says_where_its_power_comes_from() -> None:
    found = {finding.name: finding for finding in doctor.examine(MAC, Mac(power=BATTERY).system)}
    assert found["power"] == CheckResult("power", "on battery", "note", "plug the charger in before a long run")
    assert "power" not in {f.name for f in doctor.examine(HERE, replace(long_runs.this_system(), name="Linux"))}


# MLX and the device


def test_mlx_that_cannot_be_imported_is_found_and_said_in_one_line(tmp_path: Path) -> None:
    """A library that is broken, in a process of its own: no traceback, and nothing that rests on it is tried."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: undefined symbol: sgemm_')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([*SCRIPT, "doctor", "--json"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["MLX"]["found"] == "cannot be imported: ImportError: libmlx.so: undefined symbol: sgemm_"
    assert found["MLX"]["remedy"].startswith("pip install --force-reinstall mlx")
    assert not {"device", "arithmetic", "demo judge", "default judge", "judge"} & set(found)
    assert {"hub", "hub cache", "mlxpref cache"} <= set(found)


def test_the_device_is_the_one_that_mlx_uses() -> None:
    assert check_mlx().state == "ok"
    device = look_at_device()
    assert (device.backend == "CPU") == (mx.default_device().type == mx.DeviceType.cpu)
    assert device.memory is not None
    assert 0 < device.recommended < device.memory < 1 << 50


def test_metal_and_cuda_are_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        type = mx.DeviceType.gpu

    info = {"device_name": "Apple M2", "memory_size": 16 * GB, "max_recommended_working_set_size": 11 * GB}
    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    found = check_device(look_at_device())
    assert found == CheckResult("device", "Metal, Apple M2, 16.0 GB of memory, 11.0 GB for a model")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert look_at_device().backend == "CUDA"


def test_a_gpu_with_memory_of_its_own_is_planned_for_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "NVIDIA", "total_memory": 24 * GB})
    assert models.device_working_set() == 18 * GB
    device = look_at_device()
    assert (device.memory, device.recommended) == (24 * GB, 18 * GB)


@pytest.mark.parametrize(
    ("platform", "nvidia", "state", "remedy"),
    [
        ("linux", None, "ok", ""),
        (
            "linux",
            "/usr/bin/nvidia-smi",
            "note",
            'use the NVIDIA GPU: pip uninstall mlx-cpu && pip install "mlx[cuda13]"',
        ),
        ("darwin", None, "note", "Metal is not available"),
    ],
)
def test_a_cpu_is_slow_and_a_gpu_beside_it_is_seen(
    platform: str, nvidia: str | None, state: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_checks.sys, "platform", platform)
    monkeypatch.setattr(device_checks.shutil, "which", lambda name: nvidia)
    found = check_device(Device("CPU", "EPYC", 8 * GB, 6 * GB))
    assert found.state == state
    assert found.remedy.startswith(remedy)
    assert "slow on a CPU" in found.found


def test_a_device_that_computes_wrongly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_arithmetic()
    assert right.state == "ok"
    assert re.fullmatch(r"right, \d+ GFLOP/s in float32", right.found)
    whole = mx.array
    monkeypatch.setattr(mx, "array", lambda values, dtype: whole(np.asarray(values) + (np.asarray(values) == 9), dtype))
    assert check_arithmetic().state == "fails"


def test_the_slow_blas_is_a_note_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checks, "blas_in_use", lambda: {"blas_threads": None, "blas_kernels": None})
    found = check_blas()
    assert (found.state, "forty times slower" in found.found) == ("note", True)
    assert found.remedy.startswith("pip install --force-reinstall opencv-python")
    monkeypatch.setattr(device_checks, "blas_in_use", lambda: {"blas_threads": 2, "blas_kernels": "Zen"})
    assert check_blas() == CheckResult("BLAS", "OpenBLAS (Zen), 2 threads")


# Judges


def test_the_demo_judge_works_and_a_broken_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_demo().state == "ok"
    monkeypatch.setattr(models, "JUDGE", tmp_path / "nowhere")
    found = check_demo()
    assert found.state == "fails"
    assert "nowhere" in found.found


def test_which_judges_fit_goes_by_what_they_need(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    judge = recommended_judges()[0]
    said = {size: check_judge(judge, size * GB) for size in (8, 12, 20)}
    assert [found.state for found in said.values()] == ["note", "ok", "ok"]
    assert "too large to judge (11.0 GB), too large to train (14.7 GB)" in said[8].found
    assert "judges (11.0 GB), too large to train (14.7 GB)" in said[12].found
    assert "judges (11.0 GB), trains (14.7 GB), to download (5.8 GB)" in said[20].found
    monkeypatch.setattr(judge_checks, "cached_model", lambda hub_id: cache)
    assert check_judge(judge, 20 * GB).found.endswith("in the cache")


@pytest.mark.parametrize(
    ("named", "hub", "state", "found"),
    [
        ("demo", APART, "ok", "which knows coloured shapes only"),
        (str(JUDGE), APART, "ok", "to judge, "),
        ("./nowhere", REACHED, "fails", "does not exist"),
        ("~/nowhere", REACHED, "fails", "does not exist"),
        ("~nobody-here/x", REACHED, "fails", "does not exist"),
        ("  ", REACHED, "fails", "does not exist"),
        (str(GOLDEN), REACHED, "fails", "which is no judge"),
        ("owner/name", REACHED, "ok", "downloaded at its first use"),
        ("owner/name@v1", APART, "fails", "not here and cannot be downloaded"),
        ("", REACHED, "ok", "Qwen3-VL-8B-Instruct-4bit, downloaded at its first use"),
        ("", APART, "fails", "Qwen3-VL-8B-Instruct-4bit, which is not here and cannot be downloaded"),
    ],
)
def test_the_judge_that_commands_take_is_looked_for(
    named: str, hub: Hub, state: str, found: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("MLXPREF_MODEL", named)
    finding = check_default_judge(hub, 12 * GB)
    assert (finding.state, found in finding.found) == (state, True), finding
    assert bool(finding.remedy) == (state != "ok")


def test_a_judge_in_the_cache_needs_no_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(judge_checks, "cached_model", lambda hub_id, revision=None: cache)
    for named in ("", "owner/name"):
        monkeypatch.setenv("MLXPREF_MODEL", named)
        assert check_default_judge(APART, 12 * GB).state == "ok"
        assert judge_checks.bytes_to_download(12 * GB) == 0


def test_a_device_that_no_judge_fits_fails_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    assert "try --model demo" in check_default_judge(REACHED, 2 * GB).remedy
    assert judge_checks.bytes_to_download(2 * GB) == 0
    monkeypatch.setenv("MLXPREF_MODEL", str(GOLDEN / "qwen3_vl"))
    tight = check_default_judge(REACHED, 10)
    assert (tight.state, "smaller --rows" in tight.remedy) == ("note", True)


# Places


def test_a_hub_that_answers_is_asked_once_for_its_head_and_sees_no_token(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, hub.endpoint, cache, token=TOKEN)
    found = probe_hub()
    assert (found.reached, found.token) == (True, True)
    assert [(request.method, request.authorization) for request in hub.requests] == [("HEAD", None)]


def test_no_output_holds_the_token(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, hub.endpoint, cache, token=TOKEN)
    for arguments in ((), ("--json",)):
        result = run("doctor", *arguments)
        assert "a token is set" in result.stdout
        assert TOKEN not in result.output


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached_fails_only_where_a_judge_is_missing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", cache)
    result, found = examined()
    assert (result.exit_code, found["hub"].state, found["default judge"].state) == (1, "note", "fails")
    assert "http://127.0.0.1:9 is not reached (ConnectError)" in found["hub"].found
    assert "--model demo always works" in found["default judge"].remedy
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    result, found = examined()
    assert (result.exit_code, found["hub"].state) == (0, "note")
    assert "HTTPS_PROXY" in found["hub"].remedy


def test_a_password_in_the_endpoint_is_not_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://me:secret@127.0.0.1:9/hub", cache)
    assert probe_hub().endpoint == "http://127.0.0.1:9/hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "secret" not in probe_hub().endpoint


def test_a_hub_that_is_down_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        status_code = 503

    class Session:
        def head(self, url: str, timeout: float) -> Answer:
            assert timeout <= 5
            return Answer()

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert check_hub(probe_hub()).found.split("; ")[0].endswith("is not reached (it answered 503)")


def test_offline_nothing_is_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result, found = examined()
    assert hub.requests == []
    assert found["hub"].found.startswith("HF_HUB_OFFLINE is set")
    assert found["hub"].state == "ok"
    assert found["default judge"].remedy.startswith("unset HF_HUB_OFFLINE, or")
    assert result.exit_code == 1


def test_a_cache_says_where_it_is_and_how_large(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    (cache / "blobs").mkdir()
    (cache / "blobs" / "one").write_bytes(bytes(3_000_000))
    (cache / "snapshot").symlink_to(cache / "blobs")
    (cache / "linked").symlink_to(cache / "blobs" / "one")
    assert check_hub_cache().found.startswith(f"{cache}: 3.0 MB, ")
    monkeypatch.setattr(place_checks, "_LOOKING_SECONDS", -1.0)
    assert ": more than 0 bytes" in check_hub_cache().found
    monkeypatch.setenv("MLXPREF_CACHE", str(cache / "not" / "yet"))
    own = check_own_cache()
    assert (own.state, own.found.startswith(f"{cache / 'not' / 'yet'}: 0 bytes, ")) == ("ok", True)
    assert not (cache / "not").exists()


def test_a_cache_that_cannot_be_written_fails(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "file" / "cache"))
    result, found = examined()
    assert result.exit_code == 1
    assert found["mlxpref cache"].state == "fails"
    assert found["mlxpref cache"].remedy == "remove that file, or set MLXPREF_CACHE to another place"
    monkeypatch.setattr(place_checks.os, "access", lambda path, mode: False)
    cannot = check_hub_cache()
    assert (cannot.state, cannot.remedy) == ("fails", "make it your own, or set HF_HOME to another place")


@pytest.mark.parametrize(("free", "needed", "state"), [(50, 6, "ok"), (6, 6, "fails"), (6, 0, "ok"), (0.5, 0, "note")])
def test_a_disk_needs_room_for_what_is_to_be_downloaded(
    free: float, needed: int, state: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    usage: Callable[[Any], Any] = lambda path: type("Usage", (), {"free": int(free * GB)})  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert check_hub_cache(lambda: needed * GB).state == state


def test_a_full_disk_is_seen_before_the_recommended_judge_is_downloaded(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[[Any], Any] = lambda path: type("Usage", (), {"free": 3 * GB})  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    result, found = examined()
    assert (result.exit_code, found["hub cache"].state) == (1, "fails")
    assert "5.8 GB to download" in found["hub cache"].found
