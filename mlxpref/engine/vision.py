"""The vision towers of the Qwen-VL families, run over a batch of images of one size.

mlx-vlm's own towers loop over images and windows in every block. Here the images are a batch axis, one attention call
serves all windows of one length, and everything that depends only on the size is computed once. Submodules and weights
are the tower's own, quantized or not.

Axes: N images, P patches of an image, W windows of L patches, D width of a hidden state, H heads of a width `size`.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.lru import LRU

_FUSED_HEADS = (64, 80, 128)
"""Head sizes for which Metal computes attention without holding all scores in memory."""
_SIZES = 32
"""Number of cached layouts of image sizes: 0.6 MB each for a 7B model at 512 by 512 pixels."""


@dataclass(frozen=True, eq=False)
class _Windows:
    """W windows of L patches each, one behind the other in every image, from patch `start` on.

    The rotary tables are in float32: cosines (W, 1, 1, L, 1, size / 2), and sines (W, 1, 1, L, 2, size / 2), negative
    for the first half of a head.
    """

    start: int
    cos: mx.array
    sin: mx.array


@dataclass(frozen=True, eq=False)
class _Layout:
    """The layout of an image size: an order of its merged patches, the way back, and the attention windows."""

    order: mx.array | None
    back: mx.array | None
    whole: list[_Windows]
    windowed: list[_Windows]


class VisionEncoder:
    """A vision tower that mlx-vlm loaded, for batches of images of one size."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        depth = len(tower.blocks)
        self._whole = set(getattr(tower, "fullatt_block_indexes", range(depth)))  # blocks that attend to all patches
        self._has_windows = not self._whole.issuperset(range(depth))
        self._layouts: LRU[tuple[int, int], _Layout] = LRU(_SIZES)

    def encode(self, patches: mx.array, grid: tuple[int, int]) -> tuple[mx.array, list[mx.array]]:
        """Run N images of one size through the tower.

        `patches` (N * P, F) are in the image processor's order, `grid` is the height and width of an image in merged
        patches. Returns merged patches (N, height * width, D) and Qwen3-VL's deepstack levels, each of the same shape.
        Equals `tower(patches, sizes)` up to the order of float additions. Raises ValueError unless the patches are
        whole images.
        """
        tower, layout = self.tower, self._layout(grid)
        merge, tokens = int(tower.spatial_merge_size), grid[0] * grid[1]
        deepstack = list(getattr(tower, "deepstack_visual_indexes", ()))

        def merged(merger: Any) -> mx.array:
            result: mx.array = merger(hidden)
            result = result.reshape(-1, tokens, result.shape[-1])  # (N, height * width, D)
            return result if layout.back is None else result[:, layout.back]

        hidden = _embed(tower.patch_embed.proj, patches)  # (N * P, D)
        hidden = hidden.reshape(-1, tokens * merge**2, hidden.shape[-1])  # (N, P, D)
        if "pos_embed" in tower:
            hidden = hidden + _position_embeddings(tower, grid)
        if layout.order is not None:  # whole merged patches change places: (N, height * width, merge^2 * D)
            hidden = hidden.reshape(-1, tokens, merge**2 * hidden.shape[-1])[:, layout.order].reshape(hidden.shape)
        levels = []
        for number, block in enumerate(tower.blocks):
            windows = layout.whole if number in self._whole else layout.windowed
            hidden = hidden + _attention(block.attn, block.norm1(hidden), windows)
            hidden = hidden + block.mlp(block.norm2(hidden))
            mx.eval(hidden)  # one block at a time: bounded work, and the scores of no more than one block in memory
            if number in deepstack:
                levels.append(merged(tower.deepstack_merger_list[deepstack.index(number)]))
        return merged(tower.merger), levels

    def _layout(self, grid: tuple[int, int]) -> _Layout:
        """The layout of an image of `grid` merged patches."""
        if (layout := self._layouts.get(grid)) is not None:
            return layout
        tower, merge = self.tower, int(self.tower.spatial_merge_size)
        side = int(tower.window_size) // int(tower.patch_size) // merge if self._has_windows else 0
        layout = _make_layout(grid, merge, side, int(tower.rotary_pos_emb.dim), float(tower.rotary_pos_emb.theta))
        self._layouts.put(grid, layout)
        return layout


def _embed(convolution: Any, patches: mx.array) -> mx.array:
    """The patch embedding (N * P, D): a convolution whose stride is its kernel is one matrix product."""
    weight = mx.moveaxis(convolution.weight, -1, 1).flatten(1)  # (D, frames, height, width, 3) -> (D, F)
    patches = patches.astype(weight.dtype)
    return mx.addmm(convolution.bias, patches, weight.T) if "bias" in convolution else patches @ weight.T


