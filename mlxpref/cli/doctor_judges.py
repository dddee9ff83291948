"""Checks of judges: the embedded one works, the one that commands take is there, and which recommended ones fit."""

import os
import time
from contextlib import suppress
from pathlib import Path

from mlxpref.checkpoints.download import cached_model
from mlxpref.checkpoints.resolve import RecommendedJudge, choose_judge, is_hub_id
from mlxpref.cli.doctor_checkup import CheckResult
from mlxpref.cli.doctor_places import Hub
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.errors import ModelError
from mlxpref.text import format_bytes, one_line

__all__ = ["bytes_to_download", "check_default_judge", "check_demo", "check_judge"]

_GB = 1e9
_PREFERENCES = 1000
"""Preferences of the training run that is planned for."""
_DEFAULT = "default judge"
_ANEW = "install mlxpref anew, with what it needs: pip install --force-reinstall . in its folder"


def check_demo() -> CheckResult:
    """That the embedded judge is there, loads, and tells two of its own pictures apart."""
    import numpy as np

    started = time.perf_counter()
    try:
        from mlxpref.demo.pictures import PictureSpec, render
        from mlxpref.judge.loading import load_judge

        judge = load_judge("demo", settings={"think": False})
        a, b = (render(PictureSpec(colour, "circle", "clean"), np.random.default_rng(0)) for colour in ("red", "blue"))
        p_a = judge.compare(a, b, "a red circle").p_a
    except Exception as error:  # whatever a broken package raises
        return CheckResult("demo judge", f"does not work: {one_line(error)}", "fails", _ANEW)
    if not p_a > 0.5:
        return CheckResult("demo judge", f"prefers the wrong picture ({p_a:.2f})", "fails", _ANEW)
    seconds = time.perf_counter() - started
    return CheckResult("demo judge", f"loads and judges rightly, in {seconds:.1f} s")


def check_default_judge(hub: Hub, recommended: int) -> CheckResult:
    """Which judge a command takes that is given no --model: $MLXPREF_MODEL, else one of the list.

    One that is not here fails where the hub cannot be reached: so would the command.
    """
    named = os.environ.get("MLXPREF_MODEL", "")
    if not named:
        try:
            name = choose_judge(recommended).id
        except ModelError as error:
            return CheckResult(_DEFAULT, "none", "fails", str(error))
        return _of_hub(name, name, hub)
    found = f"$MLXPREF_MODEL is {named}"
    if named == "demo":
        return CheckResult(_DEFAULT, f"{found}, which knows coloured shapes only")
    path = Path(named)
    with suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.exists():
        return _in_folder(path, found, recommended)
    if not is_hub_id(named):
        remedy = "set MLXPREF_MODEL to a folder or a Hugging Face id, or unset it"
        return CheckResult(_DEFAULT, f"{found}, which does not exist", "fails", remedy)
    return _of_hub(named, found, hub)


def bytes_to_download(recommended: int) -> int:
    """What the recommended judge takes that commands would download; 0 where it is here, or another one is named."""
    if os.environ.get("MLXPREF_MODEL", ""):
        return 0
    try:
        judge = choose_judge(recommended)
    except ModelError:
        return 0
    return 0 if cached_model(judge.id) else int(judge.size_gb * _GB)


def check_judge(judge: RecommendedJudge, recommended: int) -> CheckResult:
    """Whether a recommended judge fits the device, to judge and to train, by plans from shapes."""
    judges, trains = judge.working_set_gb * _GB <= recommended, judge.training_gb * _GB <= recommended
    to_judge, to_train = f"{judge.working_set_gb:.1f} GB", f"{judge.training_gb:.1f} GB"
    fits = f"judges ({to_judge})" if judges else f"too large to judge ({to_judge})"
    fits += f", trains ({to_train})" if trains else f", too large to train ({to_train})"
    here = "in the cache" if cached_model(judge.id) else f"to download ({judge.size_gb:.1f} GB)"
    licence = "" if judge.any_use else f", licence {judge.licence}"
    return CheckResult("judge", f"{judge.id}: {fits}, {here}{licence}", "ok" if judges else "note")


def _of_hub(name: str, found: str, hub: Hub) -> CheckResult:
    hub_id, _, revision = name.partition("@")
    if cached_model(hub_id, revision or None):
        return CheckResult(_DEFAULT, f"{found}, in the cache")
    if hub.reached:
        return CheckResult(_DEFAULT, f"{found}, downloaded at its first use")
    how = "unset HF_HUB_OFFLINE" if hub.offline else "connect to the hub"
    remedy = f"{how}, or name the folder of a judge with --model or MLXPREF_MODEL; --model demo always works"
    return CheckResult(_DEFAULT, f"{found}, which is not here and cannot be downloaded", "fails", remedy)


def _in_folder(path: Path, found: str, recommended: int) -> CheckResult:
    """A judge in a folder: whether it is one, and what it takes to judge and to train."""
    from mlxpref.checkpoints.checkpoint import Checkpoint
    from mlxpref.checkpoints.checks import check_folder
    from mlxpref.checkpoints.memory import judging_plan, model_size, training_plan

    try:
        checkpoint = Checkpoint.open(path)
        check_folder(checkpoint)
        model = model_size(checkpoint)
    except ModelError as error:
        return CheckResult(_DEFAULT, f"{found}, which is no judge", "fails", str(error))
    judging = judging_plan(model, JudgeSettings(), JudgeSettings().rows).peak
    training = training_plan(model, TrainSettings(), _PREFERENCES).peak
    found = f"{found}: {format_bytes(judging)} to judge, {format_bytes(training)} to train"
    if judging <= recommended:
        return CheckResult(_DEFAULT, found)
    remedy = f"this device recommends at most {format_bytes(recommended)}: smaller --rows or --max-pixels may fit"
    return CheckResult(_DEFAULT, found, "note", remedy)
