"""Starts training runs from settings, and resumes them from their folders."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.checkpoints.memory import MemoryPlan, model_size, require_fit, training_plan, with_fitting_batches
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.config import TrainSettings, settings_from
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.inputs import PreferencesInput, check_model, preferences_from
from mlxpref.data.learned import digests_of, write_learned
from mlxpref.data.left_out import is_public
from mlxpref.data.load import Preferences, check_preferences, load_preferences
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from mlxpref.engine.adapters import base_of, check_base, find_base, read_adapter
from mlxpref.engine.find_profile import profile_of
from mlxpref.engine.profile import OWN, Profile, profile_named
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError, ModelError
from mlxpref.files import expand, write_file
from mlxpref.judge.store import features_beside
from mlxpref.log import logger
from mlxpref.text import format_bytes
from mlxpref.training.custom_reward import load_rewards
from mlxpref.training.kept_features import keep_features
from mlxpref.training.resume import RunState, read_state
from mlxpref.training.rewards import RewardMix
from mlxpref.training.run_folder import LOG, ROLLOUTS, Run
from mlxpref.training.run_record import (
    RUN_RECORD,
    changed_since,
    check_resumable,
    chosen_settings,
    in_whole,
    read_record,
    record_of,
    resumed_settings,
    write_record,
)
from mlxpref.training.step_report import StepReport
from mlxpref.training.trackers import check_trackers
from mlxpref.training.trainer import Trainer

_ALL = frozenset(each.name for each in fields(TrainSettings))
Agree = Callable[[str], bool]
"""Answers a question, such as whether to download a model."""


def start_run(
    settings: TrainSettings,
    output: Path | None = None,
    agree: Agree = lambda question: False,
    vlm: VLM | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    preferences: Preferences | None = None,
    chosen: Collection[str] | None = None,
) -> Run:
    """Check the settings, load data and model, and write run.json, without training yet.

    `output` None is runs/<time>. A `vlm` is trained itself; `preferences` take the place of named data. `chosen` are
    the settings that the judge's profile leaves as they are, None all but defaults. ConfigError for a folder with a
    file in it, or bad settings; DataError for unreadable data (see `check_preferences`); ModelError.
    """
    if chosen is None:
        chosen = {each.name for each in fields(settings) if getattr(settings, each.name) != each.default}
    folder = Path(processes.broadcast(str(output or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))))
    settings = settings_from(TrainSettings, processes.broadcast(asdict(in_whole(settings))))
    is_used = folder.exists() and (not folder.is_dir() or any(not path.is_dir() for path in folder.rglob("*")))
    if processes.is_main and is_used:
        resume = ", or continue the run in it with --resume" if (folder / RUN_RECORD).is_file() else ""
        raise ConfigError(f"{folder}: is not empty; give another --output{resume}")
    if not settings.data:
        raise ConfigError("no --data: give `demo`, a public data set, or a file or folder of preferences")
    run = _load(settings, folder, agree, processes, vlm, preferences=preferences, chosen=chosen)
    settings = run.trainer.settings
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, run.record)
        write_file(folder / PROFILE_FILE, run.trainer.vlm.profile.text())
        earlier = (Path(settings.adapter) if settings.adapter else None, run.trainer.vlm.checkpoint.folder)
        write_learned(folder, run.digests, run.learned, earlier)
    return run


def resume_run(
    folder: Path | None,
    given: Mapping[str, Any],
    agree: Agree = lambda question: False,
    processes: ProcessGroup = SINGLE_PROCESS,
    preferences: Preferences | None = None,
) -> Run | None:
    """Load the run in a folder with its last saved state; None where it is complete.

    All settings come from its run.json. The `given` ones must be equal, except `save_every`, `log_every` and
    `report_to`, files and folders with the same content in another place, and `rows`, `micro_batch` and `recompute`,
    which trade memory for time. These three
    and another number of processes round differently, and a warning names them. Other `steps` make the run longer or
    shorter, but not shorter than it is: from the next one on, the learning rate is that of a run of so many steps, and
    patience counts anew. ConfigError, DataError or ModelError for any other difference.
    """
    if folder is None:
        raise ConfigError("--resume: of which run? give its folder with --output")
    before, settings, state = _read_run(folder, given, processes)
    done, planned = state.step if state else 0, before["settings"]["steps"]
    if 0 < settings.steps < done:
        raise ConfigError(f"{folder}: {done} steps are done; give --steps from {done} on, or another --output")
    is_complete = state is not None and state.complete
    if is_complete and settings.steps in (planned, done):
        logger.info(f"{folder}: this run is complete after {done} steps; nothing is left to do, unless --steps is more")
        return None
    kept = folder / PROFILE_FILE
    profile = str(kept) if kept.is_file() and "profile" not in given else settings.profile
    run = _load(settings, folder, agree, processes, state=state, preferences=preferences, asked_by=profile)
    if processes.is_main:  # the others have the same data and model as this one
        check_resumable(folder, before, run.record, run.digests, state is None or "adapter" in given)
    run.record |= {name: before[name] for name in ("started", "id") if name in before}
    changes = changed_since(before, run.record)
    if changes:
        text = ", ".join(f"{name} is {now}, was {then}" for name, (then, now) in changes.items())
        logger.warning(f"{folder}: {text}: the run continues, but not to the last bit as it would have")
    if settings.steps != planned:
        changes["steps"] = [planned, settings.steps]
    resumption = {"after_step": done, "changed": changes}
    run.record["resumed"] = [*before.get("resumed", []), resumption]
    if state:
        try:
            run.trainer.restore(state.arrays, state.numbers)
        except KeyError as error:
            raise ModelError(
                f"{folder}: its saved state is of another version of mlxpref ({error} is missing); use that one"
            ) from error
        if settings.steps != planned:
            _change_length(run, done, planned)
        for file, size in ((folder / name, size) for name, size in state.sizes.items() if processes.is_main):
            if not file.is_file() or file.stat().st_size < size:
                logger.warning(f"{file}: lines of steps up to {state.step} are missing; the run continues without them")
        if state.totals is None and settings.log_every > 1:
            logger.warning(f"{folder}: its log has no totals, as an earlier version began it: every step is logged")
        run.state = state
    return run


def train(
    data: PreferencesInput | None = None,
    model: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Iterator[StepReport]:
    """Train an adapter and yield a report after every step: `for report in mlxpref.train("demo", "demo"): ...`.

    `data` is a data set's name, a file or folder, or a list of `Preference`s, or of dicts like the rows of a file.
    `settings` are the fields of `mlxpref.config.TrainSettings`; see `chosen_settings` for the demo judge. It saves the
    adapter in `output` (default runs/<time>), also if the loop ends early. With `resume` the run in `output` continues
    (see `resume_run`), and needs its data again if they were a list; a complete one yields nothing. ConfigError,
    DataError or ModelError for what cannot be trained.
    """
    settings = {name: expand(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    preferences = None
    check_model(model, "(data, model)")
    if data is None or isinstance(data, str | os.PathLike):
        name = None if data is None else expand(data)
    else:
        folder = Path(expand(settings["data_dir"])) if settings.get("data_dir") else None
        name, preferences = preferences_from(
            data, settings.get("split"), settings.get("limit") or None, folder, "train"
        )
    values = ({"data": name} if name else {}) | ({"model": expand(model)} if model else {}) | settings
    place, processes = Path(expand(output)) if output else None, process_group()
    if resume:
        run = resume_run(place, values, processes=processes, preferences=preferences)
    else:
        chosen = chosen_settings(values)
        of_run = settings_from(TrainSettings, chosen)
        run = start_run(of_run, place, processes=processes, preferences=preferences, chosen=chosen)
    if run:
        yield from run.reports()


def _read_run(
    folder: Path, given: Mapping[str, Any], processes: ProcessGroup
) -> tuple[dict[str, Any], TrainSettings, RunState | None]:
    """The record, the settings and the last saved state of a run; the main process reads them for all."""
    state, message = None, None
    if processes.is_main:
        record = read_record(folder)
        settings = resumed_settings(folder, record, given)
        state = read_state(folder)
        message = [record, asdict(settings), state and state.without_arrays()]
    record, values, numbers = processes.broadcast(message)
    if numbers is not None:
        state = RunState(arrays=processes.broadcast_arrays(state.arrays if state else {}), **numbers)
    return record, settings_from(TrainSettings, values), state


def _change_length(run: Run, done: int, planned: int) -> None:
    """Let a run end earlier or later than planned; ConfigError if more steps are done."""
    count = run.trainer.step_count
    if count < done:
        raise ConfigError(
            f"{run.folder}: {done} steps are done, and one pass over the data takes {count}; give --steps"
        )
    logger.info(
        f"{run.folder}: {count} steps instead of {planned or 'one pass over the data'}: from step {done + 1} on, the "
        f"learning rate is that of a run of {count} steps"
    )
    run.trainer.held_out.restart_patience()


def _load(
    settings: TrainSettings,
    folder: Path,
    agree: Agree,
    processes: ProcessGroup,
    vlm: VLM | None = None,
    state: RunState | None = None,
    preferences: Preferences | None = None,
    chosen: Collection[str] = _ALL,
    asked_by: str = "",
) -> Run:
    """Make a run before its first step, or to go on from a `state`, without a change in its folder.

    The quickest checks come first: the reward with a profile that is named, then the data, then the model. `asked_by`
    is the profile in place of that in the settings.
    """
    named, disk = asked_by or settings.profile, features_beside() if vlm is None else None
    if processes.is_main:
        check_trackers(settings.report_to)
    mix = load_rewards(settings.rewards)
    if vlm or named:
        settings = _settings_for(vlm.profile if vlm else profile_named(named), settings, mix, chosen)
    data_dir = Path(settings.data_dir).expanduser() if settings.data_dir else None
    preferences = preferences or load_preferences(
        settings.data,
        settings.split,
        settings.limit or None,
        settings.seed,
        data_dir,
        needs_images=state is None or is_public(settings.data),
        agree=agree,
    )
    images = vlm.features.images if vlm else ImageCache(settings.max_pixels)
    left_out = check_preferences(settings.data, preferences, images, begun=state is not None)
    adapter = Path(settings.adapter) if settings.adapter else None
    if vlm is None:
        vlm, settings = _load_vlm(settings, mix, adapter, named, len(preferences), chosen, agree)
        vlm.features.images = images
    start: Mapping[str, mx.array] | None = None
    if adapter and state:
        start = {name.removeprefix("adapter."): w for name, w in state.arrays.items() if name.startswith("adapter.")}
    elif adapter:
        settings, start = _start_from(adapter, vlm, settings)
    trainer = Trainer(vlm, preferences, settings, mix, processes, start, left_out)
    if disk:
        keep_features(disk, trainer)
    base, count = base_of(vlm.checkpoint, settings.model, vlm.profile), len(trainer.preferences)
    record = record_of(folder, settings, base, preferences, count, processes.size)
    versions = {f"version of {name}": record["versions"][name] for name in ("mlxpref", "mlx", "mlx-vlm")}
    prints = {"model": base["base"]["fingerprint"], "preferences": record["data_fingerprint"]}
    processes.check_same(versions | {f"fingerprint of the {name}": value for name, value in prints.items()})
    state = RunState(0, *trainer.state, {LOG: 0, ROLLOUTS: 0}, totals={})
    digests, used = digests_of(preferences), set(map(id, trainer.preferences))  # the trainer's are some of these
    learned = digests[[id(preference) in used for preference in preferences]]
    return Run(folder, trainer, record, state, digests, learned)


def _load_vlm(
    settings: TrainSettings,
    mix: RewardMix,
    adapter: Path | None,
    profile_name: str,
    preferences: int,
    chosen: Collection[str],
    agree: Agree,
) -> tuple[VLM, TrainSettings]:
    """The model to train, with the settings that its profile and this device's memory leave; see `_load`."""
    model = settings.model or None
    name, path = find_base(adapter, model, agree) if adapter else find_checkpoint(model, agree, work="training")
    settings = in_whole(replace(settings, model=name))
    profile = profile_of(profile_name, name, path, adapter)
    settings = _settings_for(profile, settings, mix, chosen)
    checkpoint = Checkpoint.open(path)
    check_folder(checkpoint)
    size, writes = model_size(checkpoint), settings.think or not mix.exact
    text = profile.text_tokens

    def plan_of(settings: TrainSettings) -> MemoryPlan:
        return training_plan(size, settings, preferences, writes, *text)

    settings = with_fitting_batches(plan_of, settings, chosen)
    plan = require_fit(plan_of, settings, "training")
    logger.info(f"about {format_bytes(plan.peak)} of memory at the peak, {format_bytes(plan.weights)} are weights")
    return load_vlm(checkpoint, settings.max_pixels, profile=profile), settings


