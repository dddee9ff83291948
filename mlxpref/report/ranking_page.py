"""The page of a ranking: pictures in order with their intervals, reasons beside both pictures, any two to compare."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.images import load_image
from mlxpref.data.thumbnails import LoadImage, Thumbnail, try_thumbnail
from mlxpref.judge.ranking_result import JudgedPair, Ranking
from mlxpref.ranking.bradley_terry import Z95
from mlxpref.ranking.log_odds import probability
from mlxpref.ranking.strength_ranking import INTERVAL_MEANING, RankedImage
from mlxpref.report.html import even_ticks, page_script, write_page
from mlxpref.report.ranking_words import best_in_words, orders_in_words, ties_in_words
from mlxpref.report.tie_brackets import BRACKETS_MEANING, tie_brackets
from mlxpref.text import plain
from mlxpref.verdict import Strategy, Verdict

_SIDE, _BYTES = 480, 50_000
"""Pixels of the longer side of each of many pictures, and about the most bytes of one."""
_MANY = 120
"""The number of pictures from which they have that size; fewer are larger, up to `_LARGER` times as many bytes."""
_LARGER = 4


def write_ranking_page(
    path: Path, rankings: Sequence[Ranking], notes: Sequence[str] = (), load: LoadImage = load_image
) -> None:
    """Write rankings, one for each prompt or group, as one page with everything inside; it works without a network.

    `load` reads the images one at a time; an image that can no longer be read has a name but no picture. `notes` stand
    at the top, such as that the judge could not tell the images apart. The page holds every picture once, the sharper
    the fewer they are; the script shows it again where it is compared. Texts reach the script as JSON and the page as
    text, and the page's policy allows no other script and loads nothing.
    """
    names = [[plain(name) for name in ranking.short_names] for ranking in rankings]
    larger = min(max(_MANY / sum(map(len, rankings)), 1), _LARGER)  # as many bytes
    side, limit = round(_SIDE * math.sqrt(larger)), round(_BYTES * larger)
    sections = []
    for each, short in zip(rankings, names, strict=True):
        pictures = [try_thumbnail(image, side, load, limit) for image in each.images]
        sections.append(_section(each, short, pictures))
    notes = [plain(note) for note in notes]
    if len(sections) == 1:
        sections[0]["remarks"][:0] = notes
    write_page(
        path,
        "ranking.html",
        sections=sections,
        data=[_data(*each) for each in zip(rankings, names, sections, strict=True)],
        notes=notes if len(sections) > 1 else [],
        kind="groups" if any(ranking.similar_to for ranking in rankings) else "prompts",
        interval_meaning=INTERVAL_MEANING,
        brackets_meaning=BRACKETS_MEANING,
        **page_script("ranking.js"),
    )


def _section(ranking: Ranking, names: Sequence[str], pictures: Sequence[Thumbnail | None]) -> dict[str, Any]:
    """The template's values for one prompt; `zero` is the place of 0 in percent of the axis."""
    images = ranking.strengths.images
    ticks = even_ticks(min(image.low for image in images), max(image.high for image in images))
    cards = [_card(ranking, names, image, ticks, pictures[image.index]) for image in images]
    brackets = tie_brackets(images)
    for bracket in brackets:
        for place in range(bracket.first, bracket.last + 1):
            cards[place]["brackets"].append((bracket.line, place == bracket.first, place == bracket.last))
    shapes = [picture.width / picture.height for picture in pictures if picture]
    judge = f"by {ranking.model}{f' with {ranking.adapter}' if ranking.adapter else ''}, " if ranking.model else ""
    return {
        "title": plain(ranking.title) or "no prompt",
        "ranking": ranking,
        "judge": plain(judge),
        "orders": orders_in_words(ranking),
        "best": plain(best_in_words(ranking)),
        "bias": _bias(ranking),
        "unit": "on the scale of the levels of its scores" if _is_uncalibrated(ranking) else "log-odds in nats",
        "axis": [f"{tick:+g}" for tick in (ticks[0], ticks[-1])],
        "zero": _percent(0, ticks),
        "lines": 1 + max((bracket.line for bracket in brackets), default=-1),
        "shape": min(max(statistics.median(shapes or [1.0]), 0.75), 1.5),
        "cards": cards,
        "remarks": [plain(warning) for warning in ranking.warnings],
        "skipped": [plain(f"{each.path}: {each.error}") for each in ranking.skipped],
    }


def _card(
    ranking: Ranking, names: Sequence[str], image: RankedImage, ticks: Sequence[float], picture: Thumbnail | None
) -> dict[str, Any]:
    """One image's place: `start`, `middle` and `end` are its interval in percent of the axis.

    `brackets` are those of ties above it: the line, and whether the bracket begins and ends here.
    """
    start, middle, end = (_percent(x, ticks) for x in (image.low, image.strength, image.high))
    ranks = {other.index: other.rank for other in ranking.strengths.images}
    reason = ranking.reason(image)
    return {
        "image": image,
        "name": names[image.index],
        "path": plain(ranking.name(image.index)),
        "picture": picture,
        "start": start,
        "middle": middle,
        "end": end,
        "ties": ties_in_words(ranking, image),
        "brackets": [],
        "reason": plain(reason.text) if reason else None,
        "no_reason": _no_reason(ranking, image),
        "shown": [(i, names[i], ranks[i]) for i in (reason.first, reason.second)] if reason else [],
    }


def _percent(x: float, ticks: Sequence[float]) -> float:
    return 100 * (x - ticks[0]) / (ticks[-1] - ticks[0])


def _no_reason(ranking: Ranking, image: RankedImage) -> str:
    """The cause of a missing reason, in words."""
    if not image.pairs:
        return "not judged: no pair with this image was asked"
    verdicts = [v for pair in ranking.pairs if image.index in (pair.a, pair.b) for v in pair.verdict.verdicts]
    if not any(verdict.reasoning for verdict in verdicts):
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


def _data(ranking: Ranking, names: Sequence[str], section: dict[str, Any]) -> dict[str, Any]:
    """The script's data to compare any two images of one prompt.

    `deviations[i][j - i - 1]` is the standard error of the difference of strengths i and j > i, in thousandths.
    """
    fit = ranking.strengths.fit
    variances = (fit.covariance.row(image)[image + 1 :] for image in range(len(names)))
    return {
        "names": names,
        "axis": section["axis"],
        "order": [(image.index, image.rank) for image in ranking.strengths.images],
        "strengths": [round(strength, 4) for strength in fit.strengths.tolist()],
        "deviations": [np.rint(1000 * np.sqrt(row)).astype(int).tolist() for row in variances],
        "pairs": [_pair_data(pair, ranking.preference(pair)) for pair in ranking.pairs],
    }


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
