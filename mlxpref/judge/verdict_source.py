"""The sources of verdicts: the model, several processes that share the work, or the store.

Sources wrap each other, and none changes a verdict. All take comparisons lazily and give judgements in the same order,
in batches of any size.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from PIL import Image

from mlxpref.checkpoints import bounds
from mlxpref.distributed import ProcessGroup
from mlxpref.engine.completion import Sampling
from mlxpref.engine.image_features import Features, SeenImages
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.profile import Form
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ImageError
from mlxpref.judge.store import Names, Store, stamped
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, Question
from mlxpref.text import counted, shorten
from mlxpref.verdict import Verdict, verdicts_from_json, verdicts_to_json

_Encoded = tuple[Sequence[Features | ImageError], str]
"""The images of a comparison in the order shown, and its prompt."""
_LookedUp = tuple[Question, bytes | None, tuple[Verdict, ...] | None]
"""A comparison, its key (None for an unreadable image), and the store's verdicts, if any."""
_LEAST_MASS = 0.01
"""A judge that is led to its answer and gives the labels less than this together does not know what is asked."""
_LOOKAHEAD = 1024
"""The most comparisons to look up in the store before a missing one is judged."""


@dataclass(frozen=True)
class Judgement:
    """The verdicts on one comparison, one a sample; `recalled` if the store had them.

    If an image could not be read there are none, and `unreadable` has its name and the reason.
    """

    verdicts: tuple[Verdict, ...]
    recalled: bool = False
    unreadable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The conditions of judging: `batch_size` comparisons together, over all processes.

    `digest` begins their keys in the store; it is empty where there is no store. `criterion` is the user's own, if any.
    """

    sampling: Sampling
    form: Form
    think: bool
    batch_size: int
    digest: bytes = b""
    criterion: str = ""

    def key(self, images: Sequence[str], prompt: str) -> bytes:
        """The key in the store of a comparison of images, which are named by their content."""
        text = " ".join([*images, prompt])
        return hashlib.sha256(self.digest + text.encode("utf-8", "surrogatepass")).digest()


ScoreKey = tuple[ImageLike | int, str, bytes]
"""An image, a prompt, and a digest of how it is asked."""
Scores = dict[ScoreKey, tuple[ImageLike, Judgement]]
"""Judgements of single images; each entry keeps its image alive, so that the id of one in memory stays its own."""


class JudgingSession:
    """The shared work of several calls, while neither model nor images change.

    `prefixes` caches the beginnings of prompts, `seen` holds the contents of images in memory, `scores` those of a
    judge of single images, `fingerprint` is the judge's, empty until the first use. `checked` says whether the first
    answers with thinking, and those without, were looked at, `is_told` whether the user knows that scores alone decide.
    """

    def __init__(self, vlm: VLM) -> None:
        self.prefixes = PrefixCache(vlm)
        self.seen: SeenImages = {}
        self.scores: Scores = {}
        self.fingerprint = ""
        self.checked: set[bool] = set()
        self.is_told = False


VerdictSource = Callable[[Iterable[Question]], Iterator[list[Judgement]]]
"""Gives the judgements of comparisons, in their order, a batch at a time."""


def judge_by_model(
    vlm: VLM, request: Request, session: JudgingSession, comparisons: Iterable[Question]
) -> Iterator[list[Judgement]]:
    """Judge comparisons, at most `request.batch_size` at a time, and fewer where their prompts are long."""
    waiting = iter(comparisons)
    while chunk := list(islice(waiting, request.batch_size)):
        features = iter(vlm.features.get_readable(_images(chunk), session.seen))
        encoded = [([next(features) for _ in each.images], each.prompt) for each in chunk]
        for batch in _split(encoded):
            inputs, random_keys, judgements = [], [], list[Judgement]()
            for every, prompt in batch:
                images = [image for image in every if isinstance(image, Features)]
                errors = [image for image in every if isinstance(image, ImageError)]
                judgements.append(Judgement((), unreadable={error.name: error.reason for error in errors}))
                if not errors:
                    inputs.append(vlm.input_of(images, prompt, request.form, request.think, request.criterion))
                    random_keys.append(random_key(images, prompt))
            prefill = session.prefixes.prefill
            rollouts = iter(roll_out(vlm, inputs, request.sampling, random_keys, prefill=prefill) if inputs else ())
            judgements = [
                each if each.unreadable else Judgement(tuple(rollout.verdict for rollout in next(rollouts)))
                for each in judgements
            ]
            if request.think not in session.checked and any(each.verdicts for each in judgements):
                session.checked.add(request.think)
                say_if_unreadable(vlm, [verdict for each in judgements for verdict in each.verdicts])
            yield judgements


def judge_in_shards(
    source: VerdictSource, processes: ProcessGroup, batch_size: int, comparisons: Iterable[Question]
) -> Iterator[list[Judgement]]:
    """Judge the same comparisons in several processes: each judges a shard of a batch, all get the verdicts."""
    waiting = iter(comparisons)
    while chunk := list(islice(waiting, batch_size)):
        shard = [chunk[index] for index in processes.shard(len(chunk))]
        own = [(verdicts_to_json(each.verdicts), dict(each.unreadable)) for batch in source(shard) for each in batch]
        yield [
            Judgement(verdicts_from_json(verdicts), unreadable=unreadable)
            for part in processes.all_gather(own)
            for verdicts, unreadable in part
        ]


def judge_unless_stored(
    source: VerdictSource,
    store: Store,
    vlm: VLM,
    request: Request,
    session: JudgingSession,
    name: str,
    comparisons: Iterable[Question],
) -> Iterator[list[Judgement]]:
    """Recall comparisons from a store, or judge and store them; each batch is stored before it is returned.

    With the verdicts on two files it stores what they were of (`Names`) and the judge's `name`, also where they are
    recalled: a store of an earlier version has none.
    """
    judge_name = _judge_name(name, vlm, request, session)

    def names_of(comparison: Question) -> Names | None:
        """What a comparison is of; None of pictures in memory, and of single images."""
        files = [stamped(image) for image in comparison.images if not isinstance(image, Image.Image)]
        return (judge_name, comparison.prompt, files[0], files[1]) if len(files) == 2 else None

    def look_up(count: int) -> list[_LookedUp]:
        """The next comparisons, with their keys and the store's verdicts."""
        chunk = list(islice(waiting, count))
        contents = iter(vlm.features.contents(_images(chunk), session.seen))
        named = [[next(contents) for _ in comparison.images] for comparison in chunk]
        keys = [
            request.key([name for name in names if name], comparison.prompt) if all(names) else None
            for comparison, names in zip(chunk, named, strict=True)
        ]
        # Another process may be able to read what this one cannot, so every process asks for as many.
        asked = [key or str(place).encode() for place, key in enumerate(keys)]
        results = store.get_many(asked)
        store.put_names(
            {
                name: names
                for each, name in zip(chunk, asked, strict=True)
                if name in results and (names := names_of(each))
            }
        )
        return [(comparison, key, results.get(name)) for comparison, key, name in zip(chunk, keys, asked, strict=True)]

    def judge(missing: Sequence[_LookedUp]) -> Iterator[Judgement]:
        asked = iter(missing)
        for batch in source(comparison for comparison, _, _ in missing):
            by_key, names = dict[bytes, tuple[Verdict, ...]](), dict[bytes, Names]()
            for judgement, (comparison, key, _) in zip(batch, asked, strict=False):
                if key and judgement.verdicts:
                    by_key[key] = judgement.verdicts
                    if named := names_of(comparison):
                        names[key] = named
            store.put_many(by_key, names)
            yield from batch

    waiting = iter(comparisons)
    while looked_up := look_up(request.batch_size):
        missing = [each for each in looked_up if each[2] is None]
        # Known comparisons wait only while missing ones fill a batch.
        while 0 < len(missing) < request.batch_size and len(looked_up) < _LOOKAHEAD:
            more = look_up(request.batch_size - len(missing))
            if not more:
                break
            looked_up += more
            missing += [each for each in more if each[2] is None]
        judgements = judge(missing)
        for _, _, verdicts in looked_up:  # one by one: none waits for a later batch
            yield [next(judgements) if verdicts is None else Judgement(verdicts, recalled=True)]


