"""Recurrent layers (gated delta networks): a short convolution, and a state that learns and forgets at every token.

A state is a whole: it can be neither shared nor masked afterwards, so each branch has its own, and padding must not
change it. Computed in float32, as transformers does: a decay near 1 has no room in half precision.

Axes: R rows (of a block, or the branches of all rows in a step), L columns, N columns of a step in B rows, D width of a
hidden state, E width before the convolution, F columns of its window, J heads of keys, H heads of values, K width of a
key, W width of a value.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxpref.engine.branched_cache import BranchColumns, StateCache
from mlxpref.engine.gated_delta import gated_delta
from mlxpref.engine.layers import BlockContext, Memory, Prefix, StepContext, normalize

_EPSILON = 1e-6
"""What is added to the squared length of queries and keys before the root."""


class GatedDelta:
    """Layers with a state: a `Mixer` whose memory is a window (B, F, E) and a state (B, H, W, K) in float32."""

    def seen(self, prefixes: Sequence[Prefix]) -> Sequence[Prefix]:
        """The prefixes that a block sees: the state after the last one holds all of them."""
        return prefixes[-1:]

    def mix(
        self, layer: Any, states: mx.array, context: BlockContext, before: Sequence[Memory]
    ) -> tuple[mx.array, Memory]:
        """What the layer adds to the states (B, L, D) of a block, and window and state after it."""
        module, flat = layer.linear_attn, normalize(layer.input_layernorm, states).flatten(0, 1)  # (B * L, D)
        memory = before[0] if before else _empty(module, states)
        mixed, memory = _run(module, flat, memory, context.lengths)
        return mixed.reshape(states.shape), memory

    def mix_last(
        self, layer: Any, states: mx.array, context: BlockContext, before: Sequence[Memory]
    ) -> tuple[mx.array, Memory]:
        """`mix` for one column of each row, `context.ends`: (B, 1, D)."""
        mixed, memory = self.mix(layer, states, context, before)
        return mixed[context.last_columns][:, None], memory

    def step(self, layer: Any, states: mx.array, context: StepContext, cache: StateCache) -> mx.array:
        """What the layer adds to the states (B * N, D) of a step, each branch behind its own state."""
        columns, lengths = context.columns, None
        if columns is not None:
            states, lengths = _by_branch(states, columns), columns.lengths  # (B * M * C, D)
        states = normalize(layer.input_layernorm, states)
        mixed, (cache.window, cache.state) = _run(layer.linear_attn, states, (cache.window, cache.state), lengths)
        return mixed if columns is None else _by_column(mixed, columns)

    def join(self, parts: Sequence[Memory]) -> Memory:
        """The memory of blocks that follow each other: that after the last."""
        return parts[-1]

    def one_row(self, memory: Memory, row: int, length: int) -> Memory:
        """A copy of one row."""
        window, state = (mx.contiguous(array[row : row + 1]) for array in memory)
        return window, state

    def stack_rows(self, rows: Sequence[Memory]) -> Memory:
        """Rows of one each as a batch."""
        windows, states = zip(*rows, strict=True)
        return mx.concatenate(list(windows)), mx.concatenate(list(states))

    def cache(self, memory: Memory) -> StateCache:
        """A cache that begins with a memory."""
        return StateCache(*memory)


def _empty(module: Any, states: mx.array) -> Memory:
    """The window and the state before anything was read."""
    rows = states.shape[0]
    window = mx.zeros((rows, module.conv_kernel_size - 1, module.conv_dim), states.dtype)
    return window, mx.zeros((rows, module.num_v_heads, module.head_v_dim, module.head_k_dim))


def _run(module: Any, states: mx.array, memory: Memory, lengths: NDArray[np.int64] | None) -> tuple[mx.array, Memory]:
    """What a layer makes of normed states (R * L, D) behind a memory, and the memory after them.

    `lengths` (R,) are the columns before padding, None for all L. The states have two axes, with which a product is one
    operation.
    """
    window, state = memory
    rows, columns = len(state), len(states) // len(state)
    read = mx.concatenate([window, module.in_proj_qkv(states).reshape(rows, columns, -1)], axis=1)  # (R, F + L, E)
    convolved = nn.silu(_convolve(module.conv1d.weight, read, columns))  # (R, L, E)
    values = convolved[..., 2 * module.key_dim :].reshape(rows, columns, module.num_v_heads, -1)  # (R, L, H, W)
    both = convolved[..., : 2 * module.key_dim].reshape(rows, columns, 2, module.num_k_heads, -1)  # (R, L, 2, J, K)
    both = _unit(both)
    queries, keys = both[:, :, 0] * module.head_k_dim**-0.5, both[:, :, 1]  # (R, L, J, K)
    rate = nn.softplus(module.in_proj_a(states).astype(mx.float32) + module.dt_bias)
    decay = (-mx.exp(module.A_log.astype(mx.float32)) * rate).reshape(rows, columns, -1)  # (R, L, H)
    beta = mx.sigmoid(module.in_proj_b(states).astype(mx.float32)).reshape(rows, columns, -1)  # (R, L, H)
    if lengths is not None:
        filled = mx.array(np.arange(columns) < lengths[:, None])[..., None]  # (R, L, 1)
        decay, beta = mx.where(filled, decay, 0), mx.where(filled, beta, 0)
    outputs, state = gated_delta(queries, keys, values, decay, beta, state)  # (R, L, H, W)
    gate = module.in_proj_z(states).reshape(outputs.shape).astype(mx.float32)
    gated = normalize(module.norm, outputs) * nn.silu(gate)
    mixed: mx.array = module.out_proj(gated.reshape(len(states), -1).astype(states.dtype))  # (R * L, D)
    return mixed, (_last_columns(read, columns, lengths), state)


def _convolve(weight: mx.array, read: mx.array, columns: int) -> mx.array:
    """The convolution (R, L, E) of each channel over time, in float32, by a weight (E, F + 1, 1)."""
    taps = weight[..., 0].astype(mx.float32)  # (E, F + 1)
    read = read.astype(mx.float32)
    if columns == 1:
        return (read * taps.T).sum(axis=1, keepdims=True)  # (R, F + 1, E) -> (R, 1, E)
    total = read[:, :columns] * taps[:, 0]
    for tap in range(1, taps.shape[1]):
        total = total + read[:, tap : tap + columns] * taps[:, tap]
    return total


def _unit(vectors: mx.array) -> mx.array:
    """Vectors (..., K) over their lengths."""
    return vectors * mx.rsqrt((vectors * vectors).sum(axis=-1, keepdims=True) + _EPSILON)


def _last_columns(read: mx.array, columns: int, lengths: NDArray[np.int64] | None) -> mx.array:
    """The window (R, F, E) after the columns before padding, of what was read (R, F + L, E)."""
    width = read.shape[1] - columns
    if lengths is None:
        return mx.contiguous(read[:, columns:])
    index = mx.array(lengths[:, None] + np.arange(width))[..., None]  # (R, F, 1)
    return mx.take_along_axis(read, index, axis=1)


def _by_branch(states: mx.array, columns: BranchColumns) -> mx.array:
    """States (B * N, D) of a step as those of its branches (B * M * C, D)."""
    states = states.reshape(len(columns.index), -1, states.shape[-1])  # (B, N, D)
    return mx.take_along_axis(states, columns.index[..., None], axis=1).flatten(0, 1)  # (B, M * C, D)


def _by_column(states: mx.array, columns: BranchColumns) -> mx.array:
    """States of branches (B * M * C, D) as those of the step's columns (B * N, D)."""
    states = states.reshape(len(columns.back), -1, states.shape[-1])  # (B, M * C, D)
    return mx.take_along_axis(states, columns.back[..., None], axis=1).flatten(0, 1)  # (B, N, D)
