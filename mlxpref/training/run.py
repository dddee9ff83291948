"""A training run: from settings to a folder with the adapter and its records; and its resuming.

An ended or killed run resumes from its last saved state. On the same machine with the same versions it then makes the
same adapter, and the same records but for times and memory, as without the interruption.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.checkpoints.memory import model_size, require_fit, training_plan
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.config import TrainSettings, settings_from
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.inputs import PreferencesInput, preferences_from
from mlxpref.data.learned import LEARNED, Digests, digests_of, write_learned
from mlxpref.data.left_out import is_public
from mlxpref.data.load import Preferences, check_preferences, load_preferences
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from mlxpref.engine.adapters import ADAPTER_WEIGHTS, base_of, check_base, find_base, read_adapter, save_adapter
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError
from mlxpref.files import append_record, expand, lock, open_for_append, truncate_lines
from mlxpref.judge.calibration import CALIBRATION_FILE
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, image_name
from mlxpref.report.run_page import RUN_PAGE, recorded_images, write_run_page
from mlxpref.text import format_bytes
from mlxpref.training.custom_reward import load_rewards
from mlxpref.training.resume import STATE_FILES, RunState, read_state, write_state
from mlxpref.training.run_record import (
    RUN_RECORD,
    changed_since,
    check_resumable,
    in_whole,
    read_record,
    record_of,
    resumed_settings,
    run_settings,
    write_record,
)
from mlxpref.training.step_report import StepReport
from mlxpref.training.trackers import check_trackers, tracking
from mlxpref.training.trainer import Trainer

_LOG, _ROLLOUTS = "log.jsonl", "rollouts.jsonl"
RUN_FILES = (
    ADAPTER_WEIGHTS,
    ADAPTER_CONFIG,
    RUN_RECORD,
    _LOG,
    _ROLLOUTS,
    RUN_PAGE,
    CALIBRATION_FILE,
    LEARNED,
    *STATE_FILES,
)
"""The files of a run, and of its adapter's calibration, in its folder."""
_ROLLOUTS_PER_STEP = 4
"""The number of rollouts of a step in rollouts.jsonl."""

Agree = Callable[[str], bool]
"""Answers a question, such as whether to download a model."""
Files = Mapping[str, BinaryIO]