def _attention(attention: Any, hidden: mx.array, groups: list[_Windows]) -> mx.array:
    """Self-attention (N, P, D) within windows; those of one length are one group."""
    count, _, width = hidden.shape
    heads = int(attention.num_heads)
    size = width // heads
    projected = attention.qkv(hidden)  # (N, P, 3 * D)
    outputs = []
    for group in groups:
        windows, length = int(group.sin.shape[0]), int(group.sin.shape[3])
        part = projected[:, group.start : group.start + windows * length]  # (N, W * L, 3 * D)
        part = part.reshape(count, windows, length, 3, heads, 2, size // 2)
        part = part.transpose(0, 1, 3, 4, 2, 5, 6)  # (N, W, 3, H, L, 2, size / 2)
        both = part[:, :, :2]  # queries and keys
        rotated = _rotate(both, both[..., ::-1, :], group.cos, group.sin)
        flat = (count * windows, heads, length, size)  # (N, W, H, L, 2, size / 2) -> (N * W, H, L, size)
        queries, keys, values = (x.reshape(flat) for x in (rotated[:, :, 0], rotated[:, :, 1], part[:, :, 2]))
        out = _attend(queries, keys, values)  # (N * W, H, L, size)
        outputs.append(out.swapaxes(1, 2).reshape(count, windows * length, width))  # (N, W * L, D)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)  # (N, P, D)
    result: mx.array = attention.proj(joined)
    return result


def _rotate(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding in float32; `swapped` is `x` with the halves of each head swapped."""
    return (x.astype(mx.float32) * cos + swapped.astype(mx.float32) * sin).astype(x.dtype)


def _attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Attention (N * W, H, L, size) without a mask; zeros fill up a head a little short of a fused size."""
    size = int(queries.shape[-1])
    fused = next((fit for fit in _FUSED_HEADS if size <= fit <= 1.25 * size), size)
    if fused > size:
        queries, keys, values = (mx.pad(x, [(0, 0)] * 3 + [(0, fused - size)]) for x in (queries, keys, values))
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=size**-0.5)
    return out[..., :size] if fused > size else out


def _make_layout(grid: tuple[int, int], merge: int, side: int, rotary: int, theta: float) -> _Layout:
    """The layout of an image of `grid` merged patches; windows are `side` by `side` of them, 0 for none.

    `rotary` is the width of half a head: one half of it rotates with the row, the other with the column.
    """
    tokens = np.arange(grid[0] * grid[1])
    windows = _windows(tokens.reshape(grid), side) if side else [tokens[None]]
    order = np.concatenate([group.reshape(-1) for group in windows])  # (height * width,)
    within = np.arange(merge**2)
    rows = (order // grid[1] * merge)[:, None] + within // merge  # (height * width, merge^2)
    columns = (order % grid[1] * merge)[:, None] + within % merge
    frequencies = 1.0 / theta ** (mx.arange(0, rotary, 2, dtype=mx.float32) / rotary)  # (rotary / 2,)
    places = mx.array(np.stack([rows, columns], axis=-1).reshape(-1, 2, 1))  # (P, 2, 1)
    angles = (places * frequencies).flatten(1)  # (P, 2, rotary / 2) -> (P, rotary)
    cos, sin = mx.cos(angles)[:, None], mx.stack([-mx.sin(angles), mx.sin(angles)], axis=1)  # (P, 1 or 2, rotary)
    mx.eval(cos, sin)

    def part(start: int, count: int, length: int) -> _Windows:
        tables = (x[start : start + count * length].reshape(count, 1, 1, length, *x.shape[1:]) for x in (cos, sin))
        return _Windows(start, *tables)

    starts = np.cumsum([0, *(group.size * merge**2 for group in windows)]).tolist()
    moved = not np.array_equal(order, tokens)
    return _Layout(
        order=mx.array(order) if moved else None,
        back=mx.array(np.argsort(order)) if moved else None,
        whole=[part(0, 1, starts[-1])],
        windowed=[
            part(start, len(group), group.shape[1] * merge**2) for start, group in zip(starts, windows, strict=False)
        ],
    )


def _windows(tokens: np.ndarray, side: int) -> list[np.ndarray]:
    """Merged patches (height, width) as windows (W, L), those of one length together; the last ones are smaller."""
    groups: dict[int, list[np.ndarray]] = {}
    height, width = (size - size % side for size in tokens.shape)
    for rows in (tokens[:height], tokens[height:]):
        for part in (rows[:, :width], rows[:, width:]):
            if part.size:
                tall, wide = min(side, part.shape[0]), min(side, part.shape[1])
                tiles = part.reshape(part.shape[0] // tall, tall, part.shape[1] // wide, wide)
                # (rows of windows, tall, columns of windows, wide) -> (rows, columns of windows, tall, wide)
                tiles = tiles.swapaxes(1, 2)
                groups.setdefault(tall * wide, []).append(tiles.reshape(-1, tall * wide))  # (W, L)
    return [np.concatenate(parts) for parts in groups.values()]


def _position_embeddings(tower: Any, grid: tuple[int, int]) -> mx.array:
    """Qwen3-VL's learned position embeddings (P, D), interpolated between their nearest four."""
    merge, side = int(tower.spatial_merge_size), int(tower.num_grid_per_side)
    shape = (grid[0], merge, grid[1], merge)
    near = []
    for size in grid:
        place = np.linspace(0, side - 1, size * merge, dtype=np.float32)
        before = place.astype(np.int32)
        near.append([(before, 1 - (place - before)), (np.minimum(before + 1, side - 1), place - before)])
    total: Any = 0
    for (row, row_weight), (column, column_weight) in product(*near):
        # Patches of one merged patch stand together: (height, merge, width, merge) -> (height, width, merge, merge).
        index = (row[:, None] * side + column).reshape(shape).swapaxes(1, 2).reshape(-1)  # (P,)
        corner = tower.pos_embed(mx.array(index))  # (P, D)
        weight = (row_weight[:, None] * column_weight).reshape(shape).swapaxes(1, 2).reshape(-1, 1)  # (P, 1)
        total = total + corner * mx.array(weight).astype(corner.dtype)
    return total  # type: ignore[no-any-return]
