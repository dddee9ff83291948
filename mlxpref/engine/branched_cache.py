"""What layers remember of rows that share a forward pass, and the branch of each column.

This file alone handles padding, branches and order; the models' own state and positions play no role. Axes: B rows, M
branches of a row, N columns of a block, S columns so far, K heads of keys and values, W width of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds

SHARED, PADDING = -1, -2
"""Columns that all branches of a row see, and that none sees; a branch's own columns have its number, from 0 on."""
_CROWDED = 0.75
"""Above this share of columns in use the others stay."""


class LayerCache(Protocol):
    """What one layer remembers of the rows and branches of a `BranchedCache`."""

    @property
    def arrays(self) -> Sequence[mx.array]:
        """All that it holds."""

    def reserve(self, capacity: int) -> None:
        """Prepare for growth to a number of columns."""

    def begin_branches(self, count: int) -> None:
        """Prepare for `count` branches of each row."""

    def select_rows(self, rows: NDArray[np.int64], branches: int) -> None:
        """Keep these rows only, in this order; each has so many branches."""

    def keep_columns(self, columns: NDArray[np.int64]) -> None:
        """Keep these columns (B, count) of each row only."""

    def keep_branches(self, places: NDArray[np.int64], branches: int) -> None:
        """Keep the branches at these places (B, M) of each row only, of the `branches` that there were."""


