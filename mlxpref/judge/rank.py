"""Ranking: choose and judge pairs of images in rounds, until the budget is spent or the top is settled."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, get_args

import numpy as np

from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.errors import ConfigError
from mlxpref.judge.diagnostics import warnings_for
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.ranking_result import Ending, JudgedPair, Ranking, image_names
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, Pair
from mlxpref.ranking.bradley_terry import StrengthFit, fit_strengths
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.orders import FEW_IMAGES, better_orders, in_one_order, trial_pairs
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, pair_budget
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.text import counted, short_names

ThinkAbout = Literal["top", "all", "none"]
"""The pairs to judge with thinking: those of the TOP best images, all, or none."""
TOP = 10
Orders = Literal["auto", "both", "one"]
"""The orders in which a pair is shown: what the judge's first answers speak for, both, or one of them."""
Compare = Callable[[Iterable[Pair], bool, int], Iterable[PairVerdict]]
"""Judges pairs; whether to think; in both orders (2), or only with a shown first (1)."""
_ROUND = 6
"""The fewest pairs of a round: fewer would leave a batch half empty."""
_LEADERS = 3
"""The number of images that the progress names."""


@dataclass(frozen=True)
class PairBudget:
    """The numbers of pairs to judge without thinking, and then with thinking."""

    without_thinking: int
    with_thinking: int

    @classmethod
    def of(cls, count: int, think_about: ThinkAbout, pairs: int | Literal["all"] | None = None) -> "PairBudget":
        """The budget for `count` images: `pairs` of them, by default two an image.

        Of more than TOP images, "top" judges all without thinking first; the best TOP get a budget of their own.
        ConfigError for fewer than one pair, and for what is no choice.
        """
        if think_about not in get_args(ThinkAbout):
            raise ConfigError(f"think_about {think_about!r}: give {', '.join(map(repr, get_args(ThinkAbout)))}")
        if pairs is not None and pairs != "all" and not (isinstance(pairs, Integral) and pairs > 0):
            raise ConfigError(f"{pairs!r} pairs cannot be judged: 1 is the least; or give 'all'")
        if think_about == "none":
            return cls(pair_budget(count, pairs), 0)
        if think_about == "all" or count <= TOP:
            return cls(0, pair_budget(count, pairs))
        return cls(pair_budget(count, pairs), pair_budget(TOP, pairs))

    @property
    def modes(self) -> list[bool]:
        """Whether there are pairs to judge without thinking and with thinking."""
        return [think for think, count in ((False, self.without_thinking), (True, self.with_thinking)) if count]

    @property
    def total(self) -> int:
        """All pairs together."""
        return self.without_thinking + self.with_thinking


def rank_pairs(
    images: Sequence[ImageLike],
    prompt: str,
    compare: Compare,
    think_about: ThinkAbout = "top",
    pairs: int | Literal["all"] | None = None,
    top: int | None = None,
    seed: int = 0,
    processes: ProcessGroup = SINGLE_PROCESS,
    orders: Orders = "auto",
    known: Mapping[bool, Noise] | None = None,
) -> Ranking:
    """Judge pairs of at least two images by `compare` and rank them; see `PairBudget` for `think_about` and `pairs`.

    `orders` "auto" spends the comparisons of the budget on pairs in both orders or on up to twice as many in one, as
    the position bias varies from pair to pair (`better_orders`); up to `FEW_IMAGES` images it asks both. `known` is
    what earlier rankings showed of the judge's noise, without thinking and with it; of two images it is not used, so
    that the better one is the best with the probability that the judge gave it.

    With `top`, the work ends once the `top` best images are settled (`is_settled`), never early for all images;
    ConfigError for a `top` below 1 and for what is no choice.
    KeyboardInterrupt ends it, too, and the pairs so far are ranked; without any, the interrupt is raised. Process 0
    chooses the pairs for all `processes`, since machines may round differently.
    """
    start = time.perf_counter()
    if top is not None and not (isinstance(top, Integral) and top > 0):
        raise ConfigError(f"the top {top!r} cannot be found: 1 is the least")
    if orders not in get_args(Orders):
        raise ConfigError(f"orders {orders!r}: give {', '.join(map(repr, get_args(Orders)))}")
    goal = top if top and top < len(images) else None
    budget = PairBudget.of(len(images), think_about, pairs)
    noises = {budget.modes.index(think): noise for think, noise in (known or {}).items() if think in budget.modes}
    schedule = _PairSchedule(
        images, prompt, compare, seed, processes, orders, budget.modes, noises if len(images) > 2 else {}
    )
    everyone = list(range(len(images)))
    ending: Ending = "done"
    try:
        if budget.without_thinking:
            # Before thinking, this only has to find the finalists.
            finalists = max(goal, TOP) if goal and budget.with_thinking else goal
            schedule.run(everyone, 2 * budget.without_thinking, think=False, top=finalists)
        if budget.with_thinking:
            members = schedule.best(TOP) if budget.without_thinking else everyone
            schedule.run(members, 2 * budget.with_thinking, think=True, top=goal)
        if schedule.settled:
            ending = "settled"
    except KeyboardInterrupt:
        if not schedule.verdicts:
            raise
        ending = "interrupted"
    counts = JudgingCounts.of(schedule.asked)
    kept, replaced = schedule.judged_pairs()
    ranking = Ranking(
        prompt,
        tuple(images),
        rank_images(len(images), schedule.outcomes, schedule.known),
        kept,
        time.perf_counter() - start,
        replaced=replaced,
        modes=tuple(budget.modes),
        orders="; ".join(schedule.orders_notes) or f"orders: {orders}",
        planned=2 * budget.total,
        comparisons=counts.comparisons + counts.recalled,
        ending=ending,
        tokens=counts.tokens,
        recalled=counts.recalled,
    )
    return replace(ranking, warnings=tuple(warnings_for(ranking, top)))


