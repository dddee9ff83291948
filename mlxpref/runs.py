"""A training run: from settings to a folder with the adapter and the records of how it came about."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from mlxpref.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, save_adapter
from mlxpref.advice import gigabytes, plan_training
from mlxpref.config import TrainSettings, settings_from
from mlxpref.datasets import load_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import write_text
from mlxpref.models import resolve_model
from mlxpref.preferences import ImageLike, Preference
from mlxpref.training import StepReport, Trainer
from mlxpref.vlm import VLM, check_folder, load_vlm

__all__ = ["RUN_FILES", "Run", "start_run", "train"]

RUN_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "run.json", "log.jsonl", "rollouts.jsonl")
"""What a run leaves in its folder."""

_ROLLOUTS_A_STEP = 4
"""How many rollouts of a step are kept in rollouts.jsonl."""


@dataclass
class Run:
    """One run: its settings, the model that is trained, and its folder."""

    settings: TrainSettings
    folder: Path
    vlm: VLM
    preferences: Sequence[Preference]
    trainer: Trainer
    base: dict[str, str]
    done: int = 0

    def reports(self) -> Iterator[StepReport]:
        """Train and record; the adapter is saved every few steps, and where the run ends or is ended.

        Where the data ends it before its first step, nothing is left behind, so that the folder can be used again.
        """
        self.done = 0
        try:
            with (
                (self.folder / "log.jsonl").open("w", encoding="utf-8") as log,
                (self.folder / "rollouts.jsonl").open("w", encoding="utf-8") as rollouts,
            ):
                for report in self.trainer.steps():
                    _append(log, report.to_json())
                    for record in report.rollouts[:: max(1, len(report.rollouts) // _ROLLOUTS_A_STEP)]:
                        _append(rollouts, asdict(record))
                    self.done = report.step
                    if self.done % self.settings.save_every == 0:
                        self._save()
                    yield report
        except DataError:
            if self.done:
                self._save()
            else:
                self._clear()
            raise
        except BaseException:
            self._save()
            raise
        self._save()

    def _clear(self) -> None:
        for name in RUN_FILES:
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def _save(self) -> None:
        save_adapter(self.vlm.model, self.folder, self.settings.rank, self.settings.lora_scale, self.base)


def start_run(
    settings: TrainSettings,
    output: Path | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    say: Callable[[str], None] = lambda line: None,
    check: Callable[[str, Sequence[Preference]], None] = lambda data, preferences: None,
    vlm: VLM | None = None,
) -> Run:
    """Check everything, load what is needed, and write run.json; nothing is trained yet.

    `output` None is runs/<time>; a folder that holds something is refused. `check` may refuse the preferences
    before the model is loaded. A `vlm` that is given is trained itself.
    """
    folder = output or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty; give another --output")
    if not settings.data:
        raise ConfigError("no --data: give `demo`, or a .jsonl file of preferences")
    preferences = load_preferences(settings.data, settings.split, settings.limit or None, settings.seed)
    check(settings.data, preferences)
    if vlm is None:
        name, path = resolve_model(settings.model or None, agree, say)
        settings = replace(settings, model=name)
        check_folder(path)
        plan = plan_training(path, settings, len(preferences))
        say(f"about {gigabytes(plan.peak)} of memory at the peak, {gigabytes(plan.weights)} of it weights")
        vlm = load_vlm(path, settings.max_pixels)
    trainer = Trainer(vlm, preferences, settings)
    folder.mkdir(parents=True, exist_ok=True)
    base = base_of(vlm.path)
    write_text(folder / "run.json", json.dumps(_record(settings, base, trainer.preferences), indent=2) + "\n")
    return Run(settings, folder, vlm, trainer.preferences, trainer, base)


def train(
    data: str, model: str | Path | None = None, output: str | Path | None = None, **settings: Any
) -> Iterator[StepReport]:
    """Train an adapter and yield a report after every step.

    `settings` are the fields of `mlxpref.config.TrainSettings`. The adapter lands in `output` (default runs/<time>),
    also when the loop is left early.
    """
    chosen = settings_from(TrainSettings, {"data": data, "model": str(model or "")} | settings)
    yield from start_run(chosen, Path(output) if output else None).reports()


def _name(image: ImageLike) -> str:
    """What an image of the data is called there: its path, or its pixels where it has none."""
    return str(image) if isinstance(image, Path) else hashlib.sha256(image.tobytes()).hexdigest()


def _append(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _record(settings: TrainSettings, base: dict[str, str], preferences: Sequence[Preference]) -> dict[str, Any]:
    """What is needed to know, and to run again, what a run did."""
    rows = [[p.prompt, *(_name(image) for image in (p.a, p.b)), p.p_a, p.votes, p.group] for p in preferences]
    return {
        "settings": asdict(settings),
        "base": base,
        "preferences": len(preferences),
        "data_fingerprint": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mlxpref", "mlx", "mlx-lm", "mlx-vlm", "transformers")},
        },
    }
