"""The choice of the next pairs, and of when to stop. Images are numbers, strengths are log-odds in nats.

The gain of a pair is a product: the doubt which image is stronger, the share of that doubt that an answer removes, and
the chance that one of them enters or leaves the top; where only the top matters, of the last two. `next_round` picks
the largest; each pick lowers the gains of other pairs with its images.

Choosing by earlier answers has a price: the best so far owe some of their lead to luck. `fit_strengths` fits the
deviation of the strengths to the answers, which takes most of that back (scripts/ranking_coverage.py measures it).
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import Literal

import numpy as np
from scipy.special import expit

from mlxpref.errors import ConfigError
from mlxpref.ranking.bradley_terry import PRIOR_DEVIATION, Instrument, StrengthFit
from mlxpref.ranking.covariance import DENSE_IMAGES, SparseCovariance, independent
from mlxpref.ranking.information_gain import InformationGain, contention
from mlxpref.ranking.noise import ONE_ANSWER, Noise
from mlxpref.ranking.outcomes import Array, Indices, PairOutcome, all_pairs, components
from mlxpref.ranking.posterior import contenders, normal_draws
from mlxpref.ranking.threads import one_thread

REACH = 16  # candidates are at most this far apart in the current order, so that a round is linear in N
MAX_PAIRS = 2  # of one image in a round: an answer may make further pairs needless
OUT = 0.05  # the doubt whether an image is in the top below which no round is made larger for it
IMAGES_A_PAIR = 25  # in the smallest rounds of many images: their fits take a second
SETTLED = 0.95  # the probability at which a top is settled
SETTLED_DRAWS = 4000  # know it to 0.003


def pair_budget(count: int, pairs: int | Literal["all"] | None = None) -> int:
    """How many pairs of `count` images to ask: `pairs`, "all", or by default two an image; at most all that exist."""
    total = count * (count - 1) // 2
    return total if pairs == "all" else min(2 * count if pairs is None else pairs, total)


def default_round(count: int) -> int:
    """The pairs asked between two fits: one for three images, at least 3.

    Smaller rounds use their answers better; larger ones fill a judge's batches and need fewer fits.
    """
    return max(3, count // 3)


def round_size(count: int, fit: StrengthFit | None, top: int | None) -> int:
    """`default_round`; but of more than `DENSE_IMAGES` images with a `top` that of those which may be in it.

    So images end early, and the answers that are left go to few. At least one pair for `IMAGES_A_PAIR` images.
    """
    if top is None or fit is None or not isinstance(fit.covariance, SparseCovariance):
        return default_round(count)
    order = np.argsort(-fit.strengths, kind="stable")
    able = int((contention(fit, order, top) > OUT).sum())
    return max(default_round(able), count // IMAGES_A_PAIR)


@one_thread()
def next_round(
    count: int,
    asked: Collection[tuple[int, int]],
    fit: StrengthFit | None,
    size: int,
    seed: int = 0,
    top: int | None = None,
    orders: int = 2,
    instrument: int = 0,
) -> list[tuple[int, int]]:
    """The next `size` pairs (a, b), a < b, to ask of `count` images, or all that are left if they are no more.

    `asked` are the pairs of earlier rounds, either image first; none of them is asked again. `fit` is the fit to their
    answers, None before the first. Until the pairs connect all images, it picks only pairs that connect, count - 1 in
    all. An image is in at most `MAX_PAIRS` of a round, unless that leaves the round short. `top`: how many of the best
    matter most, by default 1; of more than `DENSE_IMAGES` images it then picks pairs of those that may be in it, once
    they are no more. The pairs will be asked in one or both `orders`, by `instrument`. `seed` orders equal
    images; nothing else is random. ConfigError: fewer than two images, a size or a top below 1.
    """
    if count < 2 or size < 1 or (top is not None and top < 1):
        raise ConfigError(f"a round needs at least two images, one pair and top 1, not {count}, {size} and {top}")
    past_pairs = {(min(pair), max(pair)) for pair in asked}
    if size >= count * (count - 1) // 2 - len(past_pairs):
        return [pair for pair in all_pairs(count) if pair not in past_pairs]
    fit = fit or _prior_fit(count)
    permutation = np.random.default_rng([seed, len(past_pairs)]).permutation(count)
    order = permutation[np.argsort(-np.round(fit.strengths[permutation], 9), kind="stable")]  # (N,) best first
    if top is not None and isinstance(fit.covariance, SparseCovariance):
        able, inside = _able(fit, order, top, past_pairs, size)
        if len(able) <= DENSE_IMAGES:
            part = replace(fit, strengths=fit.strengths[able], covariance=fit.covariance.part(able))
            better = int(np.isin(able, order[:top]).sum())
            among = next_round(len(able), inside, part, size, seed, better, orders, instrument)
            return [(int(able[a]), int(able[b])) for a, b in among]
    return _picked(order, past_pairs, InformationGain(fit, order, top, size, orders, instrument), size)


def _picked(
    order: Indices, past_pairs: set[tuple[int, int]], gain: InformationGain, size: int
) -> list[tuple[int, int]]:
    """The pairs (a, b), a < b, of the largest gains, each picked with regard to those before; adds them to the past.

    `order` (N,) is best first.
    """
    count = len(order)
    island = components(count, *np.array(sorted(past_pairs), np.int64).reshape(-1, 2).T)
    uses = np.zeros(count, np.int64)
    max_pairs, reach = MAX_PAIRS, REACH

    def is_free(x: int, y: int) -> bool:
        return max(uses[x], uses[y]) < max_pairs and bool(not island.any() or island[x] != island[y])

    queue = _Queue(*_candidates(order, past_pairs, reach), gain)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < size:
        best = queue.pop(is_free)
        if best is None:
            # Neighbours in the order from different islands never met: only the limits can exclude them.
            if queue.open.any() and max_pairs < count:
                max_pairs += 1
                queue.refill()
            else:
                reach *= 2
                queue = _Queue(*_candidates(order, past_pairs, reach), gain)
            continue
        x, y = best
        pairs.append((min(x, y), max(x, y)))
        past_pairs.add(pairs[-1])
        gain.add(x, y)
        uses[[x, y]] += 1
        low, high = sorted((island[x], island[y]))
        island[island == high] = low
        if high and not island.any():
            queue.refill()
        queue.update(x, y)
    return pairs


@one_thread()
def is_settled(
    fit: StrengthFit,
    top: int,
    outcomes: Collection[PairOutcome],
    members: Collection[int] | None = None,
    orders: int = 2,
    instrument: int = 0,
) -> bool:
    """Whether all that could still be asked would leave the `top` strongest images the same, with 95 %.

    `outcomes` are those of the fit; what could still be asked is every pair of the `members` (by default of all images)
    in its missing `orders`, by `instrument`. The set is meant, in any order. It says nothing of a judge whom more
    answers would not make surer: his top may be settled and not known well, as intervals and ties show. It does not
    promise that 95 % of the runs that stop at the first True are right: frequent looks find lucky answers
    (scripts/ranking_top.py measures it). Of more than `DENSE_IMAGES` images it looks at the `CONTENDERS` that are
    nearest to the edge of the top. A `top` of all images or more is settled. ConfigError: a top below 1.
    """
    if top < 1:
        raise ConfigError(f"the top {top} cannot be settled: 1 is the least")
    if top >= len(fit.strengths):
        return True
    if isinstance(fit.covariance, SparseCovariance):
        fit, top, outcomes, members = _at_the_edge(fit, top, outcomes, members)
    order = np.argsort(-fit.strengths, kind="stable")
    change = change_by_the_rest(fit, outcomes, members, orders, instrument)
    strengths = (fit.strengths + normal_draws(change, SETTLED_DRAWS, np.random.default_rng(0)))[:, order]
    same = strengths[:, :top].min(axis=1) > strengths[:, top:].max(axis=1)
    return float(same.mean()) >= SETTLED


def change_by_the_rest(
    fit: StrengthFit, outcomes: Collection[PairOutcome], members: Collection[int] | None, orders: int, instrument: int
) -> Array:
    """(N, N): the covariance of the change of strengths once all is asked: what that will take from the fit's own."""
    count = len(fit.strengths)
    asked = np.zeros((count, count), np.int64)
    for pair in outcomes:
        if pair.instrument == instrument:
            one, other = sorted((pair.a, pair.b))
            asked[one, other] = (pair.p_a_shown_first is not None) + (pair.p_a_shown_second is not None)
    a, b = np.triu_indices(count, 1)  # (K,)
    judged = fit.instrument(instrument)
    p_model = expit(judged.scale * (fit.strengths[a] - fit.strengths[b]))  # (K,)
    asked_precision = (1 / judged.answer_variance(p_model, number) for number in (1, 2))
    precision = np.stack([np.zeros_like(p_model), *asked_precision])  # (3, K) by the number of orders
    gain = np.maximum(precision[orders] - precision[asked[a, b], np.arange(len(a))], 0)
    if members is not None:
        gain = np.where(np.isin(a, list(members)) & np.isin(b, list(members)), gain, 0.0)
    information = np.zeros((count, count))
    np.add.at(
        information,
        (np.concatenate([a, b, a, b]), np.concatenate([a, b, b, a])),
        np.outer([1, 1, -1, -1], gain).ravel(),
    )
    covariance = fit.covariance.block()
    before = np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)
    after = np.linalg.pinv(before + information / fit.widening**2, rcond=1e-9, hermitian=True)
    return np.asarray(covariance - after)


