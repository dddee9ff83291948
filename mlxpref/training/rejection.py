"""Rejection sampling: only completions that are right, of preferences with some in both orders, are learned.

They are learned by likelihood, which is the policy gradient with an advantage of 1; the others have one of 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlxpref.training.rollouts import RolloutGroup, of_other_order


def kept_completions(groups: Sequence[RolloutGroup], right: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which of the right completions (P, G) are learned: those whose other order has a right one, too."""
    found: NDArray[np.bool_] = np.any(right, axis=1)
    kept: NDArray[np.bool_] = right & of_other_order(groups, found)[:, None]
    return kept
