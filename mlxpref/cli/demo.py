"""`mlxpref demo`: measure the embedded judge, train it, measure it again, and let it rank pictures."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlxpref.cli.options import FILE, HelpCommand, json_option
from mlxpref.cli.output import note, print_json, print_text, track_steps
from mlxpref.cli.tables import print_evaluations, print_example, print_ranking
from mlxpref.config import TrainSettings, read_settings, settings_from
from mlxpref.data.find_images import find_images
from mlxpref.data.thumbnails import thumbnail
from mlxpref.demo import TRAINING
from mlxpref.demo.pictures import COLOURS, QUALITIES, PictureSpec, render
from mlxpref.demo.preferences import demo_preferences, prompt_text
from mlxpref.errors import ConfigError
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import load_judge
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import Ranking
from mlxpref.preferences import Preference
from mlxpref.report.curves import curve_svg
from mlxpref.report.html import write_page
from mlxpref.text import counted, format_duration
from mlxpref.training.run import start_run
from mlxpref.training.run_folder import RUN_FILES
from mlxpref.training.step_report import StepReport

_WANTED = ("purple", "triangle")
SAMPLE_PROMPT = prompt_text(*_WANTED)
_SAMPLES = (
    *(PictureSpec(*_WANTED, quality) for quality in QUALITIES),
    *(PictureSpec("purple", shape, quality) for shape in ("circle", "square", "cross") for quality in QUALITIES[:3]),
    *(PictureSpec(colour, "triangle", "clean") for colour in COLOURS if colour != "purple"),
    *(PictureSpec(colour, "triangle", "blurry") for colour in COLOURS if colour != "purple"),
    PictureSpec("green", "circle", "clean"),
)
"""The four that match the prompt, and twenty that nearly do."""
TEST_PAIRS = 400
TEST_SEED = 20261123
"""Seed of pictures for the demo only; settings were chosen with other seeds."""
HELD_OUT_PAIRS = 400
_MEASURED = {
    "before": ("test pictures, before", "test", True),
    "after": ("test pictures, after", "test", True),
    "before_read": ("test, read at once, before", "test", False),
    "after_read": ("test, read at once, after", "test", False),
    "held_out_prompts_before": ("held-out prompts, before", "heldout", True),
    "held_out_prompts": ("held-out prompts, after", "heldout", True),
    "held_out_prompts_before_read": ("held-out, read at once, before", "heldout", False),
    "held_out_prompts_read": ("held-out, read at once, after", "heldout", False),
}
"""The measurements by their keys in JSON: the name for people, the split, and whether the judge thinks."""


@dataclass(frozen=True)
class Example:
    """One pair with a shown first, and the judge's verdicts on it before and after training."""

    preference: Preference
    before: PairVerdict
    after: PairVerdict

    def to_json(self) -> dict[str, Any]:
        """Both reasonings, the preferences for the first image, and whether people prefer it."""
        return {
            "prompt": self.preference.prompt,
            "first_is_right": self.preference.p_people > 0.5,
            "before": self.before.a_shown_first[0].reasoning,
            "after": self.after.a_shown_first[0].reasoning,
            "p_before": self.before.p_a_shown_first or 0.0,
            "p_after": self.after.p_a_shown_first or 0.0,
        }


@dataclass(frozen=True)
class DemoResult:
    """The demo's measurements by their keys in JSON, its example, its ranking and its files."""

    evaluations: dict[str, Evaluation]
    steps: int
    training_seconds: float
    example: Example | None
    ranking: Ranking
    html: Path
    adapter: Path

    @property
    def by_name(self) -> dict[str, Evaluation]:
        """The measurements by their names for people."""
        return {_MEASURED[key][0]: evaluation for key, evaluation in self.evaluations.items()}

    def to_json(self) -> dict[str, Any]:
        """The JSON of `mlxpref demo`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "evaluations"}
        values |= self.evaluations
        plain = {name: value.to_json() for name, value in values.items() if hasattr(value, "to_json")}
        paths = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
        return values | plain | paths | {"training_seconds": round(self.training_seconds, 1)}


@click.command(cls=HelpCommand, examples=("mlxpref demo", "mlxpref demo --output ./demo --json"))
@click.option(
    "--output",
    type=FILE,
    default=Path("mlxpref-demo"),
    show_default=True,
    help="Folder for pictures, adapter and page.",
)
@json_option
def demo(output: Path, as_json: bool) -> None:
    """The whole story offline: measure the embedded judge, train it, measure it again, rank pictures with reasons."""
    note("the demo judge was taught by an annotator who lets picture quality decide over the prompt: expect 55 to 75 %")
    result = run_demo(load_judge("demo"), output, demo_settings())
    if as_json:
        print_json(result.to_json())
        return
    print_evaluations(list(result.by_name.values()), list(result.by_name))
    if result.example:
        print_example(result.example.to_json())
    print_text(
        f"trained for {counted(result.steps, 'step')} in {format_duration(result.training_seconds)}; "
        f"the adapter is in {result.adapter}"
    )
    print_ranking(result.ranking)
    print_text(f"the whole story as a page: {result.html}")


def demo_settings(**changes: Any) -> TrainSettings:
    """The settings of the demo's training: training.toml, with changes."""
    return settings_from(TrainSettings, read_settings(TRAINING) | changes, str(TRAINING))


