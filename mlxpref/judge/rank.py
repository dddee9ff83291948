"""Ranking: choose and judge pairs of images in rounds, until the budget is spent or the top is settled."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.errors import ConfigError
from mlxpref.judge.diagnostics import warnings_for
from mlxpref.judge.pair_budget import TOP, PairBudget, ThinkAbout, is_count
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.ranking_result import Ending, JudgedPair, Ranking, image_names
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, Pair
from mlxpref.ranking.bradley_terry import StrengthFit, fit_strengths
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.orders import FEW_IMAGES, better_orders, in_one_order, trial_pairs
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, round_size
from mlxpref.ranking.strength_ranking import ranking_of
from mlxpref.text import counted, short_names

Orders = Literal["auto", "both", "one"]
"""The orders in which a pair is shown: what the judge's first answers speak for, both, or one of them."""
Compare = Callable[[Iterable[Pair], bool, int], Iterable[PairVerdict]]
"""Judges pairs; whether to think; in both orders (2), or only with a shown first (1)."""
_ROUND = 6
"""The fewest pairs of a round: fewer would leave a batch half empty."""
_LEADERS = 3
"""The number of images that the progress names."""


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
    if top is not None and not is_count(top):
        raise ConfigError(f"the top {top!r} cannot be found: 1 is the least")
    if orders not in get_args(Orders):
        raise ConfigError(f"orders {orders!r}: give {', '.join(map(repr, get_args(Orders)))}")
    goal = top if top and top < len(images) else None
    budget = PairBudget.of(len(images), think_about, pairs)
    memory = known if known and len(images) > 2 else {}
    schedule = _PairSchedule(images, prompt, compare, seed, processes, orders, budget.modes, memory)
    everyone = list(range(len(images)))
    ending: Ending = "done"
    try:
        if budget.without_thinking:
            # Before thinking, this only has to find the finalists.
            finalists = max(goal, TOP) if goal and budget.with_thinking else goal
            schedule.run(everyone, budget.without_thinking, think=False, top=finalists)
        if budget.with_thinking:
            members = schedule.best(TOP) if budget.without_thinking else everyone
            schedule.run(members, budget.with_thinking, think=True, top=goal)
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
        ranking_of(schedule.fit(), schedule.outcomes),
        kept,
        time.perf_counter() - start,
        replaced=replaced,
        modes=schedule.modes or (budget.modes[-1],),
        known=tuple(schedule.noises.get(number) for number in range(max(len(schedule.modes), 1))),
        orders="; ".join(schedule.orders_notes()),
        planned=schedule.planned(budget),
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
    ways: Sequence[bool]
    known: Mapping[bool, Noise]
    verdicts: dict[tuple[int, int, bool], PairVerdict] = field(default_factory=dict)
    asked: list[PairVerdict] = field(default_factory=list)
    settled: bool = False
    _sizes: dict[bool, tuple[int, int, int | None]] = field(default_factory=dict)
    _leaders: str = ""
    _latest: StrengthFit | None = None
    _readable: set[bool] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._names = short_names(image_names(self.images))

    @property
    def modes(self) -> tuple[bool, ...]:
        """The ways of judging, without thinking and with it, that gave a readable answer: a fit's instruments."""
        return tuple(think for think in self.ways if think in self._readable)

    @property
    def outcomes(self) -> list[PairOutcome]:
        """All readable pairs so far, as input for a ranking; each way of judging is an instrument."""
        modes = self.modes
        return [
            verdict.outcome(a, b, modes.index(think))
            for (a, b, think), verdict in self.verdicts.items()
            if verdict.is_readable
        ]

    @property
    def noises(self) -> dict[int, Noise]:
        """What was known of the instruments."""
        return {number: self.known[think] for number, think in enumerate(self.modes) if think in self.known}

    def planned(self, budget: PairBudget) -> int:
        """The comparisons of a budget."""
        count = len(self.images)
        thinkers = min(count, TOP) if budget.without_thinking else count
        return self._comparisons(count, budget.without_thinking) + self._comparisons(thinkers, budget.with_thinking)

    def _comparisons(self, count: int, pairs: int) -> int:
        """Two a pair, but in one order each pair is asked once."""
        return min(2 * pairs, count * (count - 1) // (2 if self.orders == "one" else 1))

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
        order = np.argsort(-np.round(self.fit().strengths, 9), kind="stable")  # equal ones as in a ranking
        numbers: list[int] = self.processes.broadcast(sorted(order[:count].tolist()))
        return numbers

    def run(self, members: Sequence[int], pairs: int, think: bool, top: int | None) -> None:
        """Ask the comparisons of `pairs` among some images (ascending numbers), or fewer if the top settles earlier."""
        what = "with thinking" if think else "without thinking"
        comparisons = self._comparisons(len(members), pairs)
        self._sizes[think] = len(members), comparisons, top
        work = self._rounds(members, comparisons, think, top)
        for _ in track(work, comparisons, lambda: f"judging {what}{self._leaders}"):
            pass
        for line in self.orders_notes(think):
            logger.info(line)

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
            fit = self.fit() if self.modes else None
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
        number = self._number(think)
        orders = {"both": 2, "one": 1, "auto": 2}[self.orders]
        size = max(_ROUND, round_size(count, fit, top))
        if self._chooses_orders(count, budget, top):
            if fit and past_pairs and think in self.modes:
                orders = better_orders(fit.instruments[number].noise, budget / count)
            elif think not in self.known and (trial := trial_pairs(count, budget, self.seed)):
                return 2, trial
            else:  # in both orders, which show whether what is known holds, but at most a third of the budget
                size = min(size, max(budget // 6, 1))
        orders = min(orders, left)
        size = min(size * (2 // orders), left // orders)
        pairs = next_round(count, past_pairs, fit, size, self.seed, top, orders, number)
        return orders, [(a, b) for a, b in pairs]

    def _second_orders(self, count: int, left: int, think: bool, top: int | None) -> list[tuple[int, int]]:
        """A round of pairs as (first shown, second shown) in the order that was not asked yet, at most `left`.

        With a `top` it begins with the images at its edge. None where one order is wanted.
        """
        if self.orders == "one":
            return []
        missing = [
            (a, b) if verdict.a_shown_second else (b, a)
            for (a, b, thought), verdict in self.verdicts.items()
            if thought == think and not verdict.is_in_both_orders
        ]
        if top:
            strengths = self.fit().strengths
            edge = np.sort(strengths)[-top - 1 : len(strengths) - top + 1].mean()
            missing.sort(key=lambda pair: float(np.abs(strengths[list(pair)] - edge).min()))
        return missing[: min(left, 2 * max(_ROUND, default_round(count)))]

    def _is_settled(self, fit: StrengthFit, top: int, members: Sequence[int], think: bool) -> bool:
        orders = 1 if self.orders == "one" else 2
        return is_settled(fit, top, self.outcomes, members, orders, self._number(think))

    def _number(self, think: bool) -> int:
        """The number of an instrument, or what it will be with its first answer."""
        return self.modes.index(think) if think in self.modes else len(self.modes)

    def _add(self, first: int, second: int, think: bool, verdict: PairVerdict) -> None:
        """Add a verdict about the first image as a, to that of the other order if there is one."""
        self._latest = None
        self.asked.append(verdict)
        if verdict.is_readable:
            self._readable.add(think)
        a, b = min(first, second), max(first, second)
        verdict = verdict if first == a else verdict.swapped()
        before = self.verdicts.get((a, b, think))
        self.verdicts[a, b, think] = verdict.joined(before) if before else verdict

    def orders_notes(self, *ways: bool) -> list[str]:
        """Which orders were asked, and why: a line for each way of judging that had to choose, or for those given."""
        if self.orders != "auto":
            return [] if ways else [f"{self.orders} order{'s' * (self.orders == 'both')}, as asked for"]
        lines = []
        for think in (think for think in ways or self._sizes if think in self.modes):
            if not self._chooses_orders(*self._sizes[think]):
                continue
            verdicts = [verdict for (_, _, thought), verdict in self.verdicts.items() if thought == think]
            both = sum(verdict.is_in_both_orders for verdict in verdicts)
            noise = self.fit().instruments[self.modes.index(think)].noise
            bias, other = (float(variance) ** 0.5 for variance in (noise.of_difference(0.5), noise.of_mean(0.5)))
            lines.append(
                f"{'with' if think else 'without'} thinking {counted(both, 'pair')} in both orders, "
                f"{len(verdicts) - both} in one, as from pair to pair the position bias varies by {bias:.2g} nats and "
                f"all else by {other:.2g}"
            )
        return lines if lines or ways else ["both orders, as of few images or of all pairs"]

    def fit(self) -> StrengthFit:
        """The fit to all answers so far, which also says who leads."""
        if self._latest is None:
            self._latest = fit_strengths(len(self.images), self.outcomes, self.noises)
            best = np.argsort(-self._latest.strengths, kind="stable")[:_LEADERS].tolist()
            self._leaders = "; leading: " + ", ".join(self._names[index] for index in best)
        return self._latest


def _part(fit: StrengthFit, members: Sequence[int]) -> StrengthFit:
    """The fit of some of the images."""
    index = np.array(members)
    return replace(fit, strengths=fit.strengths[index], covariance=fit.covariance.part(index))
