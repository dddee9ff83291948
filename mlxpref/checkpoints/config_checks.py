"""What a config.json of the supported families may say: its sizes, and how the model computes; nothing is loaded."""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from mlxpref.errors import ModelError

__all__ = ["FAMILIES", "Json", "validate"]

Json = dict[str, Any]
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
"""The architectures that mlxpref judges with, by their model_type."""

_TEXT = {
    "hidden_size": 1 << 17,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}
_TEXT_MAY = {"num_key_value_heads": 1 << 12, "head_dim": 1 << 12, "max_position_embeddings": 1 << 31}
_TOKENS = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
_VISION_MAY = {"in_channels": 3, "in_chans": 3, "depth": 1 << 10, "num_heads": 1 << 12, "patch_size": 1 << 8}
_VISION_MAY |= {"spatial_merge_size": 1 << 4, "temporal_patch_size": 1 << 4, "window_size": 1 << 16}
_VISION = {
    "qwen2_vl": {"embed_dim": 1 << 16},
    "qwen2_5_vl": {"hidden_size": 1 << 16, "intermediate_size": 1 << 18},
    "qwen3_vl": {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_position_embeddings": 1 << 20},
}
"""The largest whole number that each size may be, so that a product of two is never too large to allocate."""
_ACTIVATIONS = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}
"""What mlx-vlm computes in the vision tower, whatever the config says; in the language model it is silu."""
_MODES = {"affine": {32, 64, 128}, "mxfp4": {32}, "nvfp4": {16}, "mxfp8": {32}}
_BITS = {"affine": {2, 3, 4, 5, 6, 8}, "mxfp4": {4}, "nvfp4": {4}, "mxfp8": {8}}
"""Group sizes and bits of each mode of MLX's quantization."""


