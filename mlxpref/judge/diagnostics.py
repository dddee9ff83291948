"""Warnings about results: images that the judge knows or tells apart badly, unreadable or cut-off answers."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np
from PIL import Image

from mlxpref.data.image_cache import ImageCache
from mlxpref.demo.pictures import SIZE
from mlxpref.errors import DataError
from mlxpref.judge.mode_fit import is_contradicted
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import Ranking
from mlxpref.preferences import ImageLike
from mlxpref.text import counted

_UNDECIDED = 0.1
"""A soft preference this near to 0.5 is undecided."""
_UNDECIDED_SHARE = 2 / 3
"""Above this share of undecided pairs a warning says that the judge cannot tell the images apart."""
_STANDARD_ERRORS = 2.0
"""A position bias this many standard errors from 0 is real."""


def warnings_for(ranking: Ranking, top: int | None = None) -> Iterator[str]:
    """The warnings about a ranking, a line each; `top` is the number of best images in the request."""
    yield from _about_the_ending(ranking, top)
    yield from answer_warnings(pair.verdict for pair in ranking.pairs)
    yield from _about_preferences(ranking)


def demo_warnings(judge_name: str, images: Iterable[ImageLike], cache: ImageCache) -> Iterator[str]:
    """The warning that the demo judge knows only its own pictures, if there are others."""
    for image in images if judge_name == "demo" else ():
        with suppress(DataError):
            if (image.size if isinstance(image, Image.Image) else cache.size(image)) != (SIZE, SIZE):
                yield "the demo judge knows only its own coloured shapes: its answers about other pictures mean nothing"
                return


def _about_the_ending(ranking: Ranking, top: int | None) -> Iterator[str]:
    asked = counted(ranking.comparisons, "comparison")
    if ranking.ending == "interrupted":
        yield f"interrupted: the order is that of {asked}, {ranking.planned} were planned"
    elif top and top >= len(ranking):
        yield f"no early end: a top {top} of {counted(len(ranking), 'image')} leaves none out"
    elif ranking.ending == "settled":
        what = "best image is" if top == 1 else f"top {top} is"
        yield f"ended early: after {asked} the {what} settled at 95 %; the order of the others is less sure"


def answer_warnings(pairs: Iterable[PairVerdict]) -> Iterator[str]:
    """The warnings about a judge's answers, a line each: unreadable, cut off, or hardly answers at all."""
    every = [verdict for pair in pairs for verdict in pair.verdicts]
    # A judge of single images reads each once, whatever the number of its pairs.
    verdicts = list({id(each): each for verdict in every for each in verdict.readings or (verdict,)}.values())
    unreadable = sum(verdict.label_mass <= 0 for verdict in verdicts)
    if unreadable:
        yield f"{unreadable} of {counted(len(verdicts), 'answer')} could not be read and count for nothing"
    completions = [verdict for verdict in verdicts if verdict.tokens]
    closed = sum(verdict.closed for verdict in completions)
    if closed:
        yield (
            f"{closed} of {len(completions)} completions ran out of tokens and were closed there: "
            "a larger --max-tokens lets them finish"
        )
    mass = [verdict.label_mass for verdict in verdicts if verdict.label_mass > 0]
    if mass and float(np.median(mass)) < 0.5:
        yield (
            f"the judge gave only {np.median(mass):.0%} of its probability to an answer at all: "
            "it may not have been made, or trained, for this question"
        )


def _about_preferences(ranking: Ranking) -> Iterator[str]:
    for think in ranking.modes:
        pairs = [pair for pair in ranking.pairs if pair.think == think]  # each mode has a scale of its own
        undecided = sum(abs(ranking.preference(pair) - 0.5) < _UNDECIDED for pair in pairs)
        if undecided <= _UNDECIDED_SHARE * len(pairs):
            continue
        counts = f"of {counted(len(pairs), 'pair')}, {undecided} came out between 40 and 60 %"
        if think == ranking.modes[-1]:
            yield f"the judge can hardly tell these images apart: {counts}"
        else:
            yield (
                f"which images the judge thought about is mostly by chance, as it can hardly tell them apart at once: "
                f"{counts}; --think-about all thinks about every pair"
            )
    if is_contradicted(ranking):
        yield (
            "what the judge answers at once contradicts what it thinks, and outweighs it in this order: "
            "--think-about all goes by its thinking alone"
        )
    bias, error = ranking.strengths.position_bias, ranking.strengths.position_bias_stderr
    spread = float(np.std(ranking.strengths.fit.strengths))
    if abs(bias) > max(spread, _STANDARD_ERRORS * error):
        place = "first" if bias > 0 else "second"
        yield (
            f"the judge goes by place more than by picture: it favours the {place} one by {abs(bias):.2g} nats, "
            f"and the images' strengths spread by {spread:.2g}; the ranking takes this out"
        )
