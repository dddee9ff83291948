"""Keys and values of rows that share a forward pass, and the branch of each of their columns.

This file alone handles padding, branches and order; the models' own state and positions play no role. Axes: B rows, N
columns of a block, S columns so far, K heads of keys and values, W width of a head.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds

SHARED, PADDING = -1, -2
"""Columns that all branches of a row see, and that none sees; a branch's own columns have its number, from 0 on."""
_CROWDED = 0.75
"""Above this share of columns in use the others stay."""


class LayerCache:
    """One layer's keys and values, (B, K, S, W) each; `capacity` is how many columns it grows to."""

    def __init__(self) -> None:
        self.capacity = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

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

    def replace(self, function: Callable[[mx.array], mx.array]) -> None:
        """Replace keys and values by a function of the filled columns."""
        if self.keys is not None and self.values is not None:
            self.keys = function(self.keys[:, :, : self.offset])
            self.values = function(self.values[:, :, : self.offset])
            self.offset = self.keys.shape[2]


class BranchedKVCache:
    """The keys and values of B rows through all layers, and the branch that each column belongs to.

    A row is a comparison and the branches that continue it, for instance the completions of a group. A branch sees the
    shared columns before it and its own: the comparison is stored once for all its branches. Rows of different lengths
    are right-padded. `branch_ids` (B, S) holds the branch, SHARED or PADDING.
    """

    def __init__(self, layer_count: int) -> None:
        self.layers = [LayerCache() for _ in range(layer_count)]
        self.branch_ids: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._mask: mx.array | str | None = None

    @classmethod
    def of(cls, branch_ids: NDArray[np.int32], layers: Sequence[tuple[mx.array, mx.array]]) -> "BranchedKVCache":
        """The cache of a block that ran: its branch ids (B, S), and each layer's keys and values (B, K, S, W)."""
        cache = cls(len(layers))
        cache.branch_ids = branch_ids
        for layer, (keys, values) in zip(cache.layers, layers, strict=True):
            layer.update_and_fetch(keys, values)
        return cache

    def reserve(self, branch_ids: NDArray[np.int32], steps: int = 1) -> None:
        """Prepare for a block with these branch ids (B, N), before it runs; `steps` such blocks follow each other.

        Several steps need blocks in which no branch has two columns.
        """
        past = self.branch_ids if self.branch_ids.size else np.zeros((len(branch_ids), 0), np.int32)
        self._mask = attention_mask(past, branch_ids, steps)
        self.branch_ids = np.concatenate([past, *[branch_ids] * steps], axis=1)  # (B, S)
        for layer in self.layers:
            layer.capacity = self.branch_ids.shape[1] + bounds.RUNS_AHEAD * steps * branch_ids.shape[1]

    def next_mask(self, columns: int) -> mx.array | str | None:
        """The next block's attention mask: (B, 1, columns, S), or a shorthand for it."""
        if isinstance(self._mask, mx.array):
            return self._mask[..., : self.layers[0].offset + columns]
        return self._mask

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        index = mx.array(np.asarray(rows, np.int32))
        for layer in self.layers:
            layer.replace(lambda array: array[index])  # (old B, K, S, W) -> (new B, K, S, W)
        self.branch_ids = self.branch_ids[np.asarray(rows, int)]

    def drop_branches(self, live: Sequence[set[int]]) -> None:
        """Drop the columns that none of the live branches (one set a row) sees, if enough columns become free."""
        rows = zip(self.branch_ids, live, strict=True)
        visible = np.stack([np.isin(ids, [SHARED, *branches]) for ids, branches in rows])  # (B, S)
        count = int(visible.sum(axis=1).max(initial=0))
        if count > _CROWDED * visible.shape[1]:
            return
        order = np.argsort(~visible, axis=1, kind="stable")[:, :count]  # (B, count)
        ids = np.take_along_axis(self.branch_ids, order, axis=1)
        self.branch_ids = np.where(np.take_along_axis(visible, order, axis=1), ids, PADDING).astype(np.int32)
        index = mx.array(order)[:, None, :, None]  # (B, 1, count, 1)
        for layer in self.layers:
            layer.replace(lambda array: mx.take_along_axis(array, index, axis=2))  # (B, K, count, W)


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


def image_positions(parts: Sequence[int | tuple[int, int]], start: int = 0) -> tuple[NDArray[np.int32], int]:
    """The positions (3, L) of text and images in turn, as the Qwen-VL models count them, and the position after them.

    A part is a number of text tokens or an image's grid (height, width) in merged patches. Text counts up on all three
    axes; an image keeps the first axis and counts rows and columns on the other two, and text after it continues after
    its longer side (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    axes, position = [], start
    for part in parts:
        if isinstance(part, tuple):
            height, width = part
            rows, columns = np.divmod(np.arange(height * width), width)
            axes.append(position + np.stack([np.zeros_like(rows), rows, columns]))  # (3, height * width)
            position += max(height, width)
        else:
            axes.append(np.broadcast_to(position + np.arange(part), (3, part)))
            position += part
    return np.concatenate(axes, axis=1).astype(np.int32), position


def text_positions(start: NDArray[np.int64], columns: int) -> NDArray[np.int32]:
    """The positions (3, B, `columns`) of text that continues each row at its next position (B,)."""
    positions = np.broadcast_to(start[:, None] + np.arange(columns), (3, len(start), columns))
    return positions.astype(np.int32)
