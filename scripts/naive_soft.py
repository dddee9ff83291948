"""The soft reward as one would first write it: given to the sampled answer, not integrated over it.

Every token gets the policy gradient of this reward, the answer too; but a reward that depends on the probabilities of
both answers is the same whichever of them was sampled, so what the answer learns is 0 in the mean. It is here to be
compared with, `--reward scripts/naive_soft.py:naive_soft`.
"""

from collections.abc import Sequence
from typing import Any

__all__ = ["naive_soft"]

_FORMAT_WEIGHT = 0.2
"""What a readable answer earns beside its side, as `--format-weight` is by default."""


def naive_soft(
    texts: Sequence[str], p_first: Sequence[float | None], prompt: str, images: Any, y: float
) -> list[float]:
    """The probability that each completion gives to the side of the people; 0 where its answer cannot be read."""
    return [0.0 if p is None else _FORMAT_WEIGHT + p * y + (1 - p) * (1 - y) for p in p_first]
