"""The page of a ranking: pictures in order with their intervals, reasons beside both pictures, any two to compare."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.errors import DataError
from mlxpref.judge.ranking_result import JudgedPair, Ranking
from mlxpref.preferences import ImageLike
from mlxpref.ranking.bradley_terry import Z95, RankedImage
from mlxpref.ranking.posterior import difference_variance
from mlxpref.report.html import Thumbnail, even_ticks, page_script, short_names, thumbnail, write_page
from mlxpref.text import plain
from mlxpref.verdict import Strategy, Verdict

__all__ = ["write_ranking_page"]


@dataclass(frozen=True)
class _Shown:
    """One image beside the reasoning that speaks of it: its number, name and rank."""

    index: int
    name: str
    rank: int


@dataclass(frozen=True)
class _Card:
    """One image's place on the page; `start`, `middle` and `end` are the interval in percent of the axis.

    `reason` is None where nothing written speaks for the image's place, and `no_reason` says why.
    """

    image: RankedImage
    name: str
    path: str
    picture: Thumbnail | None
    start: float
    middle: float
    end: float
    ties: str
    tied_above: bool
    reason: str | None
    no_reason: str
    shown: tuple[_Shown, ...]


@dataclass(frozen=True)
class _Section:
    """The ranking of one prompt, as the template needs it."""

    title: str
    ranking: Ranking
    judge: str
    best: str
    bias: str
    ticks: tuple[float, ...]
    cards: tuple[_Card, ...]
    remarks: tuple[str, ...]
    skipped: tuple[str, ...]


def write_ranking_page(path: Path, rankings: Sequence[Ranking], notes: Sequence[str] = ()) -> None:
    """Write rankings, one for each prompt, as one page with everything inside; it works without a network.

    Images are read one at a time; one that can no longer be read is named without its picture. `notes` stand at the
    top, such as that the judge could not tell the images apart. Every picture is in the page once: the script shows it
    again where it is compared. Texts reach the script as JSON and the page as text, and the page's own policy lets no
    other script run and nothing be loaded.
    """
    names = [_names(ranking) for ranking in rankings]
    write_page(
        path,
        "ranking.html",
        sections=[_section(*each) for each in zip(rankings, names, strict=True)],
        data=[_data(*each) for each in zip(rankings, names, strict=True)],
        notes=[plain(note) for note in notes],
        **page_script("ranking.js"),
    )


def _section(ranking: Ranking, names: Sequence[str]) -> _Section:
    """What is shown of one prompt; the pictures are read here."""
    images = ranking.ranking.images
    ticks = even_ticks(min(image.low for image in images), max(image.high for image in images))
    ranks = {image.index: image.rank for image in images}
    thought = {i for pair in ranking.pairs if any(v.reasoning for v in pair.verdict.verdicts) for i in (pair.a, pair.b)}
    cards, above = [], None
    for image in images:
        start, middle, end = (
            100 * (x - ticks[0]) / (ticks[-1] - ticks[0]) for x in (image.low, image.strength, image.high)
        )
        reason = ranking.reason(image)
        cards.append(
            _Card(
                image,
                names[image.index],
                plain(ranking.name(image.index)),
                _picture(ranking.images[image.index]),
                start,
                middle,
                end,
                _ties(image, ranks),
                above in image.tied_with,
                plain(reason.text) if reason else None,
                _no_reason(image, image.index in thought),
                tuple(_Shown(i, names[i], ranks[i]) for i in (reason.first, reason.second)) if reason else (),
            )
        )
        above = image.index
    skipped = tuple(plain(f"{each.path}: {each.error}") for each in ranking.skipped)
    judge = f"by {ranking.model}{f' with {ranking.adapter}' if ranking.adapter else ''}, " if ranking.model else ""
    return _Section(
        f"“{prompt}”" if (prompt := plain(ranking.prompt)) else "no prompt",
        ranking,
        plain(judge),
        _best(cards[0]),
        _bias(ranking),
        tuple(ticks),
        tuple(cards),
        tuple(plain(remark) for remark in ranking.remarks),
        skipped,
    )


def _names(ranking: Ranking) -> list[str]:
    return [plain(name) for name in short_names([ranking.name(i) for i in range(len(ranking.images))])]


def _picture(image: ImageLike) -> Thumbnail | None:
    """The thumbnail, or None: hours of judging are not lost because a file was moved meanwhile."""
    try:
        return thumbnail(image)
    except DataError:
        return None


def _ties(image: RankedImage, ranks: dict[int, int]) -> str:
    """From which images this one is not told apart."""
    if not image.tied_with:
        return "told apart from all others"
    if len(image.tied_with) == len(ranks) - 1:
        return "tied with all others"
    tied = sorted({ranks[other] for other in image.tied_with})
    return f"tied with rank{'s' if len(tied) > 1 else ''} {_runs(tied)}"


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers, three or more that follow each other as a run: 1, 2, 5 to 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _no_reason(image: RankedImage, thought: bool) -> str:
    if not image.pairs:
        return "not judged: no pair with this image was asked"
    if not thought:
        return "only read, without reasons"
    return "nothing that was written of this image speaks for its place"


def _best(first: _Card) -> str:
    """Whether one image is the best, in words."""
    if not first.image.tied_with:
        return f"{first.name} is this judge's best, {first.ties}."
    return f"No image is clearly the best: {first.name} comes first, but is {first.ties}."


def _bias(ranking: Ranking) -> str:
    """How far the judge favours a place on the screen, and what that means."""
    bias, error = ranking.ranking.position_bias, ranking.ranking.position_bias_stderr
    size = f"{bias:+.2f} nats, standard error {error:.2f}"
    if abs(bias) <= Z95 * error:
        return f"No position bias can be told from these pairs: {size}."
    place = "first" if bias > 0 else "second"
    return (
        f"This judge favours the image that is shown {place}: position bias {size}. Of two equally strong images it "
        f"prefers the {place} with {100 * _probability(abs(bias)):.1f}\u00a0%. Judging both orders cancels this."
    )


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def _data(ranking: Ranking, names: Sequence[str]) -> dict[str, Any]:
    """What the script needs to compare any two images of one prompt.

    `deviations[i][j - i - 1]` is the standard error of the difference of strengths i and j > i, in thousandths.
    """
    fit = ranking.ranking.fit
    deviations = np.rint(1000 * np.sqrt(difference_variance(fit.covariance))).astype(int)
    return {
        "names": names,
        "order": [(image.index, image.rank) for image in ranking.ranking.images],
        "strengths": [round(strength, 4) for strength in fit.strengths.tolist()],
        "deviations": [row[i + 1 :] for i, row in enumerate(deviations.tolist())],
        "pairs": [_pair_data(pair) for pair in ranking.pairs],
    }


def _pair_data(pair: JudgedPair) -> list[Any]:
    """[a, b, P(a), P(a) with a first, P(a) with a second, samples with a first, samples with a second]."""
    said = pair.verdict
    preferences = (said.p_a, said.p_a_shown_first, said.p_a_shown_second)
    orders = (said.a_shown_first, said.a_shown_second)
    return [
        pair.a,
        pair.b,
        *(_rounded(p) for p in preferences),
        *(list(_samples(verdicts, said.strategy)) for verdicts in orders),
    ]


def _samples(verdicts: Sequence[Verdict], strategy: Strategy) -> Iterable[list[Any]]:
    """[P(first image)], and of what was thought about also the reasoning and whether it ran out of tokens."""
    for verdict in verdicts:
        p_first = _rounded(verdict.p_first(strategy))
        yield [p_first, plain(verdict.reasoning), int(verdict.closed)] if verdict.reasoning else [p_first]


def _rounded(p: float | None) -> float | None:
    return None if p is None else round(p, 5)
