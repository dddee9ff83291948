"""The recommended judges of `recommended.toml`, and the best of them for this device."""

import os
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from mlxpref.errors import ModelError
from mlxpref.text import format_bytes

Work = Literal["judging", "training"]


@dataclass(frozen=True)
class RecommendedJudge:
    """One entry of recommended.toml, which says what each field means; sizes in GB."""

    id: str
    profile: str
    published: str
    licence: str
    any_use: bool
    download_gb: float
    converted_gb: float
    judging_gb: float
    judging_cpu_gb: float
    training_gb: float
    training_cpu_gb: float
    tried: bool
    checked: str

    @property
    def is_converted(self) -> bool:
        """Whether its first use converts it."""
        return self.converted_gb > 0

    @property
    def kept(self) -> int:
        """The bytes of the folder that this makes."""
        return int(1e9 * self.converted_gb)

    @property
    def known(self) -> str:
        """What is known of its quality."""
        return f"MMRB2, text to image: {self.published}{'' if self.tried else '; not tried here'}"

    def needed(self, work: Work) -> int:
        """The bytes of memory that some work takes on MLX's device."""
        import mlx.core as mx

        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        return int(1e9 * getattr(self, f"{work}_cpu_gb" if on_cpu else f"{work}_gb"))


def recommended_judges() -> list[RecommendedJudge]:
    """The recommended judges, best first."""
    text = files("mlxpref.checkpoints").joinpath("recommended.toml").read_text(encoding="utf-8")
    return [RecommendedJudge(**entry) for entry in tomllib.loads(text)["judge"]]


def recommended_judge(hub_id: str) -> RecommendedJudge | None:
    """The recommended judge of an id, if it is one."""
    return next((judge for judge in recommended_judges() if judge.id == hub_id), None)


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


def choose_judge(working_set: int, work: Work = "judging") -> RecommendedJudge:
    """The best recommended judge for any use whose work fits a working set in bytes."""
    judges = [judge for judge in recommended_judges() if judge.any_use]
    fitting = [judge for judge in judges if judge.needed(work) <= working_set]
    if not fitting:
        least = format_bytes(min(judge.needed(work) for judge in judges))
        raise ModelError(
            f"no recommended judge fits this device ({format_bytes(working_set)} of working set; the smallest takes "
            f"{least} for {work}); give a smaller one with --model, or try --model demo"
        )
    return fitting[0]
