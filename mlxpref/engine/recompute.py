"""Activations that are made again in the backward pass instead of being kept, and not before it is their turn."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

__all__ = ["recomputed"]


def recomputed(module: nn.Module, run: Callable[..., tuple[mx.array, ...]]) -> Callable[..., tuple[mx.array, ...]]:
    """`run`, which computes with a module, so that only its arguments are kept for the backward pass.

    Gradients reach the module's trainable weights and all arguments. It is run again when the gradients of all its
    results are there: MLX's own checkpoint only waits for the forward pass, so that what is made again for one piece of
    a prompt exists while another is at work, a half more memory behind prompts of 1,168 tokens.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))
    names, count = list(weights), len(weights)

    def pure(*inputs: mx.array) -> tuple[mx.array, ...]:
        module.update(tree_unflatten(list(zip(names, inputs[:count], strict=True))))
        return run(*inputs[count:])

    def gradients(inputs: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        waiting = mx.depends(_listed(inputs), _listed(cotangents))
        return tuple(mx.vjp(pure, waiting, _listed(cotangents))[1])

    function: Any = mx.custom_function(pure)
    function.vjp(gradients)

    def wrapped(*arguments: mx.array) -> tuple[mx.array, ...]:
        return function(*weights.values(), *arguments)  # type: ignore[no-any-return]

    return wrapped


def _listed(arrays: Any) -> list[mx.array]:
    """MLX passes a single array bare."""
    return list(arrays) if isinstance(arrays, tuple | list) else [arrays]
