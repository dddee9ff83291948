"""Conjugate gradients for many right-hand sides at once: the sparse equations of many images."""

from typing import TYPE_CHECKING

import numpy as np

from mlxpref.ranking.outcomes import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MOST_STEPS = 5000  # 20 to 200 suffice; more only where nothing but the prior ties sure answers together


class ConjugateGradients:
    """Solves H x = r for a sparse, symmetric, positive definite H (P, P), scaled to a diagonal of ones."""

    def __init__(self, hessian: "csr_array") -> None:
        from scipy.sparse import diags_array

        self.scale: Array = 1 / np.sqrt(hessian.diagonal())  # (P,)
        scaling = diags_array(self.scale)
        self.scaled = (scaling @ hessian @ scaling).tocsr()

    def solve(self, right: Array, tolerance: float, start: Array | None = None) -> Array:
        """(P, C) right-hand sides -> (P, C) solutions; what is left over is `tolerance` times a right-hand side."""
        right = right * self.scale[:, None]
        found = np.zeros_like(right) if start is None else start / self.scale[:, None]
        limit = tolerance**2 * _squares(right)
        left = right if start is None else right - self.scaled @ found
        direction, size = left.copy(), _squares(left)  # (P, C), (C,)
        for _ in range(MOST_STEPS):
            if (size <= limit).all():
                break
            slope = self.scaled @ direction
            step = size / np.maximum(np.einsum("pc,pc->c", direction, slope), 1e-300)
            found += step * direction
            left -= step * slope
            before, size = size, _squares(left)
            direction *= size / np.maximum(before, 1e-300)
            direction += left
        return np.asarray(found * self.scale[:, None])


def _squares(columns: Array) -> Array:
    """(P, C) -> (C,) squared lengths."""
    return np.asarray(np.einsum("pc,pc->c", columns, columns))
