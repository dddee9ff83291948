"""A checkpoint's config.json in the hub's layout, whatever wrote it.

transformers 5 keeps the language model's settings in `text_config` and its rotary embedding in `rope_parameters`;
mlx-vlm reads neither of the Qwen2-VL families so. Nothing that a config could make mlx-vlm run or skip is kept.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.config_checks import FAMILIES, Json, validate
from mlxpref.errors import ModelError

__all__ = ["FAMILIES", "Json", "normalise", "validate"]

_CLASSES = dict(zip(FAMILIES, ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"), strict=True))
_NESTED = "qwen3_vl"
"""The one family whose text_config is the hub's own layout; the others have its keys beside vision_config."""
_OF_TEXT = (
    *(
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("rms_norm_eps", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("hidden_act", "use_sliding_window", "layer_types"),
)
"""What text_config says goes before what stands beside it, as in transformers; of other keys the outer one does."""
_DROPPED = ("auto_map", "model_file", "custom_pipelines", "dflash_config", "llm_config", "ple_storage", "skip_vision")
"""Code that mlx-vlm or transformers would run, and switches that lead mlx-vlm to another model than the family's."""


def normalise(stored: Mapping[str, Any], tensors: Iterable[str], file: Path) -> Json:
    """What a config.json says, in the hub's layout, without code and switches that lead to another model.

    `tensors` are the names of the stored weights; `file` is named in the ModelError for what no model says.
    """
    family = stored.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        names = ", ".join(FAMILIES.values())
        raise ModelError(
            f"{file.parent}: architecture {str(family)[:60]!r} is not supported; mlxpref judges with {names}"
        )
    config = {key: value for key, value in stored.items() if key not in _DROPPED}
    config["architectures"] = [f"{_CLASSES[family]}ForConditionalGeneration"]
    text, vision = (_part(config, name, file) for name in ("text_config", "vision_config"))
    if "text_config" in config and family != _NESTED:
        config = _flat(config, text)
    elif text:
        config["text_config"] = text
    language = config["text_config"] if family == _NESTED and text else config
    for key in _OF_TEXT:
        if key in language and language[key] is None:
            del language[key]  # so that the default is taken
    _write_rope(language, family, file)
    if vision.get("model_type") == f"{family}_vision":
        vision = vision | {"model_type": family}
    config["vision_config"] = {key: value for key, value in vision.items() if key not in _DROPPED and value is not None}
    _write_quantization(config)
    _write_tie(config, language, tensors)
    return config


def _part(config: Mapping[str, Any], name: str, file: Path) -> Json:
    """A part of a config as a copy of its own; empty where it is not there or null."""
    part = config.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise ModelError(f"{file}: {name} is no object; download the checkpoint again")
    return dict(part)


def _flat(config: Json, text: Json) -> Json:
    """A config of the Qwen2-VL families whose text_config was written beside the other keys."""
    parts = ("text_config", "vision_config")
    stated = {key: value for key, value in text.items() if value is not None and key not in parts}
    outer = {key: value for key, value in config.items() if key != "text_config" and value is not None}
    flat = stated | outer | {key: stated[key] for key in _OF_TEXT if key in stated}
    if "dtype" in flat:
        flat["torch_dtype"] = flat.pop("dtype")
    return flat


def _write_rope(language: Json, family: str, file: Path) -> None:
    """Put the rotary embedding where the hub's layout has it: rope_theta, and the rest in rope_scaling."""
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
    """mlx-vlm reads MLX's own quantization from `quantization` alone; null is none."""
    for name in ("quantization", "quantization_config"):
        if config.get(name) is None:
            config.pop(name, None)
    found = config.get("quantization_config")
    if isinstance(found, dict) and "group_size" in found and "quant_method" not in found:
        config.setdefault("quantization", found)


def _write_tie(config: Json, language: Json, tensors: Iterable[str]) -> None:
    """State whether the head is the embedding: what the keys say, unless the weights have a head beside it.

    Some trainers write both; mlx-vlm takes only one, and loads the head where it is said to be apart.
    """
    tied = config.get("tie_word_embeddings", language.get("tie_word_embeddings"))
    names = list(tensors)
    if tied in (None, True) and names:
        tied = not any(name.endswith("lm_head.weight") for name in names)
    config["tie_word_embeddings"] = language["tie_word_embeddings"] = False if tied is None else tied
