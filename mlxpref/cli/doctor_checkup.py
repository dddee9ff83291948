"""A checkup: what a machine and its packages say of themselves, held against what mlxpref needs."""

import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlxpref.text import one_line

__all__ = [
    "CheckResult",
    "Machine",
    "State",
    "check_builds",
    "check_packages",
    "check_system",
    "safely",
    "this_machine",
]

State = Literal["ok", "note", "fails"]
"""Whether all is well, something is slow or missing that can be done without, or a command would fail."""

_LEAST_MACOS, _LEAST_PYTHON = (14,), (3, 11)
_SHOWN = ("mlxpref", "mlx", "mlx-lm", "mlx-vlm", "transformers", "huggingface-hub")
"""The packages whose versions are told where all is well; the others are checked, too."""
_PATIENCE = 5.0
"""Seconds that a tool of the system may take to answer."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found; `remedy` says in one line what to do where the state is not ok."""

    name: str
    found: str
    state: State = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """What is asked of the operating system and of the installed packages.

    `name` and `kind` as `platform.system()` and `sys.platform` call it, versions as tuples, `translated` whether this
    Python runs under Rosetta. `installed` are versions by name, `demands` the requirements that mlxpref itself states.
    """

    name: str
    kind: str
    architecture: str
    python: tuple[int, ...]
    macos: tuple[int, ...]
    translated: bool
    installed: Mapping[str, str]
    demands: Sequence[str]


def this_machine() -> Machine:
    """The machine that this process runs on."""
    name = platform.system()
    demands: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        demands = metadata.requires("mlxpref") or []
    return Machine(
        name,
        sys.platform,
        platform.machine(),
        sys.version_info[:3],
        _numbers(platform.mac_ver()[0]),
        name == "Darwin" and _is_translated(),
        _installed(),
        demands,
    )


def safely(name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """What a check finds; one that fails itself is a note, as it says nothing of what it was to look at."""
    try:
        return check()
    except Exception as error:  # a checkup that ends in a traceback helps nobody
        return CheckResult(name, f"could not be checked: {one_line(error)}", "note", "please report this")


def check_system(machine: Machine) -> CheckResult:
    """The operating system, the processor and Python."""
    python = ".".join(map(str, machine.python))
    system = f"macOS {'.'.join(map(str, machine.macos))}" if machine.name == "Darwin" else machine.name
    found = f"{system}, {machine.architecture}, Python {python}"
    if machine.python < _LEAST_PYTHON:
        return CheckResult("system", found, "fails", "install Python 3.11 or later, and mlxpref with it")
    if machine.name != "Darwin":
        return CheckResult("system", found)
    if machine.translated:
        remedy = "install a Python for arm64 (`uv python install 3.12` brings one), and mlxpref with it"
        return CheckResult("system", f"{found}, which runs under Rosetta", "fails", remedy)
    if machine.architecture != "arm64":
        return CheckResult("system", found, "fails", "MLX needs Apple silicon: use another Mac, or Linux")
    if machine.macos < _LEAST_MACOS:
        return CheckResult("system", found, "fails", "update macOS: MLX needs 14 or later")
    return CheckResult("system", found)


def check_packages(machine: Machine) -> CheckResult:
    """The versions of what mlxpref needs, against the ranges that its own metadata states."""
    if not machine.demands:
        remedy = "install it: `pip install .` in its folder"
        return CheckResult("packages", "mlxpref is not installed, so it is not known what it needs", "note", remedy)
    wrong, wanted = [], []
    for demand in map(Requirement, machine.demands):
        if demand.marker and not demand.marker.evaluate({"sys_platform": machine.kind, "extra": ""}):
            continue
        name, asked = canonicalize_name(demand.name), demand.specifier
        version = machine.installed.get(name)
        if version is None or not asked.contains(version, prereleases=True):
            wrong.append(f"{name} {version}, not {asked}" if version else f"{name} is missing")
            wanted.append(f'"{name}{asked}"')
    if wrong:
        return CheckResult("packages", "; ".join(wrong), "fails", f"pip install {' '.join(wanted)}")
    shown = (f"{name} {machine.installed[name]}" for name in _SHOWN if name in machine.installed)
    return CheckResult("packages", ", ".join(shown))


def check_builds(machine: Machine) -> CheckResult:
    """That there is one build of MLX, and that it belongs to the rest of it: builds install the same file."""
    builds = {name: v for name, v in machine.installed.items() if re.fullmatch(r"mlx-(cpu|metal|cuda[\w-]*)", name)}
    found = ", ".join(f"{name} {version}" for name, version in sorted(builds.items())) or "none"
    version = machine.installed.get("mlx")
    if not builds:
        least = "mlx" if machine.name == "Darwin" else "mlx[cpu]"
        return CheckResult("MLX build", found, "fails", f'pip install --force-reinstall "{least}"')
    if len(builds) > 1:
        kept = next((name for name in sorted(builds) if "cuda" in name), min(builds))
        extra = kept.removeprefix("mlx-").replace("-", "")
        remedy = f'pip uninstall --yes {" ".join(sorted(builds))} && pip install "mlx[{extra}]" (or "mlx[cpu]")'
        return CheckResult("MLX build", f"{found}: each overwrites the other's library", "fails", remedy)
    (name, built), *_ = builds.items()
    if built != version:
        remedy = f'pip install --force-reinstall "{name}=={version}"'
        return CheckResult("MLX build", f"{found}, but mlx {version}", "fails", remedy)
    return CheckResult("MLX build", found)


def _installed() -> dict[str, str]:
    """The versions of all packages by name; one whose own files are broken is passed over, and so is missing."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        with suppress(Exception):
            found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return found


def _is_translated() -> bool:
    """Whether macOS runs this process for another processor than its own."""
    try:
        asked = ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a Mac of Intel does not know the word
        return False
    return said.strip() == "1"


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
