"""Qwen2-VL."""

from mlxpref.checkpoints.families.family import Family

TEXT = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
}  # fmt: skip
FAMILY = Family(
    model_type="qwen2_vl",
    name="Qwen2-VL",
    class_prefix="Qwen2VL",
    text=TEXT,
    vision={
        "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    mrope_section=(16, 24, 24),
    vision_activation="quick_gelu",
    vision_sizes={"embed_dim": 1 << 16},
    vision_width="embed_dim",
    is_nested=False,
    interleaves=False,
    root="",
)  # fmt: skip
