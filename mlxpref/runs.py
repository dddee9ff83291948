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

from mlxpref.adapters import save_adapter
from mlxpref.config import TrainSettings, settings_from
from mlxpref.datasets import load_preferences
from mlxpref.errors import ConfigError
from mlxpref.files import write_text
from mlxpref.models import resolve_model
from mlxpref.preferences import Preference
from mlxpref.template import template_version
from mlxpref.training import StepReport, Trainer
from mlxpref.vlm import VLM, load_vlm

__all__ = ["Run", "start_run", "train"]

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

    def reports(self) -> Iterator[StepReport]:
        """Train and record; whatever ends the run, the adapter of the last step is saved."""
        try:
            with (
                (self.folder / "log.jsonl").open("w", encoding="utf-8") as log,
                (self.folder / "rollouts.jsonl").open("w", encoding="utf-8") as rollouts,
            ):
                for report in self.trainer.steps():
                    _append(log, report.to_json())
                    for record in report.rollouts[:: max(1, len(report.rollouts) // _ROLLOUTS_A_STEP)]:
                        _append(rollouts, asdict(record))
                    yield report
        finally:
            save_adapter(self.vlm.model, self.folder, self.settings.rank, self.settings.lora_scale)


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
        vlm = load_vlm(path, settings.max_pixels)
    trainer = Trainer(vlm, preferences, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.json", json.dumps(_record(settings, vlm, preferences), indent=2) + "\n")
    return Run(settings, folder, vlm, preferences, trainer)


def train(
    data: str, model: str | Path | None = None, output: str | Path | None = None, **settings: Any
) -> Iterator[StepReport]:
    """Train an adapter and yield a report after every step.

    `settings` are the fields of `mlxpref.config.TrainSettings`. The adapter lands in `output` (default runs/<time>),
    also when the loop is left early.
    """
    chosen = settings_from(TrainSettings, {"data": data, "model": str(model or "")} | settings)
    yield from start_run(chosen, Path(output) if output else None).reports()


def _append(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _record(settings: TrainSettings, vlm: VLM, preferences: Sequence[Preference]) -> dict[str, Any]:
    """What is needed to know, and to run again, what a run did."""
    rows = [(p.prompt, str(p.a) if isinstance(p.a, Path) else "", p.p_a, p.group) for p in preferences]
    return {
        "settings": asdict(settings),
        "model_path": str(vlm.path),
        "template": template_version(),
        "preferences": len(preferences),
        "data_fingerprint": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mlxpref", "mlx", "mlx-lm", "mlx-vlm", "transformers")},
        },
    }
