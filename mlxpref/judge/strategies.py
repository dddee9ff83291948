"""Compares strategies in one run: by numbers of samples and lengths of reasons, with thinking and without.

Variants share work: every image is encoded once, and equal beginnings of prompts run once. `soft` and `select` read the
same completions, one at the start of the answer and one at its end. Random numbers are keyed by sample, so smaller
numbers of samples reuse the first ones of the largest. A single sample is greedy and needs its own completions, and so
does `score`, which asks another question. A pair whose completions all ended by themselves within fewer tokens is not
judged again with these.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mlxpref.config import JudgeSettings
from mlxpref.data.left_out import LeftOut
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluation_of, readable, tie_threshold_of, to_judge
from mlxpref.judge.judge import Judge
from mlxpref.judge.metrics import agreement, group_numbers, interval
from mlxpref.judge.pair_budget import PairBudget
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.point import SCORES_ONLY
from mlxpref.judge.protocols import PROTOCOLS, VALIDATION_SPLIT, labels
from mlxpref.judge.verdict_source import JudgingSession
from mlxpref.log import logger, track
from mlxpref.preferences import Pair, Preference
from mlxpref.ranking.intervals import difference_interval, widest
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.text import counted
from mlxpref.verdict import Strategy, Verdict

_PAIRS = 32
"""All variants judge at least this many pairs before the next ones, while the prompts are in memory."""


@dataclass(frozen=True)
class StrategyVariant:
    """One way to judge: the reading of completions, with or without reasons, their number per order, and their length.

    `max_tokens` None is the judge's own.
    """

    strategy: Strategy
    think: bool
    samples: int
    max_tokens: int | None = None

    def __str__(self) -> str:
        if not self.think:
            return f"{self.strategy}, without thinking"
        limit = f" of up to {counted(self.max_tokens, 'token')}" if self.max_tokens else ""
        return f"{self.strategy}, {counted(self.samples, 'sample')}{limit}"

    def settings(self, settings: JudgeSettings) -> JudgeSettings:
        """A judge's settings for this variant."""
        max_tokens = self.max_tokens or settings.max_tokens
        return replace(settings, think=self.think, samples=self.samples, max_tokens=max_tokens)


