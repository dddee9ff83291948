"""Strategies of asking pairs, beside each other: `python -m scripts.ranking_strategies DATA_FOLDER`.

DATA_FOLDER has HPDv2's test.json in the official layout: for every prompt the ranks that some ten raters gave its
images (`raw_annotations`), and the order that all of them together give (`rank`). A strategy asks pairs of a judge:
- `raters`: 1 or 3 of the real raters, drawn for every pair anew, each at most once a pair, without looking at the
  others. There are no places, so both orders get the same answer.
- `biased`, simulated: 3 Bernoulli votes for each order of a pair, log-odds = strength of the first - strength of the
  second + 1 (the position bias), the strengths fitted on all pairs and all raters of the prompt.
Soft: the answer is the share of the votes. Hard: the majority. One vote is both.

`ours` is the product with `--orders auto`, `ours, both` with `--orders both`; the others ask every pair in both orders.
A comparison is a pair in one order, so that a pair of the real raters costs two comparisons in both orders, too, though
their answers are the same.

The strengths come from `ranking.fit_strengths`; only the merge sort's own order stands, so soft and hard are one to it.
`tau` is Kendall's tau-a, (concordant - discordant pairs) / all pairs, against `rank` (which has no ties); equal
strengths count as neither. `top1` is the share of runs whose strongest image has the best `rank`. `top1_tied` also
counts an image with the same mean rank over the raters as the best one's, where `rank` breaks a tie. Of the biased
judge the truth are its strengths. All are means over prompts and repetitions.

With `--images N` instead: how well the best of many are found (`ranking_many`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlxpref.cli.output import print_table, show_on_stderr
from mlxpref.log import track
from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from scripts.ranking_judges import (
    Answers,
    Array,
    fit_of,
    fit_of_all,
    people,
    print_results,
    ranked,
    table,
    tau_a,
)
from scripts.ranking_many import BEST, best_of_many

Results = dict[int, Array]
"""Strengths (N,) by the number of comparisons that they come from."""

BIAS = 1.0
"""The simulated judge's preference for the first place, in nats."""
BUDGETS = (2.0, 8 / 3, 4.0)
"""Comparisons an image after which a ranking is looked at."""
CASES = (("raters", 1, False), ("raters", 3, False), ("raters", 3, True), ("biased", 3, False), ("biased", 3, True))
"""Judge, votes, soft."""


