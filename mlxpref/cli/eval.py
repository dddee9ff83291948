"""The commands that judge: compare, eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.cli.common import calibrated, image_cache, load_from_options, say_what_the_demo_knows, storing
from mlxpref.cli.eval_strategies import ALIKE, choice_of, strategy_options
from mlxpref.cli.options import (
    calibration_options,
    chosen,
    json_option,
    judge_options,
    prompt_option,
    settings_options,
    store_options,
)
from mlxpref.config import JudgeSettings
from mlxpref.errors import ConfigError, MlxprefError

if TYPE_CHECKING:
    from mlxpref.judge.evaluation import Evaluation, EvaluationSpec
    from mlxpref.preferences import Preference

__all__ = ["compare", "evaluate_command"]


@click.command(short_help="Which of two images people would prefer.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@prompt_option
@calibration_options
@judge_options
@settings_options(JudgeSettings)
@json_option
def compare(
    a: Path,
    b: Path,
    prompt: str,
    calibration: Path | None,
    no_calibration: bool,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    any_base: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Which of two images people would prefer, and why; judged in both orders."""
    from mlxpref.cli.output import print_json
    from mlxpref.cli.tables import pair_to_json, print_pair

    decoded = image_cache(settings)
    for path in (a, b):
        decoded.check(path)
    judge = load_from_options(model, adapter, yes, settings, 2, any_base, decoded)
    calibrated(judge, calibration, no_calibration)
    say_what_the_demo_knows(judge, (a, b))
    verdict = judge.compare(a, b, prompt)
    if as_json:
        judged_by = {"prompt": prompt, "model": judge.name, "adapter": str(adapter) if adapter else None}
        by = {"calibration": judge.calibration.summary() if judge.calibration else None}
        print_json(judged_by | by | pair_to_json(a, b, verdict))
    else:
        print_pair(a, b, verdict)


@click.command("eval", short_help="How often the judge, or any tool's scores, agree with people.")
@click.option("--data", required=True, help="`demo`, a public data set by name, or a file or folder of your own.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with the files of a public data set.")
@click.option("--split", default="test", show_default=True, help="Which part of the data.")
@click.option("--limit", type=click.IntRange(min=1), help="Judge only this many preferences.")
@click.option("--protocol", help="imagereward, hpdv2, pickapic, hpdv3 or pairs.  [default: the data set's own]")
@click.option(
    "--tie-threshold",
    type=click.FloatRange(0, 1),
    help="How far apart the probabilities of a tie are, for pickapic.  [default: chosen on validation_unique]",
)
@strategy_options
@click.option(
    "--scores", type=click.Path(path_type=Path), help="CSV file (image,score) of any tool, measured in a judge's place."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="File of `mlxpref calibrate`, for strategy soft.")
