"""A checkpoint's config.json in the hub's layout, whatever wrote it, and a folder that mlx-vlm can load it from.

transformers 5 keeps the language model's settings in `text_config` and its rotary embedding in `rope_parameters`;
mlx-vlm reads neither of the Qwen2-VL families so. Nothing that a config could make mlx-vlm run or skip is kept.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlxpref.checkpoints.config_checks import FAMILIES, Json, check_values
from mlxpref.checkpoints.safetensors import TensorInfo, read_json_object, read_tensor_infos
from mlxpref.errors import ModelError

__all__ = ["FAMILIES", "check_weights", "is_rewritten", "load_hf_config", "readable"]

CONFIG = "config.json"
_CHUNK = 1 << 24
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
_LEFT_OUT = ("offload_index.json", "hf_quant_config.json")
"""Files that make mlx-vlm take missing weights for granted, or weights for quantized that are not MLX's."""


def load_hf_config(folder: Path) -> Json:
    """The config of a model folder in the hub's layout, checked; raises ModelError for one that cannot be used."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give a folder, a Hugging Face id or `demo`")
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json there; a model folder holds config, tokenizer and weights")
    raw = read_json_object(file)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        names = ", ".join(FAMILIES.values())
        raise ModelError(f"{folder}: architecture {str(family)[:60]!r} is not supported; mlxpref judges with {names}")
    config = {key: value for key, value in raw.items() if key not in _DROPPED}
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
    _write_tie(config, language, folder)
    check_values(config, file)
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


def _write_tie(config: Json, language: Json, folder: Path) -> None:
    """State whether the head is the embedding: what the keys say, unless the weights have a head beside it.

    Some trainers write both; mlx-vlm takes only one, and loads the head where it is said to be apart.
    """
    tied = config.get("tie_word_embeddings", language.get("tie_word_embeddings"))
    if tied in (None, True) and any(folder.glob("*.safetensors")):
        has_head = any(name.endswith("lm_head.weight") for name in read_tensor_infos(folder))
        tied = not has_head
    config["tie_word_embeddings"] = language["tie_word_embeddings"] = False if tied is None else tied


def is_rewritten(folder: Path) -> bool:
    """Whether a folder's config.json is not what mlx-vlm is given."""
    return load_hf_config(folder) != read_json_object(folder / CONFIG)


@contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """A folder that mlx-vlm can load: this one, or a temporary one of links to its files with the rewritten config.

    The temporary one is gone afterwards; weights loaded from it, lazily too, keep their files open.
    """
    if not is_rewritten(folder) and not any((folder / name).exists() for name in _LEFT_OUT):
        yield folder
        return
    with TemporaryDirectory(prefix="mlxpref-") as place:
        view = Path(place)
        for file in folder.resolve().iterdir():
            if file.name not in (CONFIG, *_LEFT_OUT) and file.suffix != ".py" and file.is_file():
                (view / file.name).symlink_to(file)
        (view / CONFIG).write_text(json.dumps(load_hf_config(folder), indent=2), encoding="utf-8")
        yield view


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config of sizes that the folder's files do not fill, before anything of these sizes is made.

    Names and shapes one by one are mlx-vlm's to compare, when it loads. Raises ModelError.
    """
    heads = read_tensor_infos(folder)
    text, vision = {**config, **(config.get("text_config") or {})}, config["vision_config"]
    layers, depth = text["num_hidden_layers"], vision.get("depth", 32)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    width = vision["embed_dim" if config["model_type"] == "qwen2_vl" else "hidden_size"]
    stated = text["vocab_size"] * hidden + layers * 3 * hidden * inner + depth * 4 * width**2
    stored = sum(tensor.end - tensor.start for tensor in heads.values())
    # 2 bits a weight are the fewest that MLX quantizes to.
    if layers + depth > len(heads) or stated > 4 * stored:
        raise ModelError(
            f"{folder}: config.json is of {layers + depth} layers and {stated / 1e6:.4g} million weights or more, the "
            f"safetensors hold {len(heads)} tensors in {stored / 1e6:.4g} MB: they are not of one model; "
            "download the checkpoint again"
        )
    _check_head(folder, heads)


def _check_head(folder: Path, heads: Mapping[str, TensorInfo]) -> None:
    """Where the config says that the head is the embedding, one that is stored as well has to be the same."""
    raw = read_json_object(folder / CONFIG)
    if not raw.get("tie_word_embeddings", (raw.get("text_config") or {}).get("tie_word_embeddings")):
        return
    for name, head in heads.items():
        if "lm_head." not in name:
            continue
        twin = next((heads[n] for n in heads if n.endswith(f"embed_tokens.{name.rpartition('.')[2]}")), None)
        if twin is None or not _same(head, twin):
            raise ModelError(
                f"{folder}: config.json says that the head is the embedding, but {name} is another; set "
                "tie_word_embeddings to what the model was trained with"
            )


def _same(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.end - first.start
        while left > 0:
            size = min(left, _CHUNK)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True