@dataclass(frozen=True)
class Prompt:
    """The images of a prompt: `ranks` (raters, N) and their common order `rank` (N,), 1 the best; strengths (N,)."""

    ranks: Array
    rank: Array
    strengths: Array


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a folder with HPDv2's test.json."""
    try:
        rows = json.loads((folder / "test.json").read_text(encoding="utf-8"))
        tables = [(np.array([r["rank"] for r in row["raw_annotations"]]), np.array(row["rank"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{folder}: no test.json in HPDv2's layout ({error!r})") from None
    prompts = []
    for ranks, rank in tables:
        shares = {(a, b): float((ranks[:, a] < ranks[:, b]).mean()) for a, b in all_pairs(len(rank))}
        fit = fit_strengths(len(rank), [PairOutcome(*pair, share, share) for pair, share in shares.items()])
        prompts.append(Prompt(ranks.astype(float), rank.astype(float), fit.strengths))
    return prompts


# Judges


def rater_answers(ranks: Array, votes: int, soft: bool, rng: np.random.Generator) -> Answers:
    """What `votes` raters say of every pair, drawn for each anew: the share of them, or the majority."""
    answers = {}
    for a, b in all_pairs(ranks.shape[1]):
        drawn = ranks[rng.choice(len(ranks), votes, replace=False)]
        share = float((drawn[:, a] < drawn[:, b]).mean())
        p_a = share if soft else _majority(share)
        answers[a, b] = PairOutcome(a, b, p_a, p_a)
    return answers


def _majority(share: float) -> float:
    return 0.5 if share == 0.5 else float(share > 0.5)


# Strategies: images, answers, numbers of comparisons, seed


def by_random(count: int, answers: Answers, budgets: Sequence[int], seed: int) -> Results:
    """Pairs at random."""
    every = np.random.default_rng(seed).permutation(list(all_pairs(count)))
    pairs = [(int(a), int(b)) for a, b in every]
    return {budget: fit_of(count, answers, pairs[: budget // 2]).strengths for budget in budgets}


def by_swiss(count: int, answers: Answers, budgets: Sequence[int], seed: int) -> Results:
    """Rounds of N / 2 pairs: neighbours in the current order that have not met; at random in the first round."""
    strengths, results = np.random.default_rng(seed).random(count), {}
    asked: list[tuple[int, int]] = []
    for size in sizes([budget // 2 for budget in budgets], count // 2):
        asked += swiss_round(np.argsort(-strengths).tolist(), set(asked), size)
        strengths = fit_of(count, answers, asked).strengths
        results[2 * len(asked)] = strengths
    return {budget: results[budget // 2 * 2] for budget in budgets}


def swiss_round(order: Sequence[int], asked: set[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """From the nearest in the order to the farthest, every image once; then without that limit, if that is too few."""
    chosen: list[tuple[int, int]] = []
    count = len(order)
    for limited in (True, False):
        for gap in range(1, count):
            for one, other in zip(order, order[gap:], strict=False):
                pair = (min(one, other), max(one, other))
                met = limited and any(image in known for known in chosen for image in pair)
                if len(chosen) < size and pair not in asked and pair not in chosen and not met:
                    chosen.append(pair)
    return chosen


def by_merge_sort(count: int, answers: Answers, budgets: Sequence[int], seed: int) -> Results:
    """A merge sort from a random order, to its end: the budget is what it takes."""
    asked: list[tuple[int, int]] = []

    def beats(one: int, other: int) -> bool:
        pair = (min(one, other), max(one, other))
        asked.append(pair)
        return ((answers[pair].p_a or 0.0) >= 0.5) == (one < other)

    def merged(items: list[int]) -> list[int]:
        if len(items) < 2:
            return items
        left, right = merged(items[: len(items) // 2]), merged(items[len(items) // 2 :])
        result = []
        while left and right:
            result.append((left if beats(left[0], right[0]) else right).pop(0))
        return result + left + right

    order = merged(np.random.default_rng(seed).permutation(count).tolist())
    return {2 * len(asked): -np.argsort(order).astype(float)}


def by_all_pairs(count: int, answers: Answers, budgets: Sequence[int], seed: int) -> Results:
    """Every pair."""
    return {count * (count - 1): fit_of_all(count, answers).strengths}


def by_ours(count: int, answers: Answers, budgets: Sequence[int], seed: int, orders: str = "auto") -> Results:
    """The product's schedule: a run for each budget, as it depends on the budget."""
    results: Results = {}
    for budget in budgets:
        ranking = ranked(count, answers, seed, pairs=budget // 2, orders=orders)
        results[ranking.comparisons] = ranking.strengths.fit.strengths
    return results


def sizes(budgets: Sequence[int], size: int) -> list[int]:
    """Sizes of rounds, cut where a budget is used up."""
    ends = sorted({*range(size, max(budgets), size), *budgets})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


Strategy = Callable[[int, Answers, Sequence[int], int], Results]
STRATEGIES: Mapping[str, Strategy] = {
    "random": by_random,
    "swiss": by_swiss,
    "merge sort": by_merge_sort,
    "all pairs": by_all_pairs,
    "ours": by_ours,
    "ours, both": partial(by_ours, orders="both"),
}


# Strategies beside each other


def best_found(strengths: Array, rank: Array) -> bool:
    """Whether the strongest image is one of the best rank."""
    return bool(rank[int(np.argmax(strengths))] == rank.min())


def run_case(prompts: Sequence[Prompt], judge: str, votes: int, soft: bool, repeats: int) -> list[dict[str, Any]]:
    """Every strategy with one judge: a row for each number of comparisons."""
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    runs = [(number, repeat) for repeat in range(repeats) for number in range(len(prompts))]
    what = f"{judge}, {votes} votes, {'soft' if soft else 'hard'}"
    for number, repeat in track(runs, len(runs), what):
        prompt, rng = prompts[number], np.random.default_rng([votes, number, repeat])
        if judge == "raters":
            answers, rank, mean = rater_answers(prompt.ranks, votes, soft, rng), prompt.rank, prompt.ranks.mean(axis=0)
        else:
            answers = people(votes, hard=not soft, bias=BIAS).answers(prompt.strengths, rng)
            rank = mean = -prompt.strengths
        count = len(rank)
        budgets = [2 * round(share * count / 2) for share in BUDGETS if share * count < count * (count - 1)]
        for name, strategy in STRATEGIES.items():
            results = strategy(count, answers, budgets, repeat * len(prompts) + number)
            for place, (pairs, strengths) in enumerate(results.items()):
                row = (pairs, tau_a(strengths, rank), best_found(strengths, rank), best_found(strengths, mean))
                found.setdefault((name, place), []).append(row)
    rows = []
    for (name, _), values in found.items():
        means = dict(zip(("comparisons", "tau", "top1", "top1_tied"), np.mean(values, axis=0).round(4), strict=True))
        rows.append({"name": name, "votes": votes, "soft": soft} | {key: float(x) for key, x in means.items()})
    return rows


def strategy_table(rows: Sequence[Mapping[str, Any]], judge: str) -> None:
    """Print what `run_case` found."""
    columns = ("strategy", ">votes", "answers", ">comparisons", ">tau", ">top 1", ">top 1 or tied")
    cells = [
        [row["name"], row["votes"], "soft" if row["soft"] else "hard", f"{row['comparisons']:.1f}"]
        + [f"{row[key]:.3f}" for key in ("tau", "top1", "top1_tied")]
        for row in rows
    ]
    print_table(columns, cells, f"Judge: {judge}")


@click.command()
@click.argument("folder", metavar="[DATA_FOLDER]", required=False, type=click.Path(path_type=Path))
@click.option("--images", default=0, help="Instead of data: find the 20 best of so many images.")
@click.option("--repeats", default=30, show_default=True, help="Repetitions a prompt.")
@click.option("--biased-repeats", default=5, show_default=True, help="The same for the simulated judge.")
@show_on_stderr()
def main(folder: Path | None, images: int, repeats: int, biased_repeats: int) -> None:
    """Measure how good a ranking is after how many comparisons, by strategy of asking them."""
    if images:
        many = best_of_many(images, repeats)
        table(many, f"The {BEST} best of {images} images")
        print_results({"best_of_many": many})
        return
    if folder is None:
        raise click.UsageError("give a DATA_FOLDER, or --images")
    prompts = read_prompts(folder)
    rows: dict[str, list[dict[str, Any]]] = {"raters": [], "biased": []}
    for judge, votes, soft in CASES:
        found = run_case(prompts, judge, votes, soft, repeats if judge == "raters" else biased_repeats)
        rows[judge] += found
        if votes == 1:  # hard and soft are the same
            rows[judge] += [row | {"soft": True} for row in found]
    for judge, of_judge in rows.items():
        strategy_table(of_judge, judge)
    print_results({"strategies": rows["raters"], "biased_judge": rows["biased"]})


if __name__ == "__main__":
    main()
