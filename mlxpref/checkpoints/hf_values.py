"""Values in a config.json that no model of its family has, or that mlx-vlm would silently ignore."""

import reprlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from mlxpref.checkpoints.families import FAMILIES, Family
from mlxpref.errors import ModelError

Problems = Iterator[tuple[str, Any, str]]
"""Errors in a config: the key, its value, and the allowed values."""

# The largest value of each size, so that a product of two can be allocated. Required sizes come first.
_TEXT = {
    "hidden_size": 1 << 17, "num_hidden_layers": 1 << 10, "num_attention_heads": 1 << 12, "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}  # fmt: skip
_TEXT_MAY = {"num_key_value_heads": 1 << 12, "head_dim": 1 << 12, "max_position_embeddings": 1 << 31}
_VISION_MAY = {
    "in_channels": 3, "in_chans": 3, "depth": 1 << 10, "num_heads": 1 << 12, "patch_size": 1 << 8,
    "spatial_merge_size": 1 << 4, "temporal_patch_size": 1 << 4, "window_size": 1 << 16,
}  # fmt: skip
_QUANTIZATION = {
    "mode": ("affine", "mxfp4", "nvfp4", "mxfp8"),
    "bits": (2, 3, 4, 5, 6, 8),
    "group_size": (16, 32, 64, 128),
}
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_ALL = "which is all that mlx-vlm computes"


def validate(config: Mapping[str, Any], file: Path) -> None:
    """ModelError for the first value that no model of the family has, or that mlx-vlm would silently ignore.

    `config` is in the hub's layout, `file` is for the message. Loading finds sizes that only contradict the weights.
    """
    family = FAMILIES[config["model_type"]]
    text, vision = family.language(config), config["vision_config"]
    problems = chain(  # lazy: later checks rely on earlier ones
        _sizes(text, {**_TEXT, **family.text_sizes}, _TEXT_MAY),
        _sizes(vision, family.vision_sizes, _VISION_MAY, "vision_config."),
        _numbers(text, vision, family),
        _attention(text, family),
        _rotary(text, family),
        _recurrent(text) if "full_attention_interval" in family.text else (),
        _experts(text) if "num_experts" in family.text else (),
        _vision(vision, family),
        _tokens(config, text),
        *(
            _quantization(part.get(name), name)
            for part in (config, text)
            for name in ("quantization", "quantization_config")
        ),
    )
    for name, value, allowed in problems:
        value_text = "missing" if value is None else reprlib.repr(value)
        raise ModelError(f"{file}: {name} is {value_text}, not {allowed}; use the original checkpoint")


def _is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_whole(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(_is_whole(value) for value in values)


def _sizes(part: Mapping[str, Any], must: Mapping[str, int], may: Mapping[str, int], where: str = "") -> Problems:
    """Sizes that are no whole number from 1 to the given one; those in `may` may also be null."""
    for name, most in {**must, **may}.items():
        value = part.get(name)
        if not (_is_whole(value) and 1 <= value <= most) and (name in must or value is not None):
            yield f"{where}{name}", value, f"a whole number from 1 to {most}"


def _numbers(text: Mapping[str, Any], vision: Mapping[str, Any], family: Family) -> Problems:
    rope = text[family.rope]
    theta = rope.get("rope_theta") if family.rope == "rope_parameters" else text.get("rope_theta")
    numbers = {"rms_norm_eps": text.get("rms_norm_eps"), "rope_theta": theta}
    for name, value in (numbers | {"vision_config.mlp_ratio": vision.get("mlp_ratio", 4)}).items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e15:
            yield name, value, "a number above 0"


def _attention(text: Mapping[str, Any], family: Family) -> Problems:
    """Errors unless key heads divide the heads, and each layer is what mlx-vlm makes of it."""
    heads, key_heads = text["num_attention_heads"], text.get("num_key_value_heads")
    if key_heads and heads % key_heads:
        yield "num_key_value_heads", key_heads, f"a divisor of the {heads} heads"
    if text.get("hidden_act") not in (None, "silu"):
        yield "hidden_act", text["hidden_act"], f"silu, {_ALL}"
    for name, value in family.fixed.items():
        if text.get(name) not in (None, value):
            yield name, text[name], f"{value}, {_ALL}"
    if "full_attention_interval" in family.text:
        return
    kinds = text.get("layer_types") or []
    if text.get("use_sliding_window") or not isinstance(kinds, list) or {*map(str, kinds)} - {"full_attention"}:
        yield "use_sliding_window or layer_types", True, f"full attention, {_ALL}"


def _rotary(text: Mapping[str, Any], family: Family) -> Problems:
    """Errors unless three sections fill what rotates of a head."""
    rope, head = text[family.rope], text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    share = rope.get("partial_rotary_factor") if family.rope == "rope_parameters" else 1
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        yield f"{family.rope}.partial_rotary_factor", share, "a share above 0 of a head"
        return
    section, rotating = rope.get("mrope_section"), int(head * share)
    if not _are_whole(section) or len(section) != 3 or 2 * sum(section) != rotating:
        yield f"{family.rope}.mrope_section", section, f"three whole numbers that fill half of a head's {rotating}"
    for name in ("type", "rope_type"):
        if rope.get(name) not in (None, "default", "mrope"):
            yield f"{family.rope}.{name}", rope[name], f"default or mrope, {_ALL}"
    if rope.get("mrope_interleaved") not in (None, family.interleaves):
        yield f"{family.rope}.mrope_interleaved", rope["mrope_interleaved"], f"what {family.name} has"


def _recurrent(text: Mapping[str, Any]) -> Problems:
    """Errors unless every so many layers, and at least one, attends, and key heads divide the value heads."""
    interval, layers = text["full_attention_interval"], text["num_hidden_layers"]
    # Without a recurrent layer nothing would tell the hub's weights from MLX's.
    if not 2 <= interval <= layers:
        yield "full_attention_interval", interval, f"a whole number from 2 to the {layers} layers"
    kinds = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(layers)]
    if text.get("layer_types") not in (None, kinds):
        yield "layer_types", text["layer_types"], f"full attention in the last of each {interval} layers, {_ALL}"
    value_heads, key_heads = text["linear_num_value_heads"], text["linear_num_key_heads"]
    if value_heads % key_heads:
        yield "linear_num_key_heads", key_heads, f"a divisor of the {value_heads} value heads"
    if text["linear_conv_kernel_dim"] < 2:
        yield "linear_conv_kernel_dim", text["linear_conv_kernel_dim"], "a whole number from 2 on"


def _experts(text: Mapping[str, Any]) -> Problems:
    """Errors unless a token goes to some of the experts, and the layers without them are listed."""
    experts, used = text["num_experts"], text["num_experts_per_tok"]
    if used > experts:
        yield "num_experts_per_tok", used, f"at most the {experts} experts there are"
    if not _are_whole(text.get("mlp_only_layers")):
        yield "mlp_only_layers", text.get("mlp_only_layers"), "a list of layers"


def _vision(vision: Mapping[str, Any], family: Family) -> Problems:
    """Errors in the vision tower's heads, activation, and lists of blocks."""
    width, activation = vision[family.vision_width], family.vision_activation
    heads, depth = vision.get("num_heads", 16), vision.get("depth", 32)
    if width % heads or width // heads % 4:
        yield "vision_config.num_heads", heads, f"heads of four or a multiple of it in {width} numbers"
    if vision.get("hidden_act") not in (None, activation):
        yield "vision_config.hidden_act", vision["hidden_act"], f"{activation}, as mlx-vlm computes"
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        blocks = vision.get(name) or []
        last = depth if name == "deepstack_visual_indexes" else 1 << 10
        if not _are_whole(blocks) or len({*blocks}) < len(blocks) or max(blocks, default=0) >= last:
            yield f"vision_config.{name}", blocks, f"a list of the {depth} blocks there are, each once"


def _tokens(config: Mapping[str, Any], text: Mapping[str, Any]) -> Problems:
    for name in _TOKENS:
        value = config.get(name)
        if value is not None and not (_is_whole(value) and value < text["vocab_size"]):
            yield name, value, f"a token of the {text['vocab_size']} that the vocabulary has"
    if not isinstance(config["tie_word_embeddings"], bool):
        yield "tie_word_embeddings", config["tie_word_embeddings"], "true or false"


def _quantization(section: Any, name: str) -> Problems:
    """Errors unless the quantization, also of single layers, is MLX's own.

    MLX ends the process on groups of 0, and itself checks combinations of bits and groups.
    """
    if section is None:
        return
    if not isinstance(section, dict):
        yield name, section, "an object"
    layers = {f"{name} of {key[:80]}": value for key, value in section.items() if isinstance(value, dict)}
    for where, entry in {name: section, **layers}.items():
        for key, values in _QUANTIZATION.items():
            value = entry.get(key, "affine" if key == "mode" else None)
            if isinstance(value, bool) or value not in values:
                yield f"{where}: {key}", value, f"one of {', '.join(map(str, values))}"