def _settings_for(profile: Profile, settings: TrainSettings, mix: RewardMix, chosen: Collection[str]) -> TrainSettings:
    """The settings for a judge that is asked by a profile, which leaves the `chosen` ones as they are.

    ConfigError for what it cannot learn.
    """
    if profile.is_point:
        raise ConfigError(
            f"the profile {profile.name} shows one image at a time, and training learns from pairs: take a judge of "
            f"pairs, or --profile {OWN}"
        )
    profile.check_form(mix.form)
    if not mix.exact and profile.tie_opening:
        raise ConfigError(
            f"reward {settings.rewards}: the profile {profile.name} answers at once; take soft or brier, and grpo"
        )
    if settings.think and not profile.thinks:
        if "think" in chosen:
            raise ConfigError(f"--think: the profile {profile.name} answers at once; give --no-think")
        logger.info(f"the profile {profile.name} answers at once: only its answer is learned, without thinking")
        settings = replace(settings, think=False)
    if profile.max_tokens and "max_tokens" not in chosen:
        settings = replace(settings, max_tokens=profile.max_tokens)
    return settings


def _start_from(adapter: Path, vlm: VLM, settings: TrainSettings) -> tuple[TrainSettings, dict[str, mx.array]]:
    """The settings with an adapter's rank and scale, and its weights; errors if it does not fit, or they differ."""
    for line in check_base(adapter, vlm.checkpoint, vlm.profile):
        logger.warning(line)
    rank, scale, weights = read_adapter(adapter, vlm.model)
    for name, own in (("rank", rank), ("lora_scale", scale)):
        if getattr(settings, name) not in (getattr(TrainSettings(), name), own):
            raise ConfigError(f"{name} {getattr(settings, name)}: {adapter} has {own}, which stays; leave it out")
    logger.info(f"{adapter}: training goes on from this adapter, of rank {rank} and scale {scale:g}")
    return replace(settings, rank=rank, lora_scale=scale), weights
