"""Long runs: what is done on a Mac and undone after it, by a system that is not there, and nothing anywhere else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mlxpref import power as long_runs
from mlxpref.power import SWITCH, System, keep_awake, on_battery, slowdown, this_system, watched
from tests.cli.test_commands import run
from tests.conftest import picture
from tests.messages import messages

GB = 10**9
MAINS = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=123)\t85%; charged; 0:00 remaining present: true\n"
BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=123)\t19%; discharging; 1:02 remaining\n"
DESKTOP = "Now drawing from 'AC Power'\n"


@dataclass
class Mac:
    """A Mac that is not there: what was started, ended and wired on it, in order."""

    version: tuple[int, ...] = (15, 3)
    power: str | Exception = MAINS
    tools: bool = True
    recommended: int | None = 12 * GB
    refuses: Exception | None = None
    wired: int = 0
    did: list[str] = field(default_factory=list)

    @property
    def system(self) -> System:
        return System("Darwin", self.version, self.run, self.start, lambda: self.recommended, self.wire)

    def run(self, command: Sequence[str]) -> str:
        assert list(command) == ["/usr/bin/pmset", "-g", "batt"]
        if isinstance(self.power, Exception):
            raise self.power
        return self.power

    def start(self, command: Sequence[str]) -> "Mac":
        if not self.tools:
            raise FileNotFoundError(command[0])
        self.did.append(" ".join(command))
        return self

    def wire(self, limit: int) -> int:
        if self.refuses:
            raise self.refuses
        self.did.append(f"wired {limit // GB}")
        before, self.wired = self.wired, limit
        return before

    def terminate(self) -> None:
        self.did.append("ended")

    def wait(self, timeout: float) -> int:
        self.did.append("waited")
        return -15


AWAKE = f"/usr/bin/caffeinate -i -w {os.getpid()}"
"""It ends by itself after a kill -9 of this process, which undoes nothing."""


def done_on(mac: Mac) -> tuple[list[str], list[str], list[str]]:
    """What a run does on a Mac before its work and after it, and what it says."""
    with messages() as said, keep_awake(mac.system):
        before = list(mac.did)
    return before, mac.did[len(before) :], said


def test_a_mac_is_kept_awake_with_its_memory_wired_for_as_long_as_the_run() -> None:
    assert done_on(mac := Mac(wired=3 * GB)) == ([AWAKE, "wired 12"], ["wired 3", "ended", "waited"], [])
    assert mac.wired == 3 * GB


def test_all_is_undone_where_the_run_fails() -> None:
    mac = Mac()
    with pytest.raises(KeyboardInterrupt), keep_awake(mac.system):
        raise KeyboardInterrupt
    assert mac.did[2:] == ["wired 0", "ended", "waited"]


def test_a_battery_is_warned_about() -> None:
    *_, said = done_on(Mac(power=BATTERY))
    assert len(said) == 1
    assert said[0].startswith("on battery")
    assert done_on(Mac(power=DESKTOP))[2] == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError("pmset"), PermissionError("pmset"), subprocess.TimeoutExpired("pmset", 5)]
)
def test_a_mac_that_does_not_say_its_power_is_not_on_battery(error: Exception) -> None:
    assert not on_battery(Mac(power=error).system)
    assert done_on(Mac(power=error))[2] == []


def test_without_its_tools_a_mac_is_wired_all_the_same() -> None:
    assert done_on(Mac(tools=False))[:2] == (["wired 12"], ["wired 0"])


@pytest.mark.parametrize("version", [(14, 7), (13,), ()])
def test_an_older_mac_is_not_wired(version: tuple[int, ...]) -> None:
    assert done_on(Mac(version=version))[:2] == ([AWAKE], ["ended", "waited"])


@pytest.mark.parametrize("version", [(15,), (26, 1)])
def test_every_newer_mac_is_wired(version: tuple[int, ...]) -> None:
    assert "wired 12" in done_on(Mac(version=version))[0]


@pytest.mark.parametrize(
    "mac",
    [Mac(recommended=None), Mac(recommended=0), Mac(refuses=ValueError("too large")), Mac(refuses=RuntimeError("VM"))],
)
def test_a_device_that_cannot_be_wired_is_done_without(mac: Mac) -> None:
    assert done_on(mac)[:2] == ([AWAKE], ["ended", "waited"])


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert done_on(Mac(power=BATTERY)) == ([], [], [])
    monkeypatch.setenv(SWITCH, "")
    assert done_on(Mac())[0] == [AWAKE, "wired 12"]


def test_nothing_is_done_elsewhere() -> None:
    mac = Mac(power=BATTERY)
    for name in ("Linux", "Windows", ""):
        with messages() as said, keep_awake(replace(mac.system, name=name)):
            pass
        assert (mac.did, said) == ([], []), name


@pytest.mark.skipif(sys.platform != "linux", reason="it is about Linux")
def test_nothing_is_started_or_set_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real system, as commands use it."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("not on Linux")

    for name in ("_run", "_start", "_wire", "_wireable"):
        monkeypatch.setattr(long_runs, name, forbidden)
    assert this_system().name == "Linux"
    with keep_awake():
        pass


def test_a_tool_is_started_apart_from_the_terminals_interrupts_and_ended() -> None:
    """What is started is real here: a process that would outlive its second."""
    process = long_runs._start([sys.executable, "-c", "import time; time.sleep(60)"])
    assert isinstance(process, subprocess.Popen)
    assert os.getsid(process.pid) != os.getsid(0)
    system = replace(Mac().system, start=lambda command: process)
    with keep_awake(system):
        assert process.poll() is None
    assert process.poll() == -signal.SIGTERM
    assert long_runs._run([sys.executable, "-c", "print('Battery Power')"]) == "Battery Power\n"
    with pytest.raises(subprocess.CalledProcessError):
        long_runs._run([sys.executable, "-c", "raise SystemExit(1)"])


@pytest.mark.parametrize("command", ["train", "rank", "eval", "calibrate"])
def test_long_commands_do_it(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mac = Mac(power=BATTERY)
    pictures = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(pictures):
        picture(number).save(path)
    monkeypatch.setattr(long_runs, "this_system", lambda: mac.system)
    few = ("--data", "demo", "--limit", "4", "--model", "demo")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "train": (*few, "--steps", "1", "--comparisons", "2", "--no-think", "--output", tmp_path / "run"),
        "rank": (*pictures, "--prompt", "a red circle", "--model", "demo", "--think", "none"),
        "eval": (*few, "--no-think"),
        "calibrate": ("--data", "demo", "--limit", "40", "--model", "demo", "--no-think"),
    }
    result = run(command, *arguments[command])
    assert result.exit_code == 0, result.output
    assert mac.did == [AWAKE, "wired 12", "wired 0", "ended", "waited"]
    assert result.stderr.count("on battery: ") == 1


def steps(*parts: tuple[int, float, float]) -> tuple[list[float], list[float]]:
    """Columns of a log: so many steps at a speed with so many tokens each."""
    columns = [(speed, tokens) for count, speed, tokens in parts for _ in range(count)]
    return [speed for speed, _ in columns], [tokens for _, tokens in columns]


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([(30, 100, 500)], None),
        ([(20, 100, 500), (10, 60, 500)], (100, 60)),
        ([(20, 100, 500), (10, 75, 500)], None),  # not by much
        ([(20, 100, 500), (4, 60, 500)], None),  # not for long
        ([(20, 100, 500), (10, 60, 300)], None),  # its completions became shorter
        ([(20, 100, 500), (10, 60, 900)], (100, 60)),
        ([(2, 900, 500), (30, 100, 500)], None),  # the first ones are not counted
        ([(15, 100, 500), (6, 60, 500)], None),  # too few to know
        ([(30, 60, 500), (10, 100, 500)], None),  # faster
        ([(20, 100, 500), (40, 0, 0)], None),  # nothing was written
        ([(20, 100, 500), (10, float("nan"), 500), (10, 50, 500)], (100, 50)),
        ([], None),
    ],
)
def test_a_run_that_became_slower_is_seen(
    parts: list[tuple[int, float, float]], found: tuple[float, float] | None
) -> None:
    assert slowdown(*steps(*parts)) == found


@dataclass
class Step:
    tokens: int
    tokens_per_second: float


def test_it_is_said_once_as_soon_as_it_is_seen() -> None:
    reports = [Step(500, 100.0)] * 15 + [Step(500, 40.0)] * 30
    passed = []
    with messages() as said:
        for report in watched(reports):
            passed.append(report)
            if len(passed) == 19:
                assert said == []
    assert passed == reports
    assert len(said) == 1
    assert said[0].startswith("40 tokens/s, 100 at first: ")


def test_tokens_a_second_are_in_the_log_and_in_the_lines_of_progress(tmp_path: Path) -> None:
    few = ("--data", "demo", "--limit", "8", "--model", "demo", "--steps", "1", "--comparisons", "2")
    result = run("train", *few, "--max-tokens", "8", "--output", tmp_path / "a")
    line = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[0])
    assert line["tokens"] > 0
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["rollout_seconds"])
    assert f", {line['tokens_per_second']:.0f} tokens/s, " in result.stderr
    silent = run("train", *few, "--no-think", "--output", tmp_path / "b")
    assert "training: step 1 of 1" in silent.stderr
    assert "tokens/s" not in silent.stderr
