"""A training run: from settings to a folder with the adapter and the records of how it came about, and on from there.

A run that was ended, in whatever way, is resumed from its last checkpoint. On the same machine with the same versions
it then makes the very adapter, and writes the very lines but for times and memory, that it would have unbroken.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from mlxpref.checkpoints.checkpoint import Checkpoint as ModelCheckpoint
from mlxpref.checkpoints.memory import model_size, require_fit, training_plan
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.config import TrainSettings, settings_from
from mlxpref.data.load import load_preferences
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from mlxpref.engine.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, save_adapter
from mlxpref.engine.vlm import VLM, check_folder, load_vlm
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError
from mlxpref.files import append_record, lock, open_for_append, truncate_lines
from mlxpref.judge.calibration import CALIBRATION_FILE
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, Preference, digest_of, image_name
from mlxpref.report.run_page import RUN_PAGE, recorded_images, write_run_page
from mlxpref.text import format_bytes
from mlxpref.training.custom_reward import load_rewards
from mlxpref.training.resume import CHECKPOINT_FILES, Checkpoint, read_checkpoint, write_checkpoint
from mlxpref.training.run_record import (
    RUN_RECORD,
    check_same,
    differences,
    read_record,
    record_of,
    settings_again,
    write_record,
)
from mlxpref.training.trainer import StepReport, Trainer

__all__ = ["RUN_FILES", "Run", "read_log", "resume_run", "start_run", "train"]

_LOG, _ROLLOUTS = "log.jsonl", "rollouts.jsonl"
RUN_FILES = (
    ADAPTER_WEIGHTS, ADAPTER_CONFIG, RUN_RECORD, _LOG, _ROLLOUTS, RUN_PAGE, CALIBRATION_FILE, *CHECKPOINT_FILES
)  # fmt: skip
"""What a run, and who calibrates its adapter, leave in its folder."""

_ROLLOUTS_A_STEP = 4
"""How many rollouts of a step are kept in rollouts.jsonl."""


@dataclass
class Run:
    """One run: its settings, the model that is trained, its folder, and where it stands."""

    settings: TrainSettings
    folder: Path
    vlm: VLM
    trainer: Trainer
    record: dict[str, Any]
    last: Checkpoint

    @property
    def preferences(self) -> Sequence[Preference]:
        """What is learned from."""
        return self.trainer.preferences

    @property
    def done(self) -> int:
        """Steps that are finished and recorded."""
        return self.last.step

    def reports(self) -> Iterator[StepReport]:
        """Train and record; adapter and checkpoint are saved every few steps, and where the run ends or is ended.

        Where the data ends it before its first step, nothing is left behind, so that the folder can be used again. Of
        several processes all train, and one records.
        """
        if not self.trainer.processes.is_main:
            for report in self.trainer.steps(self.done):
                self.last = replace(self.last, step=report.step)
                yield report
            return
        with ExitStack() as stack:
            files = {name: stack.enter_context(open_for_append(self.folder / name)) for name in (_LOG, _ROLLOUTS)}
            if not lock(files[_LOG]):
                raise ConfigError(f"{self.folder}: another process is training there; wait for its end, or end it")
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RUN_RECORD):  # what a killed process had begun to write
                for begun in self.folder.glob(f".*{name}*"):
                    begun.unlink()
            for name, file in files.items():
                truncate_lines(file, self.last.sizes[name])
            write_record(self.folder, self.record)
            try:
                for report in self.trainer.steps(self.done):
                    self._write(report, files)
                    if report.step % self.settings.save_every == 0:
                        self._save(files)
                    yield report
            except BaseException as error:
                if isinstance(error, DataError) and not self.done and "resumed" not in self.record:
                    self._clear()
                else:
                    # The step that was under way may have changed the adapter in part.
                    self.trainer.restore(self.last.arrays, self.last.numbers)
                    self._save(files)
                    self._write_page()
                raise
            self.last = replace(self._standing(self.done, files), complete=True)
            self._save(files)
            self.record["ended"] = {"step": self.done, "early": self.trainer.stopped_early}
            write_record(self.folder, self.record)
            self._write_page()

    def _write(self, report: StepReport, files: Mapping[str, BinaryIO]) -> None:
        append_record(files[_LOG], report.to_json())
        for rollout in report.rollouts[:: max(1, len(report.rollouts) // _ROLLOUTS_A_STEP)]:
            append_record(files[_ROLLOUTS], asdict(rollout))
        self.last = self._standing(report.step, files)

    def _standing(self, step: int, files: Mapping[str, BinaryIO]) -> Checkpoint:
        """Where the run stands between two steps.

        Arrays never change once they are made, so holding those of a step costs nothing until the next update.
        """
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
        return Checkpoint(step, *self.trainer.state, sizes)

    def _write_page(self) -> None:
        """Show the run as a page; what keeps the page from being written must not cost the run."""
        named = {
            image_name(image): image for p in self.preferences for image in (p.a, p.b) if not isinstance(image, Path)
        }

        def images(record: dict[str, Any]) -> tuple[ImageLike, ImageLike] | None:
            first, second = str(record.get("first")), str(record.get("second"))
            in_memory = first in named and second in named
            return (named[first], named[second]) if in_memory else recorded_images(record)

        with suppress(MlxprefError, OSError):
            write_run_page(self.folder, images, self.trainer.vlm.features.images.load)

    def _clear(self) -> None:
        for name in RUN_FILES:
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def _save(self, files: Mapping[str, BinaryIO]) -> None:
        for file in files.values():  # a checkpoint must not be on the disk before the lines that it counts
            os.fsync(file.fileno())
        write_checkpoint(self.folder, self.last)
        save_adapter(
            self.trainer.adapter, self.folder, self.settings.rank, self.settings.lora_scale, self.record["base"]
        )


def start_run(
    settings: TrainSettings,
    output: Path | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    check: Callable[[str, Sequence[Preference]], None] = lambda data, preferences: None,
    vlm: VLM | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Check everything, load what is needed, and write run.json; nothing is trained yet.

    `output` None is runs/<time>; a folder that holds a file is refused. `check` may refuse the preferences before the
    model is loaded. A `vlm` that is given is trained itself.
    """
    folder = Path(processes.broadcast(str(output or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))))
    settings = settings_from(TrainSettings, processes.broadcast(asdict(settings)))
    used = folder.exists() and (not folder.is_dir() or any(not path.is_dir() for path in folder.rglob("*")))
    if processes.is_main and used:
        resume = ", or go on with the run in it by --resume" if (folder / RUN_RECORD).is_file() else ""
        raise ConfigError(f"{folder}: is not empty; give another --output{resume}")
    if not settings.data:
        raise ConfigError("no --data: give `demo`, a public data set, or a file or folder of preferences")
    run = _load(settings, folder, agree, check, vlm, processes)
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, run.record)
    return run


