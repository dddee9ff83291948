"""Keys and values of rows that share a forward pass: right-padded, masked, with explicit positions.

The models call `update_and_fetch` on one cache a layer and `make_mask` on the first of them; everything else about
padding and order is kept here, so the models' own state and their assumptions about positions never matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

__all__ = ["LayerCache", "RowCache", "following_positions", "image_positions"]

_GROWTH = 64
"""Columns by which the storage grows, so that a decoding step does not copy all keys and values."""


class LayerCache:
    """One layer's keys and values, (rows, heads, columns, width) each."""

    def __init__(self, rows: "RowCache") -> None:
        self._rows = rows
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
        if end - start > 1:
            self.keys = mx.concatenate([self.keys[:, :, :start], keys], axis=2)
            self.values = mx.concatenate([self.values[:, :, :start], values], axis=2)
            return self.keys, self.values
        if end > self.keys.shape[2]:
            self.keys = _grown(self.keys[:, :, :start], end)
            self.values = _grown(self.values[:, :, :start], end)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def make_mask(
        self, columns: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask of the block that is about to run; the models ask the first layer's cache for it."""
        return self._rows.mask(columns)


class RowCache:
    """The keys and values of B rows through all layers, and which of their columns hold a token.

    Rows of different lengths are right-padded: a padded column is never attended to by a later block, and causal
    order hides it from its own.
    """

    def __init__(self, layer_count: int) -> None:
        self.layers = [LayerCache(self) for _ in range(layer_count)]
        self.valid = np.zeros((0, 0), bool)
        """(B, columns): whether a column holds a token of the row."""

    def announce(self, lengths: Sequence[int], columns: int) -> None:
        """Say how many of the next block's columns each row fills, before the block runs through the model."""
        block = np.arange(columns)[None] < np.asarray(lengths)[:, None]
        past = self.valid if self.valid.size else np.zeros((len(block), 0), bool)
        self.valid = np.concatenate([past, block], axis=1)

    def mask(self, columns: int) -> mx.array | str | None:
        """What a block of `columns` may attend to: (B, 1, columns, all columns), or a shorthand for it."""
        past = self.valid.shape[1] - columns
        if self.valid[:, :past].all():
            # Padding at the block's own end is hidden by causal order; later blocks find it in `valid`.
            return "causal" if columns > 1 else None
        before = np.broadcast_to(self.valid[:, None, :past], (len(self.valid), columns, past))
        within = np.broadcast_to(np.tri(columns, dtype=bool), (len(self.valid), columns, columns))
        return mx.array(np.concatenate([before, within], axis=2)[:, None])

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        index = mx.array(np.asarray(rows, np.int32))
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.valid = self.valid[np.asarray(rows, int)]

    def repeat(self, times: int) -> None:
        """Let every row be followed by copies of itself, `times` in all; gradients add up over them."""
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = mx.repeat(layer.keys, times, 0), mx.repeat(layer.values, times, 0)
        self.valid = np.repeat(self.valid, times, axis=0)


def _grown(stored: mx.array, columns: int) -> mx.array:
    rows, heads, start, width = stored.shape
    room = mx.zeros((rows, heads, columns - start + _GROWTH, width), stored.dtype)
    return mx.concatenate([stored, room], axis=2)


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
