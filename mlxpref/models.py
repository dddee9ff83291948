"""Which judge: a folder, a Hugging Face id, the demo, or the recommended one that fits this device."""

import os
import re
import tomllib
from collections.abc import Callable
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
    name = model or os.environ.get("MLXPREF_MODEL") or ""
    if not name:
        judge = choose_judge(device_working_set())
        cached = _cached(judge.id)
        return judge.id, cached or _download_recommended(judge, agree, say)
    if name == "demo":
        return name, JUDGE
    path = Path(name).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        return name, path
    return name, _cached(name) or _download(name, say)


def _cached(name: str) -> Path | None:
    """The folder of a complete snapshot in the Hugging Face cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _download_recommended(judge: RecommendedJudge, agree: Callable[[str], bool], say: Callable[[str], None]) -> Path:
    question = (
        f"No --model given: the recommended judge for this device is {judge.id} "
        f"({_hub_size(judge.id) or f'about {judge.size_gb} GB'}, licence {judge.licence}). Download it?"
    )
    if not agree(question):
        raise ModelError(
            f"no judge: {judge.id} was not downloaded; agree with --yes, or give --model MODEL "
            "(a folder, a Hugging Face id, or `demo`)"
        )
    return _download(judge.id, say)


def _download(name: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    say(f"downloading {name} ({_hub_size(name) or 'size unknown'}) from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name}: not on the Hugging Face hub, or not open to you; check the id") from error
    except Exception as error:  # the hub's transport library raises its own errors, and changes between releases
        raise ModelError(
            f"{name}: not in the local cache, and it cannot be downloaded ({type(error).__name__}); "
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
