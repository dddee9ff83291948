"""`mlxpref doctor`: find what would fail or be slow on this machine, with remedies."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlxpref._blas import blas_in_use
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.download import cached_model
from mlxpref.checkpoints.first_use import converted_judge
from mlxpref.checkpoints.recommended import (
    RecommendedJudge,
    Work,
    choose_judge,
    device_working_set,
    recommended_judge,
    recommended_judges,
)
from mlxpref.checkpoints.resolve import is_hub_id
from mlxpref.cli.options import HelpCommand, json_option
from mlxpref.engine.profile import built_in_profiles
from mlxpref.errors import ModelError
from mlxpref.files import cache_dir, free_bytes
from mlxpref.power import on_battery
from mlxpref.text import format_bytes, one_line

_SHOWN = ("mlxpref", "mlx", "mlx-lm", "mlx-vlm", "transformers", "huggingface-hub")
"""The packages whose versions it shows; it checks all requirements of mlxpref."""
_WORKS: tuple[Work, ...] = ("judging", "training")
_LITTLE = 10**10  # free bytes; a judge of 8 billion parameters in 4 bits takes 6 GB


@dataclass(frozen=True)
class CheckResult:
    """The result of a check: ok, a note on something slow or missing, or a failure of some command.

    `remedy` says in one line what to do if the state is not ok.
    """

    found: str
    state: Literal["ok", "note", "fails"] = "ok"
    remedy: str = ""
    name: str = ""


@click.command(
    cls=HelpCommand,
    short_help="Find what would fail here, with remedies.",
    examples=("mlxpref doctor", "mlxpref doctor --json"),
)
@json_option
def doctor(as_json: bool) -> None:
    """Check this machine, its packages, MLX, judges, the hub and caches; exit 1 where a command would fail.

    A `note` names something slow, or missing but optional. It downloads and changes nothing, and asks the hub once
    whether it answers, unless HF_HUB_OFFLINE is set.
    """
    from mlxpref.cli.output import print_json, print_table, print_text

    results = examine()
    failing = [result for result in results if result.state == "fails"]
    if as_json:
        print_json({"ok": not failing, "findings": [asdict(result) for result in results]})
    else:
        print_table(("", "checked", "found"), [(result.state, result.name, result.found) for result in results])
        print_text("")
        for result in sorted(results, key=lambda result: result.state != "fails"):
            if result.remedy:
                print_text(f"{result.state}: {result.name}: {result.remedy}")
        print_text(f"{len(failing)} of {len(results)} checks failed" if failing else "nothing would fail")
    if failing:
        raise SystemExit(1)


def examine() -> list[CheckResult]:
    """The results of all checks; skips those that need MLX if it does not work."""
    from huggingface_hub import constants

    versions = installed_versions()
    results = [
        safely("system", check_system),
        safely("packages", check_packages, versions),
        safely("MLX build", check_builds, versions),
    ]
    hub = safely("hub", check_hub)
    try:
        working_set = device_working_set()
    except Exception as error:  # a library without its symbols, or for another machine
        remedy = "pip install --force-reinstall mlx, and mlx-cpu or mlx's CUDA package on Linux"
        results.append(CheckResult(f"cannot be used: {one_line(error)}", "fails", remedy, "MLX"))
    else:
        judges = [judge for judge in recommended_judges() if judge.judging_gb]
        results.append(safely("device", check_device, working_set))
        results.append(safely("default judge", check_default_judge, working_set, hub))
        results += [safely("judge", check_judge, judge, working_set) for judge in judges]
    results.append(safely("profiles", check_profiles))
    results += [hub, safely("hub cache", check_cache, "HF_HOME", lambda: Path(constants.HF_HUB_CACHE).expanduser())]
    return [*results, safely("mlxpref cache", check_cache, "MLXPREF_CACHE", cache_dir)]


def safely(name: str, check: Callable[..., CheckResult], *arguments: Any) -> CheckResult:
    """The result of a check; an error of the check itself is only a note."""
    try:
        return replace(check(*arguments), name=name)
    except Exception as error:
        return CheckResult(f"could not be checked: {one_line(error)}", "note", "please report this", name)


def check_system() -> CheckResult:
    """The operating system, the processor and Python. MLX has no wheels for systems that it does not run on."""
    macos = platform.mac_ver()[0]
    system = f"macOS {macos}" if macos else platform.system()
    value = f"{system}, {platform.machine()}, Python {platform.python_version()}"
    if on_battery():
        return CheckResult(f"{value}, on battery", "note", "plug the charger in before a long run")
    return CheckResult(value)


def installed_versions() -> dict[str, str]:
    """The versions of all packages by name; one with broken metadata counts as missing."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        with suppress(Exception):
            versions.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return versions


