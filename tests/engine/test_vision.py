"""The batched vision tower against mlx-vlm's own: the same numbers, for any size and number of images."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_vlm.models import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl, qwen3_vl_moe

from mlxpref.engine.vision import VisionEncoder
from mlxpref.engine.vlm import VLM
from tests.tolerance import assert_equal_sums

GRIDS = [(4, 4), (8, 8), (8, 12), (3, 3), (9, 9), (5, 11), (8, 6), (1, 13), (2, 1)]
"""Merged patches: one window, several, and all the ways in which windows can be cut off."""


def random_tower(family: str, width: int = 64, **settings: Any) -> Any:
    """A tower with random weights, and the window settings of Qwen2.5-VL as it is published."""
    mx.random.seed(0)
    size: dict[str, Any] = {"depth": 4, "num_heads": 2, "model_type": family}
    if family == "qwen2_vl":
        built = qwen2_vl.VisionModel(qwen2_vl.VisionConfig(embed_dim=width, hidden_size=48, **size, **settings))
    else:
        size |= {"hidden_size": width, "intermediate_size": 96, "out_hidden_size": 48}
        if family == "qwen2_5_vl":
            size |= {"window_size": 112, "patch_size": 14, "fullatt_block_indexes": [1, 3]}
            built = qwen2_5_vl.VisionModel(qwen2_5_vl.VisionConfig(**size | settings))
        else:
            module = {"qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe, "qwen3_5": qwen3_5}[family]
            levels = [] if family == "qwen3_5" else [0, 2]
            size |= {"deepstack_visual_indexes": levels, "num_position_embeddings": 49}
            built = module.VisionModel(module.VisionConfig(**size | settings))
    # Norms and biases start out as ones and zeros, with which a forgotten one would not show.
    built.update(tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), built.parameters()))
    return built


def patches(tower: Any, grid: tuple[int, int], count: int) -> mx.array:
    """Random patches of a number of images."""
    weight = tower.patch_embed.proj.weight
    shape = (count * grid[0] * grid[1] * tower.spatial_merge_size**2, weight.size // weight.shape[0])
    return mx.array(np.random.default_rng(count).standard_normal(shape), mx.float32)


def reference(tower: Any, pixels: mx.array, grid: tuple[int, int], count: int) -> list[mx.array]:
    """What mlx-vlm's own tower makes of them: merged patches, then deepstack levels."""
    merge = tower.spatial_merge_size
    out = tower(pixels.astype(tower.patch_embed.proj.weight.dtype), mx.array([[1, *(merge * x for x in grid)]] * count))
    merged, levels = out if isinstance(out, tuple) else (out, [])
    return [x.reshape(count, grid[0] * grid[1], -1) for x in (merged, *levels)]


def difference(ours: mx.array, expected: mx.array) -> float:
    """The largest difference, in units of the largest value."""
    assert ours.shape == expected.shape
    return float(mx.abs(ours - expected).max() / mx.abs(expected).max())


def check(tower: Any, grid: tuple[int, int], count: int) -> None:
    pixels = patches(tower, grid, count)
    sums = max(pixels.shape[1], grid[0] * grid[1] * tower.spatial_merge_size**2)  # a patch's values, or its attention
    merged, levels = VisionEncoder(tower).encode(pixels, grid)
    for ours, expected in zip((merged, *levels), reference(tower, pixels, grid, count), strict=True):
        assert_equal_sums(ours, expected, sums, len(tower.blocks))


@pytest.mark.parametrize(("grid", "count"), [((4, 4), 1), ((5, 11), 3), ((2, 1), 2)])
def test_towers_of_checkpoints_equal_mlx_vlms(tiny_vlm: VLM, grid: tuple[int, int], count: int) -> None:
    check(tiny_vlm.model.vision_tower, grid, count)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_equal_mlx_vlms(grid: tuple[int, int]) -> None:
    check(random_tower("qwen2_5_vl", fullatt_block_indexes=[1, 3]), grid, 3)


@pytest.mark.parametrize("full", [[], [0, 1, 2, 3]])
def test_blocks_with_full_attention(full: list[int]) -> None:
    check(random_tower("qwen2_5_vl", fullatt_block_indexes=full), (9, 5), 1)


def test_a_padded_head_equals_mlx_vlms(family: str) -> None:
    check(random_tower(family, width=2 * 72), (9, 5), 2)


def test_quantized_layers_equal_mlx_vlms(family: str) -> None:
    tower = random_tower(family)
    nn.quantize(tower, group_size=32, bits=8)
    assert isinstance(tower.blocks[0].attn.qkv, nn.QuantizedLinear)
    check(tower, (5, 6), 2)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_near_float32(family: str, dtype: mx.Dtype) -> None:
    tower, grid = random_tower(family), (9, 5)
    pixels = patches(tower, grid, 2)
    exact = reference(tower, pixels, grid, 2)
    tower.update(tree_map(lambda x: x.astype(dtype), tower.parameters()))
    merged, levels = VisionEncoder(tower).encode(pixels, grid)
    for ours, theirs, expected in zip((merged, *levels), reference(tower, pixels, grid, 2), exact, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert difference(ours, expected) < 1.5 * difference(theirs, expected)


def test_towers_share_no_tables() -> None:
    """Towers of one size and other frequencies do not share their tables."""
    towers = [random_tower("qwen2_5_vl") for _ in range(2)]
    towers[1].rotary_pos_emb.theta = 100.0
    encoders = [VisionEncoder(tower) for tower in towers]
    for grid in ((6, 7), (9, 9), (6, 7)):
        for tower, encoder in zip(towers, encoders, strict=True):
            pixels = patches(tower, grid, 1)
            merged, _ = encoder.encode(pixels, grid)
            assert_equal_sums(merged, reference(tower, pixels, grid, 1)[0], pixels.shape[1], len(tower.blocks))


def test_parts_of_images_are_refused() -> None:
    tower = random_tower("qwen2_5_vl")
    with pytest.raises(ValueError, match="reshape"):
        VisionEncoder(tower).encode(patches(tower, (4, 4), 1)[:-4], (4, 4))
