"""Where verdicts on comparisons come from: the model, several processes that share the work, or the store.

Sources wrap each other, and none changes a verdict. All take comparisons lazily and give judgements in the same order,
in batches of any size.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from mlxpref.checkpoints import bounds
from mlxpref.distributed import ProcessGroup
from mlxpref.engine.image_features import Features, SeenImages
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.rollout import Sampling, roll_out
from mlxpref.engine.template import Form
from mlxpref.engine.vlm import VLM
from mlxpref.judge.store import Store
from mlxpref.preferences import Comparison, ImageLike
from mlxpref.verdict import Verdict, verdicts_from_json, verdicts_to_json

__all__ = [
    "Judgement",
    "JudgingSession",
    "ModelVerdicts",
    "Request",
    "ShardedVerdicts",
    "StoredVerdicts",
    "VerdictSource",
]

_Encoded = tuple[Features, Features, str]
"""The images of a comparison as they are shown, and its prompt."""
_LOOKAHEAD = 1024
"""Comparisons that are looked up in the store at most before a missing one is judged."""


@dataclass(frozen=True)
class Judgement:
    """The verdicts on one comparison, one a sample; `recalled` if the store had them."""

    verdicts: tuple[Verdict, ...]
    recalled: bool = False


@dataclass(frozen=True)
class Request:
    """How comparisons are judged: `batch_size` of them together, by all processes.

    `digest` begins their keys in the store; it is empty where there is no store.
    """

    sampling: Sampling
    form: Form
    think: bool
    batch_size: int
    digest: bytes = b""

    def key(self, first: str, second: str, prompt: str) -> bytes:
        """The key in the store of a comparison of two images, which are named by their content."""
        return hashlib.sha256(self.digest + f"{first} {second} {prompt}".encode("utf-8", "surrogatepass")).digest()


class JudgingSession:
    """What calls that belong together share, as long as neither model nor images change.

    `prefixes` are the beginnings of prompts that have run, `seen` the contents of images in memory, and `fingerprint`
    is that of the judge, empty until somebody asks for it.
    """

    def __init__(self, vlm: VLM) -> None:
        self.prefixes = PrefixCache(vlm)
        self.seen: SeenImages = {}
        self.fingerprint = ""


class VerdictSource(Protocol):
    """Something that judges comparisons."""

    def batches(
        self, comparisons: Iterable[Comparison], request: Request, session: JudgingSession
    ) -> Iterator[list[Judgement]]:
        """The judgements of comparisons, in their order, a batch at a time."""


@dataclass(frozen=True)
class ModelVerdicts:
    """The model itself."""

    vlm: VLM

    def batches(
        self, comparisons: Iterable[Comparison], request: Request, session: JudgingSession
    ) -> Iterator[list[Judgement]]:
        """Judge comparisons, at most `request.batch_size` at a time, and fewer where their prompts are long."""
        waiting = iter(comparisons)
        while chunk := list(islice(waiting, request.batch_size)):
            features = iter(self.vlm.features.get_all(_images(chunk), session.seen))
            encoded = [(next(features), next(features), comparison.prompt) for comparison in chunk]
            for batch in _split(encoded):
                yield self._judge_batch(batch, request, session)

    def _judge_batch(self, batch: Sequence[_Encoded], request: Request, session: JudgingSession) -> list[Judgement]:
        inputs = [
            self.vlm.input_of((first, second), prompt, request.form, request.think) for first, second, prompt in batch
        ]
        random_keys = [_random_key(*each) for each in batch]
        rollouts = roll_out(self.vlm, inputs, request.sampling, random_keys, prefill=session.prefixes.prefill)
        return [Judgement(tuple(rollout.verdict for rollout in of_one)) for of_one in rollouts]


@dataclass(frozen=True)
class ShardedVerdicts:
    """Several processes that ask for the same: each judges its shard of a batch and gets the verdicts of all."""

    source: VerdictSource
    processes: ProcessGroup

    def batches(
        self, comparisons: Iterable[Comparison], request: Request, session: JudgingSession
    ) -> Iterator[list[Judgement]]:
        """Judge comparisons, `request.batch_size` at a time."""
        waiting = iter(comparisons)
        while chunk := list(islice(waiting, request.batch_size)):
            shard = [chunk[index] for index in self.processes.shard(len(chunk))]
            judged = [each for batch in self.source.batches(shard, request, session) for each in batch]
            gathered = self.processes.all_gather([verdicts_to_json(each.verdicts) for each in judged])
            yield [Judgement(verdicts_from_json(verdicts)) for part in gathered for verdicts in part]


@dataclass(frozen=True)
class StoredVerdicts:
    """A store around a source: what it knows is recalled, what it does not know is judged and kept."""

    source: VerdictSource
    store: Store
    vlm: VLM

    def batches(
        self, comparisons: Iterable[Comparison], request: Request, session: JudgingSession
    ) -> Iterator[list[Judgement]]:
        """Recall or judge comparisons; a batch is kept before anything of it is given."""
        waiting = iter(comparisons)
        while looked_up := self._look_up(waiting, request, session):
            missing = [(comparison, key) for comparison, key, verdicts in looked_up if verdicts is None]
            batches = self.source.batches((comparison for comparison, _ in missing), request, session)
            judged = self._keep(batches, [key for _, key in missing])
            for _, _, verdicts in looked_up:  # one by one: nothing waits for a batch that comes after it
                yield [next(judged) if verdicts is None else Judgement(verdicts, recalled=True)]

    def _look_up(
        self, waiting: Iterator[Comparison], request: Request, session: JudgingSession
    ) -> list[tuple[Comparison, bytes, tuple[Verdict, ...] | None]]:
        """The next comparisons with their keys and what the store knows; at most a batch of them is not known."""
        looked_up: list[tuple[Comparison, bytes, tuple[Verdict, ...] | None]] = []
        missing = 0
        # Known comparisons are given at once; they wait only while missing ones are gathered to a full batch.
        while not looked_up or (0 < missing < request.batch_size and len(looked_up) < _LOOKAHEAD):
            more = list(islice(waiting, request.batch_size - missing))
            if not more:
                break
            contents = iter(self.vlm.features.contents(_images(more), session.seen))
            keys = [request.key(next(contents), next(contents), comparison.prompt) for comparison in more]
            known = self.store.get_many(keys)
            looked_up += [(comparison, key, known.get(key)) for comparison, key in zip(more, keys, strict=True)]
            missing += sum(key not in known for key in keys)
        return looked_up

    def _keep(self, batches: Iterable[list[Judgement]], keys: Sequence[bytes]) -> Iterator[Judgement]:
        """Pass on the judgements of batches, each kept before; `keys` are those of all of them."""
        following = iter(keys)
        for batch in batches:
            self.store.put_many({next(following): judgement.verdicts for judgement in batch})
            yield from batch


def _images(comparisons: Sequence[Comparison]) -> list[ImageLike]:
    """The images of comparisons, two each, as they are shown."""
    return [image for comparison in comparisons for image in (comparison.first, comparison.second)]


def _split(encoded: Sequence[_Encoded]) -> Iterator[Sequence[_Encoded]]:
    """Comparisons in parts that keep to the bound on prompt tokens; each has one comparison at least."""
    sizes = [first.tokens + second.tokens for first, second, _ in encoded]
    start = 0
    for end in range(1, len(encoded) + 1):
        if end == len(encoded) or sum(sizes[start : end + 1]) > bounds.PREFILL_TOKENS:
            yield encoded[start:end]
            start = end


def _random_key(first: Features, second: Features, prompt: str) -> tuple[int, ...]:
    """The key of a comparison's random numbers: it depends on images and prompt, not on the batch."""
    digest = hashlib.sha256("\n".join([first.content, second.content, prompt]).encode("utf-8", "replace")).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8))