def run_demo(judge: Judge, folder: Path, settings: TrainSettings) -> DemoResult:
    """Measure the demo judge, train it in place, measure it again and let it rank pictures; write all into a folder.

    The folder gets `pictures`, the run's `adapter` and `index.html`; an earlier demo in it is replaced. ConfigError for
    a folder with anything else in it.
    """
    clear_demo(folder)
    pictures = write_pictures(folder)
    data = {
        "test": demo_preferences("test", TEST_PAIRS, TEST_SEED),
        "heldout": demo_preferences("heldout", HELD_OUT_PAIRS, TEST_SEED),
    }

    def measure(when: str) -> dict[str, Evaluation]:
        asked = {think: replace(judge, settings=replace(judge.settings, think=think)) for think in (True, False)}
        return {
            key: evaluate(asked[think], data[split], EvaluationSpec("demo", split))
            for key, (name, split, think) in _MEASURED.items()
            if name.endswith(when)
        }

    before = measure("before")
    run = start_run(settings, folder / "adapter", vlm=judge.vlm)
    reports = list(track_steps(run.reports(), settings.steps))
    judge = replace(judge, adapter=run.folder)
    measured = before | measure("after")
    result = DemoResult(
        evaluations={key: measured[key] for key in _MEASURED},
        steps=len(reports),
        training_seconds=sum(report.seconds - report.evaluation_seconds for report in reports),
        example=_example(data["test"], measured["before"], measured["after"]),
        ranking=judge.rank(find_images([pictures]), SAMPLE_PROMPT),
        html=folder / "index.html",
        adapter=run.folder,
    )
    _write_page(result, reports)
    return result


def write_pictures(folder: Path) -> Path:
    """Write the sample pictures into a folder, named by their content, and return the folder."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for index, spec in enumerate(_SAMPLES):
        render(spec, np.random.default_rng([7, index])).save(pictures / _file_name(spec))
    return pictures


def clear_demo(folder: Path) -> None:
    """Remove an earlier demo, but for its page, from a folder; ConfigError if the folder holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; give a folder with --output")
    demo_files = {f"pictures/{_file_name(spec)}" for spec in _SAMPLES} | {f"adapter/{name}" for name in RUN_FILES}
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    others = [path for path in files if path.relative_to(folder).as_posix() not in demo_files | {"index.html"}]
    if others:
        raise ConfigError(f"{folder}: holds what no demo wrote, such as {others[0]}; give another --output")
    for path in files:
        if path != folder / "index.html":  # the earlier page stays until the new one replaces it
            path.unlink()
    with suppress(OSError):  # it is empty, or not there
        (folder / "adapter").rmdir()


def _file_name(spec: PictureSpec) -> str:
    return f"{spec.colour}-{spec.shape}-{spec.quality}.png"


def _write_page(result: DemoResult, reports: Sequence[StepReport]) -> None:
    curve = curve_svg(
        {"rollouts that agree": [r.accuracy for r in reports], "reward": [r.reward for r in reports]},
        label="mean over rollouts",
    )
    bars = [(name, evaluation, name.rpartition(" ")[2]) for name, evaluation in result.by_name.items()]
    places = [
        entry.to_json() | {"name": entry.short_name, "picture": thumbnail(result.ranking.images[entry.index]).uri}
        for entry in result.ranking
    ]
    example = None
    if result.example:
        pair = result.example.preference
        example = result.example.to_json() | {"first": thumbnail(pair.a).uri, "second": thumbnail(pair.b).uri}
    write_page(
        result.html,
        "demo.html",
        result=result,
        bars=bars,
        curve=curve,
        ranked=places,
        example=example,
        meaning=result.ranking.meaning,
    )


def _example(test: Sequence[Preference], before: Evaluation, after: Evaluation) -> Example | None:
    """The pair whose verdict changed most clearly from wrong to right."""
    examples = [
        (abs(new.p_a - old.p_a), Example(preference, old, new))
        for preference, old, new in zip(test, before.verdicts, after.verdicts, strict=True)
        if (old.p_a > 0.5) != (preference.p_people > 0.5) == (new.p_a > 0.5)
    ]
    return max(examples, key=lambda item: item[0])[1] if examples else None
