"""Protocols: the official definitions of accuracy on each public test set, as pure functions on arrays.

A prediction is the preference for a, from 0 to 1; a label is 1 where a is better, 0 where b is, 0.5 for a tie.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxpref.data.catalog import catalog_name
from mlxpref.errors import ConfigError
from mlxpref.judge.metrics import Floats, group_numbers, interval
from mlxpref.preferences import Preference
from mlxpref.ranking.intervals import share_interval, widest
from mlxpref.verdict import Strategy

THRESHOLDS: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Pick-a-Pic's candidate tie thresholds."""
VALIDATION_SPLIT = "validation_unique"
"""Pick-a-Pic's split for choosing it."""
_LABEL = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Protocol:
    """A test set's definition of accuracy: the mean credit of pairs, or of prompts (`macro`).

    `even` is the credit of an undecided prediction; with `ties`, ties in the data count and are a prediction, and with
    `ties_beside` in a second number beside it. `by_order` counts the judgement of each order instead of a pair's.
    """

    definition: str
    macro: bool = False
    even: float = 0.0
    ties: bool = False
    ties_beside: bool = False
    by_order: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "pairs": Protocol("share of pairs without a tie whose better image is preferred, undecided is wrong"),
    "imagereward": Protocol("ImageRewardDB: micro, over all pairs without a tie, undecided is wrong"),
    # The official code sorts by score and decides every pair: an undecided one is an inversion by chance.
    "hpdv2": Protocol(
        "HPDv2: macro, mean over prompts of 1 - inversions / (n (n - 1) / 2), undecided is half an inversion",
        macro=True,
        even=0.5,
    ),
    "pickapic": Protocol(
        "Pick-a-Pic: over all pairs, 1 for the label, a tie included, 0.5 where only label or prediction is a tie",
        ties=True,
    ),
    "hpdv3": Protocol("HPDv3: over all pairs, the better image strictly preferred, undecided is wrong"),
    "mmrb2": Protocol(
        "MMRB2: right judgements of those made, both orders of a pair counted alike, undecided is wrong",
        by_order=True,
    ),
    # Its own 4-way match needs a judge that can also answer that both are bad.
    "genai_bench": Protocol(
        "GenAI-Bench, diff: over pairs without a tie (tievote, bothbad_vote), undecided is wrong; tau: over all pairs, "
        "1 for the label, where a tie is predicted only by a preference of exactly 0.5",
        ties_beside=True,
    ),
}


