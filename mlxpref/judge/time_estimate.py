"""How long a ranking will take, from a small trial with the judge that will do it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mlxpref.judge.judge import Judge, JudgingSession
from mlxpref.judge.rank import PairBudget
from mlxpref.preferences import ImageLike, Pair

__all__ = ["estimate_seconds"]

_TRIAL_TOKENS = 8


def estimate_seconds(judge: Judge, images: Sequence[ImageLike], prompt: str, budget: PairBudget) -> float | None:
    """Seconds for a budget of pairs of images, all completions at full length; None if the store knows some of it.

    The first pair is read and a few tokens are written about it; the others are taken to be like it. What runs in
    larger batches than one pair may be faster. Several processes share the pairs.
    """
    steps = min(_TRIAL_TOKENS, judge.settings.max_tokens)
    trial = Judge(judge.vlm, replace(judge.settings, max_tokens=steps, samples=1), store=judge.store)
    sitting, pair = JudgingSession(judge.vlm), Pair(images[0], images[1], prompt)

    def asked(think: bool) -> Callable[[], Any]:
        return lambda: list(trial.pairs([pair], think=think, sitting=sitting))

    asked(False)()  # on a GPU this compiles the kernels, too
    if trial.recalled:
        return None
    trial.store = None
    reading = _seconds(asked(False))
    looking = _seconds(lambda: judge.vlm.features.get_all(images[2:3]))
    expected = len(images[2:]) * looking + (budget.read + budget.think) * reading
    if budget.think:
        a_step = max(0.0, _seconds(asked(True)) - reading) / steps
        completions = 2 * judge.settings.samples * budget.think
        expected += math.ceil(completions / judge.settings.rows) * judge.settings.max_tokens * a_step
    return expected / judge.processes.size


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
