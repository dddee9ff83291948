"""An estimate of the time of judging from a small trial with the judge."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mlxpref.distributed import SINGLE_PROCESS
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_budget import PairBudget
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.preferences import ImageLike, Pair

_TRIAL_TOKENS = 8


def unknown_part(judge: Judge, pairs: Sequence[Pair], budget: PairBudget) -> PairBudget:
    """A budget for some of these pairs without those that the judge's store has."""
    if judge.store is None:
        return budget
    session = judge.session()
    known = [
        judge.count_known(pairs, think, session) // 2 if count else 0
        for think, count in ((False, budget.without_thinking), (True, budget.with_thinking))
    ]
    return PairBudget(max(0, budget.without_thinking - known[0]), max(0, budget.with_thinking - known[1]))


def estimate_seconds(judge: Judge, images: Sequence[ImageLike], prompt: str, budget: PairBudget) -> float:
    """Seconds for a budget of pairs of images that are not known, all completions at full length.

    It judges the first pair without thinking, then with a few tokens, and assumes the same for the others. Batches of
    several pairs may be faster. Several processes share the pairs.
    """
    steps = min(_TRIAL_TOKENS, judge.settings.max_tokens)
    settings = replace(judge.settings, max_tokens=steps, samples=1)
    trial = replace(judge, settings=settings, calibration=None, processes=SINGLE_PROCESS, store=None)
    session, features = judge.session(), judge.vlm.features
    session.is_told, session.checked = True, {True, False}  # the work itself says what a user must know
    runs = features.runs

    def judged(think: bool) -> PairVerdict:
        session.scores.clear()  # of a judge of single images
        return next(trial.pairs([Pair(images[0], images[1], prompt)], think=think, session=session, by_scores=True))

    judged(think=False)  # on a GPU this compiles the kernels
    a_pair = _seconds(lambda: judged(think=False))
    missing = features.missing(images, session.seen)  # the others come from memory or from disk
    if features.runs == runs:  # the trial recalled its images: on a GPU this compiles the vision tower's kernels
        features.get_all(missing[:1], session.seen)
        missing = missing[1:]
    an_image = _seconds(lambda: features.get_all(missing[:1], session.seen))
    at_once, thinking = (2 * count for count in (budget.without_thinking, budget.with_thinking))  # comparisons
    if judge.profile.is_point:  # it reads each image once
        at_once, thinking = min(at_once, len(images)), min(thinking, len(images))
    total = min(len(missing[1:]), 2 * budget.total) * an_image + (at_once + thinking) * a_pair / 2
    if thinking:
        a_token = max(0.0, _seconds(lambda: judged(think=True)) - a_pair) / steps
        completions = judge.settings.samples * thinking
        total += math.ceil(completions / judge.settings.rows) * judge.settings.max_tokens * a_token
    return total / judge.processes.size


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