@dataclass(frozen=True)
class Official:
    """An official number with its 95 % interval, its definition, and the numbers `beside` it by name.

    The interval is a bootstrap over prompts, never narrower than for independent pairs. All are NaN without a
    judgement.
    """

    value: float
    low: float
    high: float
    definition: str
    beside: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The number, its interval and definition, and what is beside it, with null for NaN."""
        values = {"value": self.value, "low": self.low, "high": self.high, "definition": self.definition}
        return {k: None if v != v else v for k, v in (values | dict(self.beside)).items()}

    def in_words(self) -> str:
        """The definition and what is beside the number, for people."""
        beside = self.beside
        if "judgements" in beside:
            missing = int(beside["of_judgements"] - beside["judgements"])
            share = f"; {100 * beside['value_missing_wrong']:.1f} % with these wrong" if missing else ""
            return f"{self.definition}; {missing} of {beside['of_judgements']:.0f} judgements are missing{share}"
        if "tau" in beside:
            return f"{self.definition}; tau is {100 * beside['tau']:.1f} % of {beside['tau_pairs']:.0f} pairs"
        return self.definition


def protocol_of(data: str) -> str:
    """The protocol of the data set in `--data`: its own, or that of plain pairs."""
    name = "pickapic" if catalog_name(data) == "pickapic_v1" else catalog_name(data)
    return name if name in PROTOCOLS else "pairs"


def counted(preferences: Sequence[Preference], protocol: str) -> list[Preference]:
    """The preferences that count in a protocol, also beside its number: those without a tie, or all."""
    rule = protocol_named(protocol)
    return [p for p in preferences if rule.ties or rule.ties_beside or p.better != "tie"]


def labels(preferences: Sequence[Preference]) -> Floats:
    """Which side counts as better (N,)."""
    return np.array([_LABEL[p.better] for p in preferences], np.float64)


def credit(protocol: str, p: Floats, label: Floats, threshold: float = 0.0) -> Floats:
    """The credit of each prediction (N,) for its label (N,), from 0 to 1.

    Where ties count, a prediction is a tie if the probabilities of both sides differ by `threshold` at most.
    """
    rule = protocol_named(protocol)
    predicted, better = np.sign(p - 0.5), np.sign(label - 0.5)  # 1 is a, -1 is b, 0 is a tie
    if rule.ties:
        predicted = np.where(np.abs((1 - p) - p) <= threshold, 0, predicted)
        return np.where(predicted == better, 1, np.where((predicted == 0) | (better == 0), 0.5, 0))
    return np.where(predicted == 0, rule.even, predicted == better)


def official(
    protocol: str,
    p: Floats,
    label: Floats,
    groups: Sequence[str],
    threshold: float = 0.0,
    orders: tuple[Floats, Floats] | None = None,
) -> Official:
    """The official number of predictions (N,) against labels (N,) in groups (N,), which are prompts.

    `orders` are the predictions by the order with a first and by the other one, NaN where there is no judgement; by
    default both are `p`.
    """
    rule = protocol_named(protocol)
    by_order = np.stack(orders or (p, p))  # (2, N)
    if rule.by_order:
        return _by_order(rule, by_order, label, groups)
    beside: dict[str, float] = {}
    if rule.ties_beside:
        is_right = (np.sign(p - 0.5) == np.sign(label - 0.5)) & ~np.isnan(by_order).all(axis=0)
        beside = {"tau": float(is_right.mean()), "tau_pairs": len(p)}
        decided = label != 0.5
        p, label, groups = p[decided], label[decided], list(np.asarray(groups)[decided])
    group = group_numbers(groups)
    total = np.asarray(np.bincount(group, credit(protocol, p, label, threshold)), np.float64)
    size = np.asarray(np.bincount(group), np.float64)
    pairs = float(size.sum())
    if rule.macro:
        pairs = len(size) ** 2 / float((1 / size).sum())  # as many equally weighted pairs vary as much
        total, size = total / size, np.ones_like(size)
    value = float(total.sum() / size.sum())
    bounds = widest(interval(total, size), share_interval(value * pairs, pairs))
    return Official(value, *bounds, rule.definition, beside)


def _by_order(rule: Protocol, orders: Floats, label: Floats, groups: Sequence[str]) -> Official:
    """The share of right ones among the judgements of orders (2, N), NaN where there is none."""
    right = (np.sign(orders - 0.5) == np.sign(label - 0.5)).sum(axis=0)  # (N,)
    made = (~np.isnan(orders)).sum(axis=0)
    judged, count = made > 0, int(made.sum())
    beside = {"judgements": count, "of_judgements": orders.size, "value_missing_wrong": float(right.mean()) / 2}
    if not count:
        return Official(math.nan, math.nan, math.nan, rule.definition, beside)
    value = float(right.sum() / count)
    group, pairs = group_numbers(list(np.asarray(groups)[judged])), int(judged.sum())
    # The two judgements of a pair are not independent, so there are as many as pairs.
    independent = share_interval(value * pairs, pairs)
    bounds = widest(interval(np.bincount(group, right[judged]), np.bincount(group, made[judged])), independent)
    return Official(value, *bounds, rule.definition, beside)


def best_threshold(p: Floats, label: Floats) -> float:
    """The tie threshold with the best Pick-a-Pic accuracy, the smallest of equal ones."""
    return THRESHOLDS[int(np.argmax([credit("pickapic", p, label, each).mean() for each in THRESHOLDS]))]


def usual_strategy(protocol: str) -> Strategy:
    """The strategy by which a protocol is meant to be measured: MMRB2 counts written judgements."""
    return "select" if protocol_named(protocol).by_order else "soft"


def protocol_named(protocol: str) -> Protocol:
    """The protocol of a name; ConfigError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {protocol!r}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]
