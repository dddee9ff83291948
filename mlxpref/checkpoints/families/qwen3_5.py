"""Qwen3.5 and Qwen3.6, dense: three of four layers are recurrent."""

from mlxpref.checkpoints.families.family import Family
from mlxpref.checkpoints.families.qwen3_vl import VISION, VISION_SIZES

FAMILY = Family(
    model_type="qwen3_5",
    name="Qwen3.5",
    class_prefix="Qwen3_5",
    text={
        "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    },
    vision=VISION,
    mrope_section=(11, 11, 10),
    vision_activation="gelu_pytorch_tanh",
    text_sizes={
        "linear_num_value_heads": 1 << 12, "linear_num_key_heads": 1 << 12, "linear_key_head_dim": 1 << 12,
        "linear_value_head_dim": 1 << 12, "linear_conv_kernel_dim": 1 << 6, "full_attention_interval": 1 << 10,
    },
    vision_sizes=VISION_SIZES,
    fixed={"attn_output_gate": True},
    rope="rope_parameters",
    rotary_share=0.25,
    passed_over=r"(?:^|\.)mtp\.",  # the head that drafts several tokens
    zero_centred_norms=True,
)  # fmt: skip
