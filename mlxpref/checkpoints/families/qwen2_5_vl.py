"""Qwen2.5-VL."""

from mlxpref.checkpoints.families.family import Family
from mlxpref.checkpoints.families.qwen2_vl import TEXT

FAMILY = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    class_prefix="Qwen2_5_VL",
    text=TEXT,
    vision={
        "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 4, "window_size": 112,
        "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
    },
    mrope_section=(16, 24, 24),
    vision_activation="silu",
    is_nested=False,
    interleaves=False,
    root="",
)  # fmt: skip
