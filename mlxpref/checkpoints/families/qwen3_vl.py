"""Qwen3-VL, dense."""

from mlxpref.checkpoints.families.family import Family

VISION = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
}  # fmt: skip
DEEPSTACK = {"deepstack_visual_indexes": [8, 16, 24]}
VISION_SIZES = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_position_embeddings": 1 << 20}
FAMILY = Family(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    class_prefix="Qwen3VL",
    text={
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-06, "rope_theta": 500000.0,
    },
    vision=VISION | DEEPSTACK,
    mrope_section=(24, 20, 20),
    vision_activation="gelu_pytorch_tanh",
    vision_sizes=VISION_SIZES,
    theta_of_4=5000000.0,
)  # fmt: skip
