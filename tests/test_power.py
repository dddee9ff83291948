"""Long runs: what is done on a Mac and undone after it, with tools that stand in for its own, and nothing elsewhere."""

import json
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlxpref.cli.train import warn_of_slowdown
from mlxpref.power import keep_awake, on_battery
from tests.cli.test_commands import run
from tests.messages import messages

GB = 10**9
MAINS = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=123)\t85%; charged; 0:00 remaining present: true\n"
BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=123)\t19%; discharging; 1:02 remaining\n"


class Mac:
    """A Mac that is not there: its tools in a folder, and MLX's wired limit."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.limits = folder, [3]
        self.tool("pmset", f'echo "{MAINS}"')
        self.tool("caffeinate", f"echo $$ $@ > {folder}/awake; exec sleep 600")
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GB})
        monkeypatch.setattr(mx, "set_wired_limit", self.wire)

    def tool(self, name: str, script: str) -> None:
        """Make an executable of the system."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def wire(self, limit: int) -> int:
        self.limits.append(limit)
        return self.limits[-2]

    def awake(self) -> list[str]:
        """The process of caffeinate and its arguments, once it has written them."""
        file = self.folder / "awake"
        until = time.monotonic() + 300
        while not (file.is_file() and file.read_text().endswith("\n")):
            assert time.monotonic() < until
            time.sleep(0.01)
        return file.read_text().split()


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mac:
    folder = tmp_path / "tools"
    folder.mkdir()
    return Mac(folder, monkeypatch)


def test_mac_stays_awake_with_wired_memory(mac: Mac) -> None:
    with messages() as lines, suppress(KeyboardInterrupt), keep_awake():
        process, *arguments = mac.awake()
        assert arguments == ["-i", "-w", str(os.getpid())]
        assert mac.limits == [3, 12 * GB]
        assert os.getsid(int(process)) != os.getsid(0)
        raise KeyboardInterrupt
    assert lines == []
    assert mac.limits == [3, 12 * GB, 3]
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_a_battery_is_warned_about(mac: Mac) -> None:
    assert not on_battery()
    mac.tool("pmset", f'echo "{BATTERY}"')
    with messages() as lines, keep_awake():
        pass
    assert len(lines) == 1
    assert lines[0].startswith("on battery")


def test_refusal_of_macos(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(limit: int) -> int:
        raise ValueError("too large")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    mac.tool("pmset", "exit 1")
    (mac.folder / "caffeinate").unlink()
    with messages() as lines, keep_awake():
        pass
    assert lines == []


@pytest.mark.parametrize(("system", "switch"), [("Linux", ""), ("Darwin", "off")])
def test_no_effect_elsewhere_or_when_off(system: str, switch: str, mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setenv("MLXPREF_LONG_RUNS", switch)
    mac.tool("pmset", f'echo "{BATTERY}"')
    with messages() as lines, keep_awake():
        pass
    assert (lines, mac.limits) == ([], [3])
    assert not (mac.folder / "awake").exists()


def test_train_stays_awake_and_logs_speed(mac: Mac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)  # else models would be built for it
    few = ("--data", "demo", "--limit", "8", "--model", "demo", "--steps", "1", "--comparisons", "2")
    result = run("train", *few, "--max-tokens", "8", "--output", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert mac.awake()
    line = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[0])
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["rollout_seconds"])
    assert f", {line['tokens_per_second']:.0f} tokens/s" in result.stderr


def steps(*parts: tuple[int, float, float]) -> Iterable[Any]:
    """Reports of a run: so many steps at a speed with so many tokens each."""
    return [SimpleNamespace(tokens_per_second=speed, tokens=tokens) for n, speed, tokens in parts for _ in range(n)]


@pytest.mark.parametrize(
    ("parts", "warnings"),
    [
        ([(30, 100, 500)], 0),
        ([(20, 100, 500), (30, 60, 500)], 1),
        ([(20, 100, 500), (10, 75, 500)], 0),  # not by much
        ([(20, 100, 500), (4, 60, 500)], 0),  # not for long
        ([(20, 100, 500), (10, 60, 300)], 0),  # its completions became shorter
        ([(2, 900, 500), (30, 100, 500)], 0),  # the first ones warm up
        ([(20, 100, 500), (40, 0, 0)], 0),  # nothing was written
    ],
)
def test_one_warning_for_a_slower_run(parts: list[tuple[int, float, float]], warnings: int) -> None:
    reports = list(steps(*parts))
    with messages() as lines:
        assert list(warn_of_slowdown(reports)) == reports
    assert len(lines) == warnings
    assert all(line.startswith("60 tokens/s, 100 at first: ") for line in lines)