def _able(
    fit: StrengthFit, order: Indices, top: int, asked: Collection[tuple[int, int]], size: int
) -> tuple[Indices, list[tuple[int, int]]]:
    """The images that may enter or leave the top, ascending, and the pairs `asked` among them, by their places there.

    `order` (N,) is best first. More images if those had fewer than twice `size` pairs left to ask.
    """
    doubt = contention(fit, order, top)
    doubt[order[min(top, len(order) - 1) - 1 : top + 1]] = 1  # both sides of the edge
    likely = np.argsort(-doubt, kind="stable")  # (N,)
    number = int((doubt > OUT).sum())
    while True:
        able = np.sort(likely[:number])
        place = {image: at for at, image in enumerate(able.tolist())}
        inside = [(place[a], place[b]) for a, b in asked if a in place and b in place]
        if number > DENSE_IMAGES or number * (number - 1) // 2 - len(inside) >= 2 * size:
            return able, inside
        number += max(number // 4, 1)


def _at_the_edge(
    fit: StrengthFit, top: int, outcomes: Collection[PairOutcome], members: Collection[int] | None
) -> tuple[StrengthFit, int, Collection[PairOutcome], Collection[int] | None]:
    """The same of the images that may enter or leave the top, which get the numbers 0 to n - 1."""
    order = np.argsort(-fit.strengths, kind="stable")
    images = contenders(fit.strengths, fit.covariance, int(order[top - 1]))
    images = np.union1d(images, order[top - 1 : top + 1])
    number = {image: place for place, image in enumerate(images.tolist())}
    inside = [replace(o, a=number[o.a], b=number[o.b]) for o in outcomes if o.a in number and o.b in number]
    own = None if members is None else [number[image] for image in members if image in number]
    better = int(np.isin(images, order[:top]).sum())
    return replace(fit, strengths=fit.strengths[images], covariance=fit.covariance.part(images)), better, inside, own


class _Queue:
    """Pairs (a, b) (K,) that may be picked, by their gains: the largest first, of equal ones the first."""

    def __init__(self, a: Indices, b: Indices, gain: InformationGain) -> None:
        self.a, self.b, self.gain = a, b, gain
        self.value = gain.of(a, b)
        self.open = np.ones(len(a), np.bool_)
        images = np.concatenate([a, b])
        self._places = np.argsort(images, kind="stable") % max(len(a), 1)  # (2 K,) by image
        self._ends = np.cumsum(np.bincount(images, minlength=len(gain.contention)))  # (N,)
        self.refill()

    def refill(self) -> None:
        """Look again at pairs that were passed over."""
        places = np.flatnonzero(self.open)
        self._heap = list(zip((-self.value[places]).tolist(), places.tolist(), strict=True))
        heapify(self._heap)

    def pop(self, is_free: Callable[[int, int], bool]) -> tuple[int, int] | None:
        """Take the best pair that is free; pairs before it are passed over. None if there is none."""
        while self._heap:
            value, place = heappop(self._heap)
            x, y = int(self.a[place]), int(self.b[place])
            if self.open[place] and -value == self.value[place] and is_free(x, y):
                self.open[place] = False
                return x, y
        return None

    def update(self, x: int, y: int) -> None:
        """Find the gains of all pairs with one of two images anew."""
        spans = [self._places[self._ends[i - 1] if i else 0 : self._ends[i]] for i in (x, y)]
        places = np.concatenate(spans)
        places = places[self.open[places]]
        self.value[places] = self.gain.of(self.a[places], self.b[places])
        for entry in zip((-self.value[places]).tolist(), places.tolist(), strict=True):
            heappush(self._heap, entry)


def _prior_fit(count: int) -> StrengthFit:
    """The fit before the first answer: the prior of `fit_strengths`."""
    variance = PRIOR_DEVIATION**2
    instrument = Instrument(1.0, 0.0, PRIOR_DEVIATION, Noise(ONE_ANSWER, 0.0))
    return StrengthFit(np.zeros(count), independent(count, variance), (instrument,))


def _candidates(order: Indices, met: Collection[tuple[int, int]], reach: int) -> tuple[Indices, Indices]:
    """Both images of every pair that was not asked and whose places in the order are at most `reach` apart."""
    gaps = range(1, min(reach, len(order) - 1) + 1)
    a = np.concatenate([order[:-gap] for gap in gaps])
    b = np.concatenate([order[gap:] for gap in gaps])
    count = int(order.max()) + 1
    past_pairs = np.array([low * count + high for low, high in met if high < count], np.int64)
    new = ~np.isin(np.minimum(a, b) * count + np.maximum(a, b), past_pairs)
    return a[new], b[new]
