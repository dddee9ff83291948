"""LoRA on the linear layers of the language model: which layers, and putting adapters on them."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

__all__ = ["attach_lora", "linear_layers"]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a vision-language model's language layers, by their full names."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    prefix = "language_model.model.layers."
    return {
        name: layer for name, layer in model.named_modules() if name.startswith(prefix) and isinstance(layer, kinds)
    }


def attach_lora(model: nn.Module, names: Sequence[str], rank: int, scale: float, dropout: float = 0.0) -> None:
    """Put fresh adapters on the named linear layers; the model says what it said before.

    A name that is no linear layer of the model is a KeyError.
    """
    layers = dict(model.named_modules())
    wrapped: list[tuple[str, Any]] = [
        (name, LoRALinear.from_base(layers[name], r=rank, dropout=dropout, scale=scale)) for name in names
    ]
    model.update_modules(tree_unflatten(wrapped))
