"""A judge of images that thinks before it answers, learns what people prefer, and runs on your own machine."""

from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from mlxpref._blas import preload
from mlxpref.checkpoints import converter
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from mlxpref import reward
    from mlxpref.conversion.functions import convert, export
    from mlxpref.data.inputs import ImageInput
    from mlxpref.data.similar import group_similar
    from mlxpref.judge.calibration import CalibrationFile
    from mlxpref.judge.evaluation import Evaluation
    from mlxpref.judge.functions import calibrate, evaluate
    from mlxpref.judge.judge import Judge
    from mlxpref.judge.pair_verdict import PairVerdict
    from mlxpref.judge.ranking_result import Ranking, RankingEntry
    from mlxpref.preferences import Pair, Preference
    from mlxpref.report.xmp import Rating, write_ratings
    from mlxpref.training.distill import Distillation, distill
    from mlxpref.training.run import train
    from mlxpref.training.step_report import StepReport
    from mlxpref.verdict import Verdict

    __version__: str

_NAMES = {
    "mlxpref.conversion.functions": ("convert", "export"),
    "mlxpref.data.inputs": ("ImageInput",),
    "mlxpref.data.similar": ("group_similar",),
    "mlxpref.judge.calibration": ("CalibrationFile",),
    "mlxpref.judge.evaluation": ("Evaluation",),
    "mlxpref.judge.functions": ("calibrate", "evaluate"),
    "mlxpref.judge.judge": ("Judge",),
    "mlxpref.judge.pair_verdict": ("PairVerdict",),
    "mlxpref.judge.ranking_result": ("Ranking", "RankingEntry"),
    "mlxpref.preferences": ("Pair", "Preference"),
    "mlxpref.report.xmp": ("Rating", "write_ratings"),
    "mlxpref.training.distill": ("Distillation", "distill"),
    "mlxpref.training.run": ("train",),
    "mlxpref.training.step_report": ("StepReport",),
    "mlxpref.verdict": ("Verdict",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
"""Where these are defined; they are imported when they are first used, since MLX alone takes a second to import."""

__all__ = [
    "CalibrationFile", "ConfigError", "DataError", "Distillation", "Evaluation", "ImageInput", "Judge", "MlxprefError",
    "ModelError", "Pair", "PairVerdict", "Preference", "Ranking", "RankingEntry", "Rating", "StepReport", "Verdict",
    "calibrate", "convert", "distill", "evaluate", "export", "group_similar", "load", "reward", "train",
    "write_ratings",
]  # fmt: skip

# Before anything imports MLX, which calls the first loaded BLAS.
preload()


def _convert_judge(source: "Path", output: "Path", name: str) -> None:
    from mlxpref.conversion.convert import convert

    convert(source, output, name=name, overwrite=True)


converter.hand_in(_convert_judge)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "reward":
        return import_module("mlxpref.reward")
    if name == "__version__":
        from importlib.metadata import version

        return version("mlxpref")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", *(name for name in globals() if name.startswith("__"))])


def load(
    model: str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None,
    calibration: str | PathLike[str] | bool = True,
    any_base: bool = False,
    yes: bool = False,
    **settings: Any,
) -> "Judge":
    """Load a judge: a checkpoint folder, a Hugging Face id, or "demo"; None means $MLXPREF_MODEL.

    Without that it is the recommended judge for this device; `yes` agrees to its download, and to its conversion to 4
    bit into the user's cache, which happen once. `calibration` is a file of `mlxpref
    calibrate`; True applies this judge's own, if any, False none. `adapter` is a folder in mlx-vlm's format or in
    PEFT's; one of another model is a ModelError unless `any_base`. `settings` are fields of
    `mlxpref.config.JudgeSettings`, such as `think=False`. The log names the calibration and doubts about an adapter
    (see `mlxpref.log`). ModelError if the model or the adapter cannot be loaded, ConfigError for an unknown setting.
    """
    from pathlib import Path

    from mlxpref.files import expand
    from mlxpref.judge.loading import calibrated, load_judge

    name, folder = expand(model) if model is not None else None, Path(expand(adapter)) if adapter else None
    return calibrated(load_judge(name, folder, settings, lambda question: yes, any_base=any_base), calibration)
