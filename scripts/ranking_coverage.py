"""What intervals hold and when a top is settled, on simulated judges: `python -m scripts.ranking_coverage`.

Coverage: 20 images, 40 pairs, 3 Bernoulli votes for each order of a pair, position bias 0.5, strengths normal with a
deviation of 0.5, 1 or 2: the share of 95 % intervals that hold the true strengths, and of differences that are within
1.96 of their standard errors. `fixed`: one random design for all repetitions; `ours`: pairs chosen by earlier answers
in rounds as the product asks them; `ours, top 1`: the same until the best is settled; `swiss`: neighbours in the order.

Top 5 of 32 images, judges with a position bias of 0.5:
- `soft`: log-odds = difference + bias + noise of the pair (deviation 0.3) + noise of the comparison (0.1);
- `votes`: the shares of 3 Bernoulli votes.
`settled_share` is the share of all 496 pairs asked until `is_settled(top=5)`, or until the limit; `settled` how often
it came to that. `stable_share` is the share after which our five are the five that all pairs give, and stay so after
every round up to the limit (where they are not at the limit, `1 - stable`, the limit and a round: a lower bound).
`right`: the five when settled are those of all pairs; `true`: they are the strongest; `all_true`: so are the latter.

Time: of the processor, for choosing the default budget's pairs and for the fits between.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np

from mlxpref.cli.output import note, print_table, print_text, show_on_stderr
from mlxpref.log import track
from mlxpref.ranking.bradley_terry import Z95, StrengthFit, fit_strengths
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, pair_budget
from mlxpref.ranking.posterior import difference_variance
from scripts.ranking_strategies import Answers, Array, fit_of, logistic, sizes, swiss_round, voted_answers

Pairs = list[tuple[int, int]]
Row = dict[str, Any]

JUDGES = (("soft", 1.0), ("soft", 3.0), ("votes", 1.0))
"""Answers, deviation of the strengths."""


def noisy_answers(strengths: Array, rng: np.random.Generator, bias: float = 0.5) -> Answers:
    """What the `soft` judge says of every pair in both orders."""
    answers = {}
    for a, b in all_pairs(len(strengths)):
        lead = strengths[a] - strengths[b] + rng.normal(0, 0.3)
        answers[a, b] = PairOutcome(a, b, *(logistic(lead + place + rng.normal(0, 0.1)) for place in (bias, -bias)))
    return answers


def round_of(count: int) -> int:
    """The size of a round as `contest.rank_pairs` asks it."""
    return max(6, default_round(count))


def ask_until(
    count: int, answers: Answers, budget: int, seed: int, top: int | None = None
) -> tuple[Pairs, StrengthFit]:
    """Ask our pairs until the budget is used up or, with `top`, that top is settled; the pairs and the last fit."""
    asked: Pairs = []
    fit = None
    while fit is None or (len(asked) < budget and not (top and is_settled(fit, top))):
        asked += next_round(count, asked, fit, min(round_of(count), budget - len(asked)), seed, top)
        fit = fit_of(count, answers, asked)
    return asked, fit


def ask_swiss(count: int, answers: Answers, budget: int, seed: int) -> tuple[Pairs, StrengthFit]:
    """The same by Swiss rounds, at random in the first."""
    strengths, asked = np.random.default_rng(seed).random(count), Pairs()
    for size in sizes([budget], count // 2):
        asked += swiss_round(np.argsort(-strengths).tolist(), set(asked), size)
        strengths = (fit := fit_of(count, answers, asked)).strengths
    return asked, fit


def top_of(strengths: Array, top: int) -> set[int]:
    """The strongest images."""
    return set(np.argsort(-strengths, kind="stable")[:top].tolist())


def top_found(count: int, answers: Answers, truth: Array, limit: int, seed: int, top: int) -> dict[str, float]:
    """One run of our pairs up to a limit: when the top was settled, when it was right for good. See the module."""
    asked: Pairs = []
    fit, settled, last_wrong = None, None, 0
    every = count * (count - 1) // 2
    full = top_of(fit_of(count, answers, list(all_pairs(count))).strengths, top)
    while len(asked) < limit:
        asked += next_round(count, asked, fit, min(round_of(count), limit - len(asked)), seed, top)
        fit = fit_of(count, answers, asked)
        ours = top_of(fit.strengths, top)
        if ours != full:
            last_wrong = len(asked)
        if settled is None and (is_settled(fit, top) or len(asked) == limit):
            settled = len(asked), is_settled(fit, top), ours
    assert settled is not None
    stable = last_wrong + round_of(count)
    return {
        "settled_share": settled[0] / every,
        "settled": float(settled[1]),
        "right": float(settled[2] == full),
        "true": float(settled[2] == top_of(truth, top)),
        "all_true": float(full == top_of(truth, top)),
        "stable_share": stable / every,
        "stable": float(last_wrong < limit),
    }


def tops(repeats: int, top: int = 5, count: int = 32, limit: float = 0.6) -> list[Row]:
    """`top_found` on average, for every judge."""
    rows: list[Row] = []
    for answers_by, deviation in JUDGES:
        found = []
        for repeat in track(range(repeats), repeats, f"top {top}, {answers_by}, deviation {deviation}"):
            rng = np.random.default_rng([32, repeat])
            truth = rng.normal(0, deviation, count)
            soft = answers_by == "soft"
            answers = noisy_answers(truth, rng) if soft else voted_answers(truth, 3, True, rng, 0.5)
            found.append(top_found(count, answers, truth, int(limit * count * (count - 1) / 2), repeat, top))
        means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        rows.append({"answers": answers_by, "deviation": deviation} | {key: round(x, 4) for key, x in means.items()})
    return rows


def coverage(repeats: int, deviation: float, count: int = 20) -> list[Row]:
    """How often 95 % intervals hold the true strengths and differences, for ways of choosing the pairs."""
    rng = np.random.default_rng(2024)
    upper, budget = np.triu_indices(count, 1), pair_budget(count)
    every = list(all_pairs(count))
    fixed = [every[place] for place in rng.permutation(len(every))[:budget]]
    held: dict[str, list[tuple[float, ...]]] = {}
    for repeat in track(range(repeats), repeats, f"coverage, deviation {deviation}"):
        strengths = rng.normal(0, deviation, count)
        answers = voted_answers(strengths, 3, True, rng, 0.5)
        ways = {
            "fixed": (fixed, fit_of(count, answers, fixed)),
            "ours": ask_until(count, answers, budget, repeat),
            "ours, top 1": ask_until(count, answers, budget, repeat, 1),
            "swiss": ask_swiss(count, answers, budget, repeat),
        }
        for name, (asked, fit) in ways.items():
            error = fit.strengths - (strengths - strengths.mean())
            inside = np.abs(error) <= Z95 * np.sqrt(np.diag(fit.covariance))
            apart = np.abs(error[:, None] - error) <= Z95 * np.sqrt(difference_variance(fit.covariance))
            row = (float(inside.mean()), float(apart[upper].mean()), fit.deviation, len(asked))
            held.setdefault(name, []).append(row)
    keys = ("strengths", "differences", "fitted_deviation", "pairs")
    return [
        {"name": name, "deviation": deviation}
        | {key: round(float(x), 4) for key, x in zip(keys, np.mean(values, axis=0), strict=True)}
        for name, values in held.items()
    ]


def scheduling(counts: Sequence[int] = (100, 300, 1000)) -> list[Row]:
    """Processor time of choosing the pairs of the default budget, and of the fits between, for numbers of images."""
    rows: list[Row] = []
    for count in counts:
        note(f"time of {count} images")
        rng = np.random.default_rng(count)
        strengths, fit, times = rng.normal(0, 1, count), None, np.zeros(2)
        asked: Pairs = []
        outcomes: list[PairOutcome] = []
        rounds = sizes([pair_budget(count)], round_of(count))
        for size in rounds:
            started = time.process_time()
            asked += next_round(count, asked, fit, size)
            times[0] += time.process_time() - started
            for a, b in asked[len(outcomes) :]:
                shares = [rng.binomial(3, logistic(strengths[a] - strengths[b] + place)) / 3 for place in (0.5, -0.5)]
                outcomes.append(PairOutcome(a, b, *shares))
            started = time.process_time()
            fit = fit_strengths(count, outcomes)
            times[1] += time.process_time() - started
        spent = dict(zip(("choosing_ms", "fitting_ms"), (1e3 * times / count).round(2).tolist(), strict=True))
        rows.append({"images": count, "pairs": len(asked), "rounds": len(rounds)} | spent)
    return rows


def table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print rows under their keys."""
    columns = [key if isinstance(value, str) else f">{key}" for key, value in rows[0].items()]
    print_table(columns, [list(row.values()) for row in rows], title)


@click.command()
@click.option("--repeats", default=200, show_default=True, help="Repetitions of coverage, for each deviation.")
@click.option("--top-repeats", default=20, show_default=True, help="Repetitions of the top 5 of 32, for each judge.")
@click.option("--largest", default=1000, show_default=True, help="The most images whose time is taken.")
@show_on_stderr()
def main(repeats: int, top_repeats: int, largest: int) -> None:
    """Measure coverage of intervals, when a top is settled, and the time it takes to choose pairs."""
    held = [row for deviation in (0.5, 1.0, 2.0) for row in coverage(repeats, deviation)]
    table(held, "Coverage of 95 % intervals, 20 images, 3 votes")
    found = tops(top_repeats)
    table(found, "Top 5 of 32 images, asked up to 60 % of all pairs")
    spent = scheduling([count for count in (100, 300, 1000) if count <= largest])
    if spent:
        table(spent, "Processor time an image at the default budget")
    print_text(json.dumps({"coverage": held, "top5": found, "time": spent}))


if __name__ == "__main__":
    main()
