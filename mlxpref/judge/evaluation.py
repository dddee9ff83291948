"""Evaluations: the agreement of a judge, or of another tool's image scores, with people by a test set's protocol."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mlxpref.data.left_out import LeftOut
from mlxpref.errors import ConfigError, DataError, ImageError
from mlxpref.judge.judge import Judge
from mlxpref.judge.metrics import Floats, Metrics, both_orders, human_agreement, measure
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.protocols import PROTOCOLS, Official, best_threshold, counted, labels, official
from mlxpref.log import track
from mlxpref.preferences import Pair, Preference
from mlxpref.text import shorten
from mlxpref.verdict import Strategy

_JUDGEMENTS: dict[Strategy | None, str] = {
    "select": "a judgement is the written verdict (as in the official number)",
    "soft": "a judgement is the more probable answer (officially the written verdict: --strategy select)",
    "score": "a judgement is the larger of two written scores (officially the written verdict: --strategy select)",
    None: "a judgement is the higher score, in both orders the same",
}
"""What the judgement of one order is, by strategy."""


@dataclass(frozen=True)
class EvaluationSpec:
    """The plan of an evaluation: a split of some data, the judge's strategy (None for image scores), a protocol.

    `tie_threshold` is for protocols that count ties: the largest difference of both sides' probabilities in a tie.
    """

    data: str
    split: str
    strategy: Strategy | None = "soft"
    protocol: str = "pairs"
    tie_threshold: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of `eval`; NaN where there was nothing to measure.

    `tokens` and `seconds` are of this run. `tokens_per_pair` includes verdicts from a store; `seconds_per_pair` covers
    only newly judged pairs. `human_ceiling` is the probability that two people agree on a pair. `verdicts` are those of
    `protocols.counted`, in that order, without pairs whose images could not be read, which are in `left_out`.
    """

    spec: EvaluationSpec
    metrics: Metrics
    official: Official
    human_ceiling: float
    unreadable: float = math.nan
    tokens: int = 0
    seconds: float = math.nan
    tokens_per_pair: float = math.nan
    seconds_per_pair: float = math.nan
    verdicts: tuple[PairVerdict, ...] = field(default=(), repr=False)
    left_out: LeftOut | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        data = f"{shorten(self.spec.data)}, split {shorten(self.spec.split, 20)}, {self.spec.strategy or 'scores'}"
        metrics = self.metrics
        interval = f"{100 * metrics.accuracy_low:.1f} to {100 * metrics.accuracy_high:.1f} %"
        return f"Evaluation({data}: accuracy {100 * metrics.accuracy:.1f} % ({interval}), {metrics.pairs} pairs)"

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON of `eval`, with null for NaN."""
        spec = self.spec
        values: dict[str, Any] = {name: getattr(spec, name) for name in ("data", "split", "protocol", "strategy")}
        own = ("unreadable", "tokens", "seconds", "official", "human_ceiling", "tokens_per_pair", "seconds_per_pair")
        values |= asdict(self.metrics) | {name: getattr(self, name) for name in own}
        values["official"] = self.official.to_json()
        if self.left_out is not None:
            values["left_out"] = self.left_out.to_json()
        if spec.tie_threshold is not None:
            values["tie_threshold"] = spec.tie_threshold
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def evaluate(
    judge: Judge, preferences: Sequence[Preference], spec: EvaluationSpec, left_out: LeftOut | None = None
) -> Evaluation:
    """Judge preferences, each in both orders, and measure the agreement with people.

    Ties in the data are dropped, unless the protocol counts them; ConfigError if it does and `spec.tie_threshold` is
    missing. `left_out` gets the images that cannot be read. DataError without preferences to judge.
    """
    assert spec.strategy is not None
    start = time.perf_counter()
    left_out = left_out or LeftOut(spec.data, preferences)
    pairs = to_judge(preferences, spec)
    work = judge.pairs((Pair(p.a, p.b, p.prompt) for p in pairs), spec.strategy, left_out=left_out)
    verdicts = list(track(work, len(pairs), f"judging ({spec.strategy})"))
    preferences, (verdicts,) = readable(preferences, pairs, [verdicts])
    return replace(evaluation_of(preferences, verdicts, spec, time.perf_counter() - start), left_out=left_out)


def readable(
    preferences: Sequence[Preference], pairs: Sequence[Preference], verdicts: Sequence[Sequence[PairVerdict]]
) -> tuple[list[Preference], list[list[PairVerdict]]]:
    """The preferences, and the verdicts of each row on `pairs` of them, without pairs that a row left out.

    ImageError if no pair is left.
    """
    judged = [not any(verdict.is_left_out for verdict in of_pair) for of_pair in zip(*verdicts, strict=True)]
    dropped = {id(pair) for pair, is_judged in zip(pairs, judged, strict=True) if not is_judged}
    kept = [[each for pair, each in zip(pairs, row, strict=True) if id(pair) not in dropped] for row in verdicts]
    if pairs and not any(judged):
        raise ImageError("no pair is left to judge", f"an image of each of the {len(pairs)} cannot be read")
    return [preference for preference in preferences if id(preference) not in dropped], kept


def evaluation_of(
    preferences: Sequence[Preference], verdicts: Sequence[PairVerdict], spec: EvaluationSpec, seconds: float
) -> Evaluation:
    """Measure the verdicts on `protocols.counted(preferences, spec.protocol)`, in that order.

    `seconds` is this run's time for the verdicts that no store had.
    """
    assert spec.strategy is not None
    completions = [verdict for pair in verdicts for verdict in pair.verdicts]
    counts = JudgingCounts.of(verdicts)
    return replace(
        _measured(preferences, *_p_a_in_both_orders(verdicts), spec),
        unreadable=sum(verdict.p_first(spec.strategy) is None for verdict in completions) / len(completions),
        tokens=counts.tokens,
        seconds=round(seconds, 3),
        tokens_per_pair=sum(verdict.tokens for verdict in completions) / len(verdicts),
        seconds_per_pair=2 * seconds / counts.comparisons if counts.comparisons else math.nan,
        verdicts=tuple(verdicts),
    )


def evaluation_of_scores(preferences: Sequence[Preference], p_a: Floats, spec: EvaluationSpec) -> Evaluation:
    """Measure a tool that scores images: `p_a` is 1, 0 or 0.5 for each of `protocols.counted(preferences, protocol)`.

    Scores have no probabilities and no position, so metrics of these are NaN; only equal scores predict a tie.
    """
    threshold = 0.0 if PROTOCOLS[spec.protocol].ties else None
    evaluation = _measured(preferences, p_a, p_a, replace(spec, strategy=None, tie_threshold=threshold))
    names = ("both_orders_accuracy", "position_consistency", "first_choice_rate", "brier", "ece")
    undefined: dict[str, Any] = dict.fromkeys(names, math.nan)
    return replace(evaluation, metrics=replace(evaluation.metrics, **undefined))


def tie_threshold_of(preferences: Sequence[Preference], verdicts: Sequence[PairVerdict]) -> float:
    """The tie threshold with the best fit to the verdicts on a validation split, ties included."""
    return best_threshold(both_orders(*_p_a_in_both_orders(verdicts)), labels(preferences))


def to_judge(preferences: Sequence[Preference], spec: EvaluationSpec) -> list[Preference]:
    """The preferences to judge for a protocol; DataError where there is none."""
    pairs = counted(preferences, spec.protocol)
    if not pairs:
        raise DataError(f"{spec.data}, split {spec.split}: no preference to judge ({len(preferences)} ties)")
    return pairs


def _measured(
    preferences: Sequence[Preference], p_shown_first: Floats, p_shown_second: Floats, spec: EvaluationSpec
) -> Evaluation:
    """The evaluation of the judge's probabilities (N,) of both orders, without tokens and seconds."""
    pairs = to_judge(preferences, spec)
    if not len(pairs) == len(p_shown_first) == len(p_shown_second):
        raise ValueError(f"{len(pairs)} preferences to judge, {len(p_shown_first)} that were judged")
    if PROTOCOLS[spec.protocol].ties and spec.tie_threshold is None:
        raise ConfigError(f"protocol {spec.protocol} needs a tie threshold; give --tie-threshold, from 0 to 1")
    label, p_people = labels(pairs), np.array([p.p_people for p in pairs], np.float64)
    votes, prompts = np.array([p.votes for p in pairs]), np.array([p.group for p in pairs])
    decided = label != 0.5
    if not decided.any():
        raise DataError(
            f"{spec.data}, split {spec.split}: all {len(pairs)} preferences are ties, which have no better image"
        )
    p = both_orders(p_shown_first, p_shown_second)
    metrics = measure(
        p_shown_first[decided],
        p_shown_second[decided],
        p_people[decided],
        list(prompts[decided]),
        ties_dropped=len(preferences) - int(decided.sum()),
        a_is_better=label[decided] > 0.5,
    )
    orders = p_shown_first, p_shown_second
    number = official(spec.protocol, p, label, list(prompts), spec.tie_threshold or 0.0, orders)
    if PROTOCOLS[spec.protocol].by_order:
        number = replace(number, definition=f"{number.definition}; {_JUDGEMENTS[spec.strategy]}")
    return Evaluation(spec, metrics, number, human_agreement(p_people[decided], votes[decided]))


def _p_a_in_both_orders(verdicts: Sequence[PairVerdict]) -> tuple[Floats, Floats]:
    """The preferences for a (N,) where it was shown first and where second; NaN where unreadable."""
    orders = [(verdict.p_a_shown_first, verdict.p_a_shown_second) for verdict in verdicts]
    p = np.array(orders, np.float64).reshape(-1, 2)  # None becomes NaN
    return p[:, 0], p[:, 1]