@dataclass
class Run:
    """One run: its folder, trainer, run.json, the state after its last recorded step, and the digests of its data."""

    folder: Path
    trainer: Trainer
    record: dict[str, Any]
    state: RunState
    digests: Digests

    @property
    def done(self) -> int:
        """The number of recorded steps."""
        return self.state.step

    def reports(self) -> Iterator[StepReport]:
        """Train and record; save adapter and state every few steps, and at the end or an interruption.

        If bad data end it before its first step, it removes the folder, so that the next run can use it. All of several
        processes train, and the main one records.
        """
        is_new = not self.done and not self.state.sizes[_LOG]
        if not self.trainer.processes.is_main:
            if is_new:
                self.trainer.measure_start()
            for report in self.trainer.steps(self.done):
                self.state = replace(self.state, step=report.step)
                yield report
            return
        with ExitStack() as stack:
            files = self._claim(stack)
            track = stack.enter_context(tracking(self.trainer.settings.report_to, self.folder, self.record))
            try:
                if is_new and (line := self.trainer.measure_start()):
                    append_record(files[_LOG], line)
                    track(line)
                    logger.info(_measured(0, line["held_out"]))
                    self.state = self._state_after(0, files)
                for report in self.trainer.steps(self.done):
                    self._record(report, files)
                    track(report.to_json())
                    if report.step % self.trainer.settings.save_every == 0:
                        self._save(files)
                    yield report
            except BaseException as error:
                if isinstance(error, DataError) and not self.done and "resumed" not in self.record:
                    self._clear()
                else:
                    self._restore(files)
                raise
            self._close(files)

    def _claim(self, stack: ExitStack) -> Files:
        """Open and lock the records, and reset the folder to the last saved state."""
        files = {name: stack.enter_context(open_for_append(self.folder / name)) for name in (_LOG, _ROLLOUTS)}
        if not lock(files[_LOG]):
            raise ConfigError(f"{self.folder}: another process is training there; wait for its end, or end it")
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RUN_RECORD):
            for remnant in self.folder.glob(f".*{name}*"):  # of a process that was killed
                remnant.unlink()
        for name, file in files.items():
            truncate_lines(file, self.state.sizes[name])
        write_record(self.folder, self.record)
        return files

    def _record(self, report: StepReport, files: Files) -> None:
        """Append a step to the records."""
        append_record(files[_LOG], report.to_json())
        if report.held_out:
            logger.info(_measured(report.step, report.held_out))
        for rollout in report.rollouts[:: max(1, len(report.rollouts) // _ROLLOUTS_PER_STEP)]:
            append_record(files[_ROLLOUTS], asdict(rollout))
        self.state = self._state_after(report.step, files)

    def _state_after(self, step: int, files: Files) -> RunState:
        """The state after a step; its arrays are immutable, so holding them costs nothing until the next update."""
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
        return RunState(step, *self.trainer.state, sizes)

    def _save(self, files: Files) -> None:
        """Save the state and the adapter."""
        if self.trainer.left_out.reasons:
            self.record["left_out"] = self.trainer.left_out.to_json()
            write_record(self.folder, self.record)
        for file in files.values():  # a state must not be on the disk before the lines that it counts
            os.fsync(file.fileno())
        write_state(self.folder, self.state)
        settings = self.trainer.settings
        base = self.record["base"] | {"step": self.trainer.adapter_step(self.done), "trained": self.trainer.trained}
        save_adapter(self.trainer.adapter, self.folder, settings.rank, settings.lora_scale, base)

    def _restore(self, files: Files) -> None:
        """Go back to the last recorded step, as an unfinished one may have changed the adapter, and save it."""
        self.trainer.restore(self.state.arrays, self.state.numbers)
        self._save(files)
        self._write_page()

    def _close(self, files: Files) -> None:
        """Save the run as complete."""
        if self.trainer.left_out.reasons:
            logger.warning(f"left out: {self.trainer.left_out}")
        self.state = replace(self._state_after(self.done, files), complete=True)
        self._save(files)
        self.record["ended"] = {"step": self.done, "early": self.trainer.held_out.should_stop}
        write_record(self.folder, self.record)
        self._write_page()

    def _clear(self) -> None:
        """Remove the run's files and its folder."""
        for name in RUN_FILES:
            (self.folder / name).unlink(missing_ok=True)
        for name in ("tensorboard", "wandb"):  # of trackers
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.folder.rmdir()

    def _write_page(self) -> None:
        """Write the run's page; an error there must not cost the run."""
        images = (image for p in self.trainer.preferences for image in (p.a, p.b))
        in_memory = {image_name(image): image for image in images if not isinstance(image, Path)}

        def images_of(line: dict[str, Any]) -> tuple[ImageLike, ImageLike] | None:
            first, second = (in_memory.get(str(line.get(side))) for side in ("first", "second"))
            return (first, second) if first and second else recorded_images(line)

        with suppress(MlxprefError, OSError):
            write_run_page(self.folder, images_of, self.trainer.vlm.features.images.load)


def start_run(
    settings: TrainSettings,
    output: Path | None = None,
    agree: Agree = lambda question: False,
    vlm: VLM | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    preferences: Preferences | None = None,
) -> Run:
    """Check the settings, load data and model, and write run.json, without training yet.

    `output` None is runs/<time>. A `vlm` is trained itself; `preferences` take the place of named data. ConfigError for
    a folder with a file in it, or bad settings; DataError for unreadable data (see `check_preferences`); ModelError.
    """
    folder = Path(processes.broadcast(str(output or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))))
    settings = settings_from(TrainSettings, processes.broadcast(asdict(in_whole(settings))))
    is_used = folder.exists() and (not folder.is_dir() or any(not path.is_dir() for path in folder.rglob("*")))
    if processes.is_main and is_used:
        resume = ", or continue the run in it with --resume" if (folder / RUN_RECORD).is_file() else ""
        raise ConfigError(f"{folder}: is not empty; give another --output{resume}")
    if not settings.data:
        raise ConfigError("no --data: give `demo`, a public data set, or a file or folder of preferences")
    run = _load(settings, folder, agree, processes, vlm, preferences=preferences)
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, run.record)
        write_learned(
            folder, run.digests, run.trainer.preferences, Path(settings.adapter) if settings.adapter else None
        )
    return run


def resume_run(
    folder: Path | None,
    given: Mapping[str, Any],
    agree: Agree = lambda question: False,
    processes: ProcessGroup = SINGLE_PROCESS,
    preferences: Preferences | None = None,
) -> Run | None:
    """Load the run in a folder with its last saved state; None where it is complete.

    All settings come from its run.json. The `given` ones must be equal, except `save_every`, files and folders with the
    same content in another place, and `rows`, `micro_batch` and `recompute`, which trade memory for time. These three
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
    run = _load(settings, folder, agree, processes, state=state, preferences=preferences)
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
        run.state = state
    return run


def train(
    data: PreferencesInput,
    model: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Iterator[StepReport]:
    """Train an adapter and yield a report after every step: `for report in mlxpref.train("demo", "demo"): ...`.

    `data` is a data set's name, a file or folder, or a list of `Preference`s, or of dicts like the rows of a file.
    `settings` are the fields of `mlxpref.config.TrainSettings`; see `run_settings` for the demo judge. It saves the
    adapter in `output` (default runs/<time>), also if the loop ends early. With `resume` the run in `output` continues
    (see `resume_run`); a complete one yields nothing. ConfigError, DataError or ModelError for what cannot be trained.
    """
    preferences = None
    if isinstance(data, str | os.PathLike):
        name = expand(data)
    else:
        folder = Path(expand(settings["data_dir"])) if settings.get("data_dir") else None
        name, preferences = preferences_from(
            data, settings.get("split"), settings.get("limit") or None, folder, "train"
        )
    values = {"data": name} | ({"model": expand(model)} if model else {}) | settings
    place, processes = Path(expand(output)) if output else None, process_group()
    if resume:
        run = resume_run(place, values, processes=processes, preferences=preferences)
    else:
        run = start_run(run_settings(values), place, processes=processes, preferences=preferences)
    if run:
        yield from run.reports()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the steps in a run's log."""
    lines = (folder / _LOG).read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "updated" in line]


