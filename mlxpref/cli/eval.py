"""`mlxpref eval`: measure the agreement of judges, or of other tools' image scores, with people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from mlxpref.cli.common import Consent, check_apart, image_cache, load_data, software_versions
from mlxpref.cli.eval_options import EvalCommand, MeasuredOptions, OutputOptions, StrategyOptions, order_of_judges
from mlxpref.cli.judges import announce_time, find_judge_for, open_judge
from mlxpref.cli.options import DataOptions, JudgeOptions, json_option, option_group, settings_options
from mlxpref.cli.output import note, print_json
from mlxpref.cli.tables import print_evaluations, print_judges, print_strategies
from mlxpref.config import JudgeSettings
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.learned import count_learned
from mlxpref.data.left_out import LeftOut
from mlxpref.data.load import check_preferences
from mlxpref.distributed import process_group
from mlxpref.judge.compare_judges import JudgeResult, compare_judges
from mlxpref.judge.diagnostics import answer_warnings, demo_warnings
from mlxpref.judge.evaluation import EvaluationSpec, evaluation_of_scores, to_judge
from mlxpref.judge.external_scores import match_scores, prefer_by_score, read_scores
from mlxpref.judge.functions import tie_validation
from mlxpref.judge.loading import FoundJudge
from mlxpref.judge.point import SCORES_ONLY
from mlxpref.judge.protocols import PROTOCOLS, counted, protocol_of, usual_strategy
from mlxpref.judge.strategies import budget_of, compare_strategies
from mlxpref.preferences import Pair, Preference, data_fingerprint, images_of
from mlxpref.report.predictions import score_rows, write_predictions

_FEW = 4
"""So few pairs are judged as quickly as their time is estimated."""
_OLD_THINK = {("--think", "yes"): ("--think",), ("--think", "both"): ("--compare-thinking",)}
_TIES = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.ties)


@click.command(
    "eval",
    cls=EvalCommand,
    old=_OLD_THINK,
    examples=(
        "mlxpref eval --data preferences.jsonl --adapter runs/taste",
        "mlxpref eval --data imagereward --limit 200 --predictions pairs.csv",
        "mlxpref eval --data demo --model demo --model demo --adapter runs/taste --scores clip.csv",
        "mlxpref eval --data demo --adapter runs/first --adapter runs/second",
        "mlxpref eval --data demo --model demo --strategy soft,select --samples 1,4 --compare-thinking",
        "mlxpref eval --data demo --samples 1,2,4,8 --max-tokens 8,16,32,64 --compare-thinking --plot curve.svg",
        "mlxpref eval --data hpdv2 --scores scores.csv",
    ),
)
@option_group(DataOptions, "source")
@click.option("--protocol", help=f"{', '.join(PROTOCOLS)}.  [default: the data set's own]")
@click.option(
    "--tie-threshold",
    type=click.FloatRange(0, 1),
    help=f"How far apart the probabilities of a tie are, for {_TIES}.  [default: chosen on validation_unique]",
)
@option_group(StrategyOptions, "variants")
@option_group(OutputOptions, "outputs")
@option_group(MeasuredOptions, "measured")
@option_group(JudgeOptions, "shared", only=("any_base", "yes", "calibration", "store", "no_store"))
@settings_options(JudgeSettings, only=("think", "max_pixels", "seed", "rows", "criterion", "profile"))
@json_option
def evaluate(
    source: DataOptions,
    protocol: str | None,
    tie_threshold: float | None,
    variants: StrategyOptions,
    outputs: OutputOptions,
    measured: MeasuredOptions,
    shared: JudgeOptions,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure a judge's agreement with people, by the data set's own protocol and in both orders of every pair.

    Several judges, and --scores, are measured on the same pairs, and each is compared with the first. An --adapter
    belongs to the --model right before it, so `--model M --model M --adapter A` compares M with what training made of
    it; without any --model, each adapter is on its own base.

    It ignores a judge's own calibration, unless --calibration names a file. --json prints an object: what was judged,
    and `results`; the keys of a single result stand in the object itself, too.
    """
    settings = variants.settings(settings)
    judges = measured.judges(shared, order_of_judges())
    spec = _spec(source, protocol, tie_threshold, bool(judges))
    variants = replace(variants, strategies=variants.strategies or [usual_strategy(spec.protocol)])
    if not judges and (shared.calibration or outputs.plot or settings):
        raise click.UsageError(
            "--scores alone measures no judge: leave out --calibration, --plot and settings, or name a judge by --model"
        )
    outputs.check()
    consent = Consent(shared.yes, judges[0].model, judges[0].adapter) if judges else Consent(shared.yes)
    preferences = load_data(source, consent, needs_images=bool(judges))
    inputs = (source.data, *measured.scores, shared.store, shared.calibration, *images_of(preferences))
    check_apart({"--plot": outputs.plot, "--predictions": outputs.predictions}, inputs)
    judges[:1] = [replace(judge, yes=consent.agreed) for judge in judges[:1]]
    spec = replace(spec, split=preferences.split)
    if source.limit and spec.protocol != "pairs":
        note(f"--limit {source.limit}: the official number is that of the whole split, this one of a part")
    scores = {path: _matched_scores(path, counted(preferences, spec.protocol)) for path in measured.scores}
    about = {"limit": source.limit, "versions": software_versions()}
    if not judges and len(scores) == 1:
        _evaluate_scores(preferences, *next(iter(scores.items())), spec, outputs, about if as_json else None)
        return
    validation = tie_validation(spec, preferences, source.limit, source.data_dir) if judges else []
    cache, everything = image_cache(settings, shared), [*preferences, *validation]
    left_out = check_preferences(source.data, everything, cache) if judges else LeftOut(source.data, everything)
    work = _Work(spec, validation, variants, settings, cache, left_out)
    if several := len(judges) + len(scores) > 1:
        images = len(images_of(everything))
        found = [find_judge_for(images, judge, settings) for judge in judges]  # all, before one judges for hours
        comparison = compare_judges(zip(judges, found, strict=True), work.judge_found, preferences, spec, scores)
    else:
        result = work.judge(judges[0], preferences)
    if left_out.reasons:
        note(f"left out: {left_out}")
    if process_group().is_main:
        outputs.write(comparison if several else result.comparison)
    if not several:
        _print_result(result, about if as_json else None)
    elif as_json:
        keys = {name: getattr(spec, name) for name in ("data", "split", "protocol")}
        print_json({**keys, **about, "results": [row.to_json() for row in comparison]})
    else:
        print_judges(comparison)


