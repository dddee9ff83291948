"""From a name to a judge: find or download the checkpoint, load it, put the adapter and the calibration on."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import judging_plan, model_size, require_fit
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.config import JudgeSettings, settings_from
from mlxpref.engine.adapters import check_base, load_adapter
from mlxpref.engine.vlm import check_folder, load_vlm
from mlxpref.errors import DataError
from mlxpref.judge.calibration import CALIBRATION_FILE, cached_calibrations, read_calibrations
from mlxpref.judge.judge import Judge
from mlxpref.log import logger

__all__ = ["calibration_path", "load_judge", "use_calibration"]


def load_judge(
    model: str | None,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    images: int | None = None,
    any_base: bool = False,
) -> Judge:
    """Load a judge by name; see `find_checkpoint` for names and `agree`.

    An adapter that was trained on another model is refused, unless `any_base`.

    A ConfigError says what to change where it would not fit the device while it judges pairs of `images` images, by
    default as many as make a full batch.
    """
    chosen = settings_from(JudgeSettings, settings or {})
    name, path = find_checkpoint(model, agree)
    checkpoint = Checkpoint.open(path)
    check_folder(checkpoint)
    size = model_size(checkpoint)
    require_fit(lambda s: judging_plan(size, s, images or chosen.rows), chosen, "judging")
    for line in check_base(adapter, checkpoint, any_base) if adapter is not None else ():
        logger.warning(line)
    vlm = load_vlm(checkpoint, chosen.max_pixels)
    if adapter is not None:
        load_adapter(vlm.model, adapter)
    return Judge(vlm, chosen, name, adapter)


def calibration_path(judge: Judge) -> Path:
    """Where a judge's own calibration belongs: in its adapter's folder, else in the user's cache by its fingerprint."""
    if judge.adapter is not None:
        return judge.adapter / CALIBRATION_FILE
    return cached_calibrations() / f"{judge.conditions().judge[:32]}.json"


def use_calibration(judge: Judge, calibration: Path | bool = True) -> None:
    """Let a judge apply the calibration in a file; True is its own, if there is one, False is none.

    DataError for a file that is no calibration. Whether it fits the judge is seen when the judge is asked.
    """
    path = None if isinstance(calibration, bool) else calibration
    if calibration is True:
        with suppress(DataError):  # no cache, so nothing in it
            # Without an adapter all weights have to be read to know the place: only where it may be of use.
            if judge.adapter is not None or cached_calibrations().is_dir():
                own = calibration_path(judge)
                path = own if own.exists() else None
    judge.calibration = read_calibrations(path) if path else None
    if judge.calibration:
        logger.info(f"calibrated by {judge.calibration}")
