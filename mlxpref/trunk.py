"""The language model's layers one by one, so that each can be recomputed in the backward pass.

What a layer leaves for later, its keys and values, are outputs of the recomputed function: as a side effect on a cache
they would be cut off from the gradient, and recomputing would make it silently wrong. What stands before a block, its
stems, keeps its own rows; only inside a layer are they repeated for the rows that share them, so that no more than one
layer's copies exist at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxpref.prefix import mask_behind

__all__ = ["Block", "KeysValues", "Stem", "run_block", "run_layers", "spread"]

_PIECE = 512
"""Columns that run through the layers together: as many keep a GPU busy, and what one of them may not see of the later
pieces is never computed, nor do all its scores exist at once."""

KeysValues = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Block:
    """Rows that run through the layers together.

    `embeddings` (B, L, D), `positions` (3, B, L), `owners` (B, L) whose its columns are (see `RowCache`), `levels`
    (B, L, D) each: what is added after the first layers (deepstack).
    """

    embeddings: mx.array
    positions: mx.array
    owners: NDArray[np.int32]
    levels: Sequence[mx.array] = ()

    def columns(self, start: int, end: int) -> "Block":
        """Some columns of it."""
        part = slice(start, end)
        return Block(
            self.embeddings[:, part],
            self.positions[:, :, part],
            self.owners[:, part],
            [level[:, part] for level in self.levels],
        )


@dataclass(frozen=True)
class Stem:
    """Keys and values of an earlier block by layer, and whose its columns are.

    `rows` (B,) says which of its rows each row of a later block goes on; many may share one.
    """

    layers: Sequence[KeysValues]
    owners: NDArray[np.int32]
    rows: NDArray[np.int64]


def spread(part: mx.array, rows: NDArray[np.int64]) -> mx.array:
    """Rows of an array (P, ...) by number: (B, ...); gradients add up over a row's copies."""
    count = part.shape[0]
    group = len(rows) // count
    if np.array_equal(rows, np.repeat(np.arange(count), group)):
        return mx.repeat(part, group, axis=0) if group > 1 else part  # its gradient is a sum, not a scatter
    return part[mx.array(rows)]


def run_block(
    trunk: Any, block: Block, stems: Sequence[Stem] = (), recompute: bool = True
) -> tuple[mx.array, list[KeysValues]]:
    """Run a block through all layers: the hidden states (B, L, D) and each layer's new keys and values.

    `stems` stand before it, outermost first. `recompute` keeps only what enters each layer and makes the rest again in
    the backward pass. A long block runs in pieces, each behind those before it.
    """
    rows, columns = block.owners.shape
    states: list[mx.array] = []
    pieces: list[Stem] = []
    for start in range(0, columns, _PIECE):
        piece = block.columns(start, start + _PIECE) if columns > _PIECE else block
        hidden, kept = run_layers(trunk, piece, [*stems, *pieces], recompute)
        states.append(hidden)
        pieces.append(Stem(kept, piece.owners, np.arange(rows)))
    if len(pieces) == 1:
        return states[0], list(pieces[0].layers)
    joined = [
        (mx.concatenate([keys for keys, _ in layer], axis=2), mx.concatenate([values for _, values in layer], axis=2))
        for layer in zip(*(piece.layers for piece in pieces), strict=True)
    ]
    return mx.concatenate(states, axis=1), joined


def run_layers(trunk: Any, block: Block, stems: Sequence[Stem], recompute: bool) -> tuple[mx.array, list[KeysValues]]:
    """As `run_block`, all columns at once."""
    rotary = trunk.layers[0].self_attn.rotary_emb
    # As mlx-vlm does it: on Metal each layer turns its own queries and keys in one kernel.
    turning = None if rotary.fused_apply else rotary(block.embeddings, block.positions)
    past = [np.zeros((len(block.owners), 0), np.int32), *(stem.owners[stem.rows] for stem in stems)]
    mask = mask_behind(np.concatenate(past, axis=1), block.owners)
    # Where activations are kept for the backward pass, so is softmax: the fused attention makes it again. Not in half
    # precision, in which scores outside of the fused attention would be rounded.
    attend: Any = (
        _attend if block.embeddings.dtype == mx.float32 and not recompute else mx.fast.scaled_dot_product_attention
    )
    hidden, kept = block.embeddings, []
    for number, layer in enumerate(trunk.layers):

        def run(states: mx.array, *parts: mx.array, layer: Any = layer) -> tuple[mx.array, ...]:
            queries, keys, values = _projected(layer, states, block.positions, turning)
            seen = [[spread(part, stem.rows) for part, stem in zip(parts[i::2], stems, strict=True)] for i in (0, 1)]
            whole = [mx.concatenate([*before, new], axis=2) for before, new in zip(seen, (keys, values), strict=True)]
            mixed = attend(queries, *whole, scale=layer.self_attn.scale, mask=mask)
            states = states + layer.self_attn.o_proj(mixed.swapaxes(1, 2).flatten(2))
            return states + layer.mlp(layer.post_attention_layernorm(states)), keys, values

        through = nn.utils.checkpoint(layer, run) if recompute else run
        hidden, keys, values = through(hidden, *(part for stem in stems for part in stem.layers[number]))
        kept.append((keys, values))
        if number < len(block.levels):
            hidden = hidden + block.levels[number]
    return trunk.norm(hidden), kept


def _projected(
    layer: Any, states: mx.array, positions: mx.array, turning: tuple[mx.array, mx.array] | None
) -> tuple[mx.array, mx.array, mx.array]:
    """A layer's queries, keys and values (B, heads, L, width), turned to their positions."""
    attention, states = layer.self_attn, layer.input_layernorm(states)
    queries, keys, values = (
        projection(states).reshape(*states.shape[:2], heads, -1)
        for projection, heads in (
            (attention.q_proj, attention.n_heads),
            (attention.k_proj, attention.n_kv_heads),
            (attention.v_proj, attention.n_kv_heads),
        )
    )
    if "q_norm" in attention:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys, values = (part.swapaxes(1, 2) for part in (queries, keys, values))
    if turning is None:
        queries, keys = attention.rotary_emb.apply_rotary(queries, keys, positions)
    else:
        queries, keys = _turned(queries, *turning), _turned(keys, *turning)
    return queries, keys, values


def _turned(part: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The rotary embedding (B, heads, L, width) of halves that belong together, by angles (B, L, width)."""
    half = part.shape[-1] // 2
    swapped = mx.concatenate([-part[..., half:], part[..., :half]], axis=-1)
    return part * cos[:, None] + swapped * sin[:, None]


def _attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, whose backward pass finds the softmax that the forward pass made."""
    rows, heads, columns, _ = queries.shape
    grouped = (rows, keys.shape[1], heads // keys.shape[1] * columns, -1)
    scores = (queries * scale).reshape(grouped) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(rows, heads, columns, -1)
    if isinstance(mask, str):
        mask = mx.array(np.tri(columns, keys.shape[2], keys.shape[2] - columns, dtype=bool))
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1).reshape(grouped) @ values).reshape(queries.shape)
