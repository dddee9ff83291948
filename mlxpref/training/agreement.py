"""Agreement with oneself: a reward for the same preference in both orders of a pair.

A completion of one order, with the probability p that its first image is better, earns the mean of 1 - (p - q)^2 over
the G completions of the other order, where q is the probability that they give to the same image; one without an answer
earns nothing, and adds nothing. That estimates the expectation over two independent completions without bias. Reasons
have it in their reward; the answer position has its exact gradient by p. Each order holds q in its own turn, and the
gradients of both add up to that of the expectation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxpref.preferences import share_for_first
from mlxpref.training.rollouts import RolloutGroup, of_other_order
from mlxpref.verdict import Verdict


def other_order(groups: Sequence[RolloutGroup]) -> NDArray[np.float64]:
    """Return what `agreement` takes from the other order of each group, (P, 3): the means of 1, q and q^2.

    They are over all its rollouts, with 0 for those without an answer. The q are of the sampling, so they are known
    before any backward pass, in every process.
    """
    return of_other_order(groups, np.array([_moments(group.verdicts) for group in groups], np.float64))


def _moments(verdicts: Sequence[Verdict]) -> list[float]:
    shares = [verdict.p_first("soft") for verdict in verdicts]
    swapped = [share_for_first(share, a_first=False) for share in shares if share is not None]
    return [sum(q**power for q in swapped) / len(verdicts) for power in range(3)]


def agreement(p_first: Any, moments: Any) -> Any:
    """Return the mean of 1 - (p - q)^2 over the other order, from p (...) and `other_order` (..., 3).

    Plain arithmetic, so arrays of NumPy and MLX will do, and MLX differentiates through it.
    """
    answered, mean, square = (moments[..., power] for power in range(3))
    return answered * (1 - p_first**2) + 2 * mean * p_first - square
