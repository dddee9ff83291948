"""The judge: verdicts on comparisons, soft preferences of pairs, rankings of images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from mlxpref.config import JudgeSettings
from mlxpref.image_ranking import ImageRanking, Think, rank_pairs
from mlxpref.images import Skipped
from mlxpref.pairs import Comparison, Pair, PairVerdict, Track, shown
from mlxpref.preferences import ImageLike
from mlxpref.ranking import all_pairs
from mlxpref.rollout import Sampling, roll_out
from mlxpref.template import Form
from mlxpref.tree import PrefixTree
from mlxpref.verdict import Strategy, Verdict
from mlxpref.vlm import VLM

__all__ = ["Judge"]

_PREFILL_TOKENS = 16384
"""Prompt tokens that one batch holds at most: about 1 GB of keys and values at the size of a 7B model."""


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

    def rank(
        self,
        images: Sequence[ImageLike],
        prompt: str,
        think: Think = "top",
        skipped: Sequence[Skipped] = (),
        track: Track = lambda work, count, what: work,
    ) -> ImageRanking:
        """Rank at least two images, best first; see `rank_pairs` for `think` and `track`."""
        vision_runs, tokens = self.vlm.features.runs, self.tokens
        self.vlm.features.get_all(images)
        tree = PrefixTree(self.vlm)
        found = rank_pairs(
            images, prompt, lambda pairs, thinks: self.pairs(pairs, think=thinks, tree=tree), think, track
        )
        return replace(
            found,
            model=self.name,
            adapter=self.adapter,
            vision_runs=self.vlm.features.runs - vision_runs,
            tokens=self.tokens - tokens,
            skipped=tuple(skipped),
        )

    def score(self, prompt: str, images: Sequence[ImageLike]) -> list[float]:
        """The share of wins of each image against the others of this call, by soft preferences.

        Comparable within one call only: the scores of N images average 0.5.
        """
        self.vlm.features.get_all(images)
        wins = [0.0] * len(images)
        chosen = list(all_pairs(len(images)))
        verdicts = self.pairs(Pair(images[a], images[b], prompt) for a, b in chosen)
        for (a, b), verdict in zip(chosen, verdicts, strict=True):
            wins[a] += verdict.p_a
            wins[b] += 1.0 - verdict.p_a
        return [win / max(len(images) - 1, 1) for win in wins]

    def pairs(
        self,
        pairs: Iterable[Pair],
        strategy: Strategy = "soft",
        think: bool | None = None,
        tree: PrefixTree | None = None,
    ) -> Iterator[PairVerdict]:
        """Judge pairs, each in both orders, in their order; lazily, a batch at a time.

        `think` overrides the setting of the same name. `tree` holds what was begun before, for calls that belong
        together.
        """
        comparisons = (comparison for pair in pairs for comparison in shown(pair))
        form: Form = "scores" if strategy == "score" else "choice"
        verdicts = self.verdicts(comparisons, form, strategy != "soft", think, tree)
        for a_shown_first in verdicts:
            yield PairVerdict(a_shown_first, next(verdicts), strategy)

    def verdicts(
        self,
        comparisons: Iterable[Comparison],
        form: Form = "choice",
        write_answer: bool = False,
        think: bool | None = None,
        tree: PrefixTree | None = None,
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
        tree = tree or PrefixTree(self.vlm)
        for batch in self._batches(comparisons, samples):
            prompts = [self.vlm.prompt(c.first, c.second, c.prompt, form, think) for c in batch]
            keys = [self._random_key(comparison) for comparison in batch]
            self.comparisons += len(batch)
            for rollouts in roll_out(self.vlm, prompts, sampling, keys, prefill=tree.prefill):
                verdicts = tuple(rollout.verdict for rollout in rollouts)
                self.tokens += sum(verdict.tokens for verdict in verdicts)
                yield verdicts

    def _random_key(self, comparison: Comparison) -> tuple[int, ...]:
        """What the random numbers of a comparison depend on: what is shown, not when or beside what."""
        shown_now = [self.vlm.features.content(image) for image in (comparison.first, comparison.second)]
        digest = hashlib.sha256("\n".join([*shown_now, comparison.prompt]).encode("utf-8", "replace")).digest()
        return tuple(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8))

    def _batches(self, comparisons: Iterable[Comparison], samples: int) -> Iterator[list[Comparison]]:
        """Comparisons in batches that keep to the bounds on rows and on prompt tokens."""
        waiting = iter(comparisons)
        while together := list(islice(waiting, max(1, self.settings.rows // samples))):
            images = [image for comparison in together for image in (comparison.first, comparison.second)]
            features = self.vlm.features.get_all(images)
            batch: list[Comparison] = []
            tokens = 0
            for comparison, first, second in zip(together, features[::2], features[1::2], strict=True):
                size = first.tokens + second.tokens
                if batch and tokens + size > _PREFILL_TOKENS:
                    yield batch
                    batch, tokens = [], 0
                batch.append(comparison)
                tokens += size
            yield batch
