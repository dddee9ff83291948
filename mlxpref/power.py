"""A Mac during a long run: kept awake, warned about on battery, its memory wired; and whether a run became slower.

Nothing here acts on another system. All that is asked of a Mac goes through `System`, so that a test can stand in.
"""

import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar

from mlxpref.log import logger

__all__ = ["SWITCH", "Process", "Speed", "System", "keep_awake", "on_battery", "slowdown", "this_system", "watched"]

R = TypeVar("R", bound="Speed")

SWITCH = "MLXPREF_LONG_RUNS"
"""The environment variable that leaves the system alone where it is `off`."""
_CAFFEINATE, _PMSET = "/usr/bin/caffeinate", "/usr/bin/pmset"
_PATIENCE = 5.0
"""Seconds that a tool of the system may take to answer."""
_WIRES = (15,)
"""The macOS since which memory can be wired."""
_SETTLING, _WINDOW = 2, 10
"""Steps that warm up, and steps of which medians are compared."""
_SLOW, _ALIKE = 0.7, 0.8
"""The share of its early speed below which a run is slow, and of its early tokens down to which steps are alike."""


class Process(Protocol):
    """A process that was started."""

    def terminate(self) -> None:
        """End it."""

    def wait(self, timeout: float) -> int:
        """Wait for its end."""


class Speed(Protocol):
    """What a step reports of its completions."""

    @property
    def tokens(self) -> int:
        """How many tokens were written."""

    @property
    def tokens_per_second(self) -> float:
        """How fast they were."""


@dataclass(frozen=True)
class System:
    """What a long run asks of the operating system; `version` is that of macOS, as (14, 5).

    `run` gives what a command prints, `start` leaves it running; OSError or SubprocessError where that fails. `wire`
    sets how many bytes MLX keeps in memory and gives what it was before, `wireable` how many the device recommends.
    """

    name: str
    version: tuple[int, ...]
    run: Callable[[Sequence[str]], str]
    start: Callable[[Sequence[str]], Process]
    wireable: Callable[[], int | None]
    wire: Callable[[int], int]


def this_system() -> System:
    """The system that this process runs on."""
    numbers = platform.mac_ver()[0].split(".")
    version = tuple(int(number) for number in numbers if number.isdigit())
    return System(platform.system(), version, _run, _start, _wireable, _wire)


@contextmanager
def keep_awake(system: System | None = None) -> Iterator[None]:
    """On a Mac, keep it awake and what MLX holds in memory while something long runs; elsewhere do nothing.

    The display may sleep. A warning says that a Mac is on battery. Whatever the system refuses is done without.
    """
    system = system or this_system()
    if system.name != "Darwin" or os.environ.get(SWITCH, "").strip().lower() == "off":
        yield
        return
    if on_battery(system):
        logger.warning(
            "on battery: macOS slows its GPU down, and the run ends when the battery is empty; plug the charger in"
        )
    with ExitStack() as stack:
        stack.enter_context(_awake(system))
        stack.enter_context(_wired(system))
        yield


def on_battery(system: System) -> bool:
    """Whether a Mac runs on its battery; not where it does not say."""
    try:
        return "Battery Power" in system.run([_PMSET, "-g", "batt"])
    except (OSError, subprocess.SubprocessError):
        return False


def slowdown(speeds: Sequence[float], tokens: Sequence[float]) -> tuple[float, float] | None:
    """Tokens a second of the early and of the latest steps, where these became much slower; else None.

    Both sequences are by step. A step that writes fewer tokens is slower a token on a cool machine, too: where the
    latest steps do, nothing is said.
    """
    steps = [(speed, count) for speed, count in zip(speeds, tokens, strict=True) if speed > 0 and count > 0]
    early, late = steps[_SETTLING : _SETTLING + _WINDOW], steps[-_WINDOW:]
    if len(steps) < _SETTLING + 2 * _WINDOW:
        return None
    (fast, many), (slow, few) = (tuple(map(median, zip(*part, strict=True))) for part in (early, late))
    return (fast, slow) if slow < _SLOW * fast and few >= _ALIKE * many else None


def watched(reports: Iterable[R]) -> Iterator[R]:
    """Pass on the reports of steps, and say so, once, when a run has become much slower."""
    speeds: list[float] = []
    tokens: list[float] = []
    said = False
    for report in reports:
        speeds.append(report.tokens_per_second)
        tokens.append(report.tokens)
        if not said and (found := slowdown(speeds, tokens)):
            logger.warning(
                f"{found[1]:.0f} tokens/s, {found[0]:.0f} at first: the machine is hot, on battery, short of memory or "
                "shared; the result is the same"
            )
            said = True
        yield report


@contextmanager
def _awake(system: System) -> Iterator[None]:
    """Keep a Mac from sleeping by itself; should this process be killed, the tool sees that and ends, too.

    Not its display: macOS 26 is known to end GPU work that goes on while it draws (ml-explore/mlx issue 3267).
    """
    process = None
    with suppress(OSError, subprocess.SubprocessError):
        process = system.start([_CAFFEINATE, "-i", "-w", str(os.getpid())])
    try:
        yield
    finally:
        if process is not None:
            with suppress(OSError, subprocess.SubprocessError):
                process.terminate()
                process.wait(_PATIENCE)


@contextmanager
def _wired(system: System) -> Iterator[None]:
    """Let MLX keep what the device recommends in memory, where macOS can do that, and as it was afterwards."""
    before = None
    with suppress(ValueError, RuntimeError):
        if system.version >= _WIRES and (limit := system.wireable()):
            before = system.wire(limit)
    try:
        yield
    finally:
        if before is not None:
            with suppress(ValueError, RuntimeError):
                system.wire(before)


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout


def _start(command: Sequence[str]) -> Process:
    """In a session of its own, so that the terminal's Ctrl-C is for this process alone, which still saves its work."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def _wireable() -> int | None:
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    found = mx.device_info().get("max_recommended_working_set_size")
    return int(found) if found else None


def _wire(limit: int) -> int:
    import mlx.core as mx

    mx.synchronize()  # the limit must not change under work that is on its way
    return int(mx.set_wired_limit(limit))
