"""Evaluations: how well a judge, or any tool's image scores, agree with people by a test set's own protocol."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.metrics import Floats, Metrics, both_orders, human_agreement, measure
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.protocols import PROTOCOLS, VALIDATION_SPLIT, Official, best_threshold, labels, official, scored
from mlxpref.log import track
from mlxpref.preferences import Pair, Preference
from mlxpref.verdict import Strategy

if TYPE_CHECKING:
    from mlxpref.judge.judge import Judge

__all__ = [
    "Evaluation",
    "Metrics",
    "evaluate",
    "evaluation_of",
    "evaluation_of_scores",
    "measure",
    "tie_threshold_of",
    "to_judge",
]


@dataclass(frozen=True)
class Evaluation:
    """The JSON of `eval`: what was judged, how, and how well; NaN where there was nothing to measure.

    `strategy` is None for image scores. `human_ceiling` is how often two people agree who saw the same pair.
    `tokens` were written and `seconds` taken by this run; `tokens_per_pair` counts what was recalled from a store too,
    `seconds_per_pair` is of the pairs that were judged now. `verdicts` are those of `protocols.scored`.
    """

    data: str
    split: str
    protocol: str
    strategy: Strategy | None
    metrics: Metrics
    unreadable: float
    tokens: int
    seconds: float
    official: Official
    human_ceiling: float
    tokens_per_pair: float
    seconds_per_pair: float
    tie_threshold: float | None = None
    verdicts: tuple[PairVerdict, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as design.md's JSON of `eval`; null where nothing was measured."""
        fields = {key: value for key, value in self.__dict__.items() if key not in ("metrics", "verdicts")}
        if self.tie_threshold is None:
            del fields["tie_threshold"]
        before = {key: fields.pop(key) for key in ("data", "split", "protocol", "strategy")}
        return _in_json({**before, **asdict(self.metrics), **fields, "official": asdict(self.official)})


def evaluate(
    judge: "Judge",
    preferences: Sequence[Preference],
    data: str,
    split: str,
    strategy: Strategy = "soft",
    protocol: str = "pairs",
    tie_threshold: float | None = None,
    validation: Sequence[Preference] = (),
) -> Evaluation:
    """Judge preferences, each in both orders, and measure the agreement with people by a protocol.

    Ties in the data are dropped, unless the protocol counts them. It then needs `tie_threshold`, or `validation`:
    preferences that are judged first, to choose it.
    """
    if validation and tie_threshold is None and PROTOCOLS[protocol].ties:
        said = _judged(judge, validation, strategy, f"judging {VALIDATION_SPLIT} ({strategy})")
        tie_threshold = tie_threshold_of(validation, said)
    started, tokens, recalled = time.perf_counter(), judge.tokens, judge.recalled
    asked = to_judge(preferences, data, split, protocol)
    verdicts = _judged(judge, asked, strategy, f"judging ({strategy})")
    return evaluation_of(
        preferences,
        verdicts,
        data,
        split,
        strategy,
        protocol=protocol,
        tokens=judge.tokens - tokens,
        seconds=time.perf_counter() - started,
        recalled=judge.recalled - recalled,
        tie_threshold=tie_threshold,
    )


def evaluation_of(
    preferences: Sequence[Preference],
    verdicts: Sequence[PairVerdict],
    data: str,
    split: str,
    strategy: Strategy,
    *,
    protocol: str = "pairs",
    tokens: int,
    seconds: float,
    recalled: int = 0,
    tie_threshold: float | None = None,
) -> Evaluation:
    """Measure verdicts that exist already: those of `protocols.scored(preferences, protocol)`, in that order.

    `tokens` were written and `seconds` taken for them in this run, `recalled` of their comparisons come from a store.
    """
    completions = [verdict for pair in verdicts for verdict in pair.verdicts]
    judged_now = len(verdicts) - recalled / 2
    found = _measured(preferences, *_shares(verdicts), data, split, protocol, tie_threshold)
    return replace(
        found,
        strategy=strategy,
        unreadable=sum(verdict.p_first(strategy) is None for verdict in completions) / len(completions),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_pair=sum(verdict.tokens for verdict in completions) / len(verdicts),
        seconds_per_pair=seconds / judged_now if judged_now else math.nan,
        verdicts=tuple(verdicts),
    )


