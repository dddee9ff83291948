"""An adapter put into the weights that it was beside: the model says the same without it."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["fuse_adapter"]


def fuse_adapter(model: nn.Module, scale: float, weights: Mapping[str, mx.array]) -> None:
    """Add scale * (A B)^T to the weights of the linear layers that an adapter is for, in place.

    Lazy weights stay lazy. The sum is made in float32 and has the weight's type. The layers must not be quantized.
    """
    layers: dict[str, Any] = dict(model.named_modules())
    for name in sorted({key.rpartition(".")[0] for key in weights}):
        layer = layers[name]
        a, b = (weights[f"{name}.{part}"].astype(mx.float32) for part in ("lora_a", "lora_b"))
        layer.weight = (layer.weight.astype(mx.float32) + scale * (a @ b).T).astype(layer.weight.dtype)
