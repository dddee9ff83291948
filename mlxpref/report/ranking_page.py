"""The page of a ranking: pictures in order with their intervals, reasons beside both pictures, any two to compare."""

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.images import load_image
from mlxpref.data.thumbnails import LoadImage, Thumbnail, try_thumbnail
from mlxpref.judge.ranking_result import JudgedPair, Ranking, RankingEntry
from mlxpref.preferences import ImageLike
from mlxpref.ranking.bradley_terry import Z95
from mlxpref.ranking.covariance import DenseCovariance
from mlxpref.ranking.log_odds import probability
from mlxpref.ranking.outcomes import Array
from mlxpref.ranking.strength_ranking import INTERVAL_MEANING, TIE_PLACES, RankedImage, names_only_near_ties
from mlxpref.report.html import even_ticks, page_script, write_page
from mlxpref.report.ranking_words import best_in_words, orders_in_words, ties_in_words
from mlxpref.report.tie_brackets import BRACKETS_MEANING, Bracket, tie_brackets
from mlxpref.text import plain
from mlxpref.verdict import Strategy, Verdict

_SIDE, _BYTES = 480, 50_000
"""Pixels of the longer side of each of many pictures, and about the most bytes of one."""
_MANY = 120
"""The number of pictures from which they have that size; fewer are larger, up to `_LARGER` times as many bytes."""
_LARGER = 4
_PAGE = 200
"""The most images of one ranking that are shown together, and the most pictures, the best, of that size."""
_ALL_BYTES = 14_000_000
"""About the most bytes of all pictures, 19 MB as data addresses: those after the best are the smaller the more."""
_LEAST_SIDE, _PIXELS_A_BYTE = 130, 9
"""Smaller ones would not be told apart; their quality is lower instead."""
_AT_ONCE = 1000
"""The images in the page itself; the first ones of rankings after these are made when somebody comes near them."""


def write_ranking_page(
    path: Path, rankings: Sequence[Ranking], notes: Sequence[str] = (), load: LoadImage = load_image
) -> None:
    """Write rankings, one for each prompt or group, as one page with everything inside; it works without a network.

    `load` reads the images one at a time; an image that can no longer be read has a name but no picture. `notes` stand
    at the top, such as that the judge could not tell the images apart. The page holds every picture once, the sharper
    the fewer they are; the script shows it again where it is compared. Images after the first `_PAGE` of a ranking are
    text until a reader turns to their page; memory holds the pictures of one page. Texts reach the script as JSON and
    the page as text, and the page's policy allows no other script and loads nothing.
    """
    notes = [plain(note) for note in notes]
    is_one = len(rankings) == 1
    write_page(
        path,
        "ranking.html",
        contents=[(_title(ranking), len(ranking)) for ranking in rankings],
        sections=_sections(rankings, notes if is_one else [], load),
        data=map(_data, rankings),
        notes=[] if is_one else notes,
        page=_PAGE,
        kind="groups" if any(ranking.similar_to for ranking in rankings) else "prompts",
        interval_meaning=INTERVAL_MEANING,
        brackets_meaning=BRACKETS_MEANING,
        **page_script("ranking.js"),
    )


def _sections(rankings: Sequence[Ranking], notes: Sequence[str], load: LoadImage) -> Iterator[dict[str, Any]]:
    """The template's values for each ranking; the first page of one that is `later` is text, too."""
    pictures = _Pictures([len(ranking) for ranking in rankings], load)
    shown = 0
    for ranking in rankings:
        shown += min(len(ranking), _PAGE)
        yield _section(ranking, notes, pictures, is_later=shown > _AT_ONCE)


