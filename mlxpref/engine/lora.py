"""LoRA on the linear layers of the language model: adapters attached, switched off, and fused into the weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mlxpref.engine.experts import ROUTER

_DECIDING = (ROUTER, ".linear_attn.in_proj_a", ".linear_attn.in_proj_b")


class FusedLoRALinear(LoRALinear):  # type: ignore[misc]
    """mlx-lm's layer with the scale and the sum inside the matrix product: a fifth of a decoding step's work.

    A is random by a key, B is zero, so a fresh adapter adds nothing.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, key: mx.array) -> None:
        nn.Module.__init__(self)  # mlx-lm's own would draw from the caller's generator
        outputs, inputs = linear_shape(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear, self.scale = linear, scale
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)  # (..., outputs)
        low = x @ self.lora_a  # (..., rank)
        if x.dtype == self.lora_b.dtype:
            return mx.addmm(y, low, self.lora_b, alpha=self.scale)
        # In half precision the float32 product is rounded before the sum, as in mlx-lm.
        result: mx.array = y + (self.scale * (low @ self.lora_b)).astype(x.dtype)
        return result


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, quantized or not."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a vision-language model's language layers, by their full names."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    prefix = "language_model.model.layers."
    return {
        name: layer for name, layer in model.named_modules() if name.startswith(prefix) and isinstance(layer, kinds)
    }


def lora_targets(model: nn.Module) -> list[str]:
    """The linear layers that training adapts: all but those that only decide.

    A mixture's router chooses experts, and its experts, of which each token meets a few, are no linear layers; two
    projections of a recurrent layer say how fast each of its heads forgets and learns.
    """
    return [name for name in linear_layers(model) if not name.endswith(_DECIDING)]


def attach_lora(model: nn.Module, names: Sequence[str], rank: int, scale: float, seed: int = 0) -> None:
    """Put fresh adapters on the named linear layers and freeze everything else; the outputs stay the same.

    The seed determines the adapters. KeyError for a name that is no linear layer of the model.
    """
    model.freeze()
    layers, key = dict(model.named_modules()), mx.random.key(seed)
    wrapped: list[tuple[str, Any]] = []
    for name in names:
        # Two splits a layer, as in mlx-lm's own layers, so that a seed gives the same weights.
        key, layer_key = mx.random.split(mx.random.split(key)[0])
        wrapped.append((name, FusedLoRALinear(layers[name], rank, scale, layer_key)))
        layers[name].freeze()
    model.update_modules(tree_unflatten(wrapped))


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA weights of a model by their full names."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: w for name, w in weights.items() if name.rpartition(".")[2] in ("lora_a", "lora_b")}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters off for a while: every B matrix is zero, so they add exactly nothing.

    The matrices are arrays of the model's state, so this works inside compiled functions, too; a layer's scale is a
    number that tracing fixes.
    """
    weights = {name: w for name, w in adapter_weights(model).items() if name.endswith("lora_b")}
    try:
        model.update(tree_unflatten([(name, mx.zeros_like(w)) for name, w in weights.items()]))
        yield
    finally:
        model.update(tree_unflatten(list(weights.items())))


def fuse_adapter(model: nn.Module, scale: float, weights: Mapping[str, mx.array]) -> None:
    """Add scale * (A B)^T to the weights of an adapter's linear layers, in place.

    Lazy weights stay lazy. The sum is computed in float32 and has the weight's type. The layers must not be quantized.
    """
    layers: dict[str, Any] = dict(model.named_modules())
    for name in sorted({key.rpartition(".")[0] for key in weights}):
        layer = layers[name]
        a, b = (weights[f"{name}.{part}"].astype(mx.float32) for part in ("lora_a", "lora_b"))  # (in, r), (r, out)
        layer.weight = (layer.weight.astype(mx.float32) + scale * (a @ b).T).astype(layer.weight.dtype)  # (out, in)
