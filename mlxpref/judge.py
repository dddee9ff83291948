"""The judge: verdicts on comparisons, soft preferences of pairs, rankings of images.

Here, and only here, identities become places and places identities: `shown` puts a and b on the screen in both
orders, `PairVerdict` turns what was said about first and second back into a and b.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlxpref.config import JudgeSettings
from mlxpref.preferences import ImageLike
from mlxpref.ranking import PairOutcome, all_pairs, soft_preference
from mlxpref.rollout import Sampling, roll_out
from mlxpref.template import Form
from mlxpref.verdict import Strategy, Verdict
from mlxpref.vlm import VLM

__all__ = ["Comparison", "Judge", "Pair", "PairVerdict", "shown"]

_PREFILL_TOKENS = 16384
"""Prompt tokens that one batch holds at most: about 1 GB of keys and values at the size of a 7B model."""


@dataclass(frozen=True)
class Pair:
    """Two images by identity, and the prompt they are judged for."""

    a: ImageLike
    b: ImageLike
    prompt: str


@dataclass(frozen=True)
class Comparison:
    """Two images as they are shown, and the prompt they are judged for."""

    first: ImageLike
    second: ImageLike
    prompt: str


def shown(pair: Pair) -> tuple[Comparison, Comparison]:
    """A pair in both orders: with a shown first, then with a shown second."""
    return Comparison(pair.a, pair.b, pair.prompt), Comparison(pair.b, pair.a, pair.prompt)


@dataclass(frozen=True)
class PairVerdict:
    """What the judge says of a pair: every completion of both orders, and the preferences read from them."""

    a_shown_first: tuple[Verdict, ...]
    a_shown_second: tuple[Verdict, ...]
    strategy: Strategy = "soft"

    @property
    def p_a_shown_first(self) -> float | None:
        """The preference for a where it was shown first, averaged over samples; None where unreadable."""
        return _mean_p_first(self.a_shown_first, self.strategy)

    @property
    def p_a_shown_second(self) -> float | None:
        """The preference for a where it was shown second, averaged over samples; None where unreadable."""
        p_b = _mean_p_first(self.a_shown_second, self.strategy)
        return None if p_b is None else 1.0 - p_b

    @property
    def p_a(self) -> float:
        """The soft preference: both orders combined in log-odds; the one that can be read; or 0.5."""
        orders = [p for p in (self.p_a_shown_first, self.p_a_shown_second) if p is not None]
        return float(soft_preference(orders[0], orders[-1])) if orders else 0.5

    def outcome(self, a: int, b: int) -> PairOutcome:
        """What this says for a ranking in which the pair's images have the numbers a and b."""
        return PairOutcome(a, b, self.p_a_shown_first, self.p_a_shown_second)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every completion, those with a shown first before the others."""
        return self.a_shown_first + self.a_shown_second


@dataclass
class Judge:
    """A model that compares images: with or without thinking, in batches, each image encoded once.

    `tokens` counts the completion tokens written so far, `comparisons` the comparisons judged.
    """

    vlm: VLM
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    name: str = ""
    adapter: Path | None = None
    tokens: int = 0
    comparisons: int = 0

    def compare(self, a: ImageLike, b: ImageLike, prompt: str) -> PairVerdict:
        """Judge one pair in both orders."""
        return next(self.pairs([Pair(a, b, prompt)]))

    def score(self, prompt: str, images: Sequence[ImageLike]) -> list[float]:
        """The share of wins of each image against the others of this call, by soft preferences.

        Comparable within one call only: the scores of N images average 0.5.
        """
        wins = [0.0] * len(images)
        chosen = list(all_pairs(len(images)))
        verdicts = self.pairs(Pair(images[a], images[b], prompt) for a, b in chosen)
        for (a, b), verdict in zip(chosen, verdicts, strict=True):
            wins[a] += verdict.p_a
            wins[b] += 1.0 - verdict.p_a
        return [win / max(len(images) - 1, 1) for win in wins]

    def pairs(
        self, pairs: Iterable[Pair], strategy: Strategy = "soft", think: bool | None = None
    ) -> Iterator[PairVerdict]:
        """Judge pairs, each in both orders, in their order; lazily, a batch at a time.

        `think` overrides the setting of the same name.
        """
        comparisons = (comparison for pair in pairs for comparison in shown(pair))
        form: Form = "scores" if strategy == "score" else "choice"
        verdicts = self.verdicts(comparisons, form, strategy != "soft", think)
        for a_shown_first in verdicts:
            yield PairVerdict(a_shown_first, next(verdicts), strategy)

    def verdicts(
        self,
        comparisons: Iterable[Comparison],
        form: Form = "choice",
        write_answer: bool = False,
        think: bool | None = None,
    ) -> Iterator[tuple[Verdict, ...]]:
        """The verdicts on comparisons, `samples` for each, in their order; lazily, a batch at a time.

        `write_answer` lets completions go on until the answer is written; otherwise they end where it is read.
        """
        think = self.settings.think if think is None else think
        # Without thinking nothing is drawn before the answer, so more samples would say the same.
        samples = self.settings.samples if think else 1
        sampling = Sampling(
            samples=samples,
            temperature=0.0 if samples == 1 else 1.0,
            max_tokens=self.settings.max_tokens,
            seed=self.settings.seed,
            until="end" if write_answer else "answer",
        )
        for batch in self._batches(comparisons, samples):
            prompts = [self.vlm.prompt(c.first, c.second, c.prompt, form, think) for c in batch]
            keys = range(self.comparisons, self.comparisons + len(batch))
            self.comparisons += len(batch)
            for rollouts in roll_out(self.vlm, prompts, sampling, keys):
                verdicts = tuple(rollout.verdict for rollout in rollouts)
                self.tokens += sum(verdict.tokens for verdict in verdicts)
                yield verdicts

    def _batches(self, comparisons: Iterable[Comparison], samples: int) -> Iterator[list[Comparison]]:
        """Comparisons in batches that keep to the bounds on rows and on prompt tokens."""
        batch: list[Comparison] = []
        tokens = 0
        for comparison in comparisons:
            images = self.vlm.features.get_all([comparison.first, comparison.second])
            size = sum(image.tokens for image in images) * samples
            if batch and ((len(batch) + 1) * samples > self.settings.rows or tokens + size > _PREFILL_TOKENS):
                yield batch
                batch, tokens = [], 0
            batch.append(comparison)
            tokens += size
        if batch:
            yield batch


def _mean_p_first(verdicts: Sequence[Verdict], strategy: Strategy) -> float | None:
    read = [p for verdict in verdicts if (p := verdict.p_first(strategy)) is not None]
    return sum(read) / len(read) if read else None
