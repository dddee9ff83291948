"""`mlxpref eval`: measure the agreement of a judge, or of another tool's image scores, with people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from mlxpref.cli.common import Consent, check_apart, check_output, image_cache, load_data, software_versions
from mlxpref.cli.judges import announce_time, open_judge
from mlxpref.cli.options import (
    FILE,
    DataOptions,
    JudgeOptions,
    OldSpellings,
    flag,
    json_option,
    option,
    option_group,
    settings_options,
)
from mlxpref.cli.output import note, print_json
from mlxpref.cli.tables import print_evaluations, print_strategies
from mlxpref.config import JudgeSettings
from mlxpref.data.learned import count_learned
from mlxpref.data.load import check_preferences
from mlxpref.judge.diagnostics import answer_warnings, demo_warnings
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluation_of_scores, to_judge
from mlxpref.judge.external_scores import match_scores, prefer_by_score, read_scores
from mlxpref.judge.functions import tie_validation
from mlxpref.judge.protocols import PROTOCOLS, counted, protocol_of
from mlxpref.judge.strategies import (
    StrategyComparison,
    StrategyVariant,
    budget_of,
    compare_strategies,
    strategy_variants,
)
from mlxpref.preferences import Pair, Preference, data_fingerprint, images_of
from mlxpref.report.predictions import FORMATS as PREDICTION_FORMATS
from mlxpref.report.predictions import comparison_rows, score_rows, write_predictions
from mlxpref.report.reliability import FORMATS, draw_strategies
from mlxpref.verdict import STRATEGIES, Strategy


def _strategies(ctx: click.Context, parameter: click.Parameter, value: str) -> list[Strategy]:
    """Strategies separated by commas, in the order of a table."""
    names = [name.strip() for name in value.split(",")]
    if unknown := sorted(set(names) - set(STRATEGIES)):
        raise click.BadParameter(f"{', '.join(map(repr, unknown))}; known are {', '.join(STRATEGIES)}")
    return [name for name in STRATEGIES if name in names]


def _counts(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Numbers from 1, separated by commas."""
    counts = value.split(",") if value else []
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise click.BadParameter(f"{value!r}: give numbers from 1, such as 1,2,4,8")
    return [int(count) for count in counts] or None


@dataclass(frozen=True)
class StrategyOptions:
    """The strategies, numbers of samples and ways of thinking to compare."""

    strategies: Sequence[Strategy] = option(
        "--strategy",
        default="soft",
        show_default=True,
        callback=_strategies,
        help="soft, select or score; several with commas.",
    )
    samples: Sequence[int] | None = option(
        "--samples",
        callback=_counts,
        help="Completions per order: one is greedy, several are sampled; several numbers with commas.  [default: 1]",
    )
    compare_thinking: bool = flag("--compare-thinking", "Compare judging with thinking and without.")

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The judge's settings in these options and in others, for the variant with the most memory."""
        if self.compare_thinking and "think" in given:
            raise click.UsageError("--compare-thinking takes the place of --think and --no-think")
        samples = {"samples": max(self.samples)} if self.samples else {}
        return {**given, **samples, **({"think": True} if self.compare_thinking else {})}

    def variants(self, think: bool) -> list[StrategyVariant]:
        """The variants in the options; `think` says whether the judge thinks, if they do not compare both."""
        modes = [True, False] if self.compare_thinking else [think]
        return strategy_variants(self.strategies, self.samples or [1], modes)


@dataclass(frozen=True)
class OutputOptions:
    """The outputs of an evaluation besides stdout."""

    plot: Path | None = option("--plot", type=FILE, help="Draw how reliable probabilities are: .svg, .png.")
    predictions: Path | None = option(
        "--predictions", type=FILE, help="Write what was predicted for each pair, with reasons: .csv, .jsonl."
    )

    def check(self) -> None:
        """Raise errors, before the work, for outputs that could not be written after it."""
        if self.plot is not None:
            if self.plot.suffix.lower() not in FORMATS or not self.plot.absolute().parent.is_dir():
                endings = " or ".join(FORMATS)
                problem = f"{self.plot}: give a name that ends with {endings}, in a folder that exists"
                raise click.BadParameter(problem, param_hint="--plot")
            check_output("--plot", self.plot)
        if self.predictions is not None:
            check_output("--predictions", self.predictions, PREDICTION_FORMATS)

    def write(self, comparison: StrategyComparison) -> None:
        """Write the outputs and print their places."""
        if self.plot is not None:
            draw_strategies(comparison, self.plot)
            note(f"drawing: {self.plot}")
        if self.predictions is not None:
            write_predictions(self.predictions, list(comparison_rows(comparison)))
            note(f"predictions: {self.predictions}")