def validate(config: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError for the first value of a config in the hub's layout that no model can have; `file` is named."""
    checks = _Values(file)
    family = config["model_type"]
    text, vision = {**config, **(config.get("text_config") or {})}, config["vision_config"]
    checks.whole(text, _TEXT, must=True)
    checks.whole(text, _TEXT_MAY)
    checks.whole(vision, _VISION[family], must=True, where="vision_config.")
    checks.whole(vision, _VISION_MAY, where="vision_config.")
    for name in ("rms_norm_eps", "rope_theta"):
        checks.number(text, name)
    _check_attention(text, checks)
    _check_rope(text, family, checks)
    for name in _TOKENS:
        value = config.get(name)
        if value is not None and not (_is_whole(value) and 0 <= value < text["vocab_size"]):
            checks.refuse(name, value, f"a token of the {text['vocab_size']} that the vocabulary has")
    if not isinstance(config["tie_word_embeddings"], bool):
        checks.refuse("tie_word_embeddings", config["tie_word_embeddings"], "true or false")
    _check_vision(vision, family, checks)
    _check_quantization(config, text, checks)


class _Values:
    """Values of one file; whatever is refused is refused in the same words."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def refuse(self, name: str, value: Any, allowed: str) -> None:
        raise ModelError(f"{self.file}: {name} is {_short(value)}, not {allowed}; use the checkpoint's original config")

    def whole(self, part: Mapping[str, Any], most: Mapping[str, int], must: bool = False, where: str = "") -> None:
        """Whole numbers from 1; what is null or not there passes unless it `must` be."""
        for name, top in most.items():
            value = part.get(name)
            if not (_is_whole(value) and 1 <= value <= top) and (must or value is not None):
                self.refuse(f"{where}{name}", value, f"a whole number from 1 to {top}")

    def number(self, part: Mapping[str, Any], name: str) -> None:
        """A finite number above 0."""
        value = part.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.refuse(name, value, "a number above 0")


def _short(value: Any) -> str:
    return "missing" if value is None else reprlib.repr(value)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_attention(text: Mapping[str, Any], checks: _Values) -> None:
    """Heads divide the width, groups of queries the heads; every layer attends to everything before it."""
    heads = text["num_attention_heads"]
    keys = text.get("num_key_value_heads") or heads
    if heads % keys:
        checks.refuse("num_key_value_heads", keys, f"a divisor of the {heads} heads")
    if not text.get("head_dim") and text["hidden_size"] % heads:
        checks.refuse("num_attention_heads", heads, f"a divisor of the width, {text['hidden_size']}")
    if text.get("hidden_act") not in (None, "silu"):
        checks.refuse("hidden_act", text["hidden_act"], "silu, which is all that mlx-vlm computes")
    kinds = text.get("layer_types") or []
    if text.get("use_sliding_window") or not isinstance(kinds, list) or {*map(str, kinds)} - {"full_attention"}:
        checks.refuse("use_sliding_window or layer_types", True, "full attention, which is all that mlx-vlm computes")


def _check_rope(text: Mapping[str, Any], family: str, checks: _Values) -> None:
    """The rotary embedding: in three sections that fill a head, and not stretched."""
    rope = text.get("rope_scaling") or {}
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    section = rope.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or not all(_is_whole(n) and n > 0 for n in section):
        checks.refuse("rope_scaling.mrope_section", section, "a list of three whole numbers above 0")
    elif 2 * sum(section) != head:
        checks.refuse("rope_scaling.mrope_section", section, f"half of a head's {head} numbers together")
    for name in ("type", "rope_type"):
        if rope.get(name) not in (None, "default", "mrope"):
            checks.refuse(f"rope_scaling.{name}", rope[name], "default or mrope, which is all that mlx-vlm computes")
    woven = rope.get("mrope_interleaved")
    if woven is not None and woven is not (family == "qwen3_vl"):
        checks.refuse("rope_scaling.mrope_interleaved", woven, f"what {FAMILIES[family]} has")


def _check_vision(vision: Mapping[str, Any], family: str, checks: _Values) -> None:
    """The vision tower's heads, activation, and the lists of its blocks."""
    width = vision["embed_dim" if family == "qwen2_vl" else "hidden_size"]
    heads, depth = vision.get("num_heads", 16), vision.get("depth", 32)
    if width % heads or width // heads % 4:
        checks.refuse("vision_config.num_heads", heads, f"heads of four or a multiple of it in {width} numbers")
    if family == "qwen2_vl":
        checks.number({"vision_config.mlp_ratio": vision.get("mlp_ratio", 4)}, "vision_config.mlp_ratio")
        if width * vision.get("mlp_ratio", 4) > 1 << 18:
            checks.refuse("vision_config.mlp_ratio", vision["mlp_ratio"], "one that can be allocated")
    if vision.get("hidden_act") not in (None, _ACTIVATIONS[family]):
        checks.refuse("vision_config.hidden_act", vision["hidden_act"], f"{_ACTIVATIONS[family]}, as mlx-vlm computes")
    if vision.get("model_type") not in (None, family):
        checks.refuse("vision_config.model_type", vision["model_type"], family)
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        blocks = vision.get(name)
        if blocks is None:
            continue
        if not isinstance(blocks, list) or not all(_is_whole(i) and i >= 0 for i in blocks):
            checks.refuse(f"vision_config.{name}", blocks, "a list of blocks")
        if len({*blocks}) < len(blocks) or (name.startswith("deepstack") and max(blocks, default=0) >= depth):
            checks.refuse(f"vision_config.{name}", blocks, f"blocks of the {depth} there are, each once")


def _check_quantization(config: Mapping[str, Any], text: Mapping[str, Any], checks: _Values) -> None:
    """Quantization is MLX's own, of each layer that is named on its own, too."""
    for part in (config, text):
        for name in ("quantization", "quantization_config"):
            found = part.get(name)
            if found is None:
                continue
            if not isinstance(found, dict):
                checks.refuse(name, found, "an object")
            if found.get("quant_method"):
                method = _short(found["quant_method"])
                raise ModelError(
                    f"{checks.file}: quantized by {method}; mlxpref reads MLX's own quantization: use the original "
                    "checkpoint, or one that was converted from it"
                )
            _check_layer(found, name, checks)
            for layer, entry in found.items():
                if isinstance(entry, dict):
                    _check_layer({"mode": found.get("mode", "affine")} | entry, f"{name} of {layer[:80]}", checks)


def _check_layer(entry: Mapping[str, Any], name: str, checks: _Values) -> None:
    mode, bits, group = entry.get("mode", "affine"), entry.get("bits"), entry.get("group_size")
    if not isinstance(mode, str) or mode not in _MODES:
        checks.refuse(f"{name}: mode", mode, f"one of {', '.join(_MODES)}")
    elif not _is_whole(bits) or bits not in _BITS[mode]:
        checks.refuse(f"{name}: bits", bits, f"one of {sorted(_BITS[mode])}")
    elif not _is_whole(group) or group not in _MODES[mode]:
        checks.refuse(f"{name}: group_size", group, f"one of {sorted(_MODES[mode])}")