class _Pictures:
    """Makes the pictures of a page: the best of each ranking large, the others as what is left of all bytes allows."""

    def __init__(self, counts: Sequence[int], load: LoadImage) -> None:
        """For rankings of so many images."""
        total = sum(counts)
        larger = min(max(_MANY / total, 1), _LARGER)  # as many bytes
        self.large = round(_SIDE * math.sqrt(larger)), round(_BYTES * larger)
        self.best = _PAGE if total <= _PAGE else _PAGE // len(counts)
        self._load, self._left = load, _ALL_BYTES
        self._best_to_come = sum(min(count, self.best) for count in counts)
        self._others_to_come = total - self._best_to_come

    @property
    def small(self) -> tuple[int, int]:
        """Side and about the most bytes of each of the others; the best to come will take half of what they may."""
        side, limit = self.large
        free = max(self._left - self._best_to_come * limit // 2, 0)
        limit = min(free // max(self._others_to_come, 1), limit)
        return min(max(math.isqrt(_PIXELS_A_BYTE * limit), _LEAST_SIDE), side), limit

    def make(self, image: ImageLike, is_best: bool, size: tuple[int, int]) -> Thumbnail | None:
        """The next picture, in a size; None where it can no longer be read."""
        self._best_to_come -= is_best
        self._others_to_come -= not is_best
        side, limit = size
        if picture := try_thumbnail(image, side, self._load, limit):
            self._left -= len(picture.content)
        return picture


def _section(ranking: Ranking, notes: Sequence[str], pictures: _Pictures, is_later: bool) -> dict[str, Any]:
    """The template's values for one prompt; `zero` is the place of 0 in percent of the axis.

    `cards` are those in the page itself, `later` those of other pages, by its number, each made as it is read.
    """
    ticks, brackets = _ticks(ranking), tie_brackets(ranking.strengths.images)
    cards = _cards(ranking, brackets, ticks, pictures)
    first = list(islice(cards, _PAGE))
    others = ((2 + start // _PAGE, islice(cards, _PAGE)) for start in range(0, len(ranking) - _PAGE, _PAGE))
    shapes = [card["picture"].width / card["picture"].height for card in first if card["picture"]]
    judge = f"by {ranking.model}{f' with {ranking.adapter}' if ranking.adapter else ''}, " if ranking.model else ""
    return {
        "title": _title(ranking),
        "ranking": ranking,
        "judge": plain(judge),
        "orders": orders_in_words(ranking),
        "best": plain(best_in_words(ranking)),
        "bias": _bias(ranking),
        "unit": "on the scale of the levels of its scores" if _is_uncalibrated(ranking) else "log-odds in nats",
        "axis": _ends(ticks),
        "zero": _percent(0, ticks),
        "lines": 1 + max((bracket.line for bracket in brackets), default=-1),
        "shape": min(max(statistics.median(shapes or [1.0]), 0.75), 1.5),
        "cards": [] if is_later else first,
        "later": chain([(1, first)] if is_later else [], others),
        "others": [(image.rank, image.index, plain(image.short_name)) for image in ranking[0 if is_later else _PAGE :]],
        "limits": _limits(ranking, pictures),
        "remarks": [*notes, *(plain(warning) for warning in ranking.warnings)],
        "skipped": [plain(f"{each.path}: {each.error}") for each in ranking.skipped],
    }


def _cards(
    ranking: Ranking, brackets: Sequence[Bracket], ticks: Sequence[float], pictures: _Pictures
) -> Iterator[dict[str, Any]]:
    """The images, best first, each made when it is asked for.

    `start`, `middle` and `end` are an interval in percent of the axis, `brackets` those of ties above an image: the
    line, and whether the bracket begins and ends here.
    """
    above: list[list[tuple[int, bool, bool]]] = [[] for _ in ranking.images]
    for bracket in brackets:
        for place in range(bracket.first, bracket.last + 1):
            above[place].append((bracket.line, place == bracket.first, place == bracket.last))
    names, size = _names(ranking), pictures.large
    for place, image in enumerate(ranking.strengths.images):
        start, middle, end = (_percent(x, ticks) for x in (image.low, image.strength, image.high))
        if place == pictures.best:
            size = pictures.small
        reason = ranking.reason(image)
        yield {
            "image": image,
            "name": names[image.index],
            "path": plain(ranking.name(image.index)),
            "picture": pictures.make(ranking.images[image.index], place < pictures.best, size),
            "start": start,
            "middle": middle,
            "end": end,
            "score": _score(ranking[place]) if ranking.is_by_scores else "",
            "ties": ties_in_words(ranking, image),
            "brackets": above[place],
            "reason": plain(reason.text) if reason else None,
            "no_reason": _no_reason(ranking, image),
            "shown": [(i, names[i], ranking.ranks[i]) for i in (reason.first, reason.second)] if reason else [],
        }


def _score(image: RankingEntry) -> str:
    return "unreadable" if image.score is None else f"{image.score:.2f}"


def _title(ranking: Ranking) -> str:
    return plain(ranking.title) or "no prompt"


def _names(ranking: Ranking) -> list[str]:
    return [plain(name) for name in ranking.short_names]


def _ticks(ranking: Ranking) -> list[float]:
    images = ranking.strengths.images
    return even_ticks(min(image.low for image in images), max(image.high for image in images))


def _ends(ticks: Sequence[float]) -> list[str]:
    return [f"{tick:+g}" for tick in (ticks[0], ticks[-1])]


def _limits(ranking: Ranking, pictures: _Pictures) -> str:
    """What the page of many images leaves out, in words."""
    sentences = []
    if len(ranking) > pictures.best > 0 and pictures.small < pictures.large:
        sentences.append(f"After the best {pictures.best}, pictures have fewer pixels or bytes.")
    if names_only_near_ties(len(ranking)) and not ranking.is_by_scores:
        sentences.append(
            f"Ties are looked for among the {TIE_PLACES} nearest on each side. Of two images that were not asked about "
            "together the interval is an estimate, some percent off, as it takes the errors of both for independent."
        )
    return " ".join(sentences)


def _percent(x: float, ticks: Sequence[float]) -> float:
    return 100 * (x - ticks[0]) / (ticks[-1] - ticks[0])


def _no_reason(ranking: Ranking, image: RankedImage) -> str:
    """The cause of a missing reason, in words."""
    if not image.pairs:
        return "not judged: no pair with this image was asked"
    if not any(verdict.reasoning for pair in ranking.pairs_of[image.index] for verdict in pair.verdict.verdicts):
        return "judged without thinking, so without reasons"
    return "the judge wrote no reason for this place"


def _is_uncalibrated(ranking: Ranking) -> bool:
    """Whether scores of single images stand for themselves."""
    return ranking.is_by_scores and any(pair.verdict.strategy == "select" for pair in ranking.pairs)


def _bias(ranking: Ranking) -> str:
    """The position bias of each way of judging, in words."""
    if ranking.is_by_scores:
        return "Each image was scored by itself, so no place was favoured."
    fit, named = ranking.strengths.fit, len(ranking.modes) > 1
    sentences = []
    for think, instrument in zip(ranking.modes, fit.instruments, strict=True):
        bias, error = instrument.position_bias, instrument.position_bias_stderr
        size = f"{bias:+.2f} nats, standard error {error:.2f}"
        who = ("With thinking this judge" if think else "Reading, this judge") if named else "This judge"
        if abs(bias) <= Z95 * error:
            sentences.append(f"{who} shows no position bias: {size}.")
            continue
        place = "first" if bias > 0 else "second"
        sentences.append(
            f"{who} favours the image that is shown {place}: position bias {size}. Of two equally strong images it "
            f"prefers the {place} with {100 * float(probability(abs(bias))):.1f}\u00a0%."
        )
    return " ".join([*sentences, "The strengths are without it."])


def _data(ranking: Ranking) -> dict[str, Any]:
    """The script's data to compare any two images of one prompt; `pairs` are made as they are read.

    Standard errors are in thousandths. Of few images `deviations[i][j - i - 1]` is that of the difference of strengths
    i and j > i. Of many, which have no matrix, `errors` are those of each strength, and `paired` those of the
    differences in judged pairs. Scores of single images have no errors: all three are empty.
    """
    fit = ranking.strengths.fit
    is_dense = isinstance(fit.covariance, DenseCovariance)
    is_exact, is_many = (each and not ranking.is_by_scores for each in (is_dense, not is_dense))
    variances = (fit.covariance.row(image)[image + 1 :] for image in range(len(ranking) if is_exact else 0))
    a, b = (np.array([getattr(pair, side) for pair in ranking.pairs], np.intp) for side in ("a", "b"))
    return {
        "names": _names(ranking),
        "page": _PAGE,
        "only_scores": _is_uncalibrated(ranking),
        "axis": _ends(_ticks(ranking)),
        "order": [(image.index, image.rank) for image in ranking.strengths.images],
        "strengths": [round(strength, 4) for strength in fit.strengths.tolist()],
        "deviations": [_thousandths(row) for row in variances],
        "errors": _thousandths(fit.covariance.variances()) if is_many else [],
        "paired": _thousandths(fit.covariance.of_differences(a, b)) if is_many else [],
        "pairs": (_pair_data(pair, ranking.preference(pair)) for pair in ranking.pairs),
    }


def _thousandths(variances: Array) -> list[int]:
    """Variances (K,) -> deviations in thousandths."""
    deviations: list[int] = np.rint(1000 * np.sqrt(variances)).astype(int).tolist()
    return deviations


def _pair_data(pair: JudgedPair, p_a: float) -> list[Any]:
    """[a, b, P(a), P(a) with a first, P(a) with a second, samples with a first, samples with a second].

    An order without samples was not asked.
    """
    verdict = pair.verdict
    preferences = (p_a, verdict.p_a_shown_first, verdict.p_a_shown_second)
    orders = (verdict.a_shown_first, verdict.a_shown_second)
    return [
        pair.a,
        pair.b,
        *(_rounded(p) for p in preferences),
        *([_sample(each, verdict.strategy) for each in verdicts] for verdicts in orders),
    ]


def _sample(verdict: Verdict, strategy: Strategy) -> list[Any]:
    """[P(first image)]; with reasoning also its text, and whether it ran out of tokens."""
    p_first = _rounded(verdict.p_first(strategy))
    return [p_first, plain(verdict.reasoning), int(verdict.closed)] if verdict.reasoning else [p_first]


def _rounded(p: float | None) -> float | None:
    return None if p is None else round(p, 5)
