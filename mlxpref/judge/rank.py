"""The contest: pairs of images are chosen and judged in rounds, until the budget is spent or the top is settled."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlxpref.errors import ConfigError
from mlxpref.judge.diagnostics import warnings_for
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import Ending, JudgedPair, Ranking, name_of
from mlxpref.log import track
from mlxpref.preferences import ImageLike, Pair
from mlxpref.ranking.bradley_terry import PairOutcome, StrengthFit, fit_strengths, rank_images
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, pair_budget

__all__ = ["TOP", "Compare", "PairBudget", "Think", "rank_pairs"]

Think = Literal["top", "all", "none"]
TOP = 10
"""How many of the best images are thought about where the judge thinks about the top only."""
Compare = Callable[[Iterable[Pair], bool], Iterable[PairVerdict]]
"""A judge of pairs: the pairs, and whether to think about them."""
Agreed = Callable[[Any], Any]
"""Gives every process what one of them, always the same, gave: something that JSON holds."""
_ROUND = 6
"""The fewest pairs of a round: fewer would leave a judge that works in batches idle."""
_LEADERS = 3
"""How many images are named while the work goes on."""


@dataclass(frozen=True)
class PairBudget:
    """How many pairs are read without thinking, and how many are thought about then."""

    read: int
    think: int

    @classmethod
    def of(cls, count: int, think: Think, pairs: int | Literal["all"] | None = None) -> "PairBudget":
        """The budget for `count` images: `pairs` of them, by default two an image.

        With `think` "top", more than TOP images are read first; then comes a budget of its own for the best TOP.
        """
        if isinstance(pairs, int) and pairs < 1:
            raise ConfigError(f"{pairs} pairs cannot be judged: 1 is the least")
        if think == "none":
            return cls(pair_budget(count, pairs), 0)
        if think == "all" or count <= TOP:
            return cls(0, pair_budget(count, pairs))
        return cls(pair_budget(count, pairs), pair_budget(TOP, pairs))


def rank_pairs(
    images: Sequence[ImageLike],
    prompt: str,
    compare: Compare,
    think: Think = "top",
    pairs: int | Literal["all"] | None = None,
    top: int | None = None,
    seed: int = 0,
    agreed: Agreed = lambda value: value,
) -> Ranking:
    """Judge pairs of at least two images by `compare` and rank them; see `PairBudget` for `think` and `pairs`.

    With `top`, the work ends as soon as it is settled which images are the `top` best (`pairing.is_settled`).
    KeyboardInterrupt ends it, too: what was judged until then is ranked; only where that is nothing is it raised.
    Several processes that judge together have `agreed` on which pairs are next, since machines may round differently.
    """
    started = time.perf_counter()
    if top is not None and top < 1:
        raise ConfigError(f"the top {top} cannot be found: 1 is the least")
    contest = _PairSchedule(images, prompt, compare, seed, agreed)
    budget = PairBudget.of(len(images), think, pairs)
    ending: Ending = "done"
    try:
        every = list(range(len(images)))
        if budget.read:
            # Where thinking follows, reading only has to find those that are worth it.
            wanted = max(top, TOP) if top and budget.think else top
            contest.hold(every, budget.read, False, wanted)
        if budget.think:
            ranking = rank_images(len(images), contest.outcomes)
            best = [image.index for image in ranking.images[:TOP]]
            contest.hold(agreed(sorted(best)) if budget.read else every, budget.think, True, top)
        if top and contest.count < budget.read + budget.think:
            ending = "settled"
    except KeyboardInterrupt:
        if not contest.found:
            raise
        ending = "interrupted"
    found = Ranking(
        prompt,
        tuple(images),
        rank_images(len(images), contest.outcomes),
        tuple(contest.found.values()),
        time.perf_counter() - started,
        planned=budget.read + budget.think,
        ending=ending,
    )
    return replace(found, remarks=tuple(warnings_for(found, top)))


@dataclass
class _PairSchedule:
    """What was asked so far and what follows from it; a pair that is thought about replaces the one that was read."""

    images: Sequence[ImageLike]
    prompt: str
    compare: Compare
    seed: int
    agreed: Agreed
    found: dict[tuple[int, int], JudgedPair] = field(default_factory=dict)
    count: int = 0
    _leaders: str = ""

    @property
    def outcomes(self) -> list[PairOutcome]:
        """All pairs so far, as a ranking needs them."""
        return [pair.verdict.outcome(pair.a, pair.b) for pair in self.found.values()]

    def hold(self, members: Sequence[int], budget: int, thinking: bool, top: int | None) -> None:
        """Judge a number of pairs among some images (ascending), or fewer if the top is settled before."""
        what = "thinking" if thinking else "reading"
        for _ in track(self._rounds(members, budget, thinking, top), budget, lambda: what + self._leaders):
            self.count += 1

    def _rounds(self, members: Sequence[int], budget: int, thinking: bool, top: int | None) -> Iterator[PairVerdict]:
        asked: set[tuple[int, int]] = set()
        size = max(_ROUND, default_round(len(members)))
        while len(asked) < budget:
            fit = self._fit() if self.found else None
            if self.agreed(bool(fit and asked and top and is_settled(fit, top))):
                return
            among = _part(fit, members) if fit else None
            chosen = next_round(len(members), asked, among, min(size, budget - len(asked)), self.seed, top)
            chosen = [(a, b) for a, b in self.agreed(chosen)]
            asked.update(chosen)
            pairs = [(members[a], members[b]) for a, b in chosen]
            work = self.compare((Pair(self.images[a], self.images[b], self.prompt) for a, b in pairs), thinking)
            for (a, b), verdict in zip(pairs, work, strict=True):
                self.found[a, b] = JudgedPair(a, b, verdict)
                yield verdict

    def _fit(self) -> StrengthFit:
        fit = fit_strengths(len(self.images), self.outcomes)
        best = np.argsort(-fit.strengths, kind="stable")[:_LEADERS].tolist()
        self._leaders = "; leading: " + ", ".join(Path(name_of(self.images, index)).name for index in best)
        return fit


def _part(fit: StrengthFit, members: Sequence[int]) -> StrengthFit:
    """What is known of some of the images."""
    index = np.array(members)
    return replace(fit, strengths=fit.strengths[index], covariance=fit.covariance[np.ix_(index, index)])
