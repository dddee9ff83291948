"""Qwen3-VL with a mixture of experts."""

from mlxpref.checkpoints.families.family import Family
from mlxpref.checkpoints.families.qwen3_vl import DEEPSTACK, VISION, VISION_SIZES

FAMILY = Family(
    model_type="qwen3_vl_moe",
    name="Qwen3-VL-MoE",
    class_prefix="Qwen3VLMoe",
    text={
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": None, "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-06, "rope_theta": 500000.0, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    vision=VISION | DEEPSTACK,
    mrope_section=(24, 20, 20),
    vision_activation="gelu_pytorch_tanh",
    text_sizes={
        "num_experts": 1 << 12, "num_experts_per_tok": 1 << 12, "moe_intermediate_size": 1 << 20,
        "decoder_sparse_step": 1 << 10,
    },
    vision_sizes=VISION_SIZES,
    renamed={"num_local_experts": "num_experts"},
    fixed={"norm_topk_prob": True},
    theta_of_4=5000000.0,
)  # fmt: skip
