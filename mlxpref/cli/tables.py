"""Prints results for people: a ranking, an evaluation, a conversion."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxpref.cli.output import print_table, print_text
from mlxpref.judge.compare_judges import JudgeComparison
from mlxpref.judge.compute_curve import ComputePoint, frontier, varies_compute
from mlxpref.judge.evaluation import Evaluation
from mlxpref.judge.ranking_result import Ranking, RankingEntry
from mlxpref.judge.strategies import Difference, StrategyComparison, StrategyVariant
from mlxpref.report.ranking_words import best_in_words, orders_in_words, tied_ranks
from mlxpref.text import counted, few, format_bytes, format_duration, shorten

_REASONS = 3
"""The number of images of a ranking with a printed reason."""
_REASON_LENGTH = 400
"""The most printed characters of a reason; JSON has all of it."""

_FIDELITY = ("agreement", "kl_answer", "kl_answer_max", "p_first_difference", "token_logprob_difference")
"""The printed fields of a recipe's fidelity."""


def print_ranking(ranking: Ranking, most: int | None = None) -> None:
    """Print the order with intervals and ties, reasons for the best images, and what is settled.

    With `most`, for a terminal, it prints that many of the best images, with the reasons of all of them.
    """
    images = ranking[:most]
    by_scores = ranking.is_by_scores
    columns: dict[str, Callable[[RankingEntry], object]] = {
        ">rank": lambda image: image.rank,
        "image": lambda image: image.short_name,
        ">strength": lambda image: f"{image.strength:+.2f}",
        **({">score": lambda image: "-" if image.score is None else f"{image.score:.2f}"} if by_scores else {}),
        **({} if by_scores else {">95 % interval": lambda image: f"{image.low:+.2f} to {image.high:+.2f}"}),
        **({} if by_scores else {">P(best)": lambda image: percent(image.p_best)}),
        ">won": lambda image: f"{image.wins} of {image.pairs}",
        "tied with ranks": lambda image: tied_ranks(ranking, image),
    }
    pairs = "" if by_scores else f"{counted(len(ranking.pairs), 'pair')}, "
    print_table(
        tuple(columns),
        (tuple(value(image) for value in columns.values()) for image in images),
        title=f"{ranking.title}: {counted(len(ranking), 'image')}, {pairs}{orders_in_words(ranking)}",
        shorten="image",
        drop=("won", "P(best)", "tied with ranks", "95 % interval", "strength"),
    )
    if len(images) < len(ranking):
        print_text(f"and {counted(len(ranking) - len(images), 'more image')}; --all shows them")
    for image in images[: most or _REASONS]:
        if (clearest := ranking.reason(image)) and (reason := image.reason):
            where, text = reason.removesuffix(clearest.text), clearest.text  # a long name leaves the text its room
            text = cut(text, _REASON_LENGTH // 2 if most else _REASON_LENGTH)
            print_text(f"{shorten(image.short_name)}, {shorten(where, 60)}{text}")
    for warning in ranking.warnings:
        print_text(f"note: {warning}")
    if ranking.skipped:
        print_text(f"{len(ranking.skipped)} skipped: " + few([s.path.name for s in ranking.skipped], 2))
    print_text(ranking.meaning)
    print_text(best_in_words(ranking))


def print_best(rankings: Sequence[Ranking]) -> None:
    """Print the best image of each of several rankings, and which are tied with it."""
    print_table(
        ("group", ">images", "best", ">P(best)", "tied with ranks"),
        (
            (
                ranking.similar_to or ranking.title,
                len(ranking),
                ranking[0].short_name,
                percent(ranking[0].p_best),
                tied_ranks(ranking, ranking[0]),
            )
            for ranking in rankings
        ),
        title="The best of each:",
        shorten="group",
        drop=("P(best)", "tied with ranks", "images"),
    )


def print_example(example: dict[str, Any]) -> None:
    """Print a judge's reasons about one pair before and after training."""
    right = 1 if example["first_is_right"] else 2
    print_text(f"“{example['prompt']}”, of which people prefer image {right}:")
    for when in ("before", "after"):
        print_text(f"  {when}, {percent(example[f'p_{when}'])} for image 1: {cut(example[when])}")


def print_evaluations(evaluations: Sequence[Evaluation], names: Sequence[str] = ()) -> None:
    """Print a line for each evaluation, with its name, if any, and its baselines."""
    names = names or [f"{e.spec.data} {e.spec.split}, {e.spec.strategy or 'scores'}" for e in evaluations]
    # The official number of plain pairs is their accuracy.
    with_official = any(e.spec.protocol != "pairs" for e in evaluations)
    print_table(
        ("judged", ">pairs", *((">official", ">95 % interval") if with_official else ()), ">accuracy",
         ">95 % interval", ">both orders", ">consistent", ">first chosen", ">brier", ">ece", ">unreadable"),
        (
            (
                name, e.metrics.pairs,
                *(_with_interval(e.official.value, e.official.low, e.official.high) if with_official else ()),
                *_with_interval(e.metrics.accuracy, e.metrics.accuracy_low, e.metrics.accuracy_high),
                percent(e.metrics.both_orders_accuracy), percent(e.metrics.position_consistency),
                percent(e.metrics.first_choice_rate), _number(e.metrics.brier, 3), _number(e.metrics.ece, 3),
                percent(e.unreadable),
            )
            for name, e in zip(names, evaluations, strict=True)
        ),
        shorten="judged",
        drop=("first chosen", "consistent", "brier", "unreadable", "ece", "both orders"),
    )  # fmt: skip
    for name, e in zip(names, evaluations, strict=True):
        print_text(f"{name}: {'; '.join(_beside(e))}")


def print_strategies(comparison: StrategyComparison, vision_runs: int) -> None:
    """Print a line for each variant, the gains of `soft` over the others, and the total work."""
    first = comparison.rows[0].evaluation
    variants = [row.variant for row in comparison.rows]
    limits = (">max tokens",) if any(variant.max_tokens for variant in variants) else ()
    with_official = first.spec.protocol != "pairs"
    print_table(
        ("strategy", "thinking", ">samples", *limits, *((">official",) if with_official else ()), ">accuracy",
         ">95 % interval", ">ece", ">unreadable", ">tokens a pair", ">seconds a pair"),
        (
            (
                *_variant(row.variant, limits),
                *((percent(row.evaluation.official.value),) if with_official else ()),
                *_with_interval(metrics.accuracy, metrics.accuracy_low, metrics.accuracy_high),
                _number(metrics.ece, 3),
                percent(row.evaluation.unreadable),
                *_work_a_pair(row.evaluation),
            )
            for row in comparison.rows
            for metrics in (row.evaluation.metrics,)
        ),
        title=f"{first.spec.data} {first.spec.split}: {counted(first.metrics.pairs, 'pair')}, each in both orders",
        shorten="strategy",
        drop=("seconds a pair", "tokens a pair", "unreadable", "ece"),
    )  # fmt: skip
    gains = [(row, other, gain) for row in comparison.rows for other, gain in row.minus.items()]
    if gains:
        print_table(
            ("difference", "thinking", ">samples", *limits, ">points of accuracy", ">95 % interval"),
            (
                (f"soft - {other}", *_variant(row.variant, limits)[1:], *_minus(gain))
                for row, other, gain in gains
            ),
        )  # fmt: skip
    _print_official({str(row.variant): row.evaluation for row in comparison.rows})
    for strategy in dict.fromkeys(variant.strategy for variant in variants) if varies_compute(variants) else ():
        best = frontier(ComputePoint.of(row) for row in comparison.rows if row.variant.strategy == strategy)
        steps = [f"{percent(each.accuracy)} with {each.tokens:.0f} ({each.variant})" for each in best]
        print_text(
            f"the most accurate with so many tokens a pair, or fewer: {', '.join(steps)}; what is within the intervals "
            "may be chance"
        )
    if comparison.counts.tokens:
        print_text(
            "tokens are what a row needs by itself; its seconds are those of all completions that it is read from, "
            "which other rows may share"
        )
    print_text(
        f"all rows together: {counted(comparison.counts.tokens, 'token')} and {counted(vision_runs, 'encoded image')} "
        f"in {format_duration(comparison.seconds)}; "
        f"always the first image of the file: {percent(first.metrics.first_image_baseline)}; "
        f"{counted(first.metrics.ties_dropped, 'tie')} dropped"
    )


def print_judges(comparison: JudgeComparison) -> None:
    """Print a line for each judge and each tool's scores, with its difference from the first, and the baselines."""
    first = comparison[0].evaluation
    with_official = first.spec.protocol != "pairs"
    variants = list(dict.fromkeys(row.judged.variant for row in comparison if row.judged))
    names = [row.title if len(variants) > 1 else row.name for row in comparison]
    how = f", each in both orders, {variants[0]}" if len(variants) == 1 else ", each in both orders" if variants else ""
    print_table(
        ("judge", *((">official",) if with_official else ()), ">accuracy", ">95 % interval", ">minus first",
         ">its 95 % interval", ">ece", ">unreadable", ">tokens a pair", ">seconds a pair"),
        (
            (
                name,
                *((percent(row.evaluation.official.value),) if with_official else ()),
                *_with_interval(metrics.accuracy, metrics.accuracy_low, metrics.accuracy_high),
                *_minus(row.minus_first),
                *(
                    (_number(metrics.ece, 3), percent(row.evaluation.unreadable), *_work_a_pair(row.evaluation))
                    if row.judged else ("-", "-", "-", "-")
                ),
            )
            for name, row in zip(names, comparison, strict=True)
            for metrics in (row.evaluation.metrics,)
        ),
        title=f"{first.spec.data} {first.spec.split}: {counted(first.metrics.pairs, 'pair')}{how}",
        shorten="judge",
        drop=("unreadable", "ece", "tokens a pair", "seconds a pair"),
    )  # fmt: skip
    print_text(
        f"minus first: points of accuracy, minus those of {names[0]}, on the same pairs; an interval with 0 in it "
        "leaves open which of both is better"
    )
    _print_official({name: row.evaluation for name, row in zip(names, comparison, strict=True)})
    print_text("; ".join(_baselines(first)))


def _print_official(evaluations: Mapping[str, Evaluation]) -> None:
    """Print what official numbers are, and then what is beside them, each text once with the names that it is for."""
    official = {name: e.official for name, e in evaluations.items() if e.spec.protocol != "pairs"}
    definitions = {name: each.definition for name, each in official.items()}
    beside = {name: each.in_words().removeprefix(each.definition).lstrip("; ") for name, each in official.items()}
    for what, texts in (("official", definitions), ("beside it", beside)):
        for text in dict.fromkeys(filter(None, texts.values())):
            names = [name for name in texts if texts[name] == text]
            whose = f", {', '.join(names)}" if len(names) < len(texts) else ""
            print_text(f"{what}{whose}: {text}")


def _minus(gain: Difference | None) -> tuple[str, str]:
    """A difference and its interval in points; a dash for each where there is none."""
    if gain is None:
        return "-", "-"
    return f"{100 * gain.accuracy:+.1f}", f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"


def _work_a_pair(e: Evaluation) -> tuple[str, str]:
    """The tokens and seconds of a pair; these are unknown where none was judged now."""
    seconds = "recalled" if math.isnan(e.seconds_per_pair) else f"{e.seconds_per_pair:.3f}"
    return _number(e.tokens_per_pair, 1), seconds


def _variant(variant: StrategyVariant, limits: Sequence[str]) -> tuple[object, ...]:
    """The cells of a variant; `limits` are the columns of bounds on tokens, one or none."""
    return (
        variant.strategy,
        "yes" if variant.think else "no",
        variant.samples,
        *[variant.max_tokens or "-" for _ in limits],
    )


def print_recipes(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row for each recipe (see `compare_recipes`): its size, and its fidelity to the source."""
    print_table(
        ("recipe", ">size", ">bits a weight", ">layers quantized", ">same verdict", ">KL of the answer",
         ">largest KL", ">P(first) off by", ">log P(token) off by"),
        (
            (
                row["recipe"], format_bytes(row['bytes']), _number(row["bits_per_weight"], 2),
                row["quantized_layers"], *(
                    "n/a" if row[key] is None else percent(row[key]) if key == "agreement" else f"{row[key]:.2g}"
                    for key in _FIDELITY
                ),
            )
            for row in rows
        ),
        shorten="recipe",
        drop=("log P(token) off by", "largest KL", "P(first) off by", "layers quantized", "bits a weight"),
    )  # fmt: skip
    for reason in dict.fromkeys(row["fidelity_skipped"] for row in rows if row["fidelity_skipped"]):
        print_text(f"not compared with the source: {reason}")


def fidelity_line(fidelity: dict[str, Any], source: str) -> str:
    """The fidelity of a model to its source, in a line."""
    return (
        f"beside {source}, on {fidelity['comparisons']} comparisons: the same verdict in {fidelity['agreement']:.1%}, "
        f"KL of the answer {fidelity['kl_answer']:.2g} nats, probability of the first image off by "
        f"{fidelity['p_first_difference']:.2g}, log-probability of a written token by "
        f"{fidelity['token_logprob_difference']:.2g}"
    )


def _beside(e: Evaluation) -> list[str]:
    """The work and the baselines of an evaluation."""
    parts = []
    if e.spec.protocol != "pairs":
        threshold = "" if e.spec.tie_threshold is None else f", tie threshold {e.spec.tie_threshold:g}"
        parts.append(f"official: {e.official.in_words()}{threshold}")
        parts.append(f"accuracy within prompts first: {percent(e.metrics.accuracy_macro)}")
    if e.spec.strategy is not None:
        a_pair = f"{_number(e.tokens_per_pair, 1)} tokens"
        if not math.isnan(e.seconds_per_pair):  # some were judged now
            a_pair += f" and {_number(e.seconds_per_pair, 2)} s"
        parts.append(f"{counted(e.tokens, 'token')} in {format_duration(e.seconds)}, {a_pair} a pair")
    return [*parts, *_baselines(e)]


def _baselines(e: Evaluation) -> list[str]:
    """What the pairs alone say of any judge's accuracy."""
    people = [] if math.isnan(e.human_ceiling) else [f"two people agree on {percent(e.human_ceiling)}"]
    first = f"always the first image of the file: {percent(e.metrics.first_image_baseline)}"
    return [first, *people, f"{counted(e.metrics.ties_dropped, 'tie')} dropped"]


def _with_interval(value: float, low: float, high: float) -> tuple[str, str]:
    return percent(value), f"{percent(low)} to {percent(high)}"


def _number(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share in percent; None is unreadable, NaN not measured."""
    return "unreadable" if share is None else "n/a" if math.isnan(share) else f"{100 * share:.1f} %"


def cut(reason: str, length: int = _REASON_LENGTH) -> str:
    """A reason, cut to a length."""
    return reason if len(reason) <= length else reason[: length - 1] + "…"