@dataclass(frozen=True)
class Difference:
    """The accuracy of one variant minus that of another on the same pairs, from -1 to 1.

    `low` to `high` is its 95 % interval, by bootstrap over prompts, never narrower than for independent pairs.
    """

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class StrategyRow:
    """A variant with its evaluation, and its differences from others of the same thinking and samples.

    The evaluation's tokens are those that the variant alone needs. Its seconds are of all completions that it read,
    which other rows may share.
    """

    variant: StrategyVariant
    evaluation: Evaluation
    minus: Mapping[Strategy, Difference] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON of `eval`, with `think`, `samples` and, for `soft`, `minus_select` and `minus_score`."""
        minus = {f"minus_{strategy}": asdict(gain) for strategy, gain in self.minus.items()}
        return self.evaluation.to_json() | {"think": self.variant.think, "samples": self.variant.samples} | minus


@dataclass(frozen=True)
class StrategyComparison:
    """All rows, the judged preferences, and the total work."""

    rows: tuple[StrategyRow, ...]
    preferences: tuple[Preference, ...]
    counts: JudgingCounts
    seconds: float

    def without_left_out(self, preferences: Sequence[Preference]) -> list[Preference]:
        """The preferences that were given, ties included, without those that were left out of all rows."""
        spec, kept = self.rows[0].evaluation.spec, {id(preference) for preference in self.preferences}
        dropped = {id(preference) for preference in to_judge(preferences, spec)} - kept
        return [preference for preference in preferences if id(preference) not in dropped]

    def on(self, preferences: Sequence[Preference]) -> "StrategyComparison":
        """The same verdicts measured on a part of the preferences; DataError where none of them counts."""
        pairs = to_judge(preferences, self.rows[0].evaluation.spec)
        if len(pairs) == len(self.preferences):
            return self
        kept, evaluations = {id(pair) for pair in pairs}, {}
        for variant, before in ((row.variant, row.evaluation) for row in self.rows):
            verdicts = [v for p, v in zip(self.preferences, before.verdicts, strict=True) if id(p) in kept]
            measured = evaluation_of(preferences, verdicts, before.spec, before.seconds)
            evaluations[variant] = replace(measured, left_out=before.left_out)
        return replace(self, rows=_rows(evaluations, pairs), preferences=tuple(pairs))


def strategy_variants(
    strategies: Sequence[Strategy], samples: Sequence[int], thinking: Sequence[bool], max_tokens: Sequence[int] = ()
) -> list[StrategyVariant]:
    """Every combination, in the order of a table; without thinking only one sample, as all are equal.

    Without any `max_tokens` they are the judge's own.
    """
    limits: list[int | None] = [*sorted(set(max_tokens))] or [None]
    return [
        StrategyVariant(strategy, think, count, limit)
        for think in sorted(set(thinking))
        for count in (sorted(set(samples)) if think else [1])
        for limit in (limits if think else [None])
        for strategy in dict.fromkeys(strategies)
    ]


def budget_of(variants: Sequence[StrategyVariant], pairs: int) -> PairBudget:
    """The work of judging pairs by variants: what is thought about counts once a sample."""
    sources = dict.fromkeys(_source(variant, variants) for variant in variants)
    thinking = sum(source.samples for source in sources if source.think)
    return PairBudget(pairs * sum(not source.think for source in sources), pairs * thinking)


def compare_strategies(
    judge: Judge,
    preferences: Sequence[Preference],
    spec: EvaluationSpec,
    variants: Sequence[StrategyVariant],
    validation: Sequence[Preference] = (),
    left_out: LeftOut | None = None,
) -> StrategyComparison:
    """Judge preferences by every variant, each in both orders, and measure each variant as `evaluate` does.

    It ignores the strategy of `spec` and the settings of the judge that a variant has. With a store, an interrupted
    comparison continues where it stopped. Each row gets its own tie threshold where one must be chosen. ConfigError,
    before any work, for a variant without a calibration if the judge has a calibration. No row counts a pair that one
    of them left out; `left_out` gets the images.
    """
    start = time.perf_counter()
    left_out = left_out or LeftOut(spec.data, [*preferences, *validation])
    pairs = to_judge(preferences, spec)
    session = judge.session()
    rescalings = {variant: _rescaling(variant, judge, session) for variant in variants}
    if any(judge.strategy_of(each.strategy, rescaling) != each.strategy for each, rescaling in rescalings.items()):
        logger.warning(SCORES_ONLY)
    on_validation: dict[StrategyVariant, _SharedCompletions] = {}
    if validation and PROTOCOLS[spec.protocol].ties and spec.tie_threshold is None:
        what = f"judging {VALIDATION_SPLIT}"
        on_validation, validation = _write(judge, validation, validation, variants, session, what, left_out)
    by_variant, preferences = _write(judge, preferences, pairs, variants, session, "judging", left_out)
    pairs = to_judge(preferences, spec)
    evaluations = {}
    for variant, completions in by_variant.items():
        threshold = spec.tie_threshold
        if on_validation:
            verdicts = _read(on_validation[variant], variant, judge, rescalings[variant])
            threshold = tie_threshold_of(validation, verdicts)
        row_spec = replace(spec, strategy=variant.strategy, tie_threshold=threshold)
        verdicts = _read(completions, variant, judge, rescalings[variant])
        evaluation = evaluation_of(preferences, verdicts, row_spec, completions.seconds)
        evaluations[variant] = replace(evaluation, left_out=left_out)
    every = {id(each): each for each in [*by_variant.values(), *on_validation.values()]}.values()
    return StrategyComparison(
        rows=_rows(evaluations, pairs),
        preferences=tuple(pairs),
        # A pair that is not judged again with fewer tokens is the same object.
        counts=JudgingCounts.of({id(v): v for completions in every for v in completions.verdicts}.values()),
        seconds=round(time.perf_counter() - start, 3),
    )


def difference(one: Sequence[float], other: Sequence[float], preferences: Sequence[Preference]) -> Difference:
    """The accuracy of some predictions, each the preference for a, minus that of others on the same preferences.

    Ties in the data are left out.
    """
    label = labels(preferences)
    decided = label != 0.5
    correct = [
        agreement(np.array(p_a)[decided], label[decided] > 0.5).astype(np.float64) for p_a in (one, other)
    ]  # (N,) each
    prompts = group_numbers([p.group for p, counts in zip(preferences, decided, strict=True) if counts])
    gain = correct[0] - correct[1]  # (N,)
    independent = difference_interval(int((gain > 0).sum()), int((gain < 0).sum()), len(gain))
    bounds = widest(interval(np.bincount(prompts, gain), np.bincount(prompts)), independent)
    return Difference(float(gain.mean()), *bounds)


def _rows(
    evaluations: Mapping[StrategyVariant, Evaluation], preferences: Sequence[Preference]
) -> tuple[StrategyRow, ...]:
    """The rows of evaluations on the same preferences."""
    return tuple(
        StrategyRow(variant, evaluation, _gains(variant, evaluations, preferences))
        for variant, evaluation in evaluations.items()
    )


def _gains(
    variant: StrategyVariant, evaluations: Mapping[StrategyVariant, Evaluation], preferences: Sequence[Preference]
) -> dict[Strategy, Difference]:
    """The gains of `soft` over the other strategies with the same thinking and samples."""
    if variant.strategy != "soft":
        return {}
    others = [other for other in evaluations if other != variant and replace(other, strategy="soft") == variant]
    p_a = {each: [verdict.p_a for verdict in evaluations[each].verdicts] for each in (variant, *others)}
    return {other.strategy: difference(p_a[variant], p_a[other], preferences) for other in others}


class _SharedCompletions:
    """Completions that rows share: the judge that writes them, its verdicts, and its seconds.

    `longer` are the same ones with more tokens, if any. A pair whose completions ended there within the fewer tokens is
    theirs, and so is its part of their seconds.
    """

    def __init__(self, judge: Judge, variant: StrategyVariant, longer: "_SharedCompletions | None" = None) -> None:
        # The rescaling happens when a row is read.
        self._judge = replace(judge, settings=variant.settings(judge.settings), calibration=None)
        self.variant = variant
        # A judge of single images writes once what many pairs share, so its tokens are of no pair alone.
        self._longer = None if judge.profile.is_point else longer
        self.verdicts: list[PairVerdict] = []
        self.seconds = 0.0

    def extend(self, pairs: Sequence[Pair], session: JudgingSession, left_out: LeftOut) -> Iterator[PairVerdict]:
        """Judge more pairs."""
        longer, known = self._longer, list[PairVerdict | None]([None] * len(pairs))
        if longer is not None:
            known = [each if self._is_whole(each) else None for each in longer.verdicts[len(self.verdicts) :]]
            self.seconds += longer.seconds * (len(known) - known.count(None)) / len(longer.verdicts)
        rest = [pair for pair, verdict in zip(pairs, known, strict=True) if verdict is None]
        start = time.perf_counter()
        judged = self._judge.pairs(rest, self.variant.strategy, session=session, left_out=left_out, by_scores=True)
        for each in known:
            verdict = next(judged) if each is None else each
            self.seconds += time.perf_counter() - start
            self.verdicts.append(verdict)
            yield verdict
            start = time.perf_counter()

    def _is_whole(self, verdict: PairVerdict) -> bool:
        """Whether every completion about a pair ended by itself so early that it would be the same here."""
        limit = self._judge.settings.max_tokens
        return all(not each.closed and each.tokens <= limit for each in verdict.verdicts)


def _write(
    judge: Judge,
    preferences: Sequence[Preference],
    judged: Sequence[Preference],
    variants: Sequence[StrategyVariant],
    session: JudgingSession,
    what: str,
    left_out: LeftOut,
) -> tuple[dict[StrategyVariant, _SharedCompletions], list[Preference]]:
    """Write all completions about the `judged` ones of preferences.

    Returns each variant's, and the preferences without those that a variant left out.
    """
    sources = {variant: _source(variant, variants) for variant in variants}
    shared: dict[StrategyVariant, _SharedCompletions] = {}
    for source in sorted(dict.fromkeys(sources.values()), key=lambda each: -(each.max_tokens or 0)):
        alike = [each for other, each in shared.items() if replace(other, max_tokens=source.max_tokens) == source]
        shared[source] = _SharedCompletions(judge, source, alike[-1] if alike else None)
    pairs = [Pair(p.a, p.b, p.prompt) for p in judged]
    size = max(_PAIRS, judge.settings.rows)
    current = next(iter(shared.values()))

    def work() -> Iterator[PairVerdict]:
        nonlocal current
        for start in range(0, len(pairs), size):
            for current in shared.values():
                yield from current.extend(pairs[start : start + size], session, left_out)

    deque(track(work(), len(pairs) * len(shared), lambda: f"{what} ({current.variant})"), maxlen=0)
    kept, rows = readable(preferences, judged, [each.verdicts for each in shared.values()])
    for each, verdicts in zip(shared.values(), rows, strict=True):
        each.verdicts = verdicts
    return {variant: shared[source] for variant, source in sources.items()}, kept


def _source(variant: StrategyVariant, variants: Sequence[StrategyVariant]) -> StrategyVariant:
    """The variant whose completions contain those of this one."""
    others = [each for each in variants if (each.think, each.max_tokens) == (variant.think, variant.max_tokens)]
    with_answer = variant.strategy == "soft" and any(other.strategy == "select" for other in others)
    samples = max(other.samples for other in others) if variant.samples > 1 else 1
    return replace(variant, strategy="select" if with_answer else variant.strategy, samples=samples)


def _rescaling(variant: StrategyVariant, judge: Judge, session: JudgingSession) -> TemperatureScaling | None:
    """The rescaling of a variant; ConfigError where the judge is calibrated, but not for it."""
    if not judge.calibration or variant.strategy != "soft":
        return None
    asked = replace(judge, settings=variant.settings(judge.settings))
    return judge.calibration.rescaling(asked.conditions(session=session))


def _read(
    completions: _SharedCompletions, variant: StrategyVariant, judge: Judge, rescaling: TemperatureScaling | None
) -> list[PairVerdict]:
    """The pairs with only this variant's completions."""

    def own(samples: Sequence[Verdict]) -> tuple[Verdict, ...]:
        first = samples[: variant.samples]
        return tuple(_until_answer(each, variant, judge) if variant.strategy == "soft" else each for each in first)

    strategy = judge.strategy_of(variant.strategy, rescaling)
    return [
        PairVerdict(own(pair.a_shown_first), own(pair.a_shown_second), strategy, rescaling, pair.recalled)
        for pair in completions.verdicts
    ]


def _until_answer(verdict: Verdict, variant: StrategyVariant, judge: Judge) -> Verdict:
    """A verdict cut at the answer position, without the answer after it."""
    if verdict.label_mass == 0 or verdict.answer_start is None:
        return verdict
    tokens = verdict.answer_tokens if variant.think else 0
    if judge.profile.counts == "last" and variant.think and not verdict.closed:
        tokens = verdict.tokens  # the answer that counts shows only at the end
    return replace(verdict, text=verdict.text[: verdict.answer_start], tokens=tokens, written=None)
