"""A checkpoint's config.json in the hub's layout, from any writer.

transformers 5 keeps the language model's settings in `text_config` and its rotary embedding in `rope_parameters`; for
the Qwen2-VL families mlx-vlm reads neither. transformers before 4.53 left out what equals a class's default, which
mlx-vlm's differ from. It drops keys that make mlx-vlm run code or skip a part.
"""

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from mlxpref.checkpoints.names import CONVERT
from mlxpref.errors import ModelError

Json = dict[str, Any]
Problems = Iterator[tuple[str, Any, str]]
"""Errors in a config: the key, its value, and the allowed values."""
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
"""The supported architectures, by their model_type."""
_CLASSES = dict(zip(FAMILIES, ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"), strict=True))
_NESTED = "qwen3_vl"
"""The one family whose text_config is the hub's own layout; the others have its keys at the top level."""
_OF_TEXT = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "hidden_act", "use_sliding_window", "layer_types",
)  # fmt: skip
"""Keys that text_config decides, as in transformers; the top level decides all others."""
_QWEN2_TEXT = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
}  # fmt: skip
_DEFAULTS: dict[str, tuple[Json, Json, list[int]]] = {
    "qwen2_vl": (
        _QWEN2_TEXT,
        {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
         "spatial_merge_size": 2, "temporal_patch_size": 2},
        [16, 24, 24],
    ),
    "qwen2_5_vl": (
        _QWEN2_TEXT,
        {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
         "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 4, "window_size": 112,
         "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]},
        [16, 24, 24],
    ),
    "qwen3_vl": (
        {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000,
         "rms_norm_eps": 1e-06, "rope_theta": 500000.0},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
         "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
         "deepstack_visual_indexes": [8, 16, 24]},
        [24, 20, 20],
    ),
}  # fmt: skip
"""What transformers' classes take for a missing key: of text_config, of vision_config, and the rotary sections."""
_THETA_OF_4 = 5000000.0
"""The default of rope_theta of Qwen3-VL in transformers 4."""
_DROPPED = ("auto_map", "model_file", "custom_pipelines", "dflash_config", "llm_config", "ple_storage", "skip_vision")
"""Code that mlx-vlm or transformers would run, and switches that make mlx-vlm load another model."""

