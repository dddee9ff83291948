"""From a name to a judge: find or download the checkpoint, load it with its adapter, and calibrate it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.memory import judging_plan, model_size, require_fit
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.config import JudgeSettings, settings_from
from mlxpref.engine.adapters import check_base, find_base, load_adapter
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import DataError
from mlxpref.judge.calibration import CALIBRATION_FILE, cached_calibrations, read_calibrations
from mlxpref.judge.judge import Judge
from mlxpref.log import logger


def load_judge(
    model: str | None,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    images: int | None = None,
    any_base: bool = False,
) -> Judge:
    """Load a judge by name; see `find_checkpoint` for names and `agree`. None with an adapter is the adapter's base.

    ConfigError if judging pairs of `images` images (by default a full batch) would not fit the device. ModelError for
    an adapter of another model, unless `any_base`.
    """
    judge_settings = settings_from(JudgeSettings, settings or {})
    name, path = find_base(adapter, model, agree) if adapter is not None else find_checkpoint(model, agree)
    checkpoint = Checkpoint.open(path)
    check_folder(checkpoint)
    size = model_size(checkpoint)
    require_fit(lambda s: judging_plan(size, s, images or judge_settings.rows), judge_settings, "judging")
    for line in check_base(adapter, checkpoint, any_base) if adapter is not None else ():
        logger.warning(line)
    vlm = load_vlm(checkpoint, judge_settings.max_pixels)
    if adapter is not None:
        load_adapter(vlm.model, adapter)
    return Judge(vlm, judge_settings, name, adapter)


def calibration_path(judge: Judge) -> Path:
    """The place of a judge's own calibration: its adapter's folder, else the user's cache by its fingerprint."""
    if judge.adapter is not None:
        return judge.adapter / CALIBRATION_FILE
    return cached_calibrations() / f"{judge.conditions().judge[:32]}.json"


def calibrated(judge: Judge, calibration: Path | bool = True) -> Judge:
    """The judge with the calibration in a file; True is its own, if any, False is none.

    DataError for a file that is no calibration. A file of another judge raises an error only when the judge judges.
    """
    path = _own_calibration(judge) if calibration is True else calibration or None
    if path is None:
        return replace(judge, calibration=None)
    file = read_calibrations(path)
    logger.info(f"calibrated by {file}")
    return replace(judge, calibration=file)


def _own_calibration(judge: Judge) -> Path | None:
    """The judge's own calibration, if there is one."""
    with suppress(DataError):  # there is no cache
        # Without an adapter the place depends on all weights: read them only if there may be a calibration.
        if judge.adapter is not None or cached_calibrations().is_dir():
            path = calibration_path(judge)
            return path if path.exists() else None
    return None
