"""`mlxpref demo`: measure the embedded judge, train it, measure it again, and let it rank pictures."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from mlxpref.cli.options import FILE, HelpCommand, json_option
from mlxpref.cli.output import note, print_json, print_table, print_text, track_steps
from mlxpref.cli.tables import percent, print_evaluations, print_example, print_ranking
from mlxpref.config import TrainSettings, read_settings, settings_from
from mlxpref.data.find_images import find_images
from mlxpref.data.thumbnails import thumbnail
from mlxpref.demo import TRAINING
from mlxpref.demo.briefs import Requirement, count_met, prompt_text
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.demo.preferences import PairSpec, demo_pairs, demo_preferences
from mlxpref.demo.reasons import Truth, truth_of
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

SAMPLE_BRIEF = (Requirement("circle", "green"), Requirement("cross", "triangle"), Requirement("square", "blue"))
SAMPLE_PROMPT = prompt_text(SAMPLE_BRIEF)
_SAMPLES = tuple(
    PictureSpec(*colours)._replace(quality=quality)
    for colours in sorted(set(permutations(("green", "blue", "red", "red"))))
    for quality in ("clean", "blurry")
)
"""Every way to give these colours to the four shapes, clean and blurry: 24 pictures."""
TEST_PAIRS, OTHER_PAIRS = 400, 200
TEST_SEED = 20261130
"""Seed of pictures for the demo only; settings were chosen with other seeds."""
_SAMPLED = 2
"""Completions of each order where they are sampled."""


class _Measurement(NamedTuple):
    """What is measured: its name for people, the split and its pairs, whether the judge thinks, and its samples."""

    name: str
    split: str = "test"
    pairs: int = TEST_PAIRS
    think: bool = True
    samples: int = 1


_MEASURED = {
    "before": _Measurement("thinking, before"),
    "after": _Measurement("thinking, after"),
    "before_sampled": _Measurement(f"thinking {_SAMPLED} times, before", samples=_SAMPLED),
    "after_sampled": _Measurement(f"thinking {_SAMPLED} times, after", samples=_SAMPLED),
    "before_read": _Measurement("at once, before", think=False),
    "after_read": _Measurement("at once, after", think=False),
    "held_out_prompts_before": _Measurement("held-out briefs, before", "heldout", OTHER_PAIRS),
    "held_out_prompts": _Measurement("held-out briefs, after", "heldout", OTHER_PAIRS),
    "four_requirements_before": _Measurement("four requirements, before", "four", OTHER_PAIRS),
    "four_requirements": _Measurement("four requirements, after", "four", OTHER_PAIRS),
}
"""The measurements by their keys in JSON."""
_WRITTEN = ("before", "after", "before_sampled", "after_sampled")
"""The measurements whose completions are read as well."""


@dataclass(frozen=True)
class Writing:
    """What a judge wrote about pairs: the share of right answers, tokens a completion, and the truth of its reasons."""

    right: float
    tokens: float
    truth: Truth

    def to_json(self) -> dict[str, Any]:
        """All shares by their names."""
        return {"right": self.right, "tokens": self.tokens} | asdict(self.truth)


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
    """The demo's measurements by their keys in JSON, what was written in them, its example, ranking and files."""

    evaluations: dict[str, Evaluation]
    written: dict[str, Writing]
    steps: int
    training_seconds: float
    example: Example | None
    ranking: Ranking
    html: Path
    adapter: Path

    @property
    def by_name(self) -> dict[str, Evaluation]:
        """The measurements by their names for people."""
        return {_MEASURED[key].name: evaluation for key, evaluation in self.evaluations.items()}

    def to_json(self) -> dict[str, Any]:
        """The JSON of `mlxpref demo`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "evaluations"}
        values |= self.evaluations
        plain = {name: value.to_json() for name, value in values.items() if hasattr(value, "to_json")}
        paths = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
        written = {name: writing.to_json() for name, writing in self.written.items()}
        return values | plain | paths | {"written": written, "training_seconds": round(self.training_seconds, 1)}


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
    note("a sloppy annotator taught the demo judge to check one requirement of three: expect 55 to 75 %")
    result = run_demo(load_judge("demo"), output, demo_settings())
    if as_json:
        print_json(result.to_json())
        return
    print_evaluations(list(result.by_name.values()), list(result.by_name))
    _print_written(result.written)
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
        (split, pairs): demo_preferences(split, pairs, TEST_SEED)
        for split, pairs in {(each.split, each.pairs) for each in _MEASURED.values()}
    }

    def measure(when: str) -> dict[str, Evaluation]:
        return {key: judged(each) for key, each in _MEASURED.items() if each.name.endswith(when)}

    def judged(each: _Measurement) -> Evaluation:
        asked = replace(judge.settings, think=each.think, samples=each.samples, rows=settings.rows)
        preferences = data[each.split, each.pairs]
        return evaluate(replace(judge, settings=asked), preferences, EvaluationSpec("demo", each.split))

    before = measure("before")
    run = start_run(settings, folder / "adapter", vlm=judge.vlm)
    reports = list(track_steps(run.reports(), settings.steps))
    judge = replace(judge, adapter=run.folder)
    measured = before | measure("after")
    tested = demo_pairs("test", TEST_PAIRS, TEST_SEED)
    result = DemoResult(
        evaluations={key: measured[key] for key in _MEASURED},
        written={key: written_about(tested, measured[key].verdicts) for key in _WRITTEN},
        steps=len(reports),
        training_seconds=sum(report.seconds - report.evaluation_seconds for report in reports),
        example=_example(data["test", TEST_PAIRS], measured["before"], measured["after"]),
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
    """The requirements that a picture meets, the colours of its shapes in their order, and its quality."""
    return f"{count_met(SAMPLE_BRIEF, spec)}-met-{'-'.join(spec)}.png"


def written_about(pairs: Sequence[PairSpec], verdicts: Sequence[PairVerdict]) -> Writing:
    """What a judge wrote about pairs in both orders."""
    shown = [
        (each, verdict)
        for pair, judged in zip(pairs, verdicts, strict=True)
        for each, order in ((pair, judged.a_shown_first), (pair.swapped, judged.a_shown_second))
        for verdict in order
    ]
    prefers_first = [None if (p := verdict.p_first("soft")) is None else p > 0.5 for _, verdict in shown]
    right = [first == (pair.better == "a") for (pair, _), first in zip(shown, prefers_first, strict=True)]
    truth = truth_of(
        (pair, verdict.reasoning, first) for (pair, verdict), first in zip(shown, prefers_first, strict=True)
    )
    return Writing(float(np.mean(right)), float(np.mean([verdict.tokens for _, verdict in shown])), truth)


def _print_written(written: Mapping[str, Writing]) -> None:
    """Print a line for the completions of each measurement."""
    columns: dict[str, Callable[[Writing], str]] = {
        ">right": lambda each: percent(each.right),
        ">tokens": lambda each: f"{each.tokens:.1f}",
        ">checked": lambda each: _share(each.truth.complete),
        ">colours true": lambda each: _share(each.truth.facts),
        ">verdicts true": lambda each: _share(each.truth.verdicts),
        ">sums true": lambda each: _share(each.truth.sums),
        ">answer follows": lambda each: _share(each.truth.follows),
    }
    print_table(
        ("written", *columns),
        ((_MEASURED[key].name, *(column(each) for column in columns.values())) for key, each in written.items()),
        title="What is written on the test pairs, one completion at a time:",
        shorten="written",
        drop=("sums true", "answer follows", "colours true"),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _write_page(result: DemoResult, reports: Sequence[StepReport]) -> None:
    curve = curve_svg(
        {"rollouts that agree": [r.accuracy for r in reports], "reward": [r.reward for r in reports]},
        label="mean over rollouts",
    )
    length = curve_svg({"tokens": [r.tokens / len(r.rollouts) for r in reports]}, label="tokens a rollout")
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
        written=[(_MEASURED[key].name, each) for key, each in result.written.items()],
        curve=curve,
        length=length,
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
