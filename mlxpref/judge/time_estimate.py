"""An estimate of a ranking's time from a small trial with its judge."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mlxpref.distributed import SINGLE_PROCESS
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.rank import PairBudget
from mlxpref.preferences import ImageLike, Pair

_TRIAL_TOKENS = 8


def estimate_seconds(judge: Judge, images: Sequence[ImageLike], prompt: str, budget: PairBudget) -> float | None:
    """Seconds for a budget of pairs of images, all completions at full length; None if the store has some of them.

    It judges the first pair without thinking, then with a few tokens, and assumes the same for the others. Batches of
    several pairs may be faster. Several processes share the pairs.
    """
    steps = min(_TRIAL_TOKENS, judge.settings.max_tokens)
    settings = replace(judge.settings, max_tokens=steps, samples=1)
    trial = replace(judge, settings=settings, calibration=None, processes=SINGLE_PROCESS)
    trial_judge = replace(trial, store=None)
    session = judge.session()

    def judged(trial: Judge, think: bool) -> PairVerdict:
        return next(trial.pairs([Pair(images[0], images[1], prompt)], think=think, session=session))

    if any(judged(trial, think=False).recalled):  # on a GPU this compiles the kernels, too
        return None
    a_pair = _seconds(lambda: judged(trial_judge, think=False))
    an_image = _seconds(lambda: judge.vlm.features.get_all(images[2:3]))
    total = len(images[2:]) * an_image + budget.total * a_pair
    if budget.with_thinking:
        a_token = max(0.0, _seconds(lambda: judged(trial_judge, think=True)) - a_pair) / steps
        completions = 2 * judge.settings.samples * budget.with_thinking
        total += math.ceil(completions / judge.settings.rows) * judge.settings.max_tokens * a_token
    return total / judge.processes.size


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
