"""Keys and values of rows that share a forward pass: prompts, their branches, and whose each column is.

Everything about padding, branches and order is kept here: the models' own state and assumptions about positions
never matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds

__all__ = [
    "PADDING",
    "SHARED",
    "BranchedKVCache",
    "LayerCache",
    "following_positions",
    "image_positions",
    "mask_behind",
    "owners_of",
]

SHARED, PADDING = -1, -2
"""Whose a column is: all branches' of its row, or nobody's; a branch's own columns have its number, from 0."""
Choose = Callable[[mx.array], mx.array]
_CROWDED = 0.75
"""The share of columns that somebody still sees, above which dead ones stay where they are."""


class LayerCache:
    """One layer's keys and values, (rows, heads, columns, width) each; `room` is how many columns it grows to."""

    def __init__(self) -> None:
        self.room = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a block of keys and values and return all of them."""
        start, end = self.offset, self.offset + keys.shape[2]
        self.offset = end
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
            return keys, values
        if end > self.keys.shape[2]:
            room = max(end, self.room) - start
            self.keys, self.values = _grown(self.keys[:, :, :start], room), _grown(self.values[:, :, :start], room)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, choose: "Choose") -> None:
        """Replace keys and values by what `choose` makes of the filled columns."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = choose(self.keys[:, :, : self.offset]), choose(self.values[:, :, : self.offset])
            self.offset = self.keys.shape[2]


class BranchedKVCache:
    """The keys and values of B rows through all layers, and whose each of their columns is.

    A row is a prompt and the branches that continue it, for instance the completions of a group. A branch sees the
    shared columns before it and its own: the prompt is kept once, however many branches it has. Rows of different
    lengths are right-padded.
    """

    def __init__(self, layer_count: int) -> None:
        self.layers = [LayerCache() for _ in range(layer_count)]
        self.owners: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        """(B, columns): the branch, SHARED or PADDING."""
        self._mask: mx.array | str | None = None

    @classmethod
    def of(cls, owners: NDArray[np.int32], layers: Sequence[tuple[mx.array, mx.array]]) -> "BranchedKVCache":
        """The cache of a block that ran: whose its columns are, and each layer's keys and values."""
        rows = cls(len(layers))
        rows.owners = owners
        for layer, (keys, values) in zip(rows.layers, layers, strict=True):
            layer.update_and_fetch(keys, values)
        return rows

    def announce(self, owners: NDArray[np.int32], steps: int = 1) -> None:
        """Say whose the columns (B, N) of the next block are, before it runs; `steps` such blocks follow each other.

        More than one step is for blocks in which no branch has two columns.
        """
        past = self.owners if self.owners.size else np.zeros((len(owners), 0), np.int32)
        self._mask = mask_behind(past, owners, steps)
        self.owners = np.concatenate([past, *[owners] * steps], axis=1)
        for layer in self.layers:
            layer.room = self.owners.shape[1] + bounds.RUNS_AHEAD * steps * owners.shape[1]

    def next_mask(self, columns: int) -> mx.array | str | None:
        """What the next block may attend to: (B, 1, columns, all columns), or a shorthand for it."""
        if isinstance(self._mask, mx.array):
            return self._mask[..., : self.layers[0].offset + columns]
        return self._mask

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        index = mx.array(np.asarray(rows, np.int32))
        for layer in self.layers:
            layer.keep(lambda stored: stored[index])
        self.owners = self.owners[np.asarray(rows, int)]

    def forget(self, live: Sequence[set[int]]) -> None:
        """Drop the columns that none of the live branches (one set a row) can see, if that gains enough."""
        seen = np.stack(
            [np.isin(owners, [SHARED, *branches]) for owners, branches in zip(self.owners, live, strict=True)]
        )
        count = int(seen.sum(axis=1).max(initial=0))
        if count > _CROWDED * seen.shape[1]:
            return
        order = np.argsort(~seen, axis=1, kind="stable")[:, :count]
        kept = np.take_along_axis(seen, order, axis=1)
        self.owners = np.where(kept, np.take_along_axis(self.owners, order, axis=1), PADDING).astype(np.int32)
        index = mx.array(order)[:, None, :, None]
        for layer in self.layers:
            layer.keep(lambda stored: mx.take_along_axis(stored, index, axis=2))


def owners_of(lengths: Sequence[int], columns: int) -> NDArray[np.int32]:
    """Whose the columns of right-padded prompts are, (B, `columns`): shared as far as a row's length reaches."""
    filled = np.arange(columns)[None] < np.asarray(lengths)[:, None]
    return np.where(filled, SHARED, PADDING).astype(np.int32)


def mask_behind(past: NDArray[np.int32], block: NDArray[np.int32], steps: int = 1) -> mx.array | str | None:
    """What the block (B, N) sees of the columns before it and of itself: (B, 1, N, all columns), or a shorthand for it.

    `past` and `block` say whose the columns are. Where `steps` such blocks follow each other, the mask is that of the
    last; those of the earlier ones are its beginnings.
    """
    first = block[:, :1]
    alone = ((past == SHARED) | (past == first)).all() and ((block == first) | (block == PADDING)).all()
    if alone and not (first == PADDING).any():
        # Padding at the block's own end is hidden by causal order; later blocks find it among the owners.
        return "causal" if block.shape[1] > 1 else None
    whole = np.concatenate([past, *[block] * steps], axis=1)
    seen = (whole[:, None] == SHARED) | (whole[:, None] == block[:, :, None])
    before = np.tri(block.shape[1], whole.shape[1], whole.shape[1] - block.shape[1], dtype=bool)
    return mx.array((seen & before)[:, None])


def _grown(stored: mx.array, columns: int) -> mx.array:
    rows, heads, _, width = stored.shape
    return mx.concatenate([stored, mx.zeros((rows, heads, columns, width), stored.dtype)], axis=2)


@dataclass(frozen=True)
class Positions:
    """The positions of a prompt's tokens, (3, L), and the first position after them."""

    ids: np.ndarray
    following: int


def image_positions(blocks: Sequence[int | tuple[int, int]], start: int = 0) -> Positions:
    """Positions of text and images in turn, as the Qwen-VL models count them.

    A block is a number of text tokens or an image's grid (height, width) in merged patches. Text counts up in all
    three axes; an image keeps the first axis and counts rows and columns in the other two, and what follows it
    goes on after the longer of its sides (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    axes, following = [], start
    for block in blocks:
        if isinstance(block, tuple):
            height, width = block
            rows, columns = np.divmod(np.arange(height * width), width)
            axes.append(following + np.stack([np.zeros_like(rows), rows, columns]))
            following += max(height, width)
        else:
            axes.append(np.broadcast_to(following + np.arange(block), (3, block)))
            following += block
    return Positions(np.concatenate(axes, axis=1).astype(np.int32), following)


def following_positions(start: np.ndarray, columns: int) -> np.ndarray:
    """The positions (3, B, `columns`) of text that goes on from each row's next position (B,)."""
    positions = np.broadcast_to(start[:, None] + np.arange(columns), (3, len(start), columns))
    return positions.astype(np.int32)
