"""The 20 best of N images, two comparisons an image: `python -m scripts.ranking_strategies --images N`.

The judge is a simulated one of log-odds (`ranking_judges.Judge`; strengths of deviation 1). `ours`: the product with
`--top 20`; `knockout`: pairs at random whose losers leave, until 100 are left, who share the other comparisons;
`random`: pairs at random; `bound`: all comparisons among the truly best 100. But for the product every pair is asked in
one order.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.preferences import Pair
from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.outcomes import Indices, PairOutcome
from scripts.ranking_judges import Answers, AnswersOnDemand, Array, Judge, Row, comparer, means, ranked_by, repeated

BEST, FEW = 20, 100
"""The best that are looked for among many images, and those who share the last comparisons."""


def knockout(count: int, answers: Answers, budget: int, seed: int) -> Array:
    """Strengths (N,) by `budget` comparisons: who loses leaves, until `FEW` are left."""
    rng = np.random.default_rng(seed)
    left, asked = rng.permutation(count), list[PairOutcome]()
    while len(left) > FEW:
        asked += (one := in_one_order(answers, left, 1, rng))
        losers = [pair.b if (pair.p_a or 0) >= 0.5 else pair.a for pair in one]
        left = rng.permutation(np.setdiff1d(left, losers))
    asked += in_one_order(answers, left, 2 * (budget - len(asked)) // len(left), rng)
    strengths = fit_strengths(count, asked).strengths
    strengths[np.setdiff1d(np.arange(count), left)] = -np.inf
    return strengths


def in_one_order(answers: Answers, images: Indices, per_image: int, rng: np.random.Generator) -> list[PairOutcome]:
    """Answers in one order about pairs at random, every image in about so many, at most in one with every other."""
    pairs: set[tuple[int, int]] = set()
    wanted = min(per_image * len(images) // 2, len(images) * (len(images) - 1) // 2)
    while len(pairs) < wanted:
        one = rng.permutation(images)[: len(images) // 2 * 2].reshape(-1, 2)  # (N / 2, 2)
        pairs |= {(min(pair), max(pair)) for pair in one.tolist()}
    chosen = sorted(pairs)[:wanted]
    first = rng.random(len(chosen)) < 0.5
    both = (answers[pair] for pair in chosen)
    return [
        replace(each, p_a_shown_second=None) if own else replace(each, p_a_shown_first=None)
        for each, own in zip(both, first, strict=True)
    ]


def by_product(count: int, answers: Answers, budget: int, seed: int, rounds: list[int]) -> Array:
    """Strengths by `rank --top`; puts the sizes of its rounds into `rounds`."""
    every = comparer(answers, {})

    def compare(pairs: Iterable[Pair], think: bool, orders: int) -> Iterable[PairVerdict]:
        rounds.append(len(asked := list(pairs)))
        return every(asked, think, orders)

    ranking = ranked_by(compare, count, seed, top=BEST, pairs=budget // 2)
    return ranking.strengths.fit.strengths


def best_of_many(count: int, repeats: int) -> list[Row]:
    """Every strategy: how many of the best it finds at two comparisons an image. See the module."""

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([count, repeat])
        truth = Judge().strengths(count, rng)
        answers, budget = AnswersOnDemand(Judge(), truth, repeat), 2 * count
        order, rounds = np.argsort(-truth), list[int]()

        def fitted(images: Indices) -> Array:
            asked = in_one_order(answers, images, 2 * budget // len(images), rng)
            return fit_strengths(count, asked).strengths

        strategies: dict[str, Callable[[], Array]] = {
            "ours": lambda: by_product(count, answers, budget, repeat, rounds),
            "knockout": lambda: knockout(count, answers, budget, repeat),
            "random": lambda: fitted(np.arange(count)),
            "bound": lambda: fitted(order[: max(FEW, 2 * BEST)]),
        }
        found = dict[str, float]()
        for name, strategy in strategies.items():
            started = time.process_time()
            best = np.argsort(-strategy())[:BEST]
            found[f"{name} recall"] = float(np.isin(best, order[:BEST]).mean())
            found[f"{name} cpu_s"] = time.process_time() - started
        return found | {"ours rounds": float(len(rounds))}

    found = means(repeated(repeats, f"best {BEST} of {count} images", run))
    keys = ("recall", "cpu_s", "rounds")
    return [
        {"way": way} | {key: found.get(f"{way} {key}", "") for key in keys}
        for way in ("ours", "knockout", "random", "bound")
    ]
