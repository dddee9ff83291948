"""The language model's layers one by one, so that each can be recomputed in the backward pass.

A layer's keys and values are outputs of the recomputed function. As a side effect on a cache they would get no
gradient, and recomputing would make it silently wrong. Prefixes keep their own rows; each layer repeats them for the
rows that share them, so only one layer's copies exist at a time.

Axes: B rows, L columns of a block, S columns that it sees, D width of a hidden state, H heads of queries, K heads of
keys and values, W width of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.kv_cache import PADDING, LayerCache, attention_mask

KeysValues = tuple[mx.array, mx.array]
"""The keys and the values of one layer, (B, K, S, W) each."""
RotaryTables = tuple[mx.array, mx.array] | None
"""Cosines and sines (B, L, W) for all layers. None on Metal, where one kernel a layer rotates, as in mlx-vlm."""


@dataclass(frozen=True)
class Block:
    """Rows that run through the layers together.

    `embeddings` (B, L, D); `positions` (3, B, L); `branch_ids` (B, L), see `BranchedKVCache`; `deepstack`, (B, L, D)
    each, is added after the first layers.
    """

    embeddings: mx.array
    positions: mx.array
    branch_ids: NDArray[np.int32]
    deepstack: Sequence[mx.array] = ()

    def columns(self, start: int, end: int) -> "Block":
        """The columns from `start` up to `end`."""
        part = slice(start, end)
        return Block(
            self.embeddings[:, part],
            self.positions[:, :, part],
            self.branch_ids[:, part],
            [level[:, part] for level in self.deepstack],
        )


@dataclass(frozen=True, eq=False)
class Prefix:
    """An earlier block of P rows that later rows continue: its keys and values by layer, and its `branch_ids` (P, S).

    `rows` (B,) is the prefix row that each row of a later block continues; many may share one.
    """

    layers: Sequence[KeysValues]
    branch_ids: NDArray[np.int32]
    rows: NDArray[np.int64]


def expand_rows(array: mx.array, rows: NDArray[np.int64]) -> mx.array:
    """Rows of an array by number, (P, ...) -> (B, ...); gradients add up over the copies of a row."""
    count = array.shape[0]
    copies = len(rows) // count
    if np.array_equal(rows, np.repeat(np.arange(count), copies)):
        return mx.repeat(array, copies, axis=0) if copies > 1 else array  # its gradient is a sum, not a scatter
    return array[mx.array(rows)]


def run_block(
    decoder: Any,
    block: Block,
    prefixes: Sequence[Prefix] = (),
    recompute: bool = True,
    last_positions: NDArray[np.int64] | None = None,
    eval_each_piece: bool = False,
) -> tuple[mx.array, list[KeysValues]]:
    """Run a block through all layers; returns the hidden states (B, L, D) and each layer's new keys and values.

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
    hidden = _concatenate(states, axis=1)  # (B, L, D)
    layers = [
        (_concatenate([keys for keys, _ in parts], axis=2), _concatenate([values for _, values in parts], axis=2))
        for parts in zip(*(piece.layers for piece in pieces), strict=True)
    ]  # (B, K, L, W)
    if last_positions is not None:
        hidden, last = _run_last_layer(decoder, block, prefixes, recompute, hidden, last_positions)
        layers.append(last)
    return decoder.norm(hidden), layers


def run_layers(
    decoder: Any, block: Block, prefixes: Sequence[Prefix], recompute: bool, depth: int
) -> tuple[mx.array, list[KeysValues]]:
    """The first `depth` layers of `run_block`, all columns at once, without the norm at the end."""
    rotary = rotary_tables(decoder, block.embeddings, block.positions)
    mask = attention_mask(_prefix_branch_ids(block, prefixes), block.branch_ids)
    attend = _attention(block.embeddings.dtype, recompute)
    hidden, layers = block.embeddings, []
    for number, layer in enumerate(decoder.layers[:depth]):

        def run(states: mx.array, *before: mx.array, layer: Any = layer) -> tuple[mx.array, ...]:
            queries, keys, values = _project(layer, states, block.branch_ids.shape, block.positions, rotary)
            keys = mx.contiguous(keys)  # a slice would keep the queries, rotated together with the keys, in memory
            mixed = attend(
                queries, *_behind(prefixes, before, keys, values), scale=layer.self_attn.scale, mask=mask
            )  # (B, H, L, W)
            return _finish_layer(layer, states, mixed), keys, values

        function = checkpointed(layer, run) if recompute else run
        hidden, keys, values = function(hidden, *_prefix_arrays(prefixes, number))
        layers.append((keys, values))
        if number < len(block.deepstack):
            hidden = hidden + block.deepstack[number]
    return hidden, layers


