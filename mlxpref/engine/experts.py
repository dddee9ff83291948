"""Mixtures of experts: each token is changed by the few experts that a router chooses for it.

A choice jumps where two experts are nearly equal, so rounding can make the update meet other experts than the rollout
met. The update therefore takes the rollout's choices and only weighs them anew ("routing replay", arXiv 2507.18071,
2510.11370), and counts how many it would have made otherwise.

Axes: T tokens, D width of a hidden state, K experts a token, E layers with experts, B rows, L columns.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

ROUTER = ".mlp.gate"
"""The end of the name of the layer that chooses experts; no adapter is put on it."""
NO_CHOICE = -1
"""In place of the experts of a token that was not written by the policy."""


def has_experts(layer: Any) -> bool:
    """Whether a layer's second half is a mixture of experts."""
    return "switch_mlp" in layer.mlp


def run_experts(
    mlp: Any, states: mx.array, given: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """What a mixture makes of states (T, D), and the experts (T, K) that it ran.

    `given` (T, K) takes the place of its own choices, except where it is NO_CHOICE; with it, how many of these the
    mixture would not have chosen.
    """
    gates = mx.softmax(mlp.gate(states).astype(mx.float32), axis=-1)  # (T, experts); half precision would make ties
    chosen = mx.argpartition(gates, kth=-mlp.top_k, axis=-1)[..., -mlp.top_k :].astype(mx.int32)  # (T, K)
    others = None
    if given is not None:
        own, chosen = chosen, mx.where(given == NO_CHOICE, chosen, given)
        others = mx.stop_gradient((own[..., None] != chosen[:, None]).all(axis=-1).sum().astype(mx.float32))
    chosen = mx.stop_gradient(chosen)
    weights = mx.take_along_axis(gates, chosen, axis=-1)  # (T, K)
    if mlp.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    results = mlp.switch_mlp(states, chosen)  # (T, K, D)
    return (results * weights[..., None].astype(results.dtype)).sum(axis=-2), chosen, others


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts (E, B, L, K) that the tokens of a block were given while they were written.

    `others` collects, as the layers run, how many of them the routers would not have chosen now.
    """

    experts: NDArray[np.int32]
    others: list[mx.array] = field(default_factory=list)

    def columns(self, part: slice) -> "Routing":
        """Those of some columns."""
        return Routing(self.experts[:, :, part], self.others)

    def of_layer(self, number: int) -> mx.array:
        """The experts (B * L, K) of the layer with experts of this number."""
        return mx.array(self.experts[number].reshape(-1, self.experts.shape[-1]))  # (B, L, K) -> (B * L, K)