def _spec(source: DataOptions, protocol: str | None, tie_threshold: float | None, judged: bool) -> EvaluationSpec:
    """The evaluation's plan; errors for an unknown protocol, and for a tie threshold that nothing uses."""
    protocol = protocol or protocol_of(source.data)
    if protocol not in PROTOCOLS:
        raise click.BadParameter(f"{protocol!r}; known are {', '.join(PROTOCOLS)}", param_hint="--protocol")
    if tie_threshold is not None and not (judged and PROTOCOLS[protocol].ties):
        raise click.UsageError(f"--tie-threshold is for a judge and --protocol {_TIES}")
    return EvaluationSpec(source.data, "", protocol=protocol, tie_threshold=tie_threshold)


def _matched_scores(path: Path, pairs: Sequence[Preference]) -> dict[str, float]:
    """A file's scores of the pairs' images."""
    in_file = read_scores(path)
    scores = match_scores(in_file, pairs, path)
    if unused := len(in_file) - len(scores):
        note(f"{path}: {unused} of {len(in_file)} scores are of images that were not asked for")
    return scores


@dataclass(frozen=True)
class _Work:
    """What every judge has to judge, and how; `cache` has the images, which are decoded once for all."""

    spec: EvaluationSpec
    validation: Sequence[Preference]
    variants: StrategyOptions
    settings: Mapping[str, Any]
    cache: ImageCache
    left_out: LeftOut

    def judge_found(
        self, options_and_judge: tuple[JudgeOptions, FoundJudge], preferences: Sequence[Preference]
    ) -> JudgeResult:
        """The same by one of several judges, which was found before; notes name it."""
        options, found = options_and_judge
        note(f"judging by {found.name}" + (f" with {found.adapter}" if found.adapter else ""))
        return self.judge(options, preferences, found)

    def judge(
        self, options: JudgeOptions, preferences: Sequence[Preference], found: FoundJudge | None = None
    ) -> JudgeResult:
        """Judge preferences by every variant; only --calibration applies a calibration."""
        options = replace(options, no_calibration=options.calibration is None)
        everything = [*preferences, *self.validation]
        images = images_of(everything)
        with open_judge(images, options, self.settings, self.cache, found=found) as judge:
            judge.processes.check_same({"fingerprint of the preferences": data_fingerprint(everything)})
            learned_from = count_learned(judge.folders, preferences)
            fitted_to = judge.calibration.count_fitted(preferences) if judge.calibration else 0
            runs = judge.vlm.features.runs
            rows = self.variants.variants(judge.settings.think)
            if "score" in self.variants.strategies:
                judge.profile.check_form("scores")
            limits = self.variants.several_max_tokens or [judge.settings.max_tokens]
            a_completion = replace(judge.settings, samples=1, max_tokens=sum(limits) // len(limits))
            pairs = [Pair(p.a, p.b, p.prompt) for p in [*to_judge(preferences, self.spec), *self.validation]]
            if len(pairs) > _FEW:
                announce_time(replace(judge, settings=a_completion), pairs, budget_of(rows, len(pairs)))
            comparison = compare_strategies(judge, preferences, self.spec, rows, self.validation, self.left_out)
            runs = int(judge.processes.all_sum_numbers(judge.vlm.features.runs - runs)[0])
        if recalled := comparison.counts.recalled:
            note(f"{recalled} of {recalled + comparison.counts.comparisons} comparisons were judged before")
        warnings = list(demo_warnings(judge.name, images, self.cache))
        is_soft = any(row.variant.strategy == "soft" for row in comparison.rows)
        if is_soft and judge.profile.is_point and not judge.calibration:
            warnings.append(SCORES_ONLY)  # it was said before the work
        for row in comparison.rows:
            if row.variant.strategy == "soft" and row.variant.max_tokens in (None, judge.settings.max_tokens):
                for line in answer_warnings(row.evaluation.verdicts):
                    warnings.append(f"{row.variant}: {line}")
                    note(warnings[-1])
        about = {
            "profile": judge.profile.name,
            "max_tokens": None if self.variants.several_max_tokens else judge.settings.max_tokens,
            "max_pixels": judge.vlm.features.max_pixels,
            "seed": judge.settings.seed,
            "criterion": judge.settings.criterion.strip() or None,
            "vision_runs": runs,
            "warnings": warnings,
        }
        summary = judge.calibration.summary() | {"fitted_to": fitted_to} if judge.calibration else None
        about_rows = [
            {
                "max_tokens": row.variant.max_tokens or about["max_tokens"],
                "calibration": summary if row.variant.strategy == "soft" else None,
                "learned_from": learned_from,
            }
            for row in comparison.rows
        ]
        return JudgeResult(judge.name, judge.adapter, comparison, about, about_rows)


def _print_result(result: JudgeResult, about: Mapping[str, Any] | None) -> None:
    """Print what one judge reached, with `about` as JSON; the keys of a single variant stand in the object, too."""
    if about is not None:
        rows = zip(result.comparison.rows, result.about_rows, strict=True)
        results = [row.to_json() | dict(of_row) for row, of_row in rows]
        single = results[0] if len(results) == 1 else {}
        print_json({**single, **about, **result.names, **result.about, "results": results})
    elif len(result.comparison.rows) == 1:
        print_evaluations([result.comparison.rows[0].evaluation])
    else:
        print_strategies(result.comparison, result.about["vision_runs"])


def _evaluate_scores(
    preferences: Sequence[Preference],
    path: Path,
    scores: Mapping[str, float],
    spec: EvaluationSpec,
    outputs: OutputOptions,
    about: Mapping[str, Any] | None,
) -> None:
    """Measure the scores of one file, without a model, and print the result, with `about` as JSON."""
    pairs = counted(preferences, spec.protocol)
    p_a = prefer_by_score(scores, pairs)
    if outputs.predictions is not None:
        write_predictions(outputs.predictions, score_rows(pairs, p_a.tolist()))
    evaluation = evaluation_of_scores(preferences, p_a, spec)
    if about is None:
        print_evaluations([evaluation])
        return
    result = evaluation.to_json() | {"calibration": None, "learned_from": None}
    names: dict[str, Any] = {"model": None, "adapter": None, "scores": str(path), "warnings": []}
    print_json({**result, **about, **names, "results": [result]})