_FEW = 4
"""So few pairs are judged as quickly as their time is estimated."""
_OLD_THINK = {("--think", "yes"): ("--think",), ("--think", "both"): ("--compare-thinking",)}


@click.command(
    "eval",
    cls=OldSpellings,
    old=_OLD_THINK,
    examples=(
        "mlxpref eval --data preferences.jsonl --adapter runs/taste",
        "mlxpref eval --data imagereward --limit 200 --predictions pairs.csv",
        "mlxpref eval --data demo --model demo --strategy soft,select --samples 1,4 --compare-thinking",
        "mlxpref eval --data hpdv2 --scores scores.csv",
    ),
)
@option_group(DataOptions, "source")
@click.option("--protocol", help="imagereward, hpdv2, pickapic, hpdv3 or pairs.  [default: the data set's own]")
@click.option(
    "--tie-threshold",
    type=click.FloatRange(0, 1),
    help="How far apart the probabilities of a tie are, for pickapic.  [default: chosen on validation_unique]",
)
@option_group(StrategyOptions, "variants")
@option_group(OutputOptions, "outputs")
@click.option(
    "--scores", type=FILE, help="Table (image,score) of any tool, such as a CSV file, measured instead of a judge."
)
@option_group(JudgeOptions, "judge", only=("model", "adapter", "any_base", "yes", "calibration", "store", "no_store"))
@settings_options(JudgeSettings, only=("think", "max_tokens", "max_pixels", "seed", "rows", "criterion", "profile"))
@json_option
def evaluate(
    source: DataOptions,
    protocol: str | None,
    tie_threshold: float | None,
    variants: StrategyOptions,
    outputs: OutputOptions,
    scores: Path | None,
    judge: JudgeOptions,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure the judge's agreement with people, by the data set's own protocol and in both orders of every pair.

    It ignores the judge's own calibration, unless --calibration names a file. --json prints an object: what was judged,
    and `results`; the keys of a single result stand in the object itself, too.
    """
    settings = variants.settings(settings)
    spec = _spec(source, protocol, tie_threshold, scores)
    if scores and (judge.model or judge.adapter or judge.calibration or outputs.plot or settings):
        raise click.UsageError(
            "--scores takes the place of a judge: leave out --model, --adapter, --calibration, --plot and settings"
        )
    outputs.check()
    consent = Consent(judge.yes, judge.model, judge.adapter)
    preferences = load_data(source, consent, needs_images=not scores)
    inputs = (source.data, scores, judge.store, judge.calibration, *images_of(preferences))
    check_apart({"--plot": outputs.plot, "--predictions": outputs.predictions}, inputs)
    judge = replace(judge, yes=consent.agreed)
    spec = replace(spec, split=preferences.split)
    if source.limit and spec.protocol != "pairs":
        note(f"--limit {source.limit}: the official number is that of the whole split, this one of a part")
    judged: dict[str, Any] = {"limit": source.limit, "versions": software_versions()}
    if scores:
        evaluation = _evaluate_scores(preferences, scores, spec, outputs)
        result = evaluation.to_json() | {"calibration": None, "learned_from": None}
        judged |= {"model": None, "adapter": None, "scores": str(scores), "warnings": []}
        print_json({**result, **judged, "results": [result]}) if as_json else print_evaluations([evaluation])
        return
    comparison, by_judge, results = _evaluate_judge(source, preferences, spec, variants, judge, settings, outputs)
    if as_json:
        single = results[0] if len(results) == 1 else {}
        print_json({**single, **judged, **by_judge, "results": results})
    elif len(results) == 1:
        print_evaluations([comparison.rows[0].evaluation])
    else:
        print_strategies(comparison)


def _spec(
    source: DataOptions, protocol: str | None, tie_threshold: float | None, scores: Path | None
) -> EvaluationSpec:
    """The evaluation's plan; errors for an unknown protocol, and for a tie threshold that it does not use."""
    protocol = protocol or protocol_of(source.data)
    if protocol not in PROTOCOLS:
        raise click.BadParameter(f"{protocol!r}; known are {', '.join(PROTOCOLS)}", param_hint="--protocol")
    if tie_threshold is not None and (scores or not PROTOCOLS[protocol].ties):
        raise click.UsageError("--tie-threshold is for a judge and --protocol pickapic")
    return EvaluationSpec(source.data, "", protocol=protocol, tie_threshold=tie_threshold)


def _evaluate_judge(
    source: DataOptions,
    preferences: Sequence[Preference],
    spec: EvaluationSpec,
    variants: StrategyOptions,
    options: JudgeOptions,
    settings: dict[str, Any],
    outputs: OutputOptions,
) -> tuple[StrategyComparison, dict[str, Any], list[dict[str, Any]]]:
    """Judge preferences by every variant; only --calibration applies a calibration.

    Also returns the JSON about the judge, and that of each result.
    """
    validation = tie_validation(spec, preferences, source.limit, source.data_dir)
    all_preferences = [*preferences, *validation]
    cache = image_cache(settings, options)
    left_out = check_preferences(source.data, all_preferences, cache)
    options = replace(options, no_calibration=options.calibration is None)
    images = images_of(all_preferences)
    with open_judge(images, options, settings, cache) as judge:
        judge.processes.check_same({"fingerprint of the preferences": data_fingerprint(all_preferences)})
        learned_from = count_learned(judge.folders, preferences)
        fitted_to = judge.calibration.count_fitted(preferences) if judge.calibration else 0
        rows = variants.variants(judge.settings.think)
        one_sample = replace(judge, settings=replace(judge.settings, samples=1))
        pairs = [Pair(p.a, p.b, p.prompt) for p in [*to_judge(preferences, spec), *validation]]
        if len(pairs) > _FEW:
            announce_time(one_sample, pairs, budget_of(rows, len(pairs)))
        comparison = compare_strategies(judge, preferences, spec, rows, validation, left_out)
    if left_out.reasons:
        note(f"left out: {left_out}")
    if recalled := comparison.counts.recalled:
        note(f"{recalled} of {recalled + comparison.counts.comparisons} comparisons were judged before")
    warnings = list(demo_warnings(judge.name, images, cache))
    for row in comparison.rows:
        if row.variant.strategy == "soft":
            for line in answer_warnings(row.evaluation.verdicts):
                warnings.append(f"{row.variant}: {line}")
                note(warnings[-1])
    if judge.processes.is_main:
        outputs.write(comparison)
    by_judge = {
        "model": judge.name,
        "adapter": str(judge.adapter) if judge.adapter else None,
        "max_tokens": judge.settings.max_tokens,
        "max_pixels": judge.vlm.features.max_pixels,
        "seed": judge.settings.seed,
        "criterion": judge.settings.criterion.strip() or None,
        "warnings": warnings,
    }
    summary = judge.calibration.summary() | {"fitted_to": fitted_to} if judge.calibration else None
    results = [
        row.to_json()
        | {"calibration": summary if row.variant.strategy == "soft" else None, "learned_from": learned_from}
        for row in comparison.rows
    ]
    return comparison, by_judge, results


def _evaluate_scores(
    preferences: Sequence[Preference], path: Path, spec: EvaluationSpec, outputs: OutputOptions
) -> Evaluation:
    """Measure the scores of a file, without a model."""
    pairs, file_scores = counted(preferences, spec.protocol), read_scores(path)
    scores = match_scores(file_scores, pairs, path)
    if unused := len(file_scores) - len(scores):
        note(f"{path}: {unused} of {len(file_scores)} scores are of images that were not asked for")
    p_a = prefer_by_score(scores, pairs)
    if outputs.predictions is not None:
        write_predictions(outputs.predictions, list(score_rows(pairs, p_a.tolist())))
    return evaluation_of_scores(preferences, p_a, spec)
