"""Which judge: a folder, a Hugging Face id, the demo, or the recommended one that fits this device."""

import errno
import json
import os
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mlxpref.demo import JUDGE
from mlxpref.errors import ModelError

__all__ = ["RecommendedJudge", "choose_judge", "device_working_set", "recommended_judges", "resolve_model"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
_GB = 1e9


@dataclass(frozen=True)
class RecommendedJudge:
    """One entry of recommended.toml; sizes in GB, `any_use` whether its licence allows any use."""

    id: str
    licence: str
    any_use: bool
    size_gb: float
    working_set_gb: float
    checked: str


def recommended_judges() -> list[RecommendedJudge]:
    """The judges that mlxpref knows of, best first."""
    text = files("mlxpref").joinpath("recommended.toml").read_text(encoding="utf-8")
    return [RecommendedJudge(**entry) for entry in tomllib.loads(text)["judge"]]


def device_working_set() -> int:
    """Bytes that a model may take on this device: the GPU's recommended working set, else 3/4 of the memory."""
    import mlx.core as mx

    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def choose_judge(working_set: int) -> RecommendedJudge:
    """The best recommended judge for any use that fits a working set in bytes."""
    fitting = [j for j in recommended_judges() if j.any_use and j.working_set_gb * _GB <= working_set]
    if not fitting:
        raise ModelError(
            f"no recommended judge fits this device ({working_set / _GB:.1f} GB of working set); "
            "give a smaller one with --model, or try --model demo"
        )
    return fitting[0]


def resolve_model(
    model: str | None, agree: Callable[[str], bool], say: Callable[[str], None] = lambda _: None
) -> tuple[str, Path]:
    """The name and the folder of a judge, downloaded if it has to be.

    None means $MLXPREF_MODEL, else the recommended judge, about which `agree` is asked once, before its download.
    `say` is told what is downloaded.
    """
    name = os.environ.get("MLXPREF_MODEL", "") if model is None else model
    if model is not None and not name.strip():
        raise ModelError("the model's name is empty; give a folder, a Hugging Face id or `demo`")
    if not name:
        judge = choose_judge(device_working_set())
        cached = _cached(judge.id)
        return judge.id, cached or _download_recommended(judge, agree, say)
    if name == "demo":
        return name, JUDGE
    path = Path(name)
    with suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        return name, path
    return name, _cached(name) or _download(name, f"{name} ({_hub_size(name) or 'size unknown'})", say)


def _cached(name: str) -> Path | None:
    """The folder of a complete snapshot in the Hugging Face cache; an interrupted download is none."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except (OSError, ValueError):
        return None
    index = folder / "model.safetensors.index.json"
    try:
        weights = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else set()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    complete = all((folder / name).is_file() for name in ["config.json", *weights])
    return folder if complete and any(folder.glob("*.safetensors")) else None


def _download_recommended(judge: RecommendedJudge, agree: Callable[[str], bool], say: Callable[[str], None]) -> Path:
    terms = f"{judge.id} ({_hub_size(judge.id) or f'about {judge.size_gb} GB'}, licence {judge.licence})"
    if not agree(f"No --model given: the recommended judge for this device is {terms}. Download it?"):
        raise ModelError(
            f"no --model given, and the recommended judge, {terms}, is not downloaded: agree with --yes, "
            "or give --model MODEL (a folder, a Hugging Face id, or `demo`)"
        )
    return _download(judge.id, terms, say)


def _download(name: str, terms: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    say(f"downloading {terms} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: no such folder, and not on the Hugging Face hub or not open to you; check the name"
        ) from error
    except Exception as error:  # the hub's transport library raises its own errors, and changes between releases
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ModelError(f"{name}: no space left to download it; free some, or set HF_HOME elsewhere") from error
        why = "the hub was not reached" if isinstance(error, LocalEntryNotFoundError) else type(error).__name__
        raise ModelError(
            f"{name}: no such folder, not in the local cache, and it cannot be downloaded ({why}); "
            "connect to the internet once, or give --model FOLDER"
        ) from error


def _hub_size(name: str) -> str | None:
    """The size of a checkpoint as the hub states it, or None where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(name, files_metadata=True, timeout=10).siblings or []
    except Exception:  # as above; the size is a courtesy
        return None
    return f"{sum(s.size or 0 for s in siblings if s.rfilename.endswith('.safetensors')) / _GB:.1f} GB"
