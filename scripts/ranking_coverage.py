"""What 95 % intervals hold, on simulated judges: `python -m scripts.ranking_coverage`.

20 images, strengths of deviation 1, a position bias of 0.5. `auto` and `both`: the product at the default budget of 80
comparisons, with its own choice of orders and in both; `all`: all 190 pairs in both orders. `strengths` and
`differences`: the share of intervals that hold the truth; `resolved`: of differences, those that leave 0 out;
`wrong`: of these, those of the wrong sign. `tau` is Kendall's against the truth; `tau_p_a` that of the same fit on
answers whose orders are averaged in log-odds first, with pairs of its own, at the same cost as `both`.

Judges (`ranking_judges.Judge`): `soft` with a bias that varies from pair to pair by `bias_sd`, and a noise of the
pair; `votes`: shares of votes; unlike the model: `saturated` by 8 and by 20 (strengths of deviation 8 and 20),
`hard`: only 0 or 1, whose strengths are those of the logistic curve nearest to its noise; `circle`: answers that no
strengths explain.

Ways of choosing the pairs, with three votes an answer and 40 pairs in both orders: `fixed`: one random design for all
repetitions; `product`; `top 1`: the product, until the best is settled; `swiss`: neighbours in the order.

Time: of the processor, for choosing the default budget's pairs and for the fits between, and the answers' own.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import click
import numpy as np

from mlxpref.cli.output import note, show_on_stderr
from mlxpref.ranking.bradley_terry import StrengthFit
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.ranking.pair_selection import pair_budget
from scripts.ranking_judges import (
    Answers,
    Array,
    Judge,
    Row,
    averaged,
    fit_of,
    fit_of_all,
    held,
    means,
    people,
    print_results,
    ranked,
    repeated,
    stderr,
    table,
    tau_a,
)
from scripts.ranking_strategies import sizes, swiss_round

COUNT = 20
JUDGES = {
    **{f"soft, pair {pair}": Judge(pair=pair) for pair in (0.3, 1.0)},
    **{f"{votes} votes": people(votes) for votes in (1, 3, 8)},
}
"""Judges whose bias varies, too."""
UNLIKE = {
    "saturated by 8": Judge(deviation=8, pair=2, order=0),
    "saturated by 20": Judge(deviation=20, pair=6, order=0),
    "hard": Judge(pair=1, order=0, hard=True),
    "circle": Judge(pair=0, order=0, circle=1.5),
    "order noise 1": Judge(pair=0, order=1),
    "bias 4": Judge(order=0, bias=4),
    "3 votes, margin 1e-4": people(3, margin=1e-4),
}
NEAREST_LOGISTIC = 1.702
"""A normal noise of deviation 1 gives 0 or 1 as a logistic curve of about this slope does."""


def designs(judge: Judge, repeat: int) -> tuple[Array, Answers, dict[str, StrengthFit]]:
    """The true strengths (N,), the answers, and the fits to pairs chosen in three ways."""
    rng = np.random.default_rng([COUNT, repeat])
    strengths = judge.strengths(COUNT, rng)
    answers = judge.answers(strengths, rng)
    truth = strengths * (NEAREST_LOGISTIC / judge.pair if judge.hard else 1.0)
    fits = {orders: ranked(COUNT, answers, repeat, orders=orders).strengths.fit for orders in ("auto", "both")}
    return truth, answers, fits | {"all": fit_of_all(COUNT, answers)}


def coverage(name: str, judge: Judge, repeats: int) -> list[Row]:
    """`held` for every design."""

    def run(repeat: int) -> dict[str, float]:
        truth, answers, fits = designs(judge, repeat)
        numbers = {f"{key} {design}": x for design, fit in fits.items() for key, x in held(fit, truth).items()}
        by_p_a = averaged(answers)
        other = ranked(COUNT, by_p_a, repeat, orders="both").strengths.fit
        numbers["tau_p_a both"] = tau_a(other.strengths, -truth)
        numbers["tau_p_a all"] = tau_a(fit_of_all(COUNT, by_p_a).strengths, -truth)
        return numbers

    columns = repeated(repeats, f"coverage, {name}, bias sd {judge.bias_deviation}", run)
    found, rows = means(columns), []
    for design in ("auto", "both", "all"):
        keys = ("strengths", "differences", "resolved", "wrong", "tau", "tau_p_a")
        row = {"judge": name, "bias_sd": judge.bias_deviation, "pairs": design}
        row |= {key: found.get(f"{key} {design}", "") for key in keys}
        if row["tau_p_a"] != "":
            row["stderr"] = stderr(columns[f"tau {design}"] - columns[f"tau_p_a {design}"])
        rows.append(row | {"stderr": row.get("stderr", "")})
    return rows


def ways(deviation: float, repeats: int) -> list[Row]:
    """Coverage for ways of choosing the pairs, of images whose strengths have a deviation, with three votes."""
    judge, budget, every = people(3, deviation=deviation), pair_budget(COUNT), list(all_pairs(COUNT))
    fixed = [every[place] for place in np.random.default_rng(2024).permutation(len(every))[:budget]]

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([COUNT, repeat, 1])
        truth = judge.strengths(COUNT, rng)
        answers = judge.answers(truth, rng)
        fits = {
            "fixed": fit_of(COUNT, answers, fixed),
            "product": ranked(COUNT, answers, repeat, orders="both").strengths.fit,
            "top 1": ranked(COUNT, answers, repeat, orders="both", top=1).strengths.fit,
            "swiss": ask_swiss(COUNT, answers, budget, repeat),
        }
        return {f"{way}, {key}": x for way, fit in fits.items() for key, x in held(fit, truth).items()}

    found = means(repeated(repeats, f"ways, deviation {deviation}", run))
    keys = ("strengths", "differences", "tau")
    return [
        {"way": way, "deviation": deviation} | {key: found[f"{way}, {key}"] for key in keys}
        for way in ("fixed", "product", "top 1", "swiss")
    ]


def ask_swiss(count: int, answers: Answers, budget: int, seed: int) -> StrengthFit:
    """The fit to the pairs of Swiss rounds, at random in the first."""
    strengths: Array = np.random.default_rng(seed).random(count)
    asked: list[tuple[int, int]] = []
    for size in sizes([budget], count // 2):
        asked += swiss_round(np.argsort(-strengths).tolist(), set(asked), size)
        strengths = (fit := fit_of(count, answers, asked)).strengths
    return fit


def times(counts: Sequence[int]) -> list[Row]:
    """Processor time of a ranking at the default budget without the judge's own, for numbers of images."""
    rows: list[Row] = []
    for count in counts:
        note(f"time of {count} images")
        rng = np.random.default_rng(count)
        answers = people(3).answers(rng.normal(0, 1, count), rng)
        started = time.process_time()
        ranking = ranked(count, answers, 0)
        spent = 1e3 * (time.process_time() - started) / count
        rows.append({"images": count, "comparisons": ranking.comparisons, "ms_an_image": round(spent, 2)})
    return rows


