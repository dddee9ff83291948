"""LoRA on the linear layers of the language model: which layers, putting adapters on them, and leaving them off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

__all__ = ["adapter_off", "adapter_weights", "attach_lora", "linear_layers"]


class FusedLoRALinear(LoRALinear):  # type: ignore[misc]
    """mlx-lm's layer, whose product is scaled and added within the matrix product: a fifth of a decoding step's work.

    Where the layer computes in half precision, so that the float32 product has to be rounded first, it is mlx-lm's own.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != self.lora_b.dtype:
            return super().__call__(x)  # type: ignore[no-any-return]
        return mx.addmm(self.linear(x), self.dropout(x) @ self.lora_a, self.lora_b, alpha=self.scale)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a vision-language model's language layers, by their full names."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    prefix = "language_model.model.layers."
    return {
        name: layer for name, layer in model.named_modules() if name.startswith(prefix) and isinstance(layer, kinds)
    }


def attach_lora(model: nn.Module, names: Sequence[str], rank: int, scale: float, dropout: float = 0.0) -> None:
    """Put fresh adapters on the named linear layers and freeze everything else; the model says what it said before.

    A name that is no linear layer of the model is a KeyError.
    """
    model.freeze()
    layers = dict(model.named_modules())
    wrapped: list[tuple[str, Any]] = [
        (name, LoRALinear.from_base(layers[name], r=rank, dropout=dropout, scale=scale)) for name in names
    ]
    for _, layer in wrapped:
        layer.__class__ = FusedLoRALinear
        layer.linear.freeze()
    model.update_modules(tree_unflatten(wrapped))


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA weights of a model by their full names."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: w for name, w in weights.items() if name.rpartition(".")[2] in ("lora_a", "lora_b")}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make the model its own reference for a while: every B matrix is zero, so the adapters add exactly nothing.

    The matrices are arrays of the model's state, so this holds inside compiled functions too, where changing a
    layer's scale, a number fixed when the function was traced, would do nothing.
    """
    weights = {name: w for name, w in adapter_weights(model).items() if name.endswith("lora_b")}
    try:
        model.update(tree_unflatten([(name, mx.zeros_like(w)) for name, w in weights.items()]))
        yield
    finally:
        model.update(tree_unflatten(list(weights.items())))
