"""Simulated judges for the benches of rankings, and rankings of their answers by the product's own schedule."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mlxpref.cli.output import print_table, print_text
from mlxpref.judge.pair_budget import ThinkAbout
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.rank import Compare, rank_pairs
from mlxpref.judge.ranking_result import Ranking
from mlxpref.log import Progress, logger, showing, track
from mlxpref.preferences import Pair
from mlxpref.ranking.bradley_terry import Z95, StrengthFit, fit_strengths
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from mlxpref.verdict import Verdict

Array = NDArray[np.float64]
Answers = Mapping[tuple[int, int], PairOutcome]
"""What the judge says of every pair (a, b), a < b, should it be asked."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """A simulated judge; all its numbers are in nats of its log-odds, and all but `bias` are standard deviations.

    Its log-odds for the first image are the difference of the strengths (`deviation`), plus the noise of the `pair`
    (both orders share it), plus the position `bias` and what the pair's bias has beyond it (`bias_deviation`), plus the
    noise of the comparison (`order`). `circle`: images also have an angle each, and the sine of the difference of the
    angles, times this, is added, which no strengths explain. With `votes` an answer is the share of so many votes, at
    least `margin` from 0 and 1. A `hard` answer is 0 or 1, as the log-odds or the majority say.
    """

    deviation: float = 1.0
    pair: float = 0.3
    order: float = 0.1
    bias: float = 0.5
    bias_deviation: float = 0.0
    votes: int = 0
    margin: float = 0.0
    hard: bool = False
    circle: float = 0.0

    def strengths(self, count: int, rng: np.random.Generator) -> Array:
        """(N,) strengths at random."""
        return rng.normal(0, self.deviation, count)

    def answers(self, strengths: Array, rng: np.random.Generator) -> Answers:
        """What it says of every pair of images with the strengths (N,) in both orders."""
        outcomes = self.of_pairs(strengths, list(all_pairs(len(strengths))), rng)
        return {(outcome.a, outcome.b): outcome for outcome in outcomes}

    def of_pairs(
        self, strengths: Array, pairs: Sequence[tuple[int, int]], rng: np.random.Generator
    ) -> list[PairOutcome]:
        """The same of some pairs; `circle` needs all."""
        a, b = np.array(pairs).T
        angles = rng.uniform(0, 2 * np.pi, len(strengths))
        lead = strengths[a] - strengths[b] + self.circle * np.sin(angles[a] - angles[b])
        lead += rng.normal(0, self.pair, len(a))
        place = self.bias + rng.normal(0, self.bias_deviation, len(a))
        p = expit(np.stack([lead + place, lead - place]) + rng.normal(0, self.order, (2, len(a))))
        if self.votes:
            p = rng.binomial(self.votes, p) / self.votes
        if self.hard:
            p = (1 + np.sign(p - 0.5)) / 2
        p = np.clip(p, self.margin, 1 - self.margin)
        rows = zip(a.tolist(), b.tolist(), *p.tolist(), strict=True)
        return [PairOutcome(*row) for row in rows]


class AnswersOnDemand(Mapping[tuple[int, int], PairOutcome]):
    """A judge's answers about images with the strengths (N,), each found when it is asked for, by a seed."""

    def __init__(self, judge: Judge, strengths: Array, seed: int) -> None:
        self.judge, self.strengths, self.seed = judge, strengths, seed

    def __getitem__(self, pair: tuple[int, int]) -> PairOutcome:
        return self.judge.of_pairs(self.strengths, [pair], np.random.default_rng([self.seed, *pair]))[0]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return all_pairs(len(self.strengths))

    def __len__(self) -> int:
        return len(self.strengths) * (len(self.strengths) - 1) // 2


def people(votes: int, **differences: Any) -> Judge:
    """A judge whose answers are shares of votes, without further noise."""
    return Judge(pair=0, order=0, votes=votes, **differences)


def averaged(answers: Answers) -> Answers:
    """Answers whose orders are averaged in log-odds first."""
    return {pair: replace(one, p_a_shown_first=one.p_a, p_a_shown_second=one.p_a) for pair, one in answers.items()}


