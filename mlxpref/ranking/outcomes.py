"""The judge's answers about pairs of images, as numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlxpref.errors import DataError
from mlxpref.ranking.log_odds import combine_orders

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

MAX_VOTES = 24  # answers that are all shares of up to so many votes, with 0 or 1 among them, are vote shares
VOTES_MARGIN = 1.01e-4  # how near to a share of votes an answer is one


@dataclass(frozen=True)
class PairOutcome:
    """The judge's answers about images a and b: P(a preferred) with a shown first, and with a shown second.

    None or NaN is a missing order. List each pair once: a pair that is listed twice counts twice. `instrument` numbers
    the way of judging, 0 to 9, such as reading and thinking: each has a scale, a bias and a noise of its own.
    """

    a: int
    b: int
    p_a_shown_first: float | None
    p_a_shown_second: float | None
    instrument: int = 0

    @property
    def p_a(self) -> float | None:
        """The soft preference for a, see `combine_orders`."""
        return combine_orders(self.p_a_shown_first, self.p_a_shown_second)


class Outcomes:
    """Outcomes over K pairs: a, b and instrument (K,); p (2, K), P(a) shown first and shown second, NaN if missing.

    DataError: fewer than two images, an index outside them, a pair of one image, a probability outside 0 to 1, an
    instrument that is no number from 0 to 9.
    """

    def __init__(self, count: int, outcomes: Sequence[PairOutcome]) -> None:
        if count < 2:
            raise DataError(f"a ranking needs at least two images, not {count}")
        rows = [(o.a, o.b, o.instrument, o.p_a_shown_first, o.p_a_shown_second) for o in outcomes]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 5).T  # (5, K); None becomes NaN
        self.count = count
        self.p: Array = columns[3:]
        self.a, self.b, self.instrument = a, b, instrument = columns[:3].astype(np.int64)
        bad = (np.minimum(a, b) < 0) | (np.maximum(a, b) >= count) | (a == b) | (instrument < 0) | (instrument > 9)
        bad |= ((self.p < 0) | (self.p > 1)).any(axis=0)
        if bad.any():
            raise DataError(
                f"{bad.sum()} of {len(rows)} pairs cannot be ranked, first {outcomes[int(bad.argmax())]}: a and b "
                f"must be two different images from 0 to {count - 1}, probabilities must lie between 0 and 1"
            )
        self.known = ~np.isnan(self.p)  # (2, K)
        self.instruments = int(instrument.max()) + 1 if len(rows) else 1

    def are_votes(self, instrument: int) -> bool:
        """Whether the answers of an instrument are shares of votes, as of people, rather than a model's probabilities.

        True if all are shares of one number of votes and one of them is 0 or 1; or if all nearly are, some of them
        shares such as a third, and most answers are given twice, as a model's hardly are.
        """
        p = self.p[:, self.instrument == instrument]
        p = p[~np.isnan(p)]
        if not len(p):
            return False
        if np.isin(p, (0.0, 1.0)).any():
            return any(np.abs(p * votes - np.rint(p * votes)).max() <= 1e-9 for votes in range(1, MAX_VOTES + 1))
        values = len(np.unique(p))  # two of one vote, else a saturated judge would seem to vote
        between = ((p > VOTES_MARGIN) & (p < 1 - VOTES_MARGIN)).any()
        if min(p.min(), 1 - p.max()) > VOTES_MARGIN or values > len(p) / 2 or not (between or values == 2):
            return False
        return any(
            np.abs(p * votes - np.rint(p * votes)).max() <= VOTES_MARGIN * votes for votes in range(1, MAX_VOTES + 1)
        )

    def cycles(self, instrument: int) -> int:
        """How many independent cycles an instrument's pairs close, given the pairs of the others.

        Each cycle shows how far answers contradict one order; without any, no noise can be seen.
        """
        own = (self.instrument == instrument) & self.known.any(axis=0)
        others = (self.instrument != instrument) & self.known.any(axis=0)
        return int(own.sum()) - (self._components(others) - self._components(own | others))

    def _components(self, rows: NDArray[np.bool_]) -> int:
        return int(components(self.count, self.a[rows], self.b[rows]).max()) + 1


def components(count: int, a: Indices, b: Indices) -> Indices:
    """(N,): for every image the number of the component of the graph of pairs that it belongs to."""
    from scipy.sparse import coo_array  # takes a fifth of a second to import
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(a)), (a, b)), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def all_pairs(count: int) -> Iterator[tuple[int, int]]:
    """Every pair (a, b) with a < b of `count` images: the round robin, count (count - 1) / 2 pairs."""
    return ((a, b) for a in range(count) for b in range(a + 1, count))
