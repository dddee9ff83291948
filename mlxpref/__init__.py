"""A judge of images that thinks before it answers, learns what people prefer, and runs on your own machine."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpref._blas import preload
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError

if TYPE_CHECKING:
    from mlxpref.judge.judge import Judge
    from mlxpref.judge.pair_verdict import PairVerdict
    from mlxpref.judge.ranking_result import Ranking
    from mlxpref.preferences import Preference
    from mlxpref.training.run import train
    from mlxpref.verdict import Verdict

__all__ = [
    "ConfigError",
    "DataError",
    "Judge",
    "MlxprefError",
    "ModelError",
    "PairVerdict",
    "Preference",
    "Ranking",
    "Verdict",
    "load",
    "train",
]

_MODULES = {
    "Judge": "mlxpref.judge.judge",
    "PairVerdict": "mlxpref.judge.pair_verdict",
    "Preference": "mlxpref.preferences",
    "Ranking": "mlxpref.judge.ranking_result",
    "Verdict": "mlxpref.verdict",
    "train": "mlxpref.training.run",
}
"""Where these are defined; they are imported when they are first used, since MLX alone takes a second to import."""

# Before anything imports MLX, which calls the first loaded BLAS.
preload()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    calibration: str | Path | bool = True,
    any_base: bool = False,
    **settings: Any,
) -> "Judge":
    """Load a judge: a checkpoint folder, a Hugging Face id, or "demo"; None means $MLXPREF_MODEL.

    `calibration` is a file of `mlxpref calibrate`; True applies this judge's own, if any, False none. `adapter` is a
    folder in mlx-vlm's format or in PEFT's; one of another model is a ModelError unless `any_base`. `settings` are
    fields of `mlxpref.config.JudgeSettings`, such as `think=False`. The log names the calibration and doubts about an
    adapter (see `mlxpref.log`). ModelError if the model or the adapter cannot be loaded, ConfigError for an unknown
    setting.
    """
    from mlxpref.judge.loading import calibrated, load_judge

    name, folder = str(model) if model is not None else None, Path(adapter) if adapter else None
    judge = load_judge(name, folder, settings, any_base=any_base)
    return calibrated(judge, calibration if isinstance(calibration, bool) else Path(calibration))
