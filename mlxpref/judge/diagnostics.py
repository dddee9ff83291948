"""What should be known before a ranking is trusted: what the judge could not tell, read or finish."""

from collections.abc import Iterator

import numpy as np

from mlxpref.judge.ranking_result import Ranking

__all__ = ["warnings_for"]

_UNDECIDED = 0.1
"""A soft preference so near to 0.5 says next to nothing."""
_MOST = 2 / 3
"""The share of such pairs above which the judge is said not to be able to tell."""
_SURE = 2.0
"""Standard errors from 0 at which a position bias is there at all."""


def warnings_for(ranking: Ranking, top: int | None = None) -> Iterator[str]:
    """One line for each thing; none where there is nothing to say."""
    yield from _of_the_end(ranking, top)
    if not ranking.prompt.strip():
        yield "the prompt is empty: the images were compared without knowing what they were made for"
    yield from _of_the_verdicts(ranking)
    yield from _of_the_judge(ranking)


def _of_the_end(ranking: Ranking, top: int | None) -> Iterator[str]:
    asked = len(ranking.pairs)
    if ranking.ending == "interrupted":
        yield f"interrupted: the order is that of {asked} pairs, {ranking.planned} were planned"
    elif ranking.ending == "settled":
        what = "best image is" if top == 1 else f"top {top} is"
        yield f"ended early: after {asked} pairs the {what} settled at 95 %; the order of the others is less sure"


def _of_the_verdicts(ranking: Ranking) -> Iterator[str]:
    verdicts = [verdict for pair in ranking.pairs for verdict in pair.verdict.verdicts]
    unreadable = sum(verdict.p_first("soft") is None for verdict in verdicts)
    if unreadable:
        yield f"{unreadable} of {len(verdicts)} answers could not be read: they count for nothing"
    thought = [verdict for verdict in verdicts if verdict.tokens]
    closed = sum(verdict.closed for verdict in thought)
    if closed:
        yield (
            f"{closed} of {len(thought)} completions ran out of tokens and were read where they stood: "
            "a larger --max-tokens lets them finish"
        )
    mass = [verdict.label_mass for verdict in verdicts if verdict.label_mass > 0]
    if mass and float(np.median(mass)) < 0.5:
        yield (
            f"the judge gave only {np.median(mass):.0%} of its probability to an answer at all: "
            "it may not have been made, or trained, for this question"
        )


def _of_the_judge(ranking: Ranking) -> Iterator[str]:
    undecided = sum(abs(pair.verdict.p_a - 0.5) < _UNDECIDED for pair in ranking.pairs)
    if undecided > _MOST * len(ranking.pairs):
        yield (
            f"the judge can hardly tell these images apart: of {len(ranking.pairs)} pairs, "
            f"{undecided} came out between 40 and 60 %"
        )
    bias, error = ranking.ranking.position_bias, ranking.ranking.position_bias_stderr
    spread = float(np.std(ranking.ranking.fit.strengths))
    if abs(bias) > max(spread, _SURE * error):
        place = "first" if bias > 0 else "second"
        yield (
            f"the judge goes by place more than by picture: it favours the {place} one by {abs(bias):.1f} nats, "
            f"and the images' strengths spread by {spread:.1f}; each pair is shown in both orders, which cancels this"
        )
