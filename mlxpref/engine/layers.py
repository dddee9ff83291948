"""What all kinds of layers share: blocks and the prefixes before them, and the interface of a kind of layer.

A layer of the language model first mixes tokens, and then changes each by itself. A `Mixer` is the first half of one
kind of layer, and knows what that kind remembers of a block: keys and values of all columns, or a state at its end.
The engine runs every model through this interface and asks nowhere which family it is of.

Axes: B rows, L columns of a block, N columns of a step, S columns that a block sees, P rows of a prefix, D width of a
hidden state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.engine.branched_cache import PADDING, BranchColumns, LayerCache, attention_mask
from mlxpref.engine.experts import Routing

Memory = tuple[mx.array, mx.array]
"""What a layer remembers of a block: keys and values (B, K, L, W) each, or the window and state at its end."""
RotaryTables = tuple[mx.array, mx.array] | None
"""Cosines and sines (B, L, R) for all layers. None on Metal, where one kernel a layer rotates, as in mlx-vlm."""


@dataclass(frozen=True)
class Block:
    """Rows that run through the layers together.

    `embeddings` (B, L, D); `positions` (3, B, L); `branch_ids` (B, L), see `BranchedCache`; `deepstack`, (B, L, D)
    each, is added after the first layers; `routing` gives its tokens their experts.
    """

    embeddings: mx.array
    positions: mx.array
    branch_ids: NDArray[np.int32]
    deepstack: Sequence[mx.array] = ()
    routing: Routing | None = None

    def columns(self, start: int, end: int) -> "Block":
        """The columns from `start` up to `end`."""
        part = slice(start, end)
        return Block(
            self.embeddings[:, part],
            self.positions[:, :, part],
            self.branch_ids[:, part],
            [level[:, part] for level in self.deepstack],
            self.routing and self.routing.columns(part),
        )


@dataclass(frozen=True, eq=False)
class Prefix:
    """An earlier block of P rows that later rows continue: its memory by layer, and its `branch_ids` (P, S).

    `rows` (B,) is the prefix row that each row of a later block continues; many may share one.
    """

    layers: Sequence[Memory]
    branch_ids: NDArray[np.int32]
    rows: NDArray[np.int64]

    def expanded(self, memory: Sequence[mx.array]) -> Memory:
        """The memory of one of its layers, for each row of a later block."""
        first, second = (expand_rows(array, self.rows) for array in memory)
        return first, second


def expand_rows(array: mx.array, rows: NDArray[np.int64]) -> mx.array:
    """Rows of an array by number, (P, ...) -> (B, ...); gradients add up over the copies of a row."""
    count = array.shape[0]
    copies = len(rows) // count
    if np.array_equal(rows, np.repeat(np.arange(count), copies)):
        return mx.repeat(array, copies, axis=0) if copies > 1 else array  # its gradient is a sum, not a scatter
    return array[mx.array(rows)]


@dataclass(frozen=True)
class BlockContext:
    """What the layers of a block share; each part is made when a layer first needs it.

    `recompute` says that the backward pass runs them again. `ends` (B,) is the one column of each row that the last
    layer returns.
    """

    decoder: Any
    block: Block
    prefixes: Sequence[Prefix]
    recompute: bool
    ends: NDArray[np.int64] | None = None

    @property
    def positions(self) -> mx.array:
        """The positions (3, B, L) of the block."""
        return self.block.positions

    @cached_property
    def rotary(self) -> RotaryTables:
        """The rotary tables of the block."""
        return rotary_tables(self.decoder, self.block.embeddings, self.positions)

    @cached_property
    def mask(self) -> mx.array | str | None:
        """The attention mask (B, 1, L, S) of the block behind its prefixes, or a shorthand for it."""
        return attention_mask(self._before, self.block.branch_ids)

    @cached_property
    def lengths(self) -> NDArray[np.int64] | None:
        """The columns (B,) of each row before its padding; None where no row has any."""
        filled = self.block.branch_ids != PADDING  # (B, L)
        return None if filled.all() else filled.sum(axis=1)

    @cached_property
    def last_columns(self) -> tuple[mx.array, mx.array]:
        """The rows and columns of the `ends`, (B,) each."""
        assert self.ends is not None
        return mx.arange(len(self.ends)), mx.array(self.ends)

    @cached_property
    def last_positions(self) -> mx.array:
        """The positions (3, B, 1) of the `ends`."""
        rows, columns = self.last_columns
        return self.positions[:, rows, columns][..., None]  # (3, B, L) -> (3, B, 1)

    @cached_property
    def last_rotary(self) -> RotaryTables:
        """The rotary tables of the `ends`."""
        return rotary_tables(self.decoder, self.block.embeddings, self.last_positions)

    @cached_property
    def last_mask(self) -> mx.array | str | None:
        """The attention mask (B, 1, 1, S) of the `ends`, or a shorthand for it."""
        ids, ends = self.block.branch_ids, self.ends
        assert ends is not None
        visible = np.where(np.arange(ids.shape[1]) <= ends[:, None], ids, PADDING)
        queries = ids[np.arange(len(ends)), ends][:, None]  # (B, 1)
        mask = attention_mask(np.concatenate([self._before, visible], axis=1), queries)
        # A query's own column is among the visible ones.
        return mask[..., :-1] if isinstance(mask, mx.array) else mask

    @property
    def _before(self) -> NDArray[np.int32]:
        """The branch ids of all prefixes for each row, (B, S)."""
        none = np.zeros((len(self.block.branch_ids), 0), np.int32)
        return np.concatenate([none, *(prefix.branch_ids[prefix.rows] for prefix in self.prefixes)], axis=1)


@dataclass(frozen=True)
class StepContext:
    """What the layers of a decoding step share: positions (3, B, N), rotary tables, attention mask, branches' columns.

    `columns` is None where each branch has one column, in the order of the cache's branches. `experts`
    receives those of the step's tokens, (B * N, K) for each layer with experts.
    """

    positions: mx.array
    rotary: RotaryTables
    mask: mx.array | str | None
    columns: BranchColumns | None
    experts: list[mx.array] | None


class Mixer(Protocol):
    """The first half of one kind of layer: how it mixes tokens, and what it remembers of them."""

    def seen(self, prefixes: Sequence[Prefix]) -> Sequence[Prefix]:
        """The prefixes whose memory a block needs, in their order."""

    def mix(
        self, layer: Any, states: mx.array, context: BlockContext, before: Sequence[Memory]
    ) -> tuple[mx.array, Memory]:
        """What the layer adds to the states (B, L, D) of a block, and what it remembers of the block.

        `before` are the memories of the `seen` prefixes for each row.
        """

    def mix_last(
        self, layer: Any, states: mx.array, context: BlockContext, before: Sequence[Memory]
    ) -> tuple[mx.array, Memory]:
        """`mix` for one column of each row, `context.ends`: (B, 1, D), and the memory of the whole block."""

    def step(self, layer: Any, states: mx.array, context: StepContext, cache: Any) -> mx.array:
        """What the layer adds to the states (B * N, D) of a step behind its cache; the cache then has the step."""

    def join(self, parts: Sequence[Memory]) -> Memory:
        """The memory of blocks that follow each other in the same rows."""

    def one_row(self, memory: Memory, row: int, length: int) -> Memory:
        """A copy of the memory of one row that has `length` columns."""

    def stack_rows(self, rows: Sequence[Memory]) -> Memory:
        """The memories of one row each as that of a batch."""

    def cache(self, memory: Memory) -> LayerCache:
        """A cache that begins with a memory."""


def normalize(norm: Any, states: mx.array) -> mx.array:
    """A norm of states in their own type, whatever type its weights have."""
    result: mx.array = norm(states)
    return result.astype(states.dtype)


def rotary_tables(decoder: Any, like: mx.array, positions: mx.array) -> RotaryTables:
    """The rotary tables of positions (3, B, L), in the type of `like`."""
    rotary = next(layer.self_attn.rotary_emb for layer in decoder.layers if "self_attn" in layer)
    return None if rotary.fused_apply else rotary(like, positions)