def say_if_unreadable(vlm: VLM, verdicts: Sequence[Verdict]) -> None:
    """Say, once for a loaded judge, if it came to no answer by itself in its first verdicts."""
    is_readable = any(
        (verdict.label_mass > _LEAST_MASS or verdict.written is not None) and not verdict.closed for verdict in verdicts
    )
    if not is_readable and not vlm.is_unreadable:
        vlm.is_unreadable = True
        closed = sum(verdict.closed for verdict in verdicts)
        ending = f" ({closed} ran out of tokens: a larger --max-tokens may help)" if closed else ""
        logger.warning(
            f"no answer was found in the first {counted(len(verdicts), 'completion')}{ending}: the profile "
            f"{vlm.profile.name} expects {vlm.profile.lead!r} before it, and this judge wrote "
            f"{shorten(verdicts[0].text, 300)!r}; give the profile that it was trained with by --profile"
        )


def _judge_name(name: str, vlm: VLM, request: Request, session: JudgingSession) -> str:
    """A judge and how it is asked, for `Names`: equal `judge` and `profile` mean equal questions to one judge."""
    values = {
        "name": name,
        "judge": session.fingerprint,
        "profile": vlm.profile.version(request.criterion),
        "form": request.form,
        "think": request.think,
        "digest": request.digest.hex(),
    }
    return json.dumps(values)


def _images(comparisons: Sequence[Question]) -> list[ImageLike]:
    """The images of comparisons as they are shown."""
    return [image for comparison in comparisons for image in comparison.images]


def _split(inputs: Sequence[_Encoded]) -> Iterator[Sequence[_Encoded]]:
    """Comparisons in parts that keep to the bound on prompt tokens; each has one comparison at least."""
    sizes = [sum(image.tokens for image in images if isinstance(image, Features)) for images, _ in inputs]
    start = 0
    for end in range(1, len(inputs) + 1):
        if end == len(inputs) or sum(sizes[start : end + 1]) > bounds.PREFILL_TOKENS:
            yield inputs[start:end]
            start = end


def random_key(images: Sequence[Features], prompt: str) -> tuple[int, ...]:
    """The key of a comparison's random numbers: it depends on images and prompt, not on the batch."""
    text = "\n".join([*(image.content for image in images), prompt])
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8))