# The largest value of each size, so that a product of two can be allocated. Required sizes come first.
_TEXT = {
    "hidden_size": 1 << 17, "num_hidden_layers": 1 << 10, "num_attention_heads": 1 << 12, "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}  # fmt: skip
_TEXT_MAY = {"num_key_value_heads": 1 << 12, "head_dim": 1 << 12, "max_position_embeddings": 1 << 31}
_VISION = {
    "qwen2_vl": {"embed_dim": 1 << 16},
    "qwen2_5_vl": {"hidden_size": 1 << 16, "intermediate_size": 1 << 18},
    "qwen3_vl": {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_position_embeddings": 1 << 20},
}
_VISION_MAY = {
    "in_channels": 3, "in_chans": 3, "depth": 1 << 10, "num_heads": 1 << 12, "patch_size": 1 << 8,
    "spatial_merge_size": 1 << 4, "temporal_patch_size": 1 << 4, "window_size": 1 << 16,
}  # fmt: skip
_ACTIVATIONS = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}
"""The vision tower's activation in mlx-vlm, which ignores the config; the language model's is silu."""
_SECTIONS = ("quantization", "quantization_config")
_OTHER_METHOD = re.compile("_?load_in_|quant_type$")
"""Keys of quantizations that do not name their method."""
_QUANTIZATION = {
    "mode": ("affine", "mxfp4", "nvfp4", "mxfp8"),
    "bits": (2, 3, 4, 5, 6, 8),
    "group_size": (16, 32, 64, 128),
}
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def check_kind(config_json: Mapping[str, Any], file: Path) -> None:
    """ModelError, which says what it is, for a config.json of another architecture or another quantization."""
    kinds = (config_json.get("model_type"), config_json.get("architectures"), config_json.get("_class_name"))
    family, names = next(filter(None, kinds), "without a model_type"), ", ".join(FAMILIES.values())
    text = config_json.get("text_config")
    for part in (config_json, text if isinstance(text, dict) else {}):
        section = part.get("quantization_config")
        if not isinstance(section, dict):
            continue
        method = section.get("quant_method") or next((key for key in section if _OTHER_METHOD.match(key)), None)
        if method:
            raise ModelError(f"{file.parent}: quantized by {str(method)[:40]}: {CONVERT}")
    if isinstance(family, str) and family.removesuffix("_text") in FAMILIES:
        if family in FAMILIES:
            return
        whole = FAMILIES[family.removesuffix("_text")]
        raise ModelError(f"{file.parent}: only the language model of {whole}, which cannot see; give the whole model")
    name = str(family[0] if isinstance(family, list) else family)[:60]
    raise ModelError(f"{file.parent}: architecture {name!r} is not supported; give one of {names}")


def normalise(config_json: Mapping[str, Any], tensors: Iterable[str], file: Path) -> Json:
    """The content of config.json in the hub's layout, without code and switches to another model.

    Its kind is checked, see `check_kind`. What is left out has transformers' default. `tensors` are the names of the
    stored weights; `file` is for the ModelError about impossible values.
    """
    family = config_json["model_type"]
    config = {key: value for key, value in config_json.items() if key not in _DROPPED}
    config["architectures"] = [f"{_CLASSES[family]}ForConditionalGeneration"]
    text, vision = (_part(config, name, file) for name in ("text_config", "vision_config"))
    of_text, of_vision, sections = _DEFAULTS[family]
    for part in (config, text):
        if part.get("num_key_value_heads", 0) is None:
            part["num_key_value_heads"] = part.get("num_attention_heads") or of_text["num_attention_heads"]
    if family == _NESTED:
        config["text_config"] = text or {key: config.pop(key) for key in _OF_TEXT if key in config}
    elif "text_config" in config:
        if text.get("tie_word_embeddings") is True:  # as in transformers, either of both ties
            config["tie_word_embeddings"] = True
        config = _flat(config, text)
    language = config["text_config"] if family == _NESTED else config
    for key in _OF_TEXT:
        if key in language and language[key] is None:
            del language[key]  # so that the default applies
    _write_rope(language, family, file)
    if family == _NESTED and str(config.get("transformers_version")).startswith("4."):
        language.setdefault("rope_theta", _THETA_OF_4)
    language["rope_scaling"].setdefault("mrope_section", sections)
    language |= of_text | language
    if vision.get("model_type") == f"{family}_vision":
        vision = vision | {"model_type": family}
    vision = {key: value for key, value in vision.items() if key not in _DROPPED and value is not None}
    config["vision_config"] = vision | {key: of_vision[key] for key in of_vision.keys() - vision.keys()}
    _write_quantization(config)
    _write_tie(config, language, tensors)
    return config


def _part(config: Mapping[str, Any], name: str, file: Path) -> Json:
    """A copy of a part of a config; empty if it is missing or null."""
    part = config.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise ModelError(f"{file}: {name} is no object; download the checkpoint again")
    return dict(part)


def _flat(config: Json, text: Json) -> Json:
    """A config of the Qwen2-VL families with the keys of text_config at the top level."""
    parts = ("text_config", "vision_config")
    inner = {key: value for key, value in text.items() if value is not None and key not in parts}
    outer = {key: value for key, value in config.items() if key != "text_config" and value is not None}
    flat = inner | outer | {key: inner[key] for key in _OF_TEXT if key in inner}
    if "dtype" in flat:
        flat["torch_dtype"] = flat.pop("dtype")
    return flat


def _write_rope(language: Json, family: str, file: Path) -> None:
    """Move the rotary embedding to the hub's layout: rope_theta, and the rest in rope_scaling."""
    parameters: Json = {}
    for name in ("rope_scaling", "rope_parameters"):
        parameters |= _part(language, name, file)
    language.pop("rope_parameters", None)
    if "rope_theta" in parameters:
        language["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.get("type") or parameters.get("rope_type")
    if family != _NESTED:
        parameters.pop("rope_type", None)
        parameters["type"] = kind or "mrope"
    language["rope_scaling"] = parameters


def _write_quantization(config: Json) -> None:
    """mlx-vlm reads MLX's own quantization only from `quantization`; null is none."""
    for name in _SECTIONS:
        if config.get(name) is None:
            config.pop(name, None)
    section = config.get("quantization_config")
    if isinstance(section, dict) and "group_size" in section and "quant_method" not in section:
        config.setdefault("quantization", section)


def _write_tie(config: Json, language: Json, tensors: Iterable[str]) -> None:
    """Set whether the head is the embedding: as in the keys, unless the weights have a separate head.

    Some trainers write both; mlx-vlm loads a head only if the config says that it is not the embedding.
    """
    tied = config.get("tie_word_embeddings", language.get("tie_word_embeddings"))
    names = list(tensors)
    if tied in (None, True) and names:
        tied = not any(name.endswith("lm_head.weight") for name in names)
    config["tie_word_embeddings"] = language["tie_word_embeddings"] = False if tied is None else tied


def validate(config: Mapping[str, Any], file: Path) -> None:
    """ModelError for the first value that no model of the family has, or that mlx-vlm would silently ignore.

    `config` is in the hub's layout, `file` is for the message. Loading finds sizes that only contradict the weights.
    """
    family = config["model_type"]
    text, vision = {**config, **(config.get("text_config") or {})}, config["vision_config"]
    problems = chain(  # lazy: later checks rely on earlier ones
        _sizes(text, _TEXT, _TEXT_MAY),
        _sizes(vision, _VISION[family], _VISION_MAY, "vision_config."),
        _numbers(text, vision),
        _attention(text, family),
        _vision(vision, family),
        _tokens(config, text),
        *(_quantization(part.get(name), name) for part in (config, text) for name in _SECTIONS),
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


def _numbers(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Problems:
    numbers = {name: text.get(name) for name in ("rms_norm_eps", "rope_theta")}
    for name, value in (numbers | {"vision_config.mlp_ratio": vision.get("mlp_ratio", 4)}).items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e15:
            yield name, value, "a number above 0"


def _attention(text: Mapping[str, Any], family: str) -> Problems:
    """Errors unless key heads divide the heads, attention is full, and three rotary sections fill a head."""
    heads, key_heads = text["num_attention_heads"], text.get("num_key_value_heads")
    if key_heads and heads % key_heads:
        yield "num_key_value_heads", key_heads, f"a divisor of the {heads} heads"
    if text.get("hidden_act") not in (None, "silu"):
        yield "hidden_act", text["hidden_act"], "silu, which is all that mlx-vlm computes"
    kinds = text.get("layer_types") or []
    if text.get("use_sliding_window") or not isinstance(kinds, list) or {*map(str, kinds)} - {"full_attention"}:
        yield "use_sliding_window or layer_types", True, "full attention, which is all that mlx-vlm computes"
    rope, head = text["rope_scaling"], text.get("head_dim") or text["hidden_size"] // heads
    section = rope.get("mrope_section")
    if not _are_whole(section) or len(section) != 3 or 2 * sum(section) != head:
        yield "rope_scaling.mrope_section", section, f"three whole numbers that fill half of a head's {head}"
    for name in ("type", "rope_type"):
        if rope.get(name) not in (None, "default", "mrope"):
            yield f"rope_scaling.{name}", rope[name], "default or mrope, which is all that mlx-vlm computes"
    if rope.get("mrope_interleaved") not in (None, family == _NESTED):
        yield "rope_scaling.mrope_interleaved", rope["mrope_interleaved"], f"what {FAMILIES[family]} has"


def _vision(vision: Mapping[str, Any], family: str) -> Problems:
    """Errors in the vision tower's heads, activation, and lists of blocks."""
    width = vision["embed_dim" if family == "qwen2_vl" else "hidden_size"]
    heads, depth = vision.get("num_heads", 16), vision.get("depth", 32)
    if width % heads or width // heads % 4:
        yield "vision_config.num_heads", heads, f"heads of four or a multiple of it in {width} numbers"
    if vision.get("hidden_act") not in (None, _ACTIVATIONS[family]):
        yield "vision_config.hidden_act", vision["hidden_act"], f"{_ACTIVATIONS[family]}, as mlx-vlm computes"
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