@click.command(help=__doc__)
@click.option("--repeats", default=40, show_default=True, help="Repetitions of every row.")
@click.option("--largest", default=300, show_default=True, help="The most images whose time is taken.")
@click.option("--judge", "only", default="", help="Only judges whose name has this text.")
@show_on_stderr()
def main(repeats: int, largest: int, only: str) -> None:
    rows = []
    for name, judge in JUDGES.items():
        deviations = (0.0, 0.5, 1.0, 2.0, 4.0) if not judge.votes else (0.0, 1.0, 2.0)
        varied = [replace(judge, bias_deviation=deviation) for deviation in deviations]
        rows += [row for each in varied if only in name for row in coverage(name, each, repeats)]
    rows += [row for name, judge in UNLIKE.items() if only in name for row in coverage(name, judge, repeats)]
    results = {"coverage": rows}
    table(rows, f"Coverage of 95 % intervals, {COUNT} images")
    if not only:
        results["ways"] = [row for deviation in (0.5, 1.0, 2.0) for row in ways(deviation, repeats)]
        table(results["ways"], "Ways of choosing 40 pairs, 3 votes")
        results["time"] = times([count for count in (100, 300, 1000) if count <= largest])
        if results["time"]:
            table(results["time"], "Processor time at the default budget")
    print_results(results)


if __name__ == "__main__":
    main()
