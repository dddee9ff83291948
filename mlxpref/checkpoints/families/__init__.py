"""The supported families, and the names of some that are not; adding a family begins with a file here."""

from collections.abc import Mapping

from mlxpref.checkpoints.families import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl, qwen3_vl_moe
from mlxpref.checkpoints.families.family import Family

__all__ = ["FAMILIES", "OTHERS", "Family"]

FAMILIES: Mapping[str, Family] = {
    each.FAMILY.model_type: each.FAMILY for each in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5)
}
"""The supported families by their model_type."""
OTHERS: Mapping[str, str] = {
    "qwen3_5_moe": "Qwen3.5's mixture of experts; of these Qwen3-VL's is supported, and Qwen3.5 where it is dense",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "internvl": "InternVL",
    "internvl_chat": "InternVL",
    "mistral3": "Mistral 3",
    "glm4v": "GLM-4V",
}
"""What else people judge with, by its model_type, in words for a refusal."""
