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


class _Recorder:
    """The cache of one layer in one run: hands out the stems before what is new, and keeps what is new."""

    offset = 0

    def __init__(self, before: Sequence[KeysValues]) -> None:
        self._before = before
        self.new: KeysValues | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self.new = keys, values
        if not self._before:
            return keys, values
        return (
            mx.concatenate([*(part[0] for part in self._before), keys], axis=2),
            mx.concatenate([*(part[1] for part in self._before), values], axis=2),
        )


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
    hidden, kept = block.embeddings, []
    for number, layer in enumerate(trunk.layers):

        def run(states: mx.array, *parts: mx.array, layer: nn.Module = layer) -> tuple[mx.array, ...]:
            pairs = zip(parts[::2], parts[1::2], stems, strict=True)
            cache = _Recorder([(spread(keys, stem.rows), spread(values, stem.rows)) for keys, values, stem in pairs])
            out = layer(states, mask, cache, block.positions, turning)
            assert cache.new is not None
            return out, *cache.new

        through = nn.utils.checkpoint(layer, run) if recompute else run
        hidden, keys, values = through(hidden, *(part for stem in stems for part in stem.layers[number]))
        kept.append((keys, values))
        if number < len(block.levels):
            hidden = hidden + block.levels[number]
    return trunk.norm(hidden), kept
