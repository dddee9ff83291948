"""Ranking: choose and judge pairs of images in rounds, until the budget is spent or the top is settled."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, get_args

import numpy as np

from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.errors import ConfigError
from mlxpref.judge.diagnostics import warnings_for
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.ranking_result import Ending, JudgedPair, Ranking, image_names
from mlxpref.log import track
from mlxpref.preferences import ImageLike, Pair
from mlxpref.ranking.bradley_terry import PairOutcome, StrengthFit, fit_strengths, rank_images
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, pair_budget
from mlxpref.text import short_names

ThinkAbout = Literal["top", "all", "none"]
"""The pairs to judge with thinking: those of the TOP best images, all, or none."""
TOP = 10
Compare = Callable[[Iterable[Pair], bool], Iterable[PairVerdict]]
"""Judges pairs; the second argument is whether to think."""
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
) -> Ranking:
    """Judge pairs of at least two images by `compare` and rank them; see `PairBudget` for `think_about` and `pairs`.

    With `top`, the work ends once the `top` best images are settled (`is_settled`), never early for all images;
    ConfigError for a `top` below 1.
    KeyboardInterrupt ends it, too, and the pairs so far are ranked; without any, the interrupt is raised. Process 0
    chooses the pairs for all `processes`, since machines may round differently.
    """
    start = time.perf_counter()
    if top is not None and not (isinstance(top, Integral) and top > 0):
        raise ConfigError(f"the top {top!r} cannot be found: 1 is the least")
    goal = top if top and top < len(images) else None
    schedule = _PairSchedule(images, prompt, compare, seed, processes)
    budget = PairBudget.of(len(images), think_about, pairs)
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
        if goal and len(schedule.verdicts) < budget.total:
            ending = "settled"
    except KeyboardInterrupt:
        if not schedule.pairs:
            raise
        ending = "interrupted"
    counts = JudgingCounts.of(schedule.verdicts)
    ranking = Ranking(
        prompt,
        tuple(images),
        rank_images(len(images), schedule.outcomes),
        tuple(schedule.pairs.values()),
        time.perf_counter() - start,
        planned=budget.total,
        ending=ending,
        tokens=counts.tokens,
        recalled=counts.recalled,
    )
    return replace(ranking, warnings=tuple(warnings_for(ranking, top)))


@dataclass
class _PairSchedule:
    """The next pairs, and the verdicts so far; one with thinking replaces the pair's earlier one."""

    images: Sequence[ImageLike]
    prompt: str
    compare: Compare
    seed: int
    processes: ProcessGroup
    pairs: dict[tuple[int, int], JudgedPair] = field(default_factory=dict)
    verdicts: list[PairVerdict] = field(default_factory=list)
    _leaders: str = ""

    def __post_init__(self) -> None:
        self._names = short_names(image_names(self.images))

    @property
    def outcomes(self) -> list[PairOutcome]:
        """All pairs so far, as input for a ranking."""
        return [pair.verdict.outcome(pair.a, pair.b) for pair in self.pairs.values()]

    def best(self, count: int) -> list[int]:
        """The numbers of the best images so far, ascending."""
        images = rank_images(len(self.images), self.outcomes).images[:count]
        numbers: list[int] = self.processes.broadcast(sorted(image.index for image in images))
        return numbers

    def run(self, members: Sequence[int], budget: int, think: bool, top: int | None) -> None:
        """Judge `budget` pairs among some images (ascending numbers), or fewer if the top settles earlier."""
        what = "with thinking" if think else "without thinking"
        work = self._rounds(members, budget, think, top)
        for verdict in track(work, budget, lambda: f"judging {what}{self._leaders}"):
            self.verdicts.append(verdict)

    def _rounds(self, members: Sequence[int], budget: int, think: bool, top: int | None) -> Iterator[PairVerdict]:
        past_pairs: set[tuple[int, int]] = set()
        size = max(_ROUND, default_round(len(members)))
        while len(past_pairs) < budget:
            fit = self._fit() if self.pairs else None
            if self.processes.broadcast(bool(fit and past_pairs and top and is_settled(fit, top))):
                return
            among = _part(fit, members) if fit else None
            proposals = next_round(len(members), past_pairs, among, min(size, budget - len(past_pairs)), self.seed, top)
            pairs = [(a, b) for a, b in self.processes.broadcast(proposals)]
            past_pairs.update(pairs)
            numbers = [(members[a], members[b]) for a, b in pairs]
            verdicts = self.compare((Pair(self.images[a], self.images[b], self.prompt) for a, b in numbers), think)
            for (a, b), verdict in zip(numbers, verdicts, strict=True):
                self.pairs[a, b] = JudgedPair(a, b, verdict)
                yield verdict

    def _fit(self) -> StrengthFit:
        fit = fit_strengths(len(self.images), self.outcomes)
        best = np.argsort(-fit.strengths, kind="stable")[:_LEADERS].tolist()
        self._leaders = "; leading: " + ", ".join(self._names[index] for index in best)
        return fit


def _part(fit: StrengthFit, members: Sequence[int]) -> StrengthFit:
    """The strengths and covariances of some of the images."""
    index = np.array(members)
    return replace(fit, strengths=fit.strengths[index], covariance=fit.covariance[np.ix_(index, index)])