def evaluation_of_scores(
    preferences: Sequence[Preference], p_a: Floats, data: str, split: str, protocol: str = "pairs"
) -> Evaluation:
    """Measure a tool that scores images: `p_a` is 1, 0 or 0.5 for each of `protocols.scored(preferences, protocol)`.

    Scores have no probabilities and see no places, so all that is about these is NaN, and equal scores only are
    a predicted tie.
    """
    found = _measured(preferences, p_a, p_a, data, split, protocol, 0.0 if PROTOCOLS[protocol].ties else None)
    known = replace(
        found.metrics,
        both_orders_accuracy=math.nan,
        position_consistency=math.nan,
        first_choice_rate=math.nan,
        brier=math.nan,
        ece=math.nan,
    )
    return replace(found, metrics=known)


def tie_threshold_of(preferences: Sequence[Preference], verdicts: Sequence[PairVerdict]) -> float:
    """The tie threshold that fits best what was said of a validation split, ties included."""
    return best_threshold(both_orders(*_shares(verdicts)), labels(preferences))


def to_judge(preferences: Sequence[Preference], data: str, split: str, protocol: str) -> list[Preference]:
    """The preferences that a protocol needs judged; DataError where there is none."""
    asked = scored(preferences, protocol)
    if not asked:
        raise DataError(f"{data}, split {split}: no preference to judge ({len(preferences)} ties)")
    return asked


def _judged(judge: "Judge", asked: Sequence[Preference], strategy: Strategy, what: str) -> list[PairVerdict]:
    return list(track(judge.pairs((Pair(p.a, p.b, p.prompt) for p in asked), strategy), len(asked), what))


def _measured(
    preferences: Sequence[Preference],
    p_shown_first: Floats,
    p_shown_second: Floats,
    data: str,
    split: str,
    protocol: str,
    tie_threshold: float | None,
) -> Evaluation:
    """Everything that follows from probabilities and people; what it took is not known here."""
    asked = to_judge(preferences, data, split, protocol)
    if not len(asked) == len(p_shown_first) == len(p_shown_second):
        raise ValueError(f"{len(asked)} preferences to judge, {len(p_shown_first)} that were judged")
    if PROTOCOLS[protocol].ties and tie_threshold is None:
        raise ConfigError(f"protocol {protocol} needs a tie threshold; give --tie-threshold, from 0 to 1")
    label, people = labels(asked), np.array([p.p_a for p in asked], np.float64)
    votes, groups = np.array([p.votes for p in asked]), np.array([p.group for p in asked])
    decided = label != 0.5
    if not decided.any():
        raise DataError(f"{data}, split {split}: all {len(asked)} preferences are ties, which have no better image")
    p = both_orders(p_shown_first, p_shown_second)
    return Evaluation(
        data=data,
        split=split,
        protocol=protocol,
        strategy=None,
        metrics=measure(
            p_shown_first[decided],
            p_shown_second[decided],
            people[decided],
            list(groups[decided]),
            ties_dropped=len(preferences) - int(decided.sum()),
            a_is_better=label[decided] > 0.5,
        ),
        unreadable=math.nan,
        tokens=0,
        seconds=math.nan,
        official=official(protocol, p, label, list(groups), tie_threshold or 0.0),
        human_ceiling=human_agreement(people[decided], votes[decided]),
        tokens_per_pair=math.nan,
        seconds_per_pair=math.nan,
        tie_threshold=tie_threshold,
    )


def _shares(verdicts: Sequence[PairVerdict]) -> tuple[Floats, Floats]:
    """What was said in both orders (N,); NaN where it cannot be read."""
    shown_first = [p if (p := verdict.p_a_shown_first) is not None else math.nan for verdict in verdicts]
    shown_second = [p if (p := verdict.p_a_shown_second) is not None else math.nan for verdict in verdicts]
    return np.array(shown_first, np.float64), np.array(shown_second, np.float64)


def _in_json(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}