def resume_run(
    folder: Path | None,
    given: Mapping[str, Any],
    agree: Callable[[str], bool] = lambda question: False,
    check: Callable[[str, Sequence[Preference]], None] = lambda data, preferences: None,
    vlm: VLM | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Run | None:
    """Load the run in a folder as it stood at its last checkpoint; None where it is complete.

    All settings come from its run.json. Those that are `given` must be the same, but for `save_every`, for `data` and
    `model` where what they name is the same elsewhere, and for what trades memory for time (`rows`, `micro_batch`,
    `recompute`), which rounds differently, as does another number of processes. ConfigError, DataError or ModelError
    for anything else that is not as it was. A warning
    names what makes a difference in the last bits.
    """
    if folder is None:
        raise ConfigError("--resume: of which run? give its folder with --output")
    before, settings, checkpoint = _left(folder, given, processes)
    if checkpoint and checkpoint.complete:
        logger.info(f"{folder}: this run is complete after {checkpoint.step} steps; nothing is left to do")
        return None
    run = _load(settings, folder, agree, check, vlm, processes)
    if processes.is_main:  # the others have the same data and model as this one
        check_same(folder, before, run.record)
    changed = differences(before, run.record)
    if changed:
        listed = ", ".join(f"{name} is {now}, was {then}" for name, (then, now) in changed.items())
        logger.warning(f"{folder}: {listed}: the run goes on, but not to the last bit as it would have")
    resumption = {"after_step": checkpoint.step if checkpoint else 0, "changed": changed}
    run.record["resumed"] = [*before.get("resumed", []), resumption]
    if checkpoint:
        try:
            run.trainer.restore(checkpoint.arrays, checkpoint.numbers)
        except KeyError as error:
            raise ModelError(
                f"{folder}: its checkpoint is of another version of mlxpref ({error} is missing); go on with that one"
            ) from error
        for name, size in checkpoint.sizes.items():
            there = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if processes.is_main and there < size:
                logger.warning(
                    f"{folder / name}: lines of steps up to {checkpoint.step} are missing; it goes on without them"
                )
        run.last = checkpoint
    return run


def train(
    data: str, model: str | Path | None = None, output: str | Path | None = None, resume: bool = False, **settings: Any
) -> Iterator[StepReport]:
    """Train an adapter and yield a report after every step.

    `settings` are the fields of `mlxpref.config.TrainSettings`. The adapter lands in `output` (default runs/<time>),
    also when the loop is left early. With `resume` the run in `output` goes on (see `resume_run`); a complete one
    yields nothing.
    """
    named = {"data": data} | ({"model": str(model)} if model else {}) | settings
    folder = Path(output) if output else None
    processes = process_group()
    if resume:
        run = resume_run(folder, named, processes=processes)
    else:
        run = start_run(settings_from(TrainSettings, named), folder, processes=processes)
    if run:
        yield from run.reports()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are of steps."""
    lines = (folder / _LOG).read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "updated" in line]


def _left(
    folder: Path, given: Mapping[str, Any], processes: ProcessGroup
) -> tuple[dict[str, Any], TrainSettings, Checkpoint | None]:
    """The record, the settings and the last checkpoint of a run, which process 0 has on its disk, for all."""
    checkpoint, numbers, told = None, None, None
    if processes.is_main:
        before = read_record(folder)
        settings = settings_again(folder, before, given)
        checkpoint = read_checkpoint(folder)
        told = [before, asdict(settings)]
    if checkpoint:
        numbers = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name != "arrays"}
    (before, chosen), numbers = processes.broadcast([told, numbers])
    if numbers is not None:
        checkpoint = Checkpoint(arrays=processes.broadcast_arrays(checkpoint.arrays if checkpoint else {}), **numbers)
    return before, settings_from(TrainSettings, chosen), checkpoint


def _load(
    settings: TrainSettings,
    folder: Path,
    agree: Callable[[str], bool],
    check: Callable[[str, Sequence[Preference]], None],
    vlm: VLM | None,
    processes: ProcessGroup,
) -> Run:
    """A run that stands before its first step; its folder is not touched.

    What can be refused at once is: the reward, then the data, then the model.
    """
    mix = load_rewards(settings.reward)
    data_dir = Path(settings.data_dir).expanduser() if settings.data_dir else None
    preferences = load_preferences(settings.data, settings.split, settings.limit or None, settings.seed, data_dir)
    check(settings.data, preferences)
    if vlm is None:
        name, path = find_checkpoint(settings.model or None, agree)
        settings = replace(settings, model=name)
        checkpoint = ModelCheckpoint.open(path)
        check_folder(checkpoint)
        size, writes = model_size(checkpoint), settings.think or not mix.exact
        plan = require_fit(lambda s: training_plan(size, s, len(preferences), writes), settings, "training")
        logger.info(
            f"about {format_bytes(plan.peak)} of memory at the peak, {format_bytes(plan.weights)} of it weights"
        )
        vlm = load_vlm(checkpoint, settings.max_pixels)
    trainer = Trainer(vlm, preferences, settings, mix, processes)
    start = Checkpoint(0, *trainer.state, {_LOG: 0, _ROLLOUTS: 0})
    base, used = base_of(vlm.checkpoint, settings.model), len(trainer.preferences)
    record = record_of(settings, base, preferences, used, processes.size)
    processes.check_same(
        {
            **{f"version of {name}": record["versions"][name] for name in ("mlxpref", "mlx", "mlx-vlm")},
            "fingerprint of the model": base["base"]["fingerprint"],
            "fingerprint of the preferences": digest_of(preferences),
        }
    )
    return Run(settings, folder, vlm, trainer, record, start)