def run_step(
    decoder: Any,
    embeddings: mx.array,
    positions: mx.array,
    rotary: RotaryTables,
    caches: Sequence[LayerCache],
    mask: mx.array | str | None,
) -> mx.array:
    """Run embeddings (B, N, D) at positions (3, B, N) behind caches, and add to them; returns the states (B, N, D)."""
    shape = embeddings.shape
    states = embeddings.flatten(0, 1)  # (B * N, D): with two axes a product is one operation
    attend = _attention(embeddings.dtype, recompute=False)
    for layer, cache in zip(decoder.layers, caches, strict=True):
        queries, keys, values = _project(layer, states, shape[:2], positions, rotary)
        mixed = attend(queries, *cache.update_and_fetch(keys, values), scale=layer.self_attn.scale, mask=mask)
        states = _finish_layer(layer, states, mixed)
    normed: mx.array = decoder.norm(states)
    return normed.reshape(shape)  # (B, N, D)


def _run_last_layer(
    decoder: Any,
    block: Block,
    prefixes: Sequence[Prefix],
    recompute: bool,
    hidden: mx.array,
    last_positions: NDArray[np.int64],
) -> tuple[mx.array, KeysValues]:
    """The last layer: the states (B, D) of one column a row, and keys and values (B, K, L, W) of all columns."""
    number, rows = len(decoder.layers) - 1, np.arange(len(last_positions))
    layer, last = decoder.layers[number], (mx.array(rows), mx.array(last_positions))
    positions = block.positions[:, last[0], last[1]][..., None]  # (3, B, L) -> (3, B, 1)
    rotary = rotary_tables(decoder, block.embeddings, block.positions)
    last_rotary = rotary_tables(decoder, block.embeddings, positions)
    visible = np.where(np.arange(block.branch_ids.shape[1]) <= last_positions[:, None], block.branch_ids, PADDING)
    mask = attention_mask(
        np.concatenate([_prefix_branch_ids(block, prefixes), visible], axis=1),  # (B, S)
        block.branch_ids[rows, last_positions][:, None],  # (B, 1)
    )
    if isinstance(mask, mx.array):
        mask = mask[..., :-1]  # (B, 1, 1, S): the query's own column is among the visible ones

    def run(states: mx.array, *before: mx.array) -> tuple[mx.array, ...]:
        _, keys, values = _project(layer, states, block.branch_ids.shape, block.positions, rotary)
        keys = mx.contiguous(keys)
        state = states[last][:, None]  # (B, L, D) -> (B, 1, D)
        queries, _, _ = _project(layer, state, state.shape[:2], positions, last_rotary)
        whole = _behind(prefixes, before, keys, values)
        mixed = mx.fast.scaled_dot_product_attention(queries, *whole, scale=layer.self_attn.scale, mask=mask)
        return _finish_layer(layer, state, mixed)[:, 0], keys, values  # (B, 1, D) -> (B, D)

    function = checkpointed(layer, run) if recompute else run
    state, keys, values = function(hidden, *_prefix_arrays(prefixes, number))
    if number < len(block.deepstack):
        state = state + block.deepstack[number][last]
    return state, (keys, values)