def held_out_change(folder: Path) -> dict[str, Any] | None:
    """The held-out accuracy before training and with a run's saved adapter; None where nothing was measured.

    `step` is the measured step, the adapter's own or the last one before; with patience it is the `best_of` so many.
    """
    lines = map(json.loads, (folder / _LOG).read_text(encoding="utf-8").splitlines())
    rows = {line["step"]: line["held_out"] for line in lines if line.get("held_out")}
    kept = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("step", math.inf)
    step = max((step for step in rows if 0 < step <= kept), default=0)
    if not step:
        return None
    before = rows.get(0, {}).get("accuracy")  # earlier versions did not measure it
    best_of = len(rows.keys() - {0}) if read_record(folder)["settings"].get("patience") else None
    pairs, accuracy = rows[step]["pairs"], rows[step]["accuracy"]
    return {"step": step, "best_of": best_of, "pairs": pairs, "before": before, "after": accuracy}


def _measured(step: int, metrics: Mapping[str, float]) -> str:
    when = f"step {step}" if step else "before training"
    return f"{when}: held-out {100 * metrics['accuracy']:.1f} % ({metrics['pairs']} pairs)"


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
) -> Run:
    """Make a run before its first step, or to go on from a `state`, without a change in its folder.

    The quickest checks come first: the reward, then the data, then the model.
    """
    if processes.is_main:
        check_trackers(settings.report_to)
    mix = load_rewards(settings.reward)
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
        model = settings.model or None
        name, path = find_base(adapter, model, agree) if adapter else find_checkpoint(model, agree)
        settings = in_whole(replace(settings, model=name))
        checkpoint = Checkpoint.open(path)
        check_folder(checkpoint)
        size, writes = model_size(checkpoint), settings.think or not mix.exact
        plan = require_fit(lambda s: training_plan(size, s, len(preferences), writes), settings, "training")
        logger.info(f"about {format_bytes(plan.peak)} of memory at the peak, {format_bytes(plan.weights)} are weights")
        vlm = load_vlm(checkpoint, settings.max_pixels)
        vlm.features.images = images
    start: Mapping[str, mx.array] | None = None
    if adapter and state:
        start = {name.removeprefix("adapter."): w for name, w in state.arrays.items() if name.startswith("adapter.")}
    elif adapter:
        settings, start = _start_from(adapter, vlm, settings)
    trainer = Trainer(vlm, preferences, settings, mix, processes, start, left_out)
    base, count = base_of(vlm.checkpoint, settings.model), len(trainer.preferences)
    record = record_of(folder, settings, base, preferences, count, processes.size)
    versions = {f"version of {name}": record["versions"][name] for name in ("mlxpref", "mlx", "mlx-vlm")}
    prints = {"model": base["base"]["fingerprint"], "preferences": record["data_fingerprint"]}
    processes.check_same(versions | {f"fingerprint of the {name}": value for name, value in prints.items()})
    state = RunState(0, *trainer.state, {_LOG: 0, _ROLLOUTS: 0})
    return Run(folder, trainer, record, state, digests_of(preferences))


def _start_from(adapter: Path, vlm: VLM, settings: TrainSettings) -> tuple[TrainSettings, dict[str, mx.array]]:
    """The settings with an adapter's rank and scale, and its weights; errors if it does not fit, or they differ."""
    for line in check_base(adapter, vlm.checkpoint):
        logger.warning(line)
    rank, scale, weights = read_adapter(adapter, vlm.model)
    for name, own in (("rank", rank), ("lora_scale", scale)):
        if getattr(settings, name) not in (getattr(TrainSettings(), name), own):
            raise ConfigError(f"{name} {getattr(settings, name)}: {adapter} has {own}, which stays; leave it out")
    logger.info(f"{adapter}: training goes on from this adapter, of rank {rank} and scale {scale:g}")
    return replace(settings, rank=rank, lora_scale=scale), weights
