"""Bounds on the difference of two float32 results that differ only in the order of their additions."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

EPSILON = float(np.finfo(np.float32).eps)


def tolerance(expected: mx.array | NDArray[np.float32], sums: int, layers: int = 1) -> float:
    """A bound on the absolute difference of two float32 results, from the largest finite one.

    A sum of n rounded products is off by about sqrt(n) units in the last place of its largest terms, in one order of
    additions or another; `sums` is the longest n. `layers` such computations follow each other, with about ten sums and
    functions each. Which order a library takes depends on the processor.
    """
    values = np.abs(np.array(expected, np.float64))
    largest = float(values[np.isfinite(values)].max(initial=0))
    return 10 * layers * EPSILON * float(np.sqrt(sums)) * largest


def assert_equal_sums(result: mx.array, expected: mx.array, sums: int, layers: int = 1) -> None:
    """Two float32 results are equal but for the order of their additions; see `tolerance`."""
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert float(mx.abs(result - expected).max()) <= tolerance(expected, sums, layers)


PROBABILITY = tolerance(np.ones(1, np.float32), sums=256, layers=4)
"""How far probabilities of the tiny models may lie apart: they have 2 to 4 layers and attend to some 200 tokens."""
