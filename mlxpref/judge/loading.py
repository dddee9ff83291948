"""From a name to a judge: find or download the checkpoint, load it with its adapter, and calibrate it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.files import source_of
from mlxpref.checkpoints.memory import MemoryPlan, judging_plan, model_size, require_fit, with_fitting_batches
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.config import JudgeSettings, settings_from
from mlxpref.engine.adapters import check_base, find_base, load_adapter, trained_settings
from mlxpref.engine.find_profile import profile_of
from mlxpref.engine.profile import Profile, own_profile, profile_named
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import expand
from mlxpref.judge.calibration import CALIBRATION_FILE, CalibrationFile, cached_calibrations, read_calibrations
from mlxpref.judge.judge import Judge
from mlxpref.log import logger


@dataclass(frozen=True)
class FoundJudge:
    """A judge whose files are here, go together, and fit the device: only its weights are not in memory."""

    name: str
    adapter: Path | None
    settings: JudgeSettings
    reads: bool
    checkpoint: Checkpoint
    profile: Profile

    def load(self) -> Judge:
        """Load it; errors of weights, and of labels that cannot be read."""
        vlm = load_vlm(self.checkpoint, self.settings.max_pixels, profile=self.profile)
        if self.adapter is not None:
            load_adapter(vlm.model, self.adapter)
        return Judge(vlm, self.settings, self.name, self.adapter, reads=self.reads)


def load_judge(
    model: str | None,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    images: int | None = None,
    any_base: bool = False,
) -> Judge:
    """Load a judge by name; see `find_checkpoint` for names and `agree`. None with an adapter is the adapter's base.

    Settings that are not given are those that the adapter, also one in the weights, was trained with, and a warning
    names the given ones that differ from these. ConfigError if judging pairs of `images` images (by default a full
    batch) would not fit the device. ModelError for an adapter of another model, unless `any_base`.
    """
    return find_judge(model, adapter, settings, agree, images, any_base).load()


def find_judge(
    model: str | None,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    images: int | None = None,
    any_base: bool = False,
) -> FoundJudge:
    """The judge of `load_judge`, with its errors and warnings, before its weights are read."""
    settings = dict(settings or {})
    if isinstance(settings.get("profile"), PathLike):
        settings["profile"] = str(settings["profile"])
    settings_from(JudgeSettings, settings)  # before any download
    if settings.get("profile"):
        profile_named(settings["profile"]).check_criterion(settings.get("criterion", ""))
    name, path = find_base(adapter, model, agree) if adapter is not None else find_checkpoint(model, agree)
    trained = trained_settings(adapter or path)
    reads = not trained.get("think") or bool(trained.get("read_weight"))
    profile = profile_of(settings.get("profile", ""), name, path, adapter)
    judge_settings = _settings(adapter or path, trained, settings, reads, profile)
    checkpoint = Checkpoint.open(path)
    check_folder(checkpoint)
    size = model_size(checkpoint)
    together, text = images or judge_settings.rows, profile.text_tokens

    def plan_of(settings: JudgeSettings) -> MemoryPlan:
        return judging_plan(size, settings, together, *text)

    judge_settings = with_fitting_batches(plan_of, judge_settings, settings or ())
    require_fit(plan_of, judge_settings, "judging")
    for line in check_base(adapter, checkpoint, profile, any_base) if adapter is not None else ():
        logger.warning(line)
    # At once the demo judge can only guess, however it was trained or converted.
    reads = reads and "demo" not in (name, source_of(path))
    return FoundJudge(name, adapter, judge_settings, reads, checkpoint, profile)


def _settings(
    adapter: Path, trained: Mapping[str, Any], given: Mapping[str, Any], reads: bool, profile: Profile
) -> JudgeSettings:
    """The given settings, else those of the adapter's training; warns of what the adapter did not learn.

    The profile gives the others; ConfigError for what it has no place for.
    """
    known = {field.name: trained[field.name] for field in fields(JudgeSettings) if field.name in trained}
    learned = settings_from(JudgeSettings, known, f"{adapter}, trained with")
    if profile.max_tokens:
        known = {"max_tokens": profile.max_tokens} | known
    if not profile.thinks:
        if given.get("think"):
            raise ConfigError(
                f"the profile {profile.name} answers at once: leave out --think (or --think-about, --compare-thinking)"
            )
        known["think"] = False
    settings = settings_from(JudgeSettings, known | dict(given))
    profile.check_criterion(settings.criterion)
    for name in filter(trained.__contains__, known):  # in the order of the settings
        before, now = getattr(learned, name), getattr(settings, name)
        if name == "think" and before != now and not (before and reads):
            ways = ("without thinking", "with thinking")
            logger.warning(f"{adapter}: trained {ways[before]} only, asked {ways[now]}: it answers less well so")
        elif name != "think" and before != now:
            logger.warning(f"{adapter}: trained with --{name.replace('_', '-')} {before}, asked with {now}")
    if settings.criterion and trained:
        logger.warning(f"{adapter}: trained without --criterion: it may go on by what it learned that people prefer")
    return settings


def calibration_path(judge: Judge) -> Path:
    """The place of a judge's own calibration: its adapter's folder, else the user's cache by its fingerprint.

    Each other profile than our own, and each criterion of the user's, has a file of its own.
    """
    version = judge.profile.version(judge.settings.criterion)
    own = "" if version == own_profile().version() else f"-{version}"
    if judge.adapter is not None:
        name = Path(CALIBRATION_FILE)
        return judge.adapter / f"{name.stem}{own}{name.suffix}"
    return cached_calibrations() / f"{judge.conditions().judge[:32]}{own}.json"


def known_calibrations(adapter: Path | None = None) -> list[CalibrationFile]:
    """The calibrations in the user's cache, and an adapter's; warns of damaged files."""
    files = sorted(adapter.glob(f"{Path(CALIBRATION_FILE).stem}*.json")) if adapter else []
    known = []
    for path in [*files, *sorted(cached_calibrations().glob("*.json"))]:
        try:
            known.append(read_calibrations(path))
        except DataError as error:
            logger.warning(str(error))
    return known


def calibrated(judge: Judge, calibration: str | PathLike[str] | bool = True) -> Judge:
    """The judge with the calibration in a file; True is its own, if any, False is none.

    DataError for a file that is no calibration. A file of another judge raises an error only when the judge judges. Of
    the judge's own it leaves off what does not hold for its settings, with a warning.
    """
    if isinstance(calibration, bool):
        file = _own_calibration(judge) if calibration else None
    else:
        file = read_calibrations(Path(expand(calibration)))
    if file is not None:
        logger.info(f"calibrated by {file}")
    return replace(judge, calibration=file)


def _own_calibration(judge: Judge) -> CalibrationFile | None:
    """The part of the judge's own calibration that holds for its settings, if there is any."""
    try:
        # Without an adapter the place depends on all weights: read them only if there may be a calibration.
        if judge.adapter is None and not cached_calibrations().is_dir():
            return None
        path = calibration_path(judge)
        if not path.exists():
            return None
        found = read_calibrations(path)
    except DataError as error:  # there is no cache, or the file is damaged
        logger.warning(f"no calibration: {error}")
        return None
    session, holds = judge.session(), []
    for each in found.calibrations:
        if differences := judge.conditions(each.conditions.think, session).differences(each.conditions):
            logger.warning(f"{path}: left off {each.conditions.mode}, as it was made for {', '.join(differences)}")
        else:
            holds.append(each)
    return replace(found, calibrations=tuple(holds), given=False) if holds else None
