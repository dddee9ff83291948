"""Judges of single images: each image is read once, and a pair is the difference of two scores.

A difference of scores is no log-odds of people's choices. It becomes one by a fitted temperature (`mlxpref calibrate`);
without that only its sign says which image is preferred.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from PIL import Image

from mlxpref.judge.diagnostics import warnings_for
from mlxpref.judge.ranking_result import BY_SCORES, JudgedPair, Ranking
from mlxpref.judge.verdict_source import Judgement, ScoreKey, Scores
from mlxpref.preferences import ImageLike, Pair, Question, SingleImage
from mlxpref.ranking.log_odds import probability
from mlxpref.verdict import Verdict

SCORES_ONLY = (
    "a judge of single images, without a fitted temperature: of a pair it says which score is higher, not how many "
    "people prefer that image, and strengths are on the scale of its levels; `mlxpref calibrate` fits one"
)
"""What a user must know of preferences by scores alone."""


def judge_by_scores(
    pairs: Iterable[Pair],
    judgements: Callable[[Iterable[Question]], Iterator[Judgement]],
    scores: Scores,
    digest: bytes,
    batch_size: int,
    both_orders: bool = True,
) -> Iterator[tuple[Judgement, Judgement]]:
    """The judgements of pairs in both orders, or only with a first, from one reading of each image.

    `scores` keeps the readings. `judgements` reads single images. The tokens of a reading are those of the first pair
    that needs it.
    """
    waiting = iter(pairs)
    while chunk := list(islice(waiting, batch_size)):
        missing: dict[ScoreKey, SingleImage] = {}
        for pair in chunk:
            for image in (pair.a, pair.b):
                key = _key(image, pair.prompt, digest)
                if key not in scores:
                    missing.setdefault(key, SingleImage(image, pair.prompt))
        read = judgements(missing.values())
        new = {}
        for key, question in missing.items():
            scores[key] = question.image, (judgement := next(read))
            new[key] = judgement
        for pair in chunk:
            keys = [_key(image, pair.prompt, digest) for image in (pair.a, pair.b)]
            a, b = (scores[key][1] for key in keys)
            tokens = [_tokens(new.pop(key, None)) for key in keys]
            yield _compared(a, b, tokens), _compared(b, a, []) if both_orders else Judgement(())


def ranking_by_scores(ranking: Ranking, top: int | None, readings: int, is_calibrated: bool) -> Ranking:
    """A ranking by scores as it is to be shown: without a fitted temperature a pair says only which image is better.

    `readings` is the number of readings of an image.
    """
    ranking = replace(ranking, orders=BY_SCORES, planned=readings, comparisons=readings)
    if is_calibrated:
        return ranking

    def plain(pairs: Sequence[JudgedPair]) -> tuple[JudgedPair, ...]:
        return tuple(replace(pair, verdict=replace(pair.verdict, strategy="select")) for pair in pairs)

    ranking = replace(ranking, pairs=plain(ranking.pairs), replaced=plain(ranking.replaced))
    return replace(ranking, warnings=(SCORES_ONLY, *warnings_for(ranking, top)))


def _key(image: ImageLike, prompt: str, digest: bytes) -> ScoreKey:
    return id(image) if isinstance(image, Image.Image) else image, prompt, digest


def _tokens(judgement: Judgement | None) -> list[int]:
    """The tokens that were written for a judgement now, a number a sample."""
    return [verdict.tokens for verdict in judgement.verdicts] if judgement and not judgement.recalled else []


def _compared(first: Judgement, second: Judgement, tokens: Sequence[Sequence[int]]) -> Judgement:
    """The judgement of two images by their own ones: of each sample the difference of both scores."""
    unreadable = {**first.unreadable, **second.unreadable}
    if unreadable:
        return Judgement((), unreadable=unreadable)
    verdicts = []
    for number, (one, other) in enumerate(zip(first.verdicts, second.verdicts, strict=True)):
        written = sum(each[number] for each in tokens if number < len(each))
        verdicts.append(_verdict(one, other, written))
    return Judgement(tuple(verdicts), recalled=first.recalled and second.recalled)


def _verdict(one: Verdict, other: Verdict, tokens: int) -> Verdict:
    """One completion about each of two images as one verdict; unreadable if either is."""
    text = f"Image 1:\n{one.text}\n\nImage 2:\n{other.text}"
    reasons = [f"Image {place}: {each.reasoning}" for place, each in ((1, one), (2, other)) if each.reasoning]
    closed = one.closed or other.closed
    if one.score is None or other.score is None:
        return Verdict(text, closed=closed, tokens=tokens, reasoning=" ".join(reasons), readings=(one, other))
    difference = one.score - other.score
    p_first, mass = float(probability(difference)), min(one.label_mass, other.label_mass)
    return Verdict(
        text,
        mass * p_first,
        mass * (1 - p_first),
        closed,
        tokens,
        reasoning=" ".join(reasons),
        written=0.5 * (1 + (difference > 0) - (difference < 0)),
        well_formed=one.well_formed and other.well_formed,
        readings=(one, other),
    )
