"""The language model's layers one by one, so that each can be recomputed in the backward pass.

What a layer remembers of a block (`Memory`) is an output of the recomputed function. As a side effect on a cache it
would get no gradient, and recomputing would make it silently wrong. Prefixes keep their own rows; each layer repeats
them for the rows that share them, so only one layer's copies exist at a time.

Axes: B rows, L columns of a block, N columns of a step, D width of a hidden state.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.attention import Attention
from mlxpref.engine.branched_cache import BranchedCache
from mlxpref.engine.experts import has_experts, run_experts
from mlxpref.engine.layers import Block, BlockContext, Memory, Mixer, Prefix, StepContext, normalize
from mlxpref.engine.recurrent import GatedDelta

_MIXERS: dict[str, Mixer] = {"self_attn": Attention(), "linear_attn": GatedDelta()}
"""The kinds of layers, by the name of the module that mixes tokens."""


def mixer_of(layer: Any) -> Mixer:
    """How a layer mixes tokens."""
    return next(mixer for name, mixer in _MIXERS.items() if name in layer)


def run_block(
    decoder: Any,
    block: Block,
    prefixes: Sequence[Prefix] = (),
    recompute: bool = True,
    last_positions: NDArray[np.int64] | None = None,
    eval_each_piece: bool = False,
) -> tuple[mx.array, list[Memory]]:
    """Run a block through all layers; returns the hidden states (B, L, D) and what each layer remembers.

    `prefixes` come before it, outermost first. `recompute` keeps only each layer's inputs and computes the rest again
    in the backward pass. A long block runs in pieces, each behind those before it. With `last_positions` (B,) it
    returns only the states (B, D) of these columns, and the last layer skips the others. `eval_each_piece`, for calls
    without a gradient, evaluates each piece while the next one is built: work stays bounded, and Ctrl-C works.
    """
    rows, columns = block.branch_ids.shape
    size = bounds.piece_columns(rows)
    depth = len(decoder.layers) - (last_positions is not None)
    states: list[mx.array] = []
    pieces: list[Prefix] = []
    for start in range(0, columns, size):
        piece = block.columns(start, start + size) if columns > size else block
        hidden, new = run_layers(decoder, piece, [*prefixes, *pieces], recompute, depth)
        if eval_each_piece and start + size < columns:
            mx.async_eval(hidden, new)
            if states:
                mx.eval(states[-1])  # the previous piece, so that the device works on this one while the next is built
        states.append(hidden)
        pieces.append(Prefix(new, piece.branch_ids, np.arange(rows)))
    hidden = states[0] if len(states) == 1 else mx.concatenate(states, axis=1)  # (B, L, D)
    layers = [
        mixer_of(layer).join(parts)
        for layer, *parts in zip(decoder.layers[:depth], *(piece.layers for piece in pieces), strict=True)
    ]
    if last_positions is not None:
        hidden, last = _run_last_layer(decoder, block, prefixes, recompute, hidden, last_positions)
        layers.append(last)
    return normalize(decoder.norm, hidden), layers


def run_layers(
    decoder: Any, block: Block, prefixes: Sequence[Prefix], recompute: bool, depth: int
) -> tuple[mx.array, list[Memory]]:
    """The first `depth` layers of `run_block`, all columns at once, without the norm at the end."""
    context = BlockContext(decoder, block, prefixes, recompute)
    hidden, layers = block.embeddings, list[Memory]()
    for number in range(depth):
        hidden, memory = _run_layer(context, number, hidden)
        layers.append(memory)
        if number < len(block.deepstack):
            hidden = hidden + block.deepstack[number]
    return hidden, layers


def _run_layer(context: BlockContext, number: int, hidden: mx.array) -> tuple[mx.array, Memory]:
    """One layer on the states (B, L, D) of a block; returns those behind it, (B, 1, D) with `context.ends`."""
    layer = context.decoder.layers[number]
    mixer = mixer_of(layer)
    seen = mixer.seen(context.prefixes)
    routing = context.block.routing if has_experts(layer) else None
    given = routing.of_layer(sum(map(has_experts, context.decoder.layers[:number]))) if routing else None

    def run(states: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        memories = [prefix.expanded(pair) for prefix, pair in zip(seen, pairs, strict=True)]
        if context.ends is None:
            mixed, memory = mixer.mix(layer, states, context, memories)
        else:
            mixed, memory = mixer.mix_last(layer, states, context, memories)
            states = states[context.last_columns][:, None]  # (B, L, D) -> (B, 1, D)
        states, _, others = _finish_layer(layer, states, mixed, given)
        return (states, *memory) if others is None else (states, *memory, others)

    function = checkpointed(layer, run) if context.recompute else run
    hidden, first, second, *others = function(hidden, *(array for prefix in seen for array in prefix.layers[number]))
    if routing:
        routing.others.extend(others)
    return hidden, (first, second)


def _run_last_layer(
    decoder: Any,
    block: Block,
    prefixes: Sequence[Prefix],
    recompute: bool,
    hidden: mx.array,
    last_positions: NDArray[np.int64],
) -> tuple[mx.array, Memory]:
    """The last layer: the states (B, D) of one column a row, and what it remembers of all columns."""
    number = len(decoder.layers) - 1
    context = BlockContext(decoder, block, prefixes, recompute, last_positions)
    hidden, memory = _run_layer(context, number, hidden)
    state = hidden[:, 0]  # (B, 1, D) -> (B, D)
    if number < len(block.deepstack):
        state = state + block.deepstack[number][context.last_columns]
    return state, memory


def run_step(decoder: Any, embeddings: mx.array, context: StepContext, cache: BranchedCache) -> mx.array:
    """Run embeddings (B, N, D) behind a cache, and add to it; returns the states (B, N, D)."""
    states = embeddings.flatten(0, 1)  # (B * N, D): with two axes a product is one operation
    for layer, layer_cache in zip(decoder.layers, cache.layers, strict=True):
        mixed = mixer_of(layer).step(layer, states, context, layer_cache)
        states, experts, _ = _finish_layer(layer, states, mixed)
        if experts is not None and context.experts is not None:
            context.experts.append(experts)
    return normalize(decoder.norm, states).reshape(embeddings.shape)  # (B, N, D)


def cache_of(decoder: Any, branch_ids: NDArray[np.int32], layers: Sequence[Memory]) -> BranchedCache:
    """The cache of a block that ran: its branch ids (B, S), and what each layer remembers."""
    caches = [mixer_of(layer).cache(memory) for layer, memory in zip(decoder.layers, layers, strict=True)]
    return BranchedCache(branch_ids, caches)


def _finish_layer(
    layer: Any, states: mx.array, mixed: mx.array, given: mx.array | None = None
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """The rest of a layer after it mixed tokens: states, and what it adds, (..., D) each.

    Also returns the experts, if any, and how many of those that were `given`, if any, it would not have chosen.
    """
    states = states + mixed
    normed = normalize(layer.post_attention_layernorm, states)
    if not has_experts(layer):
        return states + layer.mlp(normed), None, None
    added, experts, others = run_experts(layer.mlp, normed.reshape(-1, normed.shape[-1]), given)
    return states + added.reshape(states.shape), experts, others


def checkpointed(module: nn.Module, run: Callable[..., tuple[mx.array, ...]]) -> Callable[..., tuple[mx.array, ...]]:
    """`run`, a function that uses a module's weights, so that only its arguments are kept for the backward pass.

    Gradients reach the module's trainable weights and all arguments. The function runs again once the gradients of all
    its results exist, and none of its gradients is passed on before all exist. MLX's own checkpoint waits only for the
    forward pass, so recomputed arrays of several pieces of a block exist together: half as much memory again behind
    1,168 tokens. Without the second wait a state's gradient runs ahead through all pieces, and their arrays stay.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))
    names, count = list(weights), len(weights)

    def pure(*inputs: mx.array) -> tuple[mx.array, ...]:
        module.update(tree_unflatten(list(zip(names, inputs[:count], strict=True))))
        return run(*inputs[count:])

    def gradients(inputs: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        waiting = mx.depends(_as_list(inputs), _as_list(cotangents))
        results = mx.vjp(pure, waiting, _as_list(cotangents))[1]
        return tuple(mx.depends(results, results))

    function: Any = mx.custom_function(pure)
    function.vjp(gradients)

    def wrapped(*arguments: mx.array) -> tuple[mx.array, ...]:
        return function(*weights.values(), *arguments)  # type: ignore[no-any-return]

    return wrapped


def _as_list(arrays: Any) -> list[mx.array]:
    """MLX passes a single array bare."""
    return list(arrays) if isinstance(arrays, tuple | list) else [arrays]