@dataclass
class _PairSchedule:
    """The next pairs, and the verdicts so far, by both images (the smaller number first) and by whether it thought."""

    images: Sequence[ImageLike]
    prompt: str
    compare: Compare
    seed: int
    processes: ProcessGroup
    orders: Orders
    modes: Sequence[bool]
    known: Mapping[int, Noise]
    verdicts: dict[tuple[int, int, bool], PairVerdict] = field(default_factory=dict)
    asked: list[PairVerdict] = field(default_factory=list)
    settled: bool = False
    orders_notes: list[str] = field(default_factory=list)
    _leaders: str = ""

    def __post_init__(self) -> None:
        self._names = short_names(image_names(self.images))

    @property
    def outcomes(self) -> list[PairOutcome]:
        """All pairs so far, as input for a ranking; each way of judging is an instrument."""
        return [verdict.outcome(a, b, self.modes.index(think)) for (a, b, think), verdict in self.verdicts.items()]

    def judged_pairs(self) -> tuple[tuple[JudgedPair, ...], tuple[JudgedPair, ...]]:
        """The pairs, those with thinking where there are both, and the answers without thinking beside these."""
        with_thinking = {(a, b) for a, b, think in self.verdicts if think}
        kept: list[JudgedPair] = []
        replaced: list[JudgedPair] = []
        for (a, b, think), verdict in self.verdicts.items():
            (kept if think or (a, b) not in with_thinking else replaced).append(JudgedPair(a, b, verdict, think))
        return tuple(kept), tuple(replaced)

    def best(self, count: int) -> list[int]:
        """The numbers of the best images so far, ascending."""
        images = rank_images(len(self.images), self.outcomes, self.known).images[:count]
        numbers: list[int] = self.processes.broadcast(sorted(image.index for image in images))
        return numbers

    def run(self, members: Sequence[int], comparisons: int, think: bool, top: int | None) -> None:
        """Ask `comparisons` among some images (ascending numbers), or fewer if the top settles earlier."""
        what = "with thinking" if think else "without thinking"
        work = self._rounds(members, comparisons, think, top)
        for _ in track(work, comparisons, lambda: f"judging {what}{self._leaders}"):
            pass
        if self._chooses_orders(len(members), comparisons, top):
            self._say_orders(think)

    def _chooses_orders(self, count: int, budget: int, top: int | None) -> bool:
        """Whether the answers decide in which orders pairs are asked: not of few images, nor where all will be."""
        return self.orders == "auto" and count > FEW_IMAGES and (top is not None or budget < count * (count - 1))

    def _rounds(self, members: Sequence[int], budget: int, think: bool, top: int | None) -> Iterator[None]:
        """Ask round after round, until the budget is used up, and yield for every comparison."""
        self.settled = False
        count, used = len(members), 0
        past_pairs: set[tuple[int, int]] = set()
        lead: dict[int, int] = {}  # how often each image was first, less how often second
        while used < budget:
            fit = self._fit() if self.verdicts else None
            if self.processes.broadcast(
                bool(fit and past_pairs and top and self._is_settled(fit, top, members, think))
            ):
                self.settled = True
                return
            among = _part(fit, members) if fit else None
            orders, proposals = self.processes.broadcast(
                self._next_pairs(count, past_pairs, among, budget - used, budget, think, top)
            )
            past_pairs.update((a, b) for a, b in proposals)
            pairs = [(members[a], members[b]) for a, b in proposals]
            if not pairs:
                orders, pairs = 1, self._second_orders(count, budget - used, think, top)
            elif orders == 1:
                pairs = in_one_order(pairs, lead)
            if not pairs:
                return
            verdicts = self.compare(
                (Pair(self.images[a], self.images[b], self.prompt) for a, b in pairs), think, orders
            )
            for (a, b), verdict in zip(pairs, verdicts, strict=True):
                self._add(a, b, think, verdict)
                used += orders
                yield from [None] * orders

    def _next_pairs(
        self,
        count: int,
        past_pairs: set[tuple[int, int]],
        fit: StrengthFit | None,
        left: int,
        budget: int,
        think: bool,
        top: int | None,
    ) -> tuple[int, list[tuple[int, int]]]:
        """The orders of the next round and its pairs, by their places among the members."""
        instrument = self.modes.index(think)
        auto = self._chooses_orders(count, budget, top)
        if auto and not past_pairs and instrument not in self.known:
            return 2, trial_pairs(count, budget, self.seed)[: left // 2]
        orders = {"both": 2, "one": 1, "auto": 2}[self.orders]
        if auto:
            noise = fit.instruments[instrument].noise if fit and past_pairs else self.known[instrument]
            orders = better_orders(noise, budget / count)
        orders = min(orders, left)
        size = min(max(_ROUND, default_round(count)) * (2 // orders), left // orders)
        pairs = next_round(count, past_pairs, fit, size, self.seed, top, orders, instrument)
        return orders, [(a, b) for a, b in pairs]

    def _second_orders(self, count: int, left: int, think: bool, top: int | None) -> list[tuple[int, int]]:
        """A round of pairs as (first shown, second shown) in the order that was not asked yet, at most `left`.

        With a `top` it begins with the images at its edge. None where one order is wanted.
        """
        missing = [
            (a, b) if verdict.a_shown_second else (b, a)
            for (a, b, thought), verdict in self.verdicts.items()
            if thought == think and not (verdict.a_shown_first and verdict.a_shown_second)
        ]
        if top:
            strengths = self._fit().strengths
            edge = np.sort(strengths)[-top - 1 : len(strengths) - top + 1].mean()
            missing.sort(key=lambda pair: float(np.abs(strengths[list(pair)] - edge).min()))
        return [] if self.orders == "one" else missing[: min(left, 2 * max(_ROUND, default_round(count)))]

    def _is_settled(self, fit: StrengthFit, top: int, members: Sequence[int], think: bool) -> bool:
        orders = 1 if self.orders == "one" else 2
        return is_settled(fit, top, self.outcomes, members, orders, self.modes.index(think))

    def _add(self, first: int, second: int, think: bool, verdict: PairVerdict) -> None:
        """Add a verdict about the first image as a, to that of the other order if there is one."""
        self.asked.append(verdict)
        a, b = min(first, second), max(first, second)
        verdict = verdict if first == a else verdict.swapped()
        before = self.verdicts.get((a, b, think))
        self.verdicts[a, b, think] = verdict.joined(before) if before else verdict

    def _say_orders(self, think: bool) -> None:
        """Note which orders the answers spoke for."""
        verdicts = [verdict for (_, _, thought), verdict in self.verdicts.items() if thought == think]
        both = sum(bool(verdict.a_shown_first and verdict.a_shown_second) for verdict in verdicts)
        noise = self._fit().instruments[self.modes.index(think)].noise
        bias, other = (float(variance) ** 0.5 for variance in (noise.of_difference(0.5), noise.of_mean(0.5)))
        how = "with thinking" if think else "without thinking"
        line = (
            f"{how} {counted(both, 'pair')} in both orders, {len(verdicts) - both} in one: from pair to pair the "
            f"position bias varies by {bias:.2g} nats, the answer of both orders by {other:.2g}"
        )
        self.orders_notes.append(line)
        logger.info(line)

    def _fit(self) -> StrengthFit:
        fit = fit_strengths(len(self.images), self.outcomes, self.known)
        best = np.argsort(-fit.strengths, kind="stable")[:_LEADERS].tolist()
        self._leaders = "; leading: " + ", ".join(self._names[index] for index in best)
        return fit


def _part(fit: StrengthFit, members: Sequence[int]) -> StrengthFit:
    """The strengths and covariances of some of the images."""
    index = np.array(members)
    return replace(fit, strengths=fit.strengths[index], covariance=fit.covariance[np.ix_(index, index)])