def check_packages(versions: Mapping[str, str]) -> CheckResult:
    """Compare the installed versions with the requirements in mlxpref's metadata."""
    errors, requirements = [], []
    for requirement in map(Requirement, metadata.requires("mlxpref") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, range_ = canonicalize_name(requirement.name), requirement.specifier
        version = versions.get(name)
        if version is None or not range_.contains(version, prereleases=True):
            errors.append(f"{name} {version}, not {range_}" if version else f"{name} is missing")
            requirements.append(f'"{name}{range_}"')
    if errors:
        return CheckResult("; ".join(errors), "fails", f"pip install {' '.join(requirements)}")
    return CheckResult(", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions))


def check_builds(versions: Mapping[str, str]) -> CheckResult:
    """Check for one build of MLX, of MLX's own version: all builds install the same library file."""
    builds = {name: version for name, version in versions.items() if re.fullmatch(r"mlx-(cpu|metal|cuda.*)", name)}
    value = ", ".join(f"{name} {version}" for name, version in sorted(builds.items())) or "none"
    if list(builds.values()) == [versions.get("mlx")]:
        return CheckResult(value)
    remedy = f"pip uninstall --yes mlx {' '.join(builds)} && pip install mlx (on Linux one of mlx[cpu] and mlx[cuda13])"
    return CheckResult(f"{value}; mlx {versions.get('mlx')} needs one, of its version", "fails", remedy)


def check_device(working_set: int) -> CheckResult:
    """MLX's device, and its memory for a model."""
    import mlx.core as mx

    info, on_gpu = mx.device_info(), mx.default_device().type == mx.DeviceType.gpu
    backend = ("Metal" if mx.metal.is_available() else "CUDA") if on_gpu else "CPU"
    value = f"{backend}, {info.get('device_name', 'unnamed')}, {format_bytes(working_set)} for a model"
    if on_gpu:
        return CheckResult(value)
    value += "; a real judge is slow on a CPU, and computes in float32"
    if platform.system() == "Darwin":
        remedy = "Metal is not available: do not run it in a virtual machine or a sandbox"
    elif shutil.which("nvidia-smi"):
        remedy = 'use the NVIDIA GPU: pip uninstall mlx-cpu && pip install "mlx[cuda13]"'
    elif blas_in_use()["blas_kernels"] is None:
        value += ", forty times slower with the BLAS of MLX's wheel"
        remedy = "pip install --force-reinstall opencv-python: its wheel brings a fast BLAS, which mlxpref opens"
    else:
        return CheckResult(value)
    return CheckResult(value, "note", remedy)


def check_default_judge(working_set: int, hub: CheckResult) -> CheckResult:
    """Check that the judge of a command without --model is here or can be downloaded."""
    model = os.environ.get("MLXPREF_MODEL", "")
    value, for_training = f"$MLXPREF_MODEL is {model}" if model else "none", ""
    try:
        if not model:
            model = value = choose_judge(working_set).id
            with suppress(ModelError):
                trained = choose_judge(working_set, "training").id
                for_training = f"; train takes {trained}" if trained != model else ""
        folder = Path(model)
        with suppress(RuntimeError):  # no such user
            folder = folder.expanduser()
        if folder.exists():
            from mlxpref.checkpoints.checks import check_folder  # imports MLX

            check_folder(Checkpoint.open(folder))
            return CheckResult(value)
    except ModelError as error:
        return CheckResult(f"{value}: no judge that can be used", "fails", str(error))
    if model == "demo":
        return CheckResult(f"{value}, which knows coloured shapes only")
    if not is_hub_id(model):
        remedy = "set MLXPREF_MODEL to a folder or a Hugging Face id, or unset it"
        return CheckResult(f"{value}, which does not exist", "fails", remedy)
    judge = recommended_judge(model.partition("@")[0])
    known = f"; licence {judge.licence}, profile {judge.profile}, {judge.known}{for_training}" if judge else ""
    place = _place(model, judge)
    if not place.startswith("to download"):
        return CheckResult(f"{value}: {place}{known}")
    if hub.state == "ok":
        return CheckResult(f"{value}: {place} at its first use{known}")
    remedy = "connect to the hub, or name a judge's folder with --model or MLXPREF_MODEL; --model demo always works"
    return CheckResult(f"{value}, which is not here and cannot be downloaded{known}", "fails", remedy)


def check_judge(judge: RecommendedJudge, working_set: int) -> CheckResult:
    """Check whether a recommended judge fits the device, for judging and for training."""
    judges, trains = (judge.needed(work) <= working_set for work in _WORKS)
    value = f"{judge.id}: {'judges' if judges else 'too large to judge'} ({format_bytes(judge.needed('judging'))}), "
    value += f"{'trains' if trains else 'too large to train'} ({format_bytes(judge.needed('training'))}), "
    value += f"{_place(judge.id, judge)}, MMRB2 {judge.published}"
    value += "" if judge.any_use else f", licence {judge.licence}, so never the default"
    return CheckResult(value, "ok" if judges else "note")


def _place(model: str, judge: RecommendedJudge | None) -> str:
    """Where a model of the hub is, or what has to be downloaded."""
    hub_id, _, revision = model.partition("@")
    converts = judge is not None and judge.is_converted
    if converts and (found := converted_judge(hub_id, revision or None)):
        return f"converted, in {found[1]}"
    conversion = f" to convert to 4 bit ({format_bytes(judge.kept)})" if judge and converts else ""
    if cached_model(hub_id, revision or None):
        return f"in the cache{',' if converts else ''}{conversion}"
    size = f" ({judge.download_gb:.1f} GB)" if judge else ""
    return f"to download{size}{' and' if converts else ''}{conversion}"


def check_profiles() -> CheckResult:
    """The built-in profiles; the words of some are not those that their judges were trained with."""
    profiles = built_in_profiles().values()
    ours = [profile for profile in profiles if profile.note]
    known, asked = (", ".join(profile.name for profile in each) for each in (profiles, ours))
    found = f"{known}; {asked}: their questions are in mlxpref's own words, and the exact ones may matter for accuracy"
    return CheckResult(found, "note", ours[0].place)


def check_hub() -> CheckResult:
    """Check whether models and data can be downloaded; it sends no token."""
    from huggingface_hub import constants, get_session, get_token

    token = "a token is set" if get_token() else "no token, which only gated models need"
    endpoint = re.sub(r"//[^/]*@", "//", constants.ENDPOINT)  # a mirror's may hold a password
    if constants.HF_HUB_OFFLINE:
        return CheckResult(f"HF_HUB_OFFLINE is set, so nothing is downloaded; {token}", "note", "unset it")
    try:
        status = get_session().head(constants.ENDPOINT, timeout=4.0).status_code
        problem = f"it answered {status}" if status >= 500 else ""
    except Exception as error:  # the hub's transport library raises its own errors, and changes between releases
        problem = type(error).__name__
    if problem:
        remedy = "to download, check the connection, HTTPS_PROXY and HF_ENDPOINT; what is here works without"
        return CheckResult(f"{endpoint} is not reached ({problem}); {token}", "note", remedy)
    return CheckResult(f"{endpoint} answers; {token}")


def check_cache(variable: str, folder_of: Callable[[], Path]) -> CheckResult:
    """Check whether a cache can be written, its size, and the free space on its disk."""
    folder = folder_of()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        remedy = f"make it a folder of your own, or set {variable} to another place"
        return CheckResult(f"{folder}: {existing} is no folder that can be written", "fails", remedy)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    size, free = sum(path.stat().st_size for path in files), free_bytes(folder)
    value = f"{folder}: {format_bytes(size)}, {format_bytes(free)} free"
    if free < _LITTLE:
        return CheckResult(value, "note", f"make room, or set {variable} to another place")
    return CheckResult(value)
