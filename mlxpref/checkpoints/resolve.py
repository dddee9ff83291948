"""Finds a judge: a folder, a Hugging Face id, the demo, or the recommended one for this device."""

import os
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mlxpref.checkpoints.download import ask_model, cached_model, download_model, needed_bytes
from mlxpref.demo import JUDGE
from mlxpref.errors import ModelError
from mlxpref.log import logger
from mlxpref.text import format_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@.*)?")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
_GB = 1e9


@dataclass(frozen=True)
class RecommendedJudge:
    """One entry of recommended.toml; sizes in GB, `any_use` whether its licence allows any use."""

    id: str
    licence: str
    any_use: bool
    size_gb: float
    working_set_gb: float
    training_gb: float
    checked: str


def recommended_judges() -> list[RecommendedJudge]:
    """The recommended judges, best first."""
    text = files("mlxpref.checkpoints").joinpath("recommended.toml").read_text(encoding="utf-8")
    return [RecommendedJudge(**entry) for entry in tomllib.loads(text)["judge"]]


def device_working_set() -> int:
    """Bytes that a model may take on this device: the GPU's recommended working set, else 3/4 of its memory."""
    import mlx.core as mx

    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    # A CUDA GPU has its own memory; for a CPU MLX states none.
    memory = info.get("total_memory") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory) * 3 // 4


def choose_judge(working_set: int) -> RecommendedJudge:
    """The best recommended judge for any use that fits a working set in bytes."""
    fitting = [j for j in recommended_judges() if j.any_use and j.working_set_gb * _GB <= working_set]
    if not fitting:
        raise ModelError(
            f"no recommended judge fits this device ({format_bytes(working_set)} of working set); "
            "give a smaller one with --model, or try --model demo"
        )
    return fitting[0]


def find_checkpoint(
    model: str | None, agree: Callable[[str], bool], revision: str | None = None, ask: str = ""
) -> tuple[str, Path]:
    """The name and the folder of a judge; downloads it if necessary.

    None means $MLXPREF_MODEL, else the recommended judge; before its download `agree` must return True. `revision` is a
    branch, tag or commit of a Hugging Face id, which may also be written owner/name@revision. `ask` says who needs a
    model that the user did not name: then `agree` must return True, too.
    """
    name = os.environ.get("MLXPREF_MODEL", "") if model is None else model
    if model is not None and not name.strip():
        raise ModelError("the model's name is empty; give a folder, a Hugging Face id or `demo`")
    if not name:
        judge = choose_judge(device_working_set())
        hub_id, revision = _identified(judge.id, revision)
        return _named(hub_id, revision), cached_model(hub_id, revision) or _recommended(judge, revision, agree)
    path = Path(name)
    with suppress(RuntimeError):  # no such user
        path = path.expanduser()
    if name == "demo" or path.exists() or not is_hub_id(name):
        if revision:
            raise ModelError(f"{name}: is no Hugging Face id, so it has no revision {revision!r}; leave that out")
        return name, JUDGE if name == "demo" else path
    hub_id, revision = _identified(name, revision)
    return _named(hub_id, revision), cached_model(hub_id, revision) or _download(hub_id, revision, ask, agree)


def missing_judge(model: str | None) -> tuple[str, int] | None:
    """The words about a judge that would have to be downloaded, and its bytes; None for one that is here."""
    name, licence = os.environ.get("MLXPREF_MODEL", "") if model is None else model, ""
    if not name.strip():
        judge = choose_judge(device_working_set())
        name, licence = judge.id, judge.licence
    elif name == "demo" or Path(name).exists() or not is_hub_id(name):
        return None
    hub_id, revision = _identified(name, None)
    if cached_model(hub_id, revision):
        return None
    repository = ask_model(hub_id, revision)
    size, licence = needed_bytes(repository), licence or repository.licence or "not stated"
    return f"the judge {_named(hub_id, revision)} ({format_bytes(size)}; licence {licence})", size


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hugging Face id, with or without a revision."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".")


def _identified(name: str, revision: str | None) -> tuple[str, str | None]:
    """The id and the revision in a name and an option; ModelError if they contradict each other."""
    hub_id, _, own = name.partition("@")
    if own and revision and own != revision:
        raise ModelError(f"{name}: another revision than {revision!r}, which was asked for; give one of them")
    revision = own or revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelError(f"{hub_id}: {revision!r} is no revision; give a branch, a tag or a commit")
    return hub_id, revision


def _named(hub_id: str, revision: str | None) -> str:
    return f"{hub_id}@{revision}" if revision else hub_id


def _recommended(judge: RecommendedJudge, revision: str | None, agree: Callable[[str], bool]) -> Path:
    """Download the recommended judge if the user agrees to its terms."""
    size = f"about {judge.size_gb} GB"
    with suppress(ModelError):  # the size is optional; the download reports errors of the hub
        size = format_bytes(needed_bytes(ask_model(judge.id, revision)))
    terms = f"{_named(judge.id, revision)} ({size}, licence {judge.licence})"
    if not agree(f"No --model given: the recommended judge for this device is {terms}. Download it?"):
        raise ModelError(
            f"no --model given, and the recommended judge, {terms}, is not downloaded: agree with --yes, "
            "or give --model MODEL (a folder, a Hugging Face id, or `demo`)"
        )
    return _download(judge.id, revision)


def _download(
    hub_id: str, revision: str | None, ask: str = "", agree: Callable[[str], bool] = lambda question: False
) -> Path:
    """Download a model, if the user agrees or named it, which is where `ask` is empty."""
    repository = ask_model(hub_id, revision)
    size, licence = format_bytes(needed_bytes(repository)), repository.licence or "not stated"
    if ask and not agree(f"{ask} {_named(hub_id, revision)} ({size}, licence {licence}). Download it?"):
        raise ModelError(f"{_named(hub_id, revision)} ({size}) is not downloaded: agree with --yes")
    logger.info(f"downloading {_named(hub_id, revision)} ({size}, licence {licence}) from the Hugging Face hub")
    return download_model(repository)