@judge_options
@store_options
@settings_options(JudgeSettings, only=ALIKE)
@json_option
def evaluate_command(
    data: str,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    protocol: str | None,
    tie_threshold: float | None,
    strategy: str,
    samples: str | None,
    think: str | None,
    no_think: bool,
    plot: Path | None,
    scores: Path | None,
    calibration: Path | None,
    store: Path | None,
    no_store: bool,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    any_base: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How often the judge agrees with people, by the data set's own protocol; every pair is judged in both orders."""
    from mlxpref.cli.output import note, print_json
    from mlxpref.cli.tables import print_evaluations
    from mlxpref.data.load import check_preferences, load_preferences
    from mlxpref.judge.evaluation import EvaluationSpec
    from mlxpref.judge.protocols import protocol_of

    choice = choice_of(strategy, samples, think, no_think, plot)
    settings |= choice.settings
    counting = _protocol(protocol or protocol_of(data), tie_threshold, scores)
    if scores and (model or adapter or calibration or plot or chosen(settings)):
        raise click.UsageError(
            "--scores takes the place of a judge: leave out --model, --adapter, --calibration, --plot and settings"
        )
    preferences = load_preferences(data, split, limit, data_dir=data_dir)
    if limit and counting != "pairs":
        note(f"--limit {limit}: the official number is that of the whole split, this one of a part")
    if scores:
        evaluations = [_evaluate_scores(preferences, scores, EvaluationSpec(data, split, None, counting))]
    else:
        from mlxpref.cli.strategy_table import draw_strategies, report_strategies
        from mlxpref.judge.strategies import compare_strategies
        from mlxpref.power import keep_awake
        from mlxpref.preferences import digest_of

        validation = _validation(preferences, data, limit, data_dir, counting, tie_threshold)
        judged = [*preferences, *validation]
        decoded = image_cache(settings)
        check_preferences(data, judged, decoded)
        judge = load_from_options(model, adapter, yes, settings, 2 * len(judged), any_base, decoded)
        judge.processes.check_same({"fingerprint of the preferences": digest_of(judged)})
        judge = calibrated(judge, calibration, calibration is None)  # else a judge is measured as it is
        say_what_the_demo_knows(judge, [image for p in judged for image in (p.a, p.b)])
        with keep_awake(), storing(judge, store, no_store) as storing_judge:
            spec = EvaluationSpec(data, split, protocol=counting, tie_threshold=tie_threshold)
            found = compare_strategies(storing_judge, preferences, spec, choice.variants, validation)
        if recalled := found.counts.recalled:
            note(f"{recalled} of {recalled + found.counts.comparisons} comparisons were judged before")
        if plot and judge.processes.is_main:
            draw_strategies(found, plot)
        if len(found.rows) > 1:
            report_strategies(found, as_json, judge.calibration.summary() if judge.calibration else None)
            return
        evaluations = [found.rows[0].evaluation]
    if as_json:
        by = judge.calibration.summary() if calibration and judge.calibration else None
        print_json(evaluations[0].to_json() | {"calibration": by})
    else:
        print_evaluations(evaluations)


def _protocol(name: str, tie_threshold: float | None, scores: Path | None) -> str:
    """A protocol that exists, and has a tie threshold if one is given."""
    from mlxpref.judge.protocols import PROTOCOLS

    if name not in PROTOCOLS:
        raise click.BadParameter(f"{name!r}; known are {', '.join(PROTOCOLS)}", param_hint="--protocol")
    if tie_threshold is not None and (scores or not PROTOCOLS[name].ties):
        raise click.UsageError("--tie-threshold is for a judge and --protocol pickapic")
    return name


def _evaluate_scores(preferences: Sequence["Preference"], path: Path, spec: "EvaluationSpec") -> "Evaluation":
    """Measure the scores of a file, without a model."""
    from mlxpref.cli.output import note
    from mlxpref.judge.evaluation import evaluation_of_scores
    from mlxpref.judge.external_scores import match_scores, prefer_by_score, read_scores
    from mlxpref.judge.protocols import scored

    asked, given = scored(preferences, spec.protocol), read_scores(path)
    scores = match_scores(given, asked, path)
    if more := len(given) - len(scores):
        note(f"{path}: {more} of {len(given)} scores are of images that were not asked for")
    return evaluation_of_scores(preferences, prefer_by_score(scores, asked), spec)


def _validation(
    preferences: Sequence["Preference"],
    data: str,
    limit: int | None,
    data_dir: Path | None,
    protocol: str,
    tie_threshold: float | None,
) -> list["Preference"]:
    """What a tie threshold is chosen on; nothing where none is needed or one is given."""
    from mlxpref.cli.output import note
    from mlxpref.data.load import load_preferences
    from mlxpref.judge.protocols import PROTOCOLS, VALIDATION_SPLIT

    if tie_threshold is not None or not PROTOCOLS[protocol].ties:
        return []
    try:
        validation = load_preferences(data, VALIDATION_SPLIT, limit, data_dir=data_dir)
    except MlxprefError as error:
        raise type(error)(
            f"{error}; --protocol {protocol} chooses its tie threshold there: or give --tie-threshold"
        ) from error
    if validation == list(preferences):
        raise ConfigError(
            f"--protocol {protocol} chooses its tie threshold on other preferences, the split {VALIDATION_SPLIT}, and "
            f"{data} has none of its own; give --tie-threshold"
        )
    note(f"the tie threshold is chosen on {len(validation)} preferences of {VALIDATION_SPLIT}, which are judged first")
    return validation
