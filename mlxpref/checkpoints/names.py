"""The names of a model's tensors: spelled in several ways in files, in one way in mlx-vlm's models.

transformers wrote the Qwen2-VL families as `model.layers` and `visual` before 4.52, since then as
`model.language_model.layers` and `model.visual`; training tools put the names of their wrappers in front.
"""

import re
from collections.abc import Iterable

from mlxpref.checkpoints.families import FAMILIES, Family
from mlxpref.errors import ModelError

_WRAPPER = re.compile(
    r"(?<![\w.])module\.|\b_(?:orig_mod|forward_module|fsdp_wrapped_module|checkpoint_wrapped_module)\."
)
"""What DistributedDataParallel, torch.compile, DeepSpeed and FSDP put into names."""
_BEFORE = r"(?:(?:base_model|model|language_model)\.)*"
_PLACES = (
    (re.compile(rf"{_BEFORE}(?:visual|vision_tower)\."), "vision_tower."),
    (re.compile(rf"{_BEFORE}(?=lm_head\b)"), "language_model."),
    (re.compile(rf"{_BEFORE}(?=(?:layers|embed_tokens|norm)\b)"), "language_model.model."),
)
_LEFTOVER = re.compile(r"(?:inv_freq|(?:cos|sin)_cached|position_ids|masked_bias|causal_mask|attention_mask)$")
"""Tables and masks that a model computes itself; old files hold them, and transformers passes over them."""
CONVERT = "mlxpref reads only MLX's own quantization: convert the original, unquantized checkpoint (`mlxpref convert`)"
"""What to do with a checkpoint in another quantization."""
_FOREIGN = (
    (
        r"\blora_(?:[abAB]|embedding|magnitude)|\.base_layer\.|\.modules_to_save\.|\.original_(?:module|layer)\.",
        "a LoRA adapter that is not merged: merge it first (PEFT's merge_and_unload), or give its base with --model "
        "and the adapter with --adapter",
    ),
    (r"\.(?:SCB|weight_format|\w*absmax|\w*quant_map|quant_state\.\w+)$", f"quantized by bitsandbytes: {CONVERT}"),
    (r"\.(?:qweight|qzeros|g_idx)$", f"quantized by GPTQ or AWQ: {CONVERT}"),
    (
        r"\.(?:weight_scale\w*|input_scale|weight_packed|weight_shape|weight_zero_point|activation_scale)$",
        f"quantized to FP8 or by compressed-tensors: {CONVERT}",
    ),
    (
        r"(?:^|\.)(?:score|classifier|reward\w*|(?:v|rm|\w*(?:score|reward|value|regression|ranking))_?\w*head)(?:\.|$)",
        "a reward model with a head of its own, which scores one image; mlxpref asks for an answer in words: give the "
        "model that it was trained from, or measure its scores with `mlxpref eval --scores`",
    ),
)
"""By a pattern in a tensor's name: what the weights are, and what to do."""


def mlx_name(name: str) -> str:
    """The name in mlx-vlm's model of a tensor or a module in any spelling; another model's stays as it is."""
    name = _WRAPPER.sub("", name)
    for place, ours in _PLACES:
        if match := place.match(name):
            return ours + name[match.end() :]
    return name


def hub_name(name: str, model_type: str | None = None) -> str:
    """A name in the hub's files of a family from the one in mlx-vlm's model; None for that in transformers' model."""
    root = FAMILIES[model_type].root if model_type else "model."
    places = {
        "language_model.model.": "model.language_model." if root else "model.",
        "vision_tower.": f"{root}visual.",
        "language_model.": "",
    }
    for ours, theirs in places.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def places_of(tensors: Iterable[str], family: Family, where: object) -> dict[str, str]:
    """The place in mlx-vlm's model of each stored tensor, without leftovers that no model needs.

    Tensors of experts keep the ends of their names, one of several spellings. ModelError, which begins with `where`,
    for weights of another kind, and for two tensors with one place.
    """
    stored: dict[str, str] = {}
    for name in tensors:
        if _LEFTOVER.search(name) or (family.passed_over and re.search(family.passed_over, name)):
            continue
        for pattern, words in _FOREIGN:
            if re.search(pattern, name):
                raise ModelError(f"{where}: holds {name[:120]!r}: {words}")
        place = mlx_name(name)
        if not place.startswith(("vision_tower.", "language_model.")):
            raise ModelError(
                f"{where}: holds {name[:120]!r}, which no {family.name} has: another model, or more than a judge; "
                "give the original checkpoint"
            )
        if place in stored:
            raise ModelError(
                f"{where}: {stored[place][:120]!r} and {name[:120]!r} are the same weights twice; keep one of them"
            )
        stored[place] = name
    return {name: place for place, name in stored.items()}
