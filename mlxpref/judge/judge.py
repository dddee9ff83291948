"""The judge: verdicts on comparisons, soft preferences of pairs, rankings of images."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from mlxpref.checkpoints import bounds
from mlxpref.config import JudgeSettings
from mlxpref.data.find_images import Skipped
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.image_features import Features, SeenImages
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.rollout import Sampling, roll_out
from mlxpref.engine.template import Form, template_version
from mlxpref.engine.vlm import VLM
from mlxpref.judge.calibration import CalibrationFile, JudgeConditions
from mlxpref.judge.fingerprint import Fingerprint
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.rank import PairBudget, Think, rank_pairs
from mlxpref.judge.ranking_result import Ranking
from mlxpref.judge.store import BroadcastStore, Store
from mlxpref.preferences import Comparison, ImageLike, Pair, shown
from mlxpref.ranking.bradley_terry import all_pairs
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.verdict import Strategy, Verdict, verdicts_from_json, verdicts_to_json

__all__ = ["Judge", "JudgingSession"]

_LOOKAHEAD = 1024
"""Comparisons that are looked up in the store at most before one that is not there is judged."""
_METHOD = 1
"""Raised where judging itself changes, so that what was said before is no longer recalled."""


class JudgingSession:
    """What a judge remembers while calls belong together and neither model nor images change."""

    def __init__(self, vlm: VLM) -> None:
        self.tree = PrefixCache(vlm)
        self.seen: SeenImages = {}
        self.fingerprint = ""


@dataclass(frozen=True)
class _Request:
    """How comparisons are judged, and `digest`, what their keys in the store begin with (empty without one)."""

    sampling: Sampling
    form: Form
    think: bool
    digest: bytes

    def key(self, first: str, second: str, prompt: str) -> bytes:
        """What a comparison of two images, by content, is called in the store."""
        return hashlib.sha256(self.digest + f"{first} {second} {prompt}".encode("utf-8", "surrogatepass")).digest()


_Asked = tuple[Comparison, tuple[Verdict, ...] | None]
"""A comparison, and what the store knows to have been said of it."""


@dataclass
class Judge:
    """A model that compares images: with or without thinking, in batches, each image encoded once.

    With a `store`, what was said of a comparison before is recalled, and what is said now is kept, a batch at a time.
    `tokens` counts the completion tokens written so far, `comparisons` the comparisons judged, and `recalled` those
    that the store knew. With a `calibration`, soft preferences are rescaled; verdicts, and what the store keeps, are
    as they were said. It is a ConfigError to ask for what the calibration was not made for. Of several `processes`,
    all of which ask for the same, each judges its share, and all are told what was said and counted.
    """

    vlm: VLM
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    name: str = ""
    adapter: Path | None = None
    tokens: int = 0
    comparisons: int = 0
    store: Store | BroadcastStore | None = None
    recalled: int = 0
    calibration: CalibrationFile | None = None
    processes: ProcessGroup = SINGLE_PROCESS

    def compare(self, a: ImageLike, b: ImageLike, prompt: str) -> PairVerdict:
        """Judge one pair in both orders."""
        return next(self.pairs([Pair(a, b, prompt)]))

    def rank(
        self,
        images: Sequence[ImageLike],
        prompt: str,
        think: Think = "top",
        skipped: Sequence[Skipped] = (),
        pairs: int | Literal["all"] | None = None,
        top: int | None = None,
    ) -> Ranking:
        """Rank at least two images, best first; see `rank_pairs` for `think`, `pairs` and `top`."""
        vision_runs, tokens, recalled = self.vlm.features.runs, self.tokens, self.recalled
        budget = PairBudget.of(len(images), think, pairs)
        for thinks, count in ((False, budget.read), (True, budget.think)):
            if count:  # what is not calibrated is refused before any work is done
                self._rescaling(thinks, JudgingSession(self.vlm))
        sitting = self._sitting(images)

        def compare(asked: Iterable[Pair], thinks: bool) -> Iterator[PairVerdict]:
            return self.pairs(asked, think=thinks, sitting=sitting)

        found = rank_pairs(images, prompt, compare, think, pairs, top, self.settings.seed, self.processes.broadcast)
        runs = self.vlm.features.runs - vision_runs
        return replace(
            found,
            model=self.name,
            adapter=self.adapter,
            vision_runs=runs if found.ending == "interrupted" else int(self.processes.all_sum_numbers(runs)[0]),
            tokens=self.tokens - tokens,
            recalled=self.recalled - recalled,
            skipped=tuple(skipped),
        )

    def score(self, prompt: str, images: Sequence[ImageLike]) -> list[float]:
        """The share of wins of each image against the others of this call, by soft preferences.

        Comparable within one call only: the scores of N images average 0.5.
        """
        sitting = self._sitting(images)
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
        sitting: JudgingSession | None = None,
    ) -> Iterator[PairVerdict]:
        """Judge pairs, each in both orders, in their order; lazily, a batch at a time.

        `think` overrides the setting of the same name. `sitting` holds what calls that belong together
        need once.
        """
        comparisons = (comparison for pair in pairs for comparison in shown(pair))
        form: Form = "scores" if strategy == "score" else "choice"
        sitting = sitting or JudgingSession(self.vlm)
        rescaling = self._rescaling(think, sitting) if strategy == "soft" else None
        verdicts = self.verdicts(comparisons, form, strategy != "soft", think, sitting)
        for a_shown_first in verdicts:
            yield PairVerdict(a_shown_first, next(verdicts), strategy, rescaling)

    def verdicts(
        self,
        comparisons: Iterable[Comparison],
        form: Form = "choice",
        write_answer: bool = False,
        think: bool | None = None,
        sitting: JudgingSession | None = None,
    ) -> Iterator[tuple[Verdict, ...]]:
        """The verdicts on comparisons, `samples` for each, in their order; lazily, a batch at a time.

        `write_answer` lets completions go on until the answer is written; otherwise they end where it is read.
        """
        sitting = sitting or JudgingSession(self.vlm)
        way = self._way(form, write_answer, self.settings.think if think is None else think, sitting)
        size = max(1, self.settings.rows // way.sampling.samples) * self.processes.size
        waiting = iter(comparisons)
        while asked := self._asked(waiting, way, size, sitting.seen):
            said = self._share([comparison for comparison, known in asked if known is None], way, sitting)
            for _, known in asked:
                self.recalled += known is not None
                yield next(said) if known is None else known

    def conditions(self, think: bool | None = None, sitting: JudgingSession | None = None) -> JudgeConditions:
        """What soft preferences depend on beside the pair, by the settings, with or without thinking."""
        thinks = self.settings.think if think is None else think
        return JudgeConditions(
            judge=self._fingerprint_in(sitting or JudgingSession(self.vlm)),
            template=template_version(),
            method=_METHOD,
            max_pixels=self.vlm.features.max_pixels,
            think=thinks,
            samples=self.settings.samples if thinks else 1,
            max_tokens=self.settings.max_tokens if thinks else 0,
        )

    def _rescaling(self, think: bool | None, sitting: JudgingSession) -> TemperatureScaling | None:
        return self.calibration.rescaling(self.conditions(think, sitting)) if self.calibration else None

    def _way(self, form: Form, write_answer: bool, think: bool, sitting: JudgingSession) -> _Request:
        """How comparisons are judged by the settings, asked in a form, with or without thinking."""
        # Without thinking nothing is drawn before the answer, so more samples would say the same.
        samples = self.settings.samples if think else 1
        sampling = Sampling(
            samples=samples,
            temperature=0.0 if samples == 1 else 1.0,
            max_tokens=self.settings.max_tokens,
            seed=self.settings.seed,
            until="end" if write_answer else "answer",
        )
        if self.store is None:
            return _Request(sampling, form, think, b"")
        settings = asdict(sampling)
        # What makes no difference is left out: greedy completions draw nothing, and an answer read at once writes none.
        if sampling.temperature == 0:
            del settings["seed"]
        if not think and sampling.until == "answer":
            del settings["max_tokens"]
        settings |= {"form": form, "think": think, "max_pixels": self.vlm.features.max_pixels, "method": _METHOD}
        settings |= {"template": template_version(), "judge": self._fingerprint_in(sitting)}
        return _Request(sampling, form, think, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest())

    def _fingerprint_in(self, sitting: JudgingSession) -> str:
        """Who judges, looked up once a sitting."""
        sitting.fingerprint = sitting.fingerprint or self._fingerprint.now()
        return sitting.fingerprint

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(self.vlm)

    def _asked(self, waiting: Iterator[Comparison], way: _Request, size: int, seen: SeenImages) -> list[_Asked]:
        """The next comparisons, of which `size` at most have to be judged."""
        if self.store is None:
            return [(comparison, None) for comparison in islice(waiting, size)]
        asked: list[_Asked] = []
        missing = 0
        # What is known can be said at once; it is held back only while what is missing is gathered to a full batch.
        while not asked or (0 < missing < size and len(asked) < _LOOKAHEAD):
            more = list(islice(waiting, size - missing))
            if not more:
                break
            images = [image for comparison in more for image in (comparison.first, comparison.second)]
            contents = self.vlm.features.contents(images, seen)
            prompts = (comparison.prompt for comparison in more)
            keys = [way.key(*each) for each in zip(contents[::2], contents[1::2], prompts, strict=True)]
            known = self.store.get_many(keys)
            asked += [(comparison, known.get(key)) for comparison, key in zip(more, keys, strict=True)]
            missing += sum(key not in known for key in keys)
        return asked

    def _share(
        self, comparisons: Sequence[Comparison], way: _Request, sitting: JudgingSession
    ) -> Iterator[tuple[Verdict, ...]]:
        """Judge comparisons, each process its share; what all have said is kept before anything of it is said."""
        if self.processes.size == 1 or not comparisons:
            yield from self._say(comparisons, way, sitting)
            return
        alone = replace(self, store=None, processes=SINGLE_PROCESS, tokens=0, comparisons=0)
        mine = [comparisons[number] for number in self.processes.shard(len(comparisons))]
        own = [verdicts_to_json(verdicts) for verdicts in alone._say(mine, way, sitting)]
        everyone = self.processes.all_gather([own, alone.tokens])
        said = [verdicts_from_json(verdicts) for part, _ in everyone for verdicts in part]
        self.tokens += sum(tokens for _, tokens in everyone)
        self.comparisons += len(said)
        if self.store is not None:
            images = [image for comparison in comparisons for image in (comparison.first, comparison.second)]
            contents = self.vlm.features.contents(images, sitting.seen)
            named = zip(contents[::2], contents[1::2], comparisons, said, strict=True)
            self.store.put_many({way.key(a, b, comparison.prompt): verdicts for a, b, comparison, verdicts in named})
        yield from said

    def _say(
        self, comparisons: Sequence[Comparison], way: _Request, sitting: JudgingSession
    ) -> Iterator[tuple[Verdict, ...]]:
        """Judge comparisons, a batch at a time; a batch is kept before anything of it is said."""
        for batch, images in self._batches(comparisons, sitting.seen):
            together = [(both, comparison.prompt) for both, comparison in zip(images, batch, strict=True)]
            prompts = [self.vlm.prompt_of(both, text, way.form, way.think) for both, text in together]
            random_keys = [_random_key(both, text) for both, text in together]
            rollouts = roll_out(self.vlm, prompts, way.sampling, random_keys, prefill=sitting.tree.prefill)
            said = [tuple(rollout.verdict for rollout in group) for group in rollouts]
            self.comparisons += len(batch)
            self.tokens += sum(verdict.tokens for verdicts in said for verdict in verdicts)
            if self.store is not None:
                keys = [way.key(both[0].content, both[1].content, text) for both, text in together]
                self.store.put_many(dict(zip(keys, said, strict=True)))
            yield from said

    def _batches(
        self, comparisons: Sequence[Comparison], seen: SeenImages
    ) -> Iterator[tuple[Sequence[Comparison], Sequence[tuple[Features, Features]]]]:
        """Comparisons in batches that keep to the bound on prompt tokens, with their images."""
        images = [image for comparison in comparisons for image in (comparison.first, comparison.second)]
        features = self.vlm.features.get_all(images, seen)
        shown_now = list(zip(features[::2], features[1::2], strict=True))
        sizes = [first.tokens + second.tokens for first, second in shown_now]
        start = 0
        for end in range(1, len(comparisons) + 1):
            if end == len(comparisons) or sum(sizes[start : end + 1]) > bounds.PREFILL_TOKENS:
                yield comparisons[start:end], shown_now[start:end]
                start = end

    def _sitting(self, images: Sequence[ImageLike]) -> JudgingSession:
        """A sitting about images, encoded together unless others may know what would be asked of them, or ask it."""
        sitting = JudgingSession(self.vlm)
        if self.store is None and self.processes.size == 1:
            self.vlm.features.get_all(images, sitting.seen)
        return sitting


def _random_key(images: Iterable[Features], prompt: str) -> tuple[int, ...]:
    """What the random numbers of a comparison depend on: what is shown, not when or beside what."""
    names = [image.content for image in images]
    digest = hashlib.sha256("\n".join([*names, prompt]).encode("utf-8", "replace")).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8))
