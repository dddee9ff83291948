"""Strategies compared in one run: ways to read a judge, by numbers of samples, with thinking and without.

What can be shared is shared: every image is looked at once, and what prompts begin with alike runs once. `soft` and
`select` read the same completions, one where its answer begins and one at its end; and as random numbers are keyed by
sample, the first samples of the largest number are those of every smaller one. One sample is greedy and several are
drawn, so one is written apart; so is what `score` reads, which is asked for in other words.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.engine.kv_cache import BranchedKVCache
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.engine.vlm import ComparisonInput
from mlxpref.judge.evaluation import Evaluation, evaluation_of, tie_threshold_of, to_judge
from mlxpref.judge.judge import Judge, JudgingSession
from mlxpref.judge.metrics import agreement, group_numbers, interval
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.protocols import PROTOCOLS, VALIDATION_SPLIT, labels
from mlxpref.log import track
from mlxpref.preferences import Pair, Preference
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.verdict import Strategy, Verdict

__all__ = [
    "Difference",
    "StrategyComparison",
    "StrategyRow",
    "StrategyVariant",
    "compare_strategies",
    "difference",
    "strategy_variants",
]

_PAIRS = 32
"""Pairs at least that every run judges before the next ones: what they share must still be in memory."""


@dataclass(frozen=True)
class StrategyVariant:
    """One way to judge: how completions are read, whether they begin with reasons, and how many there are an order."""

    strategy: Strategy
    think: bool
    samples: int


@dataclass(frozen=True)
class Difference:
    """By how much more often one way is right than another on the same pairs, from -1 to 1.

    `low` to `high` is its 95 % interval, by bootstrap over prompts.
    """

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class StrategyRow:
    """A way with its evaluation, and how it compares with others of the same thinking and samples.

    The evaluation's tokens and seconds are those that the row needs by itself. Where rows share completions, tokens are
    counted to where each stops reading, and the seconds of writing are divided by them.
    """

    way: StrategyVariant
    evaluation: Evaluation
    minus: Mapping[Strategy, Difference] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON of `eval`, with `think`, `samples` and, for `soft`, `minus_select` and `minus_score`."""
        minus = {f"minus_{strategy}": asdict(found) for strategy, found in self.minus.items()}
        return self.evaluation.to_json() | {"think": self.way.think, "samples": self.way.samples} | minus


@dataclass(frozen=True)
class StrategyComparison:
    """Every row, and what all of them took together; `reading_seconds` of it for images and prompts."""

    rows: tuple[StrategyRow, ...]
    preferences: tuple[Preference, ...]
    tokens: int
    seconds: float
    reading_seconds: float


def strategy_variants(
    strategies: Sequence[Strategy], samples: Sequence[int], thinks: Sequence[bool]
) -> list[StrategyVariant]:
    """Every way to judge, in the order of a table; without thinking more samples would say the same."""
    return [
        StrategyVariant(strategy, think, count)
        for think in sorted(set(thinks))
        for count in (sorted(set(samples)) if think else [1])
        for strategy in dict.fromkeys(strategies)
    ]


