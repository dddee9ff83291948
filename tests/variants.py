"""Rewrites a checkpoint in other layouts: as transformers 5 writes it, in one file, with another config."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import CONFIG_MAPPING

__all__ = ["change_config", "leave_out_defaults", "read_weights", "write_transformers_5", "write_weights"]

_OUTER = {"architectures", "model_type", "image_token_id", "video_token_id", "vision_start_token_id"}
_OUTER |= {"vision_end_token_id", "vision_token_id", "tie_word_embeddings", "transformers_version", "vision_config"}
_LEFT_OUT = {
    "depth",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "mlp_ratio",
    "window_size",
}
_LEFT_OUT |= {"linear_conv_kernel_dim", "decoder_sparse_step", "mlp_only_layers"}
_LEFT_OUT |= {"tokens_per_second", "rms_norm_eps", "max_position_embeddings", "rope_theta", "num_key_value_heads"}


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder by name."""
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(file)).items()}


def write_weights(folder: Path, weights: dict[str, mx.array]) -> None:
    """Replace the weights of a folder by these, in one file."""
    mx.eval(weights)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Set keys of config.json, or remove those given as ...; return the new config."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(config))
    return config


def write_transformers_5(source: Path, target: Path) -> Path:
    """A copy in the layout that save_pretrained of transformers 5.24 writes."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.npz", "chat_template.json", "*processor_config*"))
    config = json.loads((source / "config.json").read_text())
    family = config["model_type"]
    text = config.pop("text_config", None) or {key: config.pop(key) for key in [*config] if key not in _OUTER}
    if "rope_scaling" in text:
        rope = text.pop("rope_scaling")
        text["rope_parameters"] = {"rope_type": "default", **rope, "rope_theta": text.pop("rope_theta")}
    text["dtype"] = text.pop("torch_dtype", text.get("dtype", "bfloat16"))
    text |= {"model_type": f"{family}_text", "pad_token_id": None}
    text["sliding_window"] = None
    if "num_experts" in text:
        text["num_local_experts"] = text.pop("num_experts")
    else:
        text.setdefault("layer_types", ["full_attention"] * text["num_hidden_layers"])
    text.pop("full_attention_interval", None)  # which its own models do not have
    vision = config["vision_config"] | {"model_type": f"{family}_vision", "dtype": text["dtype"]}
    vision["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    config |= {"text_config": text, "vision_config": vision, "dtype": text["dtype"], "transformers_version": "5.24.0"}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    images = json.loads((source / "preprocessor_config.json").read_text())
    kind = images.pop("processor_class", None)
    if "max_pixels" in images:
        images["size"] = {"longest_edge": images.pop("max_pixels"), "shortest_edge": images.pop("min_pixels")}
    processor = {"image_processor": images, "processor_class": kind}
    (target / "processor_config.json").write_text(json.dumps(processor, indent=2))
    template = json.loads((source / "chat_template.json").read_text())["chat_template"]
    (target / "chat_template.jinja").write_text(template)
    # It multiplies experts' weights from the other side than transformers 4.57 did, and than the hub's files.
    weights = read_weights(source).items()
    write_weights(target, {name: w.swapaxes(1, 2) if ".mlp.experts." in name else w for name, w in weights})
    return target


def leave_out_defaults(folder: Path) -> list[str]:
    """Remove from config.json what equals transformers' default, as it did itself before 4.53; returns these keys."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    whole = CONFIG_MAPPING[config["model_type"]]()
    left_out = []
    for part, defaults in (
        (config, whole.text_config),
        (config.get("text_config", {}), whole.text_config),
        (config["vision_config"], whole.vision_config),
    ):
        for key in _LEFT_OUT & part.keys():
            if part[key] == defaults.to_dict().get(key, defaults.default_theta if key == "rope_theta" else ...):
                left_out.append(key)
                del part[key]
    file.write_text(json.dumps(config))
    return left_out
