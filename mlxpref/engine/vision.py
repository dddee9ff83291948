"""The vision towers of the Qwen-VL families, run over a batch of images of one size.

mlx-vlm's own towers loop over images, and over windows, in every block. Here the images are an axis of the batch,
all windows of one length are attended to in one call, and what depends on the size alone is made once. Submodules
and weights are the tower's own, quantized or not.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

__all__ = ["encode"]

_FUSED_HEADS = (64, 80, 128)
"""Head sizes for which Metal computes attention without holding all scores in memory."""
_SIZES = 32
"""Sizes of images whose tables are kept: 0.6 MB each for a 7B model at 512 by 512 pixels."""


@dataclass(frozen=True, eq=False)
class _Group:
    """W windows of L patches each, one behind the other in every image, from patch `start` on.

    The rotary tables are in float32: cosines (W, 1, 1, L, 1, head / 2), and sines (W, 1, 1, L, 2, head / 2), negative
    for the first half of a head.
    """

    start: int
    cos: mx.array
    sin: mx.array

    @property
    def windows(self) -> int:
        return int(self.sin.shape[0])

    @property
    def length(self) -> int:
        return int(self.sin.shape[3])


@dataclass(frozen=True, eq=False)
class _Plan:
    """What follows from an image's size: an order of its merged patches, the way back, and who attends to whom."""

    order: mx.array | None
    back: mx.array | None
    whole: list[_Group]
    windowed: list[_Group]


def encode(tower: Any, patches: mx.array, grid: tuple[int, int]) -> tuple[mx.array, list[mx.array]]:
    """Run N images of one size through a vision tower that mlx-vlm loaded.

    `patches` (N * P, F) are as the image processor orders them, `grid` is the height and width of an image in merged
    patches. Returns merged patches (N, height * width, D) and Qwen3-VL's deepstack levels, each of the same shape.
    Equals `tower(patches, sizes)` up to the order of float additions. Raises ValueError unless the patches are whole
    images.
    """
    depth, merge, tokens = len(tower.blocks), int(tower.spatial_merge_size), grid[0] * grid[1]
    whole = set(getattr(tower, "fullatt_block_indexes", range(depth)))
    side = 0 if whole.issuperset(range(depth)) else int(tower.window_size) // int(tower.patch_size) // merge
    plan = _plan(grid, merge, side, int(tower.rotary_pos_emb.dim), float(tower.rotary_pos_emb.theta))
    stacked = list(getattr(tower, "deepstack_visual_indexes", ()))

    def merged(merger: Any) -> mx.array:
        out: mx.array = merger(hidden)
        out = out.reshape(-1, tokens, out.shape[-1])
        return out if plan.back is None else out[:, plan.back]

    hidden = _embed(tower.patch_embed.proj, patches)
    hidden = hidden.reshape(-1, tokens * merge**2, hidden.shape[-1])
    if "pos_embed" in tower:
        hidden = hidden + _places(tower, grid)
    if plan.order is not None:
        hidden = hidden.reshape(-1, tokens, merge**2 * hidden.shape[-1])[:, plan.order].reshape(hidden.shape)
    levels = []
    for number, block in enumerate(tower.blocks):
        groups = plan.whole if number in whole else plan.windowed
        hidden = hidden + _attention(block.attn, block.norm1(hidden), groups)
        hidden = hidden + block.mlp(block.norm2(hidden))
        mx.eval(hidden)  # one block at a time: bounded work, and the scores of no more than one block in memory
        if number in stacked:
            levels.append(merged(tower.deepstack_merger_list[stacked.index(number)]))
    return merged(tower.merger), levels


def _embed(convolution: Any, patches: mx.array) -> mx.array:
    """The patch embedding (N * P, D): a convolution whose stride is its kernel is one matrix product."""
    weight = mx.moveaxis(convolution.weight, -1, 1).flatten(1)
    patches = patches.astype(weight.dtype)
    return mx.addmm(convolution.bias, patches, weight.T) if "bias" in convolution else patches @ weight.T