def compare_strategies(
    judge: Judge,
    preferences: Sequence[Preference],
    data: str,
    split: str,
    asked: Sequence[StrategyVariant],
    protocol: str = "pairs",
    tie_threshold: float | None = None,
    validation: Sequence[Preference] = (),
) -> StrategyComparison:
    """Judge preferences in every way that is asked for, each in both orders, and measure each as `evaluate` does.

    The judge's settings of thinking and samples are not used. With a store, an interrupted comparison goes on where it
    was. A tie threshold that has to be chosen is chosen for every row.
    """
    shown = to_judge(preferences, data, split, protocol)
    started = time.perf_counter()
    sitting = JudgingSession(judge.vlm)
    readers = {way: _reader(way, judge, sitting) for way in asked}
    choose = PROTOCOLS[protocol].ties and tie_threshold is None and bool(validation)
    before = _judge(judge, validation, asked, sitting, f"judging {VALIDATION_SPLIT}") if choose else {}
    runs = _judge(judge, shown, asked, sitting, "judging")
    # What a comparison takes until it can be written, where no other run has done a part of it.
    reading = max((run.reading / run.judged for run in runs.values() if run.judged), default=0.0)
    evaluations = {}
    for way, run in runs.items():
        verdicts = readers[way].read(run.verdicts)
        share = _tokens(verdicts) / (_tokens(run.verdicts) or 1)
        threshold = tie_threshold
        if choose:
            threshold = tie_threshold_of(validation, readers[way].read(before[way].verdicts))
        evaluations[way] = evaluation_of(
            preferences,
            verdicts,
            data,
            split,
            way.strategy,
            protocol=protocol,
            tokens=round(run.judge.tokens * share),
            seconds=run.judged * reading + run.writing * share,
            recalled=run.judge.recalled,
            tie_threshold=threshold,
        )
    distinct = {id(run): run for run in [*runs.values(), *before.values()]}.values()
    return StrategyComparison(
        rows=tuple(StrategyRow(way, evaluations[way], _differences(way, evaluations, shown)) for way in asked),
        preferences=tuple(shown),
        tokens=sum(run.judge.tokens for run in distinct),
        seconds=round(time.perf_counter() - started, 3),
        reading_seconds=round(sum(run.reading for run in distinct), 3),
    )


def difference(
    one: Sequence[PairVerdict], other: Sequence[PairVerdict], preferences: Sequence[Preference]
) -> Difference:
    """The accuracy of one way less that of another, of what was said of the same preferences; ties are left out."""
    label = labels(preferences)
    decided = label != 0.5
    right = [
        agreement(np.array([verdict.p_a for verdict in said])[decided], label[decided] > 0.5).astype(np.float64)
        for said in (one, other)
    ]
    group = group_numbers([p.group for p, counts in zip(preferences, decided, strict=True) if counts])
    gained = right[0] - right[1]
    return Difference(float(gained.mean()), *interval(np.bincount(group, gained), np.bincount(group)))


def _differences(
    way: StrategyVariant, evaluations: Mapping[StrategyVariant, Evaluation], preferences: Sequence[Preference]
) -> dict[Strategy, Difference]:
    """What `soft` gains over the others that were asked for, all else alike."""
    if way.strategy != "soft":
        return {}
    others = [other for other in evaluations if other != way and replace(other, strategy="soft") == way]
    said = evaluations[way].verdicts
    return {other.strategy: difference(said, evaluations[other].verdicts, preferences) for other in others}


class _SharedCompletions:
    """Completions that rows share: a judge that writes them, what it said, and what that took."""

    def __init__(self, judge: Judge, way: StrategyVariant) -> None:
        settings = replace(judge.settings, think=way.think, samples=way.samples)
        # What rows read is rescaled for each of them.
        self.judge = replace(judge, settings=settings, tokens=0, comparisons=0, recalled=0, calibration=None)
        self.way = way
        self.verdicts: list[PairVerdict] = []
        self.reading = self.writing = 0.0

    @property
    def judged(self) -> int:
        """The comparisons that were not recalled."""
        return self.judge.comparisons

    def go_on(self, pairs: Sequence[Pair], sitting: JudgingSession, tree: "_TimedTree") -> Iterator[PairVerdict]:
        """Judge more pairs."""
        started, read = time.perf_counter(), tree.seconds
        for verdict in self.judge.pairs(tree.asked(pairs), self.way.strategy, sitting=sitting):
            self.reading += tree.seconds - read
            self.writing += time.perf_counter() - started - (tree.seconds - read)
            self.verdicts.append(verdict)
            yield verdict
            started, read = time.perf_counter(), tree.seconds

    def __str__(self) -> str:
        if not self.way.think:
            return f"{self.way.strategy}, not thinking"
        return f"{self.way.strategy}, {self.way.samples} sample{'s' if self.way.samples > 1 else ''}"


