"""Judges for the tests of rankings: designs, answers of votes and of log-odds, and any set of outcomes."""

from collections.abc import Iterable, Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import kendalltau

from mlxpref.ranking.outcomes import Array, PairOutcome

PROBABILITIES = st.floats(0, 1)
relaxed = settings(deadline=None, max_examples=60)  # a busy machine is not a failure


def random_pairs(count: int, per_image: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A random design: every image in `per_image` pairs (an odd one out may be in fewer), no pair twice."""
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < count * per_image // 2:
        order = rng.permutation(count).tolist()
        for a, b in zip(order[: count // 2], order[count // 2 :], strict=False):
            if len(pairs) < count * per_image // 2:
                pairs.add((min(a, b), max(a, b)))
    return sorted(pairs)


def outcomes_of(
    pairs: Iterable[tuple[int, int]], first: Array, second: Array, instrument: int = 0
) -> list[PairOutcome]:
    """Outcomes of K pairs with P(a) (K,) shown first and second."""
    rows = zip(pairs, first.tolist(), second.tolist(), strict=True)
    return [PairOutcome(a, b, p, q, instrument) for (a, b), p, q in rows]


def voted(
    pairs: Sequence[tuple[int, int]], strengths: Array, rng: np.random.Generator, votes: int = 3, bias: float = 0.5
) -> list[PairOutcome]:
    """Outcomes whose probabilities are the shares of independent yes-or-no votes, `votes` a comparison."""
    a, b = np.array(pairs).T
    lead = strengths[a] - strengths[b]
    first, second = (rng.binomial(votes, expit(lead + sign * bias)) / votes for sign in (1, -1))
    return outcomes_of(pairs, first, second)


def thought(
    pairs: Sequence[tuple[int, int]],
    strengths: Array,
    rng: np.random.Generator,
    noise: float = 0.3,
    each: float = 0.1,
    bias: float = 0.5,
    bias_deviation: float = 0.0,
    scale: float = 1.0,
    instrument: int = 0,
) -> list[PairOutcome]:
    """Outcomes of a judge of probabilities.

    Its log-odds are `scale` times the difference of strengths, with noise of the pair, noise of each comparison, and a
    bias that varies from pair to pair by `bias_deviation`.
    """
    a, b = np.array(pairs).T
    lead = strengths[a] - strengths[b] + rng.normal(0, noise, len(a))
    biases = bias + rng.normal(0, bias_deviation, len(a))
    first, second = (lead + sign * biases + rng.normal(0, each, len(a)) for sign in (1, -1))
    return outcomes_of(pairs, expit(scale * first), expit(scale * second), instrument)


def one_order(outcomes: Iterable[PairOutcome]) -> list[PairOutcome]:
    """The outcomes with one order each, first and second in turn."""
    return [
        PairOutcome(o.a, o.b, *((o.p_a_shown_first, None), (None, o.p_a_shown_second))[k % 2], o.instrument)
        for k, o in enumerate(outcomes)
    ]


def tau(strengths: Array, truth: Array) -> float:
    """Kendall's agreement of two orders."""
    return float(kendalltau(strengths, truth)[0])


@st.composite
def judged_sets(draw: st.DrawFn) -> tuple[int, list[PairOutcome]]:
    """Any number of images and outcomes, orders missing here and there, pairs repeated, sets disconnected."""
    count, instruments = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    p = st.none() | st.just(float("nan")) | st.sampled_from([0.0, 0.5, 1.0]) | PROBABILITIES
    image = st.integers(0, count - 1)
    pair = st.tuples(image, image, p, p, st.integers(0, instruments - 1)).filter(lambda row: row[0] != row[1])
    return count, [PairOutcome(*row) for row in draw(st.lists(pair, max_size=20))]
