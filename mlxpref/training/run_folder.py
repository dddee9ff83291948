"""The folder of a training run: the adapter and its records, written while the run trains.

It resumes from its last saved state. On the same machine with the same versions it then makes the same adapter, and the
same records but for times and memory, as without the interruption.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mlxpref.checkpoints.files import ADAPTER_CONFIG, PROFILE_FILE
from mlxpref.data.learned import Digests
from mlxpref.engine.adapters import ADAPTER_WEIGHTS, save_adapter
from mlxpref.errors import ConfigError, DataError, MlxprefError
from mlxpref.files import LEARNED, append_record, lock, open_for_append, truncate_lines
from mlxpref.judge.calibration import CALIBRATION_FILE
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, image_name
from mlxpref.report.run_page import RUN_PAGE, recorded_images, write_run_page
from mlxpref.training.resume import STATE_FILES, RunState, write_state
from mlxpref.training.run_record import RUN_RECORD, read_record, write_record
from mlxpref.training.step_report import StepReport, with_totals
from mlxpref.training.trackers import tracking
from mlxpref.training.trainer import Trainer

LOG, ROLLOUTS = "log.jsonl", "rollouts.jsonl"
RUN_FILES = (
    ADAPTER_WEIGHTS, ADAPTER_CONFIG, RUN_RECORD, LOG, ROLLOUTS, RUN_PAGE, CALIBRATION_FILE, PROFILE_FILE,
    LEARNED, *STATE_FILES,
)  # fmt: skip
"""The files of a run, and of its adapter's calibration, in its folder."""
_ROLLOUTS_PER_STEP = 4
"""The number of rollouts of a step in rollouts.jsonl."""

Files = Mapping[str, BinaryIO]


@dataclass
class Run:
    """One run: its folder, trainer, run.json and the state after its last recorded step.

    `digests` (N, 4) are those of its preferences, `learned` the rows of those that it learns from.
    """

    folder: Path
    trainer: Trainer
    record: dict[str, Any]
    state: RunState
    digests: Digests
    learned: Digests

    @property
    def done(self) -> int:
        """The number of recorded steps."""
        return self.state.step

    def reports(self) -> Iterator[StepReport]:
        """Train and record; save adapter and state every few steps, and at the end or an interruption.

        If bad data end it before its first step, it removes the folder, so that the next run can use it. All of several
        processes train, and the main one records.
        """
        is_new = not self.done and not self.state.sizes[LOG]
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
                    append_record(files[LOG], line)
                    track(line)
                    logger.info(_measured(0, line["held_out"]))
                    self.state = self._state_after(0, files)
                for report in self.trainer.steps(self.done):
                    self._record(report, files, track)
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
        files = {name: stack.enter_context(open_for_append(self.folder / name)) for name in (LOG, ROLLOUTS)}
        if not lock(files[LOG]):
            raise ConfigError(f"{self.folder}: another process is training there; wait for its end, or end it")
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RUN_RECORD):
            for remnant in self.folder.glob(f".*{name}*"):  # of a process that was killed
                remnant.unlink()
        for name, file in files.items():
            truncate_lines(file, self.state.sizes[name])
        write_record(self.folder, self.record)
        return files

    def _record(self, report: StepReport, files: Files, track: Callable[[dict[str, Any]], None]) -> None:
        """Count a step, and append every few ones, the first, the last and those with a measurement to the records."""
        totals = None if self.state.totals is None else with_totals(self.state.totals, report)
        if report.held_out:
            logger.info(_measured(report.step, report.held_out))
        is_due = report.step % self.trainer.settings.log_every == 0 or report.step in (1, report.steps)
        line = report.to_json() | ({"totals": totals} if totals else {})
        is_due |= bool(report.held_out) or totals is None  # without totals every line counts
        if is_due:
            append_record(files[LOG], line)
            track(line)
            for rollout in report.rollouts[:: max(1, len(report.rollouts) // _ROLLOUTS_PER_STEP)]:
                append_record(files[ROLLOUTS], asdict(rollout))
        self.state = replace(self._state_after(report.step, files), totals=totals, line=None if is_due else line)

    def _state_after(self, step: int, files: Files) -> RunState:
        """The state after a step; its arrays are immutable, so holding them costs nothing until the next update."""
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
        return RunState(step, *self.trainer.state, sizes, totals=self.state.totals)

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
        save_adapter(
            self.trainer.adapter, self.folder, settings.rank, settings.lora_scale, base, self.trainer.vlm.profile
        )

    def _restore(self, files: Files) -> None:
        """Go back to the last recorded step, as an unfinished one may have changed the adapter, and save it."""
        self.trainer.restore(self.state.arrays, self.state.numbers)
        self._save(files)
        self._end_log(files)  # behind what is saved: a resumed run removes it
        self._write_page()

    def _close(self, files: Files) -> None:
        """Save the run as complete."""
        if self.trainer.left_out.reasons:
            logger.warning(f"left out: {self.trainer.left_out}")
        self._end_log(files)
        self.state = replace(self._state_after(self.done, files), complete=True)
        self._save(files)
        self.record["ended"] = {"step": self.done, "early": self.trainer.held_out.should_stop}
        write_record(self.folder, self.record)
        self._write_page()

    def _end_log(self, files: Files) -> None:
        """Append the last step, if the log lacks it."""
        if self.state.line:
            append_record(files[LOG], self.state.line)

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


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the steps in a run's log."""
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "updated" in line]


def held_out_change(folder: Path) -> dict[str, Any] | None:
    """The held-out accuracy before training and with a run's saved adapter; None where nothing was measured.

    `step` is the measured step, the adapter's own or the last one before; with patience it is the `best_of` so many.
    """
    lines = map(json.loads, (folder / LOG).read_text(encoding="utf-8").splitlines())
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
