"""A checkpoint's config.json in the hub's layout, from any writer.

transformers 5 keeps the language model's settings in `text_config`, its rotary embedding in `rope_parameters`, and some
under other names; mlx-vlm does not read these of every family. transformers before 4.53 left out what equals a class's
default, which mlx-vlm's differ from. It drops keys that make mlx-vlm run code or skip a part. `families` has what
differs from family to family.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.families import FAMILIES, OTHERS, Family
from mlxpref.checkpoints.names import CONVERT
from mlxpref.errors import ModelError

Json = dict[str, Any]
_OF_TEXT = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "hidden_act", "use_sliding_window", "layer_types",
)  # fmt: skip
"""Keys of every family that text_config decides, as in transformers; the top level decides all that no family has."""
_DROPPED = ("auto_map", "model_file", "custom_pipelines", "dflash_config", "llm_config", "ple_storage", "skip_vision")
"""Code that mlx-vlm or transformers would run, and switches that make mlx-vlm load another model."""
_OTHER_METHOD = re.compile("_?load_in_|quant_type$")
"""Keys of quantizations that do not name their method."""


def check_kind(config_json: Mapping[str, Any], file: Path) -> None:
    """ModelError, which says what it is, for a config.json of another architecture or another quantization."""
    kinds = (config_json.get("model_type"), config_json.get("architectures"), config_json.get("_class_name"))
    kind = next(filter(None, kinds), "without a model_type")
    text = config_json.get("text_config")
    for part in (config_json, text if isinstance(text, dict) else {}):
        section = part.get("quantization_config")
        if not isinstance(section, dict):
            continue
        method = section.get("quant_method") or next((key for key in section if _OTHER_METHOD.match(key)), None)
        if method:
            raise ModelError(f"{file.parent}: quantized by {str(method)[:40]}: {CONVERT}")
    name = str(kind[0] if isinstance(kind, list) else kind)[:60]
    whole = name.removesuffix("_text")
    if isinstance(kind, str) and whole in FAMILIES:
        if name in FAMILIES:
            return
        of = FAMILIES[whole].name
        raise ModelError(f"{file.parent}: only the language model of {of}, which cannot see; give the whole model")
    words = f"{name!r} ({OTHERS[whole]})" if whole in OTHERS else repr(name)
    names = ", ".join(family.name for family in FAMILIES.values())
    raise ModelError(f"{file.parent}: architecture {words} is not supported; give one of {names}")


def normalise(config_json: Mapping[str, Any], tensors: Iterable[str], file: Path) -> Json:
    """The content of config.json in the hub's layout, without code and switches to another model.

    Its kind is checked, see `check_kind`. What is left out has transformers' default. `tensors` are the names of the
    stored weights; `file` is for the ModelError about impossible values.
    """
    family = FAMILIES[config_json["model_type"]]
    config = {key: value for key, value in config_json.items() if key not in _DROPPED}
    config["architectures"] = [f"{family.class_prefix}ForConditionalGeneration"]
    text, vision = (_part(config, name, file) for name in ("text_config", "vision_config"))
    for part in (config, text):
        if part.get("num_key_value_heads", 0) is None:
            part["num_key_value_heads"] = part.get("num_attention_heads") or family.text["num_attention_heads"]
    of_text = dict.fromkeys((*_OF_TEXT, *family.renamed, *family.text, *family.fixed))
    if family.is_nested:
        config["text_config"] = text or {key: config.pop(key) for key in of_text if key in config}
        config["text_config"].setdefault("model_type", f"{family.model_type}_text")
    elif "text_config" in config:
        if text.get("tie_word_embeddings") is True:  # as in transformers, either of both ties
            config["tie_word_embeddings"] = True
        config = _flat(config, text)
    language = config["text_config"] if family.is_nested else config
    for key in [key for key in language if family.passed_over and key.startswith("mtp_")]:
        del language[key]  # the head that drafts tokens is not loaded
    for key in of_text:
        if key in language and language[key] is None:
            del language[key]  # so that the default applies
    _write_language(language, family, config, file)
    if vision.get("model_type") == f"{family.model_type}_vision":
        vision = vision | {"model_type": family.model_type}
    vision = {key: value for key, value in vision.items() if key not in _DROPPED and value is not None}
    config["vision_config"] = {**family.vision, **vision}
    _write_image_token(config)
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
    """A config with the keys of text_config at the top level."""
    parts = ("text_config", "vision_config")
    inner = {key: value for key, value in text.items() if value is not None and key not in parts}
    outer = {key: value for key, value in config.items() if key != "text_config" and value is not None}
    flat = inner | outer | {key: inner[key] for key in _OF_TEXT if key in inner}
    if "dtype" in flat:
        flat["torch_dtype"] = flat.pop("dtype")
    return flat


def _write_language(language: Json, family: Family, config: Mapping[str, Any], file: Path) -> None:
    """Give the language model's settings the hub's names, and the defaults of what they lack."""
    for theirs, ours in family.renamed.items():
        if theirs in language:
            language.setdefault(ours, language.pop(theirs))
    kinds = language.get("layer_types")
    if "full_attention_interval" in family.text and isinstance(kinds, list) and "full_attention" in kinds:
        language.setdefault("full_attention_interval", kinds.index("full_attention") + 1)
    _write_rope(language, family, file)
    if family.theta_of_4 is not None and str(config.get("transformers_version")).startswith("4."):
        language.setdefault("rope_theta", family.theta_of_4)
    language["rope_scaling"].setdefault("mrope_section", list(family.mrope_section))
    language |= {**family.text, **language}
    if language.get("head_dim", 0) is None:
        hidden, heads = language["hidden_size"], language["num_attention_heads"]
        if isinstance(hidden, int) and isinstance(heads, int) and heads:
            language["head_dim"] = hidden // heads
    if family.rope == "rope_parameters":
        theta, share = language.pop("rope_theta"), language.pop("partial_rotary_factor", None)
        rope = {"rope_theta": theta, "partial_rotary_factor": share or family.rotary_share}
        language["rope_parameters"] = rope | language.pop("rope_scaling")


def _write_rope(language: Json, family: Family, file: Path) -> None:
    """Move the rotary embedding to rope_theta, and the rest to rope_scaling."""
    parameters: Json = {}
    for name in ("rope_scaling", "rope_parameters"):
        parameters |= _part(language, name, file)
    language.pop("rope_parameters", None)
    if "rope_theta" in parameters:
        language["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.get("type") or parameters.get("rope_type")
    if not family.is_nested:
        parameters.pop("rope_type", None)
        parameters["type"] = kind or "mrope"
    elif not kind:
        parameters["rope_type"] = "default"
    language["rope_scaling"] = parameters


def _write_image_token(config: Json) -> None:
    """Some of mlx-vlm's own configs name the image's and the video's token only as it does."""
    for kind in ("image", "video"):
        if config.get(f"{kind}_token_id") is None and config.get(f"{kind}_token_index") is not None:
            config[f"{kind}_token_id"] = config[f"{kind}_token_index"]


def _write_quantization(config: Json) -> None:
    """mlx-vlm reads MLX's own quantization only from `quantization`; null is none."""
    for name in ("quantization", "quantization_config"):
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
