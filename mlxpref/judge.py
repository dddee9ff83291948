"""The judge: verdicts on comparisons, soft preferences of pairs, rankings of images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from mlxpref.config import JudgeSettings
from mlxpref.features import Features, Seen
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

__all__ = ["Judge", "Sitting"]

_PREFILL_TOKENS = 16384
"""Prompt tokens that one batch holds at most: about 1 GB of keys and values at the size of a 7B model."""


class Sitting:
    """What a judge remembers while calls belong together and neither model nor images change."""

    def __init__(self, vlm: VLM) -> None:
        self.tree = PrefixTree(vlm)
        self.seen: Seen = {}


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
        sitting = Sitting(self.vlm)
        self.vlm.features.get_all(images, sitting.seen)
        found = rank_pairs(
            images, prompt, lambda pairs, thinks: self.pairs(pairs, think=thinks, sitting=sitting), think, track
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
        sitting = Sitting(self.vlm)
        self.vlm.features.get_all(images, sitting.seen)
        wins = [0.0] * len(images)
        chosen = list(all_pairs(len(images)))
        verdicts = self.pairs((Pair(images[a], images[b], prompt) for a, b in chosen), sitting=sitting)
        for (a, b), verdict in zip(chosen, verdicts, strict=True):
            wins[a] += verdict.p_a
            wins[b] += 1.0 - verdict.p_a
        return [win / max(len(images) - 1, 1) for win in wins]

    def pairs(
        self,
        pairs: Iterable[Pair],
        strategy: Strategy = "soft",
        think: bool | None = None,
        sitting: Sitting | None = None,
    ) -> Iterator[PairVerdict]:
        """Judge pairs, each in both orders, in their order; lazily, a batch at a time.

        `think` overrides the setting of the same name. `sitting` holds what calls that belong together
        need once.
        """
        comparisons = (comparison for pair in pairs for comparison in shown(pair))
        form: Form = "scores" if strategy == "score" else "choice"
        verdicts = self.verdicts(comparisons, form, strategy != "soft", think, sitting)
        for a_shown_first in verdicts:
            yield PairVerdict(a_shown_first, next(verdicts), strategy)

    def verdicts(
        self,
        comparisons: Iterable[Comparison],
        form: Form = "choice",
        write_answer: bool = False,
        think: bool | None = None,
        sitting: Sitting | None = None,
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
        sitting = sitting or Sitting(self.vlm)
        for batch, images in self._batches(comparisons, samples, sitting.seen):
            prompts = [
                self.vlm.prompt_of(shown_now, comparison.prompt, form, think)
                for comparison, shown_now in zip(batch, images, strict=True)
            ]
            keys = [_random_key(prompt.images, c.prompt) for prompt, c in zip(prompts, batch, strict=True)]
            self.comparisons += len(batch)
            for rollouts in roll_out(self.vlm, prompts, sampling, keys, prefill=sitting.tree.prefill):
                verdicts = tuple(rollout.verdict for rollout in rollouts)
                self.tokens += sum(verdict.tokens for verdict in verdicts)
                yield verdicts

    def _batches(
        self, comparisons: Iterable[Comparison], samples: int, seen: Seen
    ) -> Iterator[tuple[list[Comparison], list[tuple[Features, Features]]]]:
        """Comparisons in batches that keep to the bounds on rows and on prompt tokens, with their images."""
        waiting = iter(comparisons)
        while together := list(islice(waiting, max(1, self.settings.rows // samples))):
            images = [image for comparison in together for image in (comparison.first, comparison.second)]
            features = self.vlm.features.get_all(images, seen)
            shown_now = list(zip(features[::2], features[1::2], strict=True))
            sizes = [first.tokens + second.tokens for first, second in shown_now]
            start = 0
            for end in range(1, len(together) + 1):
                if end == len(together) or sum(sizes[start : end + 1]) > _PREFILL_TOKENS:
                    yield together[start:end], shown_now[start:end]
                    start = end


def _random_key(images: Iterable[Features], prompt: str) -> tuple[int, ...]:
    """What the random numbers of a comparison depend on: what is shown, not when or beside what."""
    names = [image.content for image in images]
    digest = hashlib.sha256("\n".join([*names, prompt]).encode("utf-8", "replace")).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8))
