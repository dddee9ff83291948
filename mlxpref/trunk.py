"""The language model's layers one by one, so that each can be recomputed in the backward pass.

What a layer leaves for later, its keys and values, are outputs of the recomputed function: as a side effect on a cache
they would be cut off from the gradient, and recomputing would make it silently wrong. Prefix keys and values stay those
of P rows; only inside a layer are they repeated for the rows that share them, so that no more than one layer's copies
exist at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["Block", "KeysValues", "run_layers"]

KeysValues = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Block:
    """Rows that run through the layers together.

    `embeddings` (B, L, D), `positions` (3, B, L), `mask` what attention may see, `levels` (B, L, D) each: what is added
    after the first layers (deepstack).
    """

    embeddings: mx.array
    positions: mx.array
    mask: mx.array | str | None
    levels: Sequence[mx.array] = ()


class _Recorder:
    """The cache of one layer in one run: hands out the prefix before what is new, and keeps what is new."""

    offset = 0

    def __init__(self, prefix: KeysValues | None, group: int) -> None:
        self._prefix, self._group = prefix, group
        self.new: KeysValues | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self.new = keys, values
        if self._prefix is None:
            return keys, values
        before = [mx.repeat(part, self._group, axis=0) for part in self._prefix]
        return mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)


def run_layers(
    trunk: Any,
    block: Block,
    prefix: Sequence[KeysValues] | None = None,
    group: int = 1,
    recompute: bool = True,
) -> tuple[mx.array, list[KeysValues]]:
    """Run a block through all layers: the hidden states (B, L, D) and each layer's new keys and values.

    `prefix` are an earlier block's keys and values, of B / `group` rows; each of its rows stands before `group` rows of
    this block. `recompute` keeps only what enters each layer and makes the rest again in the backward pass.
    """
    rotary = trunk.layers[0].self_attn.rotary_emb
    # As mlx-vlm does it: on Metal each layer turns its own queries and keys in one kernel.
    turning = None if rotary.fused_apply else rotary(block.embeddings, block.positions)
    hidden, kept = block.embeddings, []
    for number, layer in enumerate(trunk.layers):

        def run(states: mx.array, *before: mx.array, layer: nn.Module = layer) -> tuple[mx.array, ...]:
            cache = _Recorder((before[0], before[1]) if before else None, group)
            out = layer(states, block.mask, cache, block.positions, turning)
            assert cache.new is not None
            return out, *cache.new

        through = nn.utils.checkpoint(layer, run) if recompute else run
        hidden, keys, values = through(hidden, *(prefix[number] if prefix else ()))
        kept.append((keys, values))
        if number < len(block.levels):
            hidden = hidden + block.levels[number]
    return trunk.norm(hidden), kept
