"""Judges of single images: each image is read once, and a pair is the difference of two scores.

A difference of scores is no log-odds of people's choices. It becomes one by a fitted temperature (`mlxpref calibrate`);
without that only its sign says which image is preferred.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxpref.judge.diagnostics import answer_warnings
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.ranking_result import BY_SCORES, JudgedPair, Ranking
from mlxpref.judge.verdict_source import Judgement, ScoreKey, Scores
from mlxpref.log import track
from mlxpref.preferences import ImageLike, Pair, Question, SingleImage
from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.log_odds import probability
from mlxpref.ranking.strength_ranking import RankedImage, StrengthRanking
from mlxpref.verdict import Verdict

_DIGITS = 4
"""Digits of a strength that count: what is read beside an image moves the others."""
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


def rank_by_scores(
    images: Sequence[ImageLike],
    prompt: str,
    judge: Callable[[Iterable[Pair]], Iterator[PairVerdict]],
    think: bool,
    readings: Scores,
) -> Ranking:
    """Rank images by their scores alone; `judge` gives verdicts of pairs, and fills `readings` with one of each image.

    Strengths are the scores without their mean, divided by the temperature if one was fitted. There is nothing random
    in them, so an interval is a point. An image without a readable score counts as an average one.
    """
    start, count = time.perf_counter(), len(images)
    chain = (Pair(images[i], images[i + 1], prompt) for i in range(count - 1))
    read = list(track(judge(chain), count - 1, "scoring images"))
    values = [*(_score(verdict, 0) for verdict in read), _score(read[-1], 1)]
    scores = np.array(values)  # (N,)
    scaling = read[0].rescaling
    known = np.where(np.isnan(scores), 0 if np.isnan(scores).all() else np.nanmean(scores), scores)
    strengths = (known - known.mean()) / (scaling.temperature if scaling else 1.0)
    entries = _entries(strengths)
    order = [entry.index for entry in entries]
    neighbours = [(min(a, b), max(a, b)) for a, b in pairwise(order)]
    verdicts = judge(Pair(images[a], images[b], prompt) for a, b in neighbours)
    if scaling is None:  # a pair says only which image is better
        verdicts = (replace(verdict, strategy="select") for verdict in verdicts)
    pairs = tuple(JudgedPair(a, b, verdict, think) for (a, b), verdict in zip(neighbours, verdicts, strict=True))
    counts = JudgingCounts.of(read)
    fit = fit_strengths(count, [pair.verdict.outcome(pair.a, pair.b) for pair in pairs if pair.verdict.is_readable])
    ranking = Ranking(
        prompt,
        tuple(images),
        StrengthRanking(entries, 0.0, 0.0, replace(fit, strengths=strengths)),
        pairs,
        time.perf_counter() - start,
        modes=(think,),
        orders=BY_SCORES,
        planned=count,
        comparisons=count,
        tokens=counts.tokens,
        recalled=sum(judgement.recalled for _, judgement in readings.values()),
        scores=tuple(None if math.isnan(value) else value for value in values),
    )
    warnings = (*(() if scaling else (SCORES_ONLY,)), *answer_warnings(read))
    return replace(ranking, warnings=warnings)


def _score(verdict: PairVerdict, place: int) -> float:
    """The mean score of a pair's first (0) or second image (1) over its samples; NaN where none could be read."""
    readings = [each.readings[place] for each in verdict.a_shown_first if each.readings]
    scores = [reading.score for reading in readings if reading.score is not None]
    return sum(scores) / len(scores) if scores else math.nan


def _entries(strengths: NDArray[np.float64]) -> tuple[RankedImage, ...]:
    """The places of images by strengths (N,), best first; equal ones share a place."""
    rounded = np.round(strengths, _DIGITS)
    entries = []
    for index in np.argsort(-rounded, kind="stable").tolist():
        stronger, weaker = (int(np.sum(rounded > rounded[index])), int(np.sum(rounded < rounded[index])))
        equal = tuple(int(other) for other in np.flatnonzero(rounded == rounded[index]) if other != index)
        strength = float(strengths[index])
        best = 0.0 if stronger else 1.0 / (1 + len(equal))
        entry = RankedImage(
            index, 1 + stronger, strength, 0.0, strength, strength, best, weaker, len(strengths) - 1, equal
        )
        entries.append(entry)
    return tuple(entries)


def _key(image: ImageLike, prompt: str, digest: bytes) -> ScoreKey:
    return id(image) if isinstance(image, Image.Image) else image, prompt, digest


def _tokens(judgement: Judgement | None) -> list[int]:
    """The tokens of a judgement, a number a sample."""
    return [verdict.tokens for verdict in judgement.verdicts] if judgement else []


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