def _attention(attention: Any, hidden: mx.array, groups: list[_Group]) -> mx.array:
    """Self-attention (N, P, D) within the windows of each group."""
    count, _, width = hidden.shape
    heads = int(attention.num_heads)
    size = width // heads
    mixed = attention.qkv(hidden)
    outputs = []
    for group in groups:
        windows, length = group.windows, group.length
        part = mixed[:, group.start : group.start + windows * length]
        part = part.reshape(count, windows, length, 3, heads, 2, size // 2).transpose(0, 1, 3, 4, 2, 5, 6)
        turning = part[:, :, :2]
        turned = _turn(turning, turning[..., ::-1, :], group.cos, group.sin)
        flat = (count * windows, heads, length, size)
        out = _attend(*(x.reshape(flat) for x in (turned[:, :, 0], turned[:, :, 1], part[:, :, 2])))
        outputs.append(out.swapaxes(1, 2).reshape(count, windows * length, width))
    result: mx.array = attention.proj(outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1))
    return result


def _turn(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding in float32; `swapped` is `x` with the halves of each head swapped."""
    return (x.astype(mx.float32) * cos + swapped.astype(mx.float32) * sin).astype(x.dtype)


def _attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Attention (B, heads, L, head) without a mask; a head a little short of a fused size is filled up with zeros."""
    size = int(queries.shape[-1])
    fused = next((fit for fit in _FUSED_HEADS if size <= fit <= 1.25 * size), size)
    if fused > size:
        queries, keys, values = (mx.pad(x, [(0, 0)] * 3 + [(0, fused - size)]) for x in (queries, keys, values))
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=size**-0.5)
    return out[..., :size] if fused > size else out


@lru_cache(maxsize=_SIZES)
def _plan(grid: tuple[int, int], merge: int, side: int, rotary: int, theta: float) -> _Plan:
    """The plan of an image of `grid` merged patches; windows are `side` by `side` of them, 0 for none."""
    tokens = np.arange(grid[0] * grid[1])
    windows = _windows(tokens.reshape(grid), side) if side else [tokens[None]]
    order = np.concatenate([group.reshape(-1) for group in windows])
    within = np.arange(merge**2)
    rows = (order // grid[1] * merge)[:, None] + within // merge
    columns = (order % grid[1] * merge)[:, None] + within % merge
    frequencies = 1.0 / theta ** (mx.arange(0, rotary, 2, dtype=mx.float32) / rotary)
    angles = (mx.array(np.stack([rows, columns], axis=-1).reshape(-1, 2, 1)) * frequencies).flatten(1)
    cos, sin = mx.cos(angles)[:, None], mx.stack([-mx.sin(angles), mx.sin(angles)], axis=1)
    mx.eval(cos, sin)

    def group(start: int, count: int, length: int) -> _Group:
        tables = (x[start : start + count * length].reshape(count, 1, 1, length, *x.shape[1:]) for x in (cos, sin))
        return _Group(start, *tables)

    starts = np.cumsum([0, *(part.size * merge**2 for part in windows)]).tolist()
    moved = not np.array_equal(order, tokens)
    return _Plan(
        order=mx.array(order) if moved else None,
        back=mx.array(np.argsort(order)) if moved else None,
        whole=[group(0, 1, starts[-1])],
        windowed=[
            group(start, len(part), part.shape[1] * merge**2) for start, part in zip(starts, windows, strict=False)
        ],
    )


def _windows(tokens: np.ndarray, side: int) -> list[np.ndarray]:
    """Merged patches (height, width) as windows (W, L), those of one length together; the last ones are cut off."""
    groups: dict[int, list[np.ndarray]] = {}
    height, width = (size - size % side for size in tokens.shape)
    for rows in (tokens[:height], tokens[height:]):
        for part in (rows[:, :width], rows[:, width:]):
            if part.size:
                tall, wide = min(side, part.shape[0]), min(side, part.shape[1])
                tiles = part.reshape(part.shape[0] // tall, tall, part.shape[1] // wide, wide).swapaxes(1, 2)
                groups.setdefault(tall * wide, []).append(tiles.reshape(-1, tall * wide))
    return [np.concatenate(parts) for parts in groups.values()]


def _places(tower: Any, grid: tuple[int, int]) -> mx.array:
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
        corner = tower.pos_embed(mx.array((row[:, None] * side + column).reshape(shape).swapaxes(1, 2).reshape(-1)))
        weight = (row_weight[:, None] * column_weight).reshape(shape).swapaxes(1, 2).reshape(-1, 1)
        total = total + corner * mx.array(weight).astype(corner.dtype)
    return total  # type: ignore[no-any-return]
