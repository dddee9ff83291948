"""Attention layers: what they do with a block or a decoding step, and the keys and values that they remember.

Axes: B rows, L columns of a block, S columns that it sees, D width of a hidden state, H heads of queries, K heads of
keys and values, W width of a head, R of these numbers that rotate.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.engine.branched_cache import KeyValueCache
from mlxpref.engine.layers import BlockContext, Memory, Prefix, RotaryTables, StepContext, normalize


class Attention:
    """Layers with keys and values: a `Mixer` whose memory are those of a block, (B, K, L, W) each."""

    def seen(self, prefixes: Sequence[Prefix]) -> Sequence[Prefix]:
        """The prefixes that a block sees: all of them."""
        return prefixes

    def mix(
        self, layer: Any, states: mx.array, context: BlockContext, before: Sequence[Memory]
    ) -> tuple[mx.array, Memory]:
        """What attention adds to the states (B, L, D) of a block, and the block's keys and values."""
        attention = layer.self_attn
        states = normalize(layer.input_layernorm, states)
        queries, keys, values, gate = _project(attention, states, context.positions, context.rotary)
        keys = mx.contiguous(keys)  # a slice would keep the queries, rotated together with the keys, in memory
        attend = _attention(states.dtype, context.recompute)
        mixed = attend(queries, *self.join([*before, (keys, values)]), scale=attention.scale, mask=context.mask)
        return _output(attention, mixed, gate, states.shape), (keys, values)

    def mix_last(
        self, layer: Any, states: mx.array, context: BlockContext, before: Sequence[Memory]
    ) -> tuple[mx.array, Memory]:
        """`mix` for one column of each row, `context.ends`: (B, 1, D), and all keys and values."""
        attention, last = layer.self_attn, context.last_columns
        states = normalize(layer.input_layernorm, states)
        _, keys, values, _ = _project(attention, states, context.positions, context.rotary)
        keys = mx.contiguous(keys)
        state = states[last][:, None]  # (B, L, D) -> (B, 1, D)
        queries, _, _, gate = _project(attention, state, context.last_positions, context.last_rotary)
        whole = self.join([*before, (keys, values)])
        mixed = mx.fast.scaled_dot_product_attention(queries, *whole, scale=attention.scale, mask=context.last_mask)
        return _output(attention, mixed, gate, state.shape), (keys, values)

    def step(self, layer: Any, states: mx.array, context: StepContext, cache: KeyValueCache) -> mx.array:
        """What attention adds to the states (B * N, D) of a step behind a cache, to which it adds the step's own."""
        attention = layer.self_attn
        # With two axes a product is one operation.
        normed = normalize(layer.input_layernorm, states)
        queries, keys, values, gate = _project(attention, normed, context.positions, context.rotary)
        attend = _attention(states.dtype, recompute=False)
        keys, values = cache.update_and_fetch(keys, values)
        mixed = attend(queries, keys, values, scale=attention.scale, mask=context.mask)
        return _output(attention, mixed, gate, states.shape)

    def join(self, parts: Sequence[Memory]) -> Memory:
        """The memory of blocks that follow each other: (B, K, S, W) each."""
        keys, values = zip(*parts, strict=True)
        return _concatenate(keys), _concatenate(values)

    def one_row(self, memory: Memory, row: int, length: int) -> Memory:
        """A copy of one row, (1, K, `length`, W) each: a slice would keep the whole batch in memory."""
        keys, values = (mx.contiguous(array[row : row + 1, :, :length]) for array in memory)
        return keys, values

    def stack_rows(self, rows: Sequence[Memory]) -> Memory:
        """Rows of one each as a batch, padded on the right to the longest."""
        columns = max(keys.shape[2] for keys, _ in rows)

        def padded(array: mx.array) -> mx.array:
            return mx.pad(array, [(0, 0), (0, 0), (0, columns - array.shape[2]), (0, 0)])

        keys, values = (mx.concatenate([padded(row[part]) for row in rows]) for part in (0, 1))
        return keys, values

    def cache(self, memory: Memory) -> KeyValueCache:
        """A cache that begins with a memory."""
        cache = KeyValueCache()
        cache.update_and_fetch(*memory)
        return cache


def _project(
    attention: Any, states: mx.array, positions: mx.array, rotary: RotaryTables
) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """Queries (B, H, L, W), keys and values (B, K, L, W), rotated to positions (3, B, L), and the output's gate.

    `states` are (B, L, D) or flattened (B * L, D). The gate (..., H * W) is None unless the queries'
    projection is twice as wide as they are, as in Qwen3.5.
    """
    shape, width = positions.shape[1:], attention.head_dim  # (B, L), W
    heads = getattr(attention, "n_heads", None) or attention.num_attention_heads
    queries, gate = attention.q_proj(states).reshape(*shape, heads, -1), None  # (B, L, H, W or 2 * W)
    if queries.shape[-1] == 2 * width:  # of each head the query, and then its gate
        queries, gate = queries[..., :width], queries[..., width:].reshape(*states.shape[:-1], -1)
    keys = attention.k_proj(states).reshape(*shape, -1, width)  # (B, L, K, W)
    values = attention.v_proj(states).reshape(*shape, -1, width)  # (B, L, K, W)
    if "q_norm" in attention:
        queries, keys = normalize(attention.q_norm, queries), normalize(attention.k_norm, keys)
    queries, keys, values = (part.swapaxes(1, 2) for part in (queries, keys, values))  # (B, heads, L, W)
    if rotary is None:
        queries, keys = attention.rotary_emb.apply_rotary(queries, keys, positions)
    else:
        both = _rotate(mx.concatenate([queries, keys], axis=1), *rotary)  # (B, H + K, L, W)
        queries, keys = both[:, :heads], both[:, heads:]
    return queries, keys, values, gate


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The rotary embedding of x (B, heads, L, W) by angles (B, L, R): of the first R numbers, whose halves pair up."""
    size = cos.shape[-1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    turned = x[..., :size] * cos[:, None] + mx.concatenate([-second, first], axis=-1) * sin[:, None]
    return turned if size == x.shape[-1] else mx.concatenate([turned, x[..., size:]], axis=-1)


def _output(attention: Any, mixed: mx.array, gate: mx.array | None, shape: Sequence[int]) -> mx.array:
    """What attention's result (B, H, L, W) adds to states of a shape, (B, L, D) or (B * L, D)."""
    mixed = mixed.swapaxes(1, 2).reshape(*shape[:-1], -1)  # (B, L, H, W) -> (B, L, H * W) or (B * L, H * W)
    result: mx.array = attention.o_proj(mixed if gate is None else mixed * mx.sigmoid(gate))
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


def _concatenate(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=2)
