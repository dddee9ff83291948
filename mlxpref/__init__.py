"""A judge of images that thinks before it answers, learns what people prefer, and runs on one's own machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpref._blas import preload
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError

if TYPE_CHECKING:
    from mlxpref.judge.judge import Judge
    from mlxpref.training.trainer import StepReport

__all__ = ["ConfigError", "DataError", "MlxprefError", "ModelError", "load", "train"]

# Before anything imports MLX: the symbols that are found first are the ones MLX will call.
preload()


def load(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    calibration: str | Path | bool = True,
    any_base: bool = False,
    **settings: Any,
) -> "Judge":
    """Load a judge: a checkpoint folder, a Hugging Face id, or "demo"; None means $MLXPREF_MODEL.

    `calibration` is a file of `mlxpref calibrate`; True, that of this judge if it was calibrated; or False. One that is
    applied is named on stderr. An `adapter` is a folder in mlx-vlm's format or in PEFT's; one that was trained on
    another model is refused unless `any_base`. `settings` are the fields of `mlxpref.config.JudgeSettings`, such as
    `think=False`. Raises ModelError where the model or the adapter cannot be loaded, ConfigError for a setting that
    does not exist.
    """
    from mlxpref.judge.loading import load_judge, use_calibration

    name, folder = str(model) if model is not None else None, Path(adapter) if adapter else None
    judge = load_judge(name, folder, settings, any_base=any_base)
    use_calibration(judge, calibration if isinstance(calibration, bool) else Path(calibration))
    return judge


def train(
    data: str, model: str | Path | None = None, output: str | Path | None = None, **settings: Any
) -> Iterator["StepReport"]:
    """Train an adapter and yield a report after every step: `for report in mlxpref.train("demo", "demo"): ...`.

    `settings` are the fields of `mlxpref.config.TrainSettings`. The adapter lands in `output` (default runs/<time>),
    also when the loop is left early.
    """
    from mlxpref.training.run import train as train_and_record

    return train_and_record(data, model, output, **settings)