class _TimedTree(PrefixCache):
    """A prefix tree that counts the seconds from where pairs are taken to where their prompts have run."""

    seconds = 0.0
    _taken: float | None = None

    def asked(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Pass on pairs, and see when the last one was taken: then their images are looked at."""
        for pair in pairs:
            self._taken = time.perf_counter()
            yield pair

    def prefill(self, prompts: Sequence[ComparisonInput]) -> tuple[BranchedKVCache, mx.array]:
        """Run prompts, as ever, and wait for them."""
        started = self._taken or time.perf_counter()
        cache, logits = super().prefill(prompts)
        mx.eval(logits)
        self.seconds += time.perf_counter() - started
        self._taken = None
        return cache, logits


def _reader(way: StrategyVariant, judge: Judge, sitting: JudgingSession) -> "_VerdictReader":
    """How a way reads; what the judge is not calibrated for is refused before any work is done."""
    rescaling = None
    if judge.calibration and way.strategy == "soft":
        rescaling = judge.calibration.rescaling(replace(judge.conditions(way.think, sitting), samples=way.samples))
    return _VerdictReader(way, judge.vlm.words, judge.settings.max_tokens, rescaling)


def _judge(
    judge: Judge,
    preferences: Sequence[Preference],
    asked: Sequence[StrategyVariant],
    sitting: JudgingSession,
    what: str,
) -> dict[StrategyVariant, _SharedCompletions]:
    """The run that each way reads, all of them done."""
    needed = {way: _needed(way, asked) for way in asked}
    runs = {way: _SharedCompletions(judge, way) for way in dict.fromkeys(needed.values())}
    tree = sitting.tree = _TimedTree(judge.vlm)
    pairs = [Pair(p.a, p.b, p.prompt) for p in preferences]
    size = max(_PAIRS, judge.settings.rows)
    now = next(iter(runs.values()))

    def work() -> Iterator[PairVerdict]:
        nonlocal now
        for start in range(0, len(pairs), size):
            for now in runs.values():
                yield from now.go_on(pairs[start : start + size], sitting, tree)

    deque(track(work(), len(pairs) * len(runs), lambda: f"{what} ({now})"), maxlen=0)
    for run in runs.values():
        judge.tokens += run.judge.tokens
        judge.comparisons += run.judge.comparisons
        judge.recalled += run.judge.recalled
    return {way: runs[needed[way]] for way in asked}


def _needed(way: StrategyVariant, asked: Sequence[StrategyVariant]) -> StrategyVariant:
    """The way whose completions say what this one reads."""
    others = [other for other in asked if other.think == way.think]
    written = way.strategy == "soft" and any(other.strategy == "select" for other in others)
    samples = max(other.samples for other in others) if way.samples > 1 else 1
    return StrategyVariant("select" if written else way.strategy, way.think, samples)


@dataclass(frozen=True)
class _VerdictReader:
    """What a way reads of the verdicts of its run, rescaled where the judge is calibrated for it."""

    way: StrategyVariant
    words: ComparisonTokenizer
    max_tokens: int
    rescaling: TemperatureScaling | None

    def read(self, verdicts: Iterable[PairVerdict]) -> list[PairVerdict]:
        """What is said of pairs by the completions that the way has."""
        return [
            PairVerdict(self._of(pair.a_shown_first), self._of(pair.a_shown_second), self.way.strategy, self.rescaling)
            for pair in verdicts
        ]

    def _of(self, said: Sequence[Verdict]) -> tuple[Verdict, ...]:
        first = said[: self.way.samples]
        return tuple(map(self._until_answer, first)) if self.way.strategy == "soft" else tuple(first)

    def _until_answer(self, verdict: Verdict) -> Verdict:
        """A verdict as it is where the labels' probabilities are read, without the answer that was written after it."""
        thought = verdict.text.find("</think>")
        answer = verdict.text.find("<answer>", thought)
        if verdict.label_mass == 0 or thought < 0 or answer < 0:
            return verdict
        end = answer + len("<answer>")
        # Nothing is written before the answer without thinking, and all that may be where reasons were closed. Else the
        # tokens of the answer are counted by writing it down again.
        tokens = self.max_tokens if verdict.closed else verdict.tokens - len(self.words.control(verdict.text[end:]))
        return replace(verdict, text=verdict.text[:end], tokens=max(tokens, 0) if self.way.think else 0)


def _tokens(verdicts: Iterable[PairVerdict]) -> int:
    return sum(verdict.tokens for pair in verdicts for verdict in pair.verdicts)