class KeyValueCache:
    """Keys and values of one layer, (B, K, S, W) each, of all branches in their row."""

    def __init__(self) -> None:
        self.capacity = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    @property
    def arrays(self) -> Sequence[mx.array]:
        """Keys and values."""
        return [array for array in (self.keys, self.values) if array is not None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values (B, K, N, W) of a block, and return those of all columns (B, K, S, W)."""
        start, end = self.offset, self.offset + keys.shape[2]
        self.offset = end
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
            return keys, values
        if end > self.keys.shape[2]:
            columns = max(end, self.capacity) - start
            self.keys, self.values = _grow(self.keys[:, :, :start], columns), _grow(self.values[:, :, :start], columns)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, capacity: int) -> None:
        """Grow to this many columns the next time there is no room."""
        self.capacity = capacity

    def begin_branches(self, count: int) -> None:
        """All branches of a row see the same columns, so nothing changes."""

    def select_rows(self, rows: NDArray[np.int64], branches: int) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows)
        self._replace(lambda array: array[index])  # (old B, K, S, W) -> (new B, K, S, W)

    def keep_columns(self, columns: NDArray[np.int64]) -> None:
        """Keep these columns (B, count) of each row only."""
        index = mx.array(columns)[:, None, :, None]  # (B, 1, count, 1)
        self._replace(lambda array: mx.take_along_axis(array, index, axis=2))  # (B, K, count, W)

    def keep_branches(self, places: NDArray[np.int64], branches: int) -> None:
        """The columns of other branches are masked, so nothing changes."""

    def _replace(self, function: Callable[[mx.array], mx.array]) -> None:
        """Replace keys and values by a function of the filled columns."""
        if self.keys is not None and self.values is not None:
            self.keys = function(self.keys[:, :, : self.offset])
            self.values = function(self.values[:, :, : self.offset])
            self.offset = self.keys.shape[2]


class StateCache:
    """The state of one recurrent layer, which cannot be shared or masked: one for each branch of each row.

    `window` (B * M, ...) are the last columns before its convolution, `state` (B * M, ...) is what it remembers; there
    are M branches in a row, branch by branch, or one until they begin.
    """

    def __init__(self, window: mx.array, state: mx.array) -> None:
        self.window, self.state = window, state

    @property
    def arrays(self) -> Sequence[mx.array]:
        """Window and state."""
        return [self.window, self.state]

    def reserve(self, capacity: int) -> None:
        """A state does not grow."""

    def begin_branches(self, count: int) -> None:
        """Copy the state of each row to its branches."""
        self._replace(lambda array: mx.repeat(array, count, axis=0))  # (B, ...) -> (B * M, ...)

    def select_rows(self, rows: NDArray[np.int64], branches: int) -> None:
        """Keep these rows only, with their branches, in this order."""
        self._select((rows[:, None] * branches + np.arange(branches)).reshape(-1))  # (B, M) -> (B * M,)

    def keep_columns(self, columns: NDArray[np.int64]) -> None:
        """A state has no columns."""

    def keep_branches(self, places: NDArray[np.int64], branches: int) -> None:
        """Keep the branches at these places (B, new M) only, of `branches` in a row."""
        self._select((np.arange(len(places))[:, None] * branches + places).reshape(-1))  # (B, new M) -> (B * new M,)

    def _select(self, index: NDArray[np.int64]) -> None:
        chosen = mx.array(index)
        self._replace(lambda array: array[chosen])

    def _replace(self, function: Callable[[mx.array], mx.array]) -> None:
        self.window, self.state = function(self.window), function(self.state)


@dataclass(frozen=True)
class BranchColumns:
    """The columns of a block by branch, where these are not one of each in their order.

    `index` (B, M * C) are the columns of the branches, C for each, `lengths` (B * M,) how many of them there are;
    `back` (B, N) is where each column of the block is among these.
    """

    index: mx.array
    lengths: NDArray[np.int64]
    back: mx.array

    @classmethod
    def of(cls, block: NDArray[np.int32], branches: NDArray[np.int32]) -> "BranchColumns | None":
        """The columns of a block with ids (B, N) by branches (B, M); None for one of each in their order."""
        if np.array_equal(block, branches):
            return None
        own = (block[:, None] == branches[..., None]) & (branches[..., None] != PADDING)  # (B, M, N)
        lengths = own.sum(axis=-1)  # (B, M)
        order = np.argsort(~own, axis=-1, kind="stable")[..., : max(1, int(lengths.max()))]  # (B, M, C)
        place = np.cumsum(own, axis=-1) - 1 + np.arange(own.shape[1])[:, None] * order.shape[-1]  # (B, M, N)
        back = np.where(own, place, 0).max(axis=1)  # (B, N)
        return cls(mx.array(order.reshape(len(block), -1)), lengths.reshape(-1), mx.array(back))


class BranchedCache:
    """What all layers remember of B rows, and the branch that each column belongs to.

    A row is a comparison and the branches that continue it, for instance the completions of a group. A branch sees the
    shared columns before it and its own: the comparison's keys and values are stored once for all its branches. Rows of
    different lengths are right-padded. `branch_ids` (B, S) holds the branch, SHARED or PADDING; `branches` (B, M) are
    those that began, in the order of their states, PADDING where a row has fewer.
    """

    def __init__(self, branch_ids: NDArray[np.int32], layers: Sequence[LayerCache]) -> None:
        self.branch_ids, self.layers = branch_ids, list(layers)
        self.branches: NDArray[np.int32] = np.zeros((len(branch_ids), 0), np.int32)
        self.columns: BranchColumns | None = None
        self._mask: mx.array | str | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """All that the layers hold."""
        return [array for layer in self.layers for array in layer.arrays]

    def begin_branches(self, branches: NDArray[np.int32]) -> None:
        """Let these branches (B, M) begin; before that no block can continue them."""
        self.branches = branches
        for layer in self.layers:
            layer.begin_branches(branches.shape[1])

    def reserve(self, branch_ids: NDArray[np.int32], steps: int = 1) -> None:
        """Prepare for a block with these branch ids (B, N), before it runs; `steps` such blocks follow each other.

        Several steps need blocks in which no branch has two columns.
        """
        self._mask = attention_mask(self.branch_ids, branch_ids, steps)
        self.columns = BranchColumns.of(branch_ids, self.branches)
        self.branch_ids = np.concatenate([self.branch_ids, *[branch_ids] * steps], axis=1)  # (B, S)
        for layer in self.layers:
            layer.reserve(self.branch_ids.shape[1] + bounds.RUNS_AHEAD * steps * branch_ids.shape[1])

    def next_mask(self, columns: int) -> mx.array | str | None:
        """The next block's attention mask: (B, 1, columns, S), or a shorthand for it."""
        if isinstance(self._mask, mx.array):
            filled = next(layer.offset for layer in self.layers if isinstance(layer, KeyValueCache))
            return self._mask[..., : filled + columns]
        return self._mask

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        index = np.asarray(rows, np.int64)
        for layer in self.layers:
            layer.select_rows(index, max(1, self.branches.shape[1]))
        self.branch_ids, self.branches = self.branch_ids[index], self.branches[index]

    def drop_branches(self, live: Sequence[set[int]]) -> None:
        """Keep the live branches (one set a row), and the columns that one of these sees.

        Columns that none sees stay until enough become free.
        """
        self._keep_branches(live)
        rows = zip(self.branch_ids, live, strict=True)
        visible = np.stack([np.isin(ids, [SHARED, *branches]) for ids, branches in rows])  # (B, S)
        count = int(visible.sum(axis=1).max(initial=0))
        if count > _CROWDED * visible.shape[1]:
            return
        order = np.argsort(~visible, axis=1, kind="stable")[:, :count]  # (B, count)
        ids = np.take_along_axis(self.branch_ids, order, axis=1)
        self.branch_ids = np.where(np.take_along_axis(visible, order, axis=1), ids, PADDING).astype(np.int32)
        for layer in self.layers:
            layer.keep_columns(order)

    def _keep_branches(self, live: Sequence[set[int]]) -> None:
        """Keep the states of the live branches."""
        before = self.branches.shape[1]
        kept = [
            [i for i, branch in enumerate(row) if branch in own] for row, own in zip(self.branches, live, strict=True)
        ]
        count = max(map(len, kept))
        if count == before:
            return
        places = np.array([row + [0] * (count - len(row)) for row in kept], np.int64)  # (B, count)
        is_kept = np.arange(count) < np.array([[len(row)] for row in kept])  # (B, count)
        branches = np.take_along_axis(self.branches, places, axis=1)
        self.branches = np.where(is_kept, branches, PADDING).astype(np.int32)
        for layer in self.layers:
            layer.keep_branches(places, before)


def row_branch_ids(lengths: Sequence[int], columns: int) -> NDArray[np.int32]:
    """The branch ids (B, `columns`) of right-padded rows: shared as far as a row's length reaches."""
    filled = np.arange(columns)[None] < np.asarray(lengths)[:, None]  # (1, columns) < (B, 1)
    return np.where(filled, SHARED, PADDING).astype(np.int32)


def attention_mask(past: NDArray[np.int32], block: NDArray[np.int32], steps: int = 1) -> mx.array | str | None:
    """The mask of a block with branch ids (B, N), over the columns before it with theirs (B, past) and its own.

    Returns (B, 1, N, past + N), "causal", or None if all is visible. For `steps` such blocks in a row it is the mask of
    the last; the masks of the earlier ones are its beginnings.
    """
    first = block[:, :1]
    alone = ((past == SHARED) | (past == first)).all() and ((block == first) | (block == PADDING)).all()
    if alone and not (first == PADDING).any():
        # Causal order hides padding at the block's own end; the branch ids hide it from later blocks.
        return "causal" if block.shape[1] > 1 else None
    whole = np.concatenate([past, *[block] * steps], axis=1)  # (B, S)
    visible = (whole[:, None] == SHARED) | (whole[:, None] == block[:, :, None])  # (B, N, S)
    before = np.tri(block.shape[1], whole.shape[1], whole.shape[1] - block.shape[1], dtype=bool)  # (N, S)
    return mx.array((visible & before)[:, None])


def _grow(array: mx.array, columns: int) -> mx.array:
    """Stored keys or values (B, K, S, W) with room for more columns: (B, K, S + columns, W)."""
    rows, heads, _, width = array.shape
    return mx.concatenate([array, mx.zeros((rows, heads, columns, width), array.dtype)], axis=2)