def comparer(reading: Answers, thinking: Answers) -> Compare:
    """Answers as the function by which `rank_pairs` asks them."""

    def compare(pairs: Iterable[Pair], think: bool, orders: int) -> Iterator[PairVerdict]:
        for pair in pairs:
            a, b = int(str(pair.a)), int(str(pair.b))
            answer = (thinking if think else reading)[min(a, b), max(a, b)]
            assert answer.p_a_shown_first is not None
            assert answer.p_a_shown_second is not None
            verdict = PairVerdict((_verdict(answer.p_a_shown_first),), (_verdict(1 - answer.p_a_shown_second),))
            verdict = verdict if a < b else verdict.swapped()
            yield verdict if orders == 2 else replace(verdict, a_shown_second=())

    return compare


def _verdict(p_first: float) -> Verdict:
    return Verdict("", p_first, 1 - p_first)


def ranked(count: int, answers: Answers, seed: int, thinking: Answers | None = None, **options: Any) -> Ranking:
    """The product's ranking of `count` images; without thinking, unless there are answers with it. See `rank_pairs`."""
    return ranked_by(comparer(answers, thinking or {}), count, seed, "none" if thinking is None else "top", **options)


def ranked_by(compare: Compare, count: int, seed: int, think: ThinkAbout = "none", **options: Any) -> Ranking:
    """The same by any way to compare."""
    with _quiet():
        return rank_pairs([Path(str(number)) for number in range(count)], "", compare, think, seed=seed, **options)


@contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with showing(Progress()):
            yield
    finally:
        logger.setLevel(level)


def fit_of(count: int, answers: Answers, pairs: Iterable[tuple[int, int]]) -> StrengthFit:
    """What the answers to pairs say."""
    return fit_strengths(count, [answers[pair] for pair in pairs])


def fit_of_all(count: int, answers: Answers) -> StrengthFit:
    """What the answers to all pairs say."""
    return fit_of(count, answers, all_pairs(count))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tau_a(strengths: Array, rank: Array) -> float:
    """Kendall's tau-a of strengths (N,), larger is better, against ranks (N,), smaller is better."""
    agree = np.sign(strengths[:, None] - strengths) * np.sign(rank - rank[:, None])
    return float(agree[np.triu_indices(len(rank), 1)].mean())


def held(fit: StrengthFit, truth: Array) -> dict[str, float]:
    """How a fit and its intervals stand to the truth (N,).

    `strengths`, `differences`: the share that lies within the 95 % interval; `resolved`: the share of differences whose
    interval leaves 0 out; `wrong`: the share of these that have the wrong sign; `tau` is Kendall's.
    """
    error = fit.strengths - (truth - truth.mean())
    upper = np.triu_indices(len(truth), 1)
    variances = [fit.covariance.row(image)[image + 1 :] for image in range(len(truth))]
    reach = Z95 * np.sqrt(np.concatenate(variances))
    found, true = ((each[:, None] - each)[upper] for each in (fit.strengths, truth))
    resolved = np.abs(found) > reach
    return {
        "strengths": float((np.abs(error) <= Z95 * np.sqrt(fit.covariance.variances())).mean()),
        "differences": float((np.abs(found - true) <= reach).mean()),
        "resolved": float(resolved.mean()),
        "wrong": float((resolved & (np.sign(found) != np.sign(true))).sum() / max(resolved.sum(), 1)),
        "tau": tau_a(fit.strengths, -truth),
    }


def best_is(strengths: Array, truth: Array) -> float:
    """1 if the strongest image is truly the strongest."""
    return float(np.argmax(strengths) == np.argmax(truth))


def repeated(repeats: int, what: str, run: Callable[[int], dict[str, float]]) -> dict[str, Array]:
    """The numbers of runs 0, 1 ..., one column a key."""
    rows = [run(repeat) for repeat in track(range(repeats), repeats, what)]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def means(columns: Mapping[str, Array]) -> dict[str, float]:
    """The mean of every column that is not NaN."""
    return {key: round(float(np.nanmean(values)), 4) for key, values in columns.items()}


def stderr(values: Array) -> float:
    """The standard error of the mean."""
    return round(float(values.std() / math.sqrt(max(len(values) - 1, 1))), 4)


def table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print rows under their keys."""
    columns = [key if isinstance(value, str) else f">{key}" for key, value in rows[0].items()]
    print_table(columns, [[row.get(key, "") for key in rows[0]] for row in rows], title)


def print_results(results: Mapping[str, Sequence[Row]]) -> None:
    """Print everything as one line of JSON."""
    print_text(json.dumps(results))