def checkpointed(module: nn.Module, run: Callable[..., tuple[mx.array, ...]]) -> Callable[..., tuple[mx.array, ...]]:
    """`run`, a function that uses a module's weights, so that only its arguments are kept for the backward pass.

    Gradients reach the module's trainable weights and all arguments. The function runs again once the gradients of all
    its results exist. MLX's own checkpoint waits only for the forward pass, so recomputed arrays of several pieces of a
    block exist together: half as much memory again behind 1,168 tokens.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))
    names, count = list(weights), len(weights)

    def pure(*inputs: mx.array) -> tuple[mx.array, ...]:
        module.update(tree_unflatten(list(zip(names, inputs[:count], strict=True))))
        return run(*inputs[count:])

    def gradients(inputs: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        waiting = mx.depends(_as_list(inputs), _as_list(cotangents))
        return tuple(mx.vjp(pure, waiting, _as_list(cotangents))[1])

    function: Any = mx.custom_function(pure)
    function.vjp(gradients)

    def wrapped(*arguments: mx.array) -> tuple[mx.array, ...]:
        return function(*weights.values(), *arguments)  # type: ignore[no-any-return]

    return wrapped


def _as_list(arrays: Any) -> list[mx.array]:
    """MLX passes a single array bare."""
    return list(arrays) if isinstance(arrays, tuple | list) else [arrays]


def _concatenate(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)


def _prefix_branch_ids(block: Block, prefixes: Sequence[Prefix]) -> NDArray[np.int32]:
    """The branch ids of all prefixes for each row of a block, (B, S)."""
    none = np.zeros((len(block.branch_ids), 0), np.int32)
    return np.concatenate([none, *(prefix.branch_ids[prefix.rows] for prefix in prefixes)], axis=1)


def _prefix_arrays(prefixes: Sequence[Prefix], number: int) -> list[mx.array]:
    """The keys and values of the prefixes in one layer: keys, values, keys, values, ..."""
    return [array for prefix in prefixes for array in prefix.layers[number]]


def _behind(
    prefixes: Sequence[Prefix], before: Sequence[mx.array], keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array]:
    """Keys and values (B, K, L, W) behind those of the prefixes, in the order of `_prefix_arrays`: (B, K, S, W)."""
    all_keys = [expand_rows(array, prefix.rows) for array, prefix in zip(before[::2], prefixes, strict=True)]
    all_values = [expand_rows(array, prefix.rows) for array, prefix in zip(before[1::2], prefixes, strict=True)]
    return _concatenate([*all_keys, keys], axis=2), _concatenate([*all_values, values], axis=2)


def rotary_tables(decoder: Any, like: mx.array, positions: mx.array) -> RotaryTables:
    """The tables of positions (3, B, L), in the type of `like`."""
    rotary = decoder.layers[0].self_attn.rotary_emb
    return None if rotary.fused_apply else rotary(like, positions)


def _project(
    layer: Any, states: mx.array, shape: Sequence[int], positions: mx.array, rotary: RotaryTables
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries (B, H, L, W), keys and values (B, K, L, W) of a layer, rotated to positions (3, B, L).

    `states` are (B, L, D) or flattened (B * L, D); `shape` is (B, L).
    """
    attention, states = layer.self_attn, layer.input_layernorm(states)
    queries = attention.q_proj(states).reshape(*shape, attention.n_heads, -1)  # (B, L, H, W)
    keys = attention.k_proj(states).reshape(*shape, attention.n_kv_heads, -1)  # (B, L, K, W)
    values = attention.v_proj(states).reshape(*shape, attention.n_kv_heads, -1)  # (B, L, K, W)
    if "q_norm" in attention:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys, values = (part.swapaxes(1, 2) for part in (queries, keys, values))  # (B, heads, L, W)
    if rotary is None:
        queries, keys = attention.rotary_emb.apply_rotary(queries, keys, positions)
    else:
        both = _rotate(mx.concatenate([queries, keys], axis=1), *rotary)  # (B, H + K, L, W)
        queries, keys = both[:, : attention.n_heads], both[:, attention.n_heads :]
    return queries, keys, values


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The rotary embedding of x (B, heads, L, W), whose halves belong together, by angles (B, L, W)."""
    half = x.shape[-1] // 2
    swapped = mx.concatenate([-x[..., half:], x[..., :half]], axis=-1)  # (B, heads, L, W)
    return x * cos[:, None] + swapped * sin[:, None]


def _finish_layer(layer: Any, states: mx.array, mixed: mx.array) -> mx.array:
    """The rest of a layer after attention: states (B, L, D) or (B * L, D), and attention's result (B, H, L, W)."""
    mixed = mixed.swapaxes(1, 2).reshape(*states.shape[:-1], -1)  # (B, L, H, W) -> (B, L, H * W) or (B * L, H * W)
    states = states + layer.self_attn.o_proj(mixed)
    result: mx.array = states + layer.mlp(layer.post_attention_layernorm(states))
    return result


def _attention(dtype: mx.Dtype, recompute: bool) -> Any:
    """The attention function of a run.

    Without recomputing, plain attention keeps the softmax for the backward pass; the fused one computes it again. Half
    precision needs the fused one, as plain attention would round the scores.
    """
    keep_softmax = dtype == mx.float32 and not recompute
    return _plain_attention if keep_softmax else mx.fast.scaled_dot_product_attention


def _plain_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` with a backward pass that reuses the forward pass's softmax.

    Queries (B, H, L, W), keys and values (B, K, S, W), mask (B, 1, L, S) -> (B, H, L, W).
    """
    rows, heads, columns, _ = queries.shape
    grouped = (rows, keys.shape[1], heads // keys.shape[1] * columns, -1)  # (B, K, H / K * L, W or S)
    scores = (queries * scale).reshape(grouped) @ keys.swapaxes(-1, -2)  # (B, K, H / K * L, S)
    scores = scores.reshape(rows, heads, columns, -1)  # (B, H, L, S)
    if isinstance(mask, str):
        mask = mx.array(np.tri(columns, keys.shape[2], keys.shape[2] - columns, dtype=bool))  # (L, S)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    mixed = mx.softmax(scores, axis=-1).reshape(grouped) @ values  # (B, K, H / K * L, W)
    return mixed.reshape(queries.shape)  # (B, H, L, W)
