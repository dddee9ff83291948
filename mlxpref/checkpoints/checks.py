"""Whether a folder and what was loaded from it are a whole model: files, parts, types of weights, sizes that agree."""

import reprlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.checkpoints.hf_config import check_weights, load_hf_config
from mlxpref.errors import ModelError

__all__ = ["check_folder", "check_model", "check_processor"]

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)
"""The types that weights are computed in."""


def check_folder(path: Path) -> None:
    """Refuse a folder that would load wrongly or not at all, in words that say what is missing."""
    config = load_hf_config(path)
    # Without these mlx-vlm takes defaults in silence, and the judge sees badly scaled images.
    if not any((path / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(f"{path}: no preprocessor_config.json there; copy it from the original checkpoint")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path}: no tokenizer.json there; copy it from the original checkpoint")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no .safetensors weights there; download the checkpoint again")
    check_weights(path, config)


def check_model(path: Path, model: nn.Module) -> None:
    """Refuse a model, loaded lazily or not, that lacks a part or whose weights have types that cannot be computed.

    mlx-vlm drops a vision tower without weights in silence, and takes whole numbers for weights.
    """
    for part in ("vision_tower", "language_model"):
        if getattr(model, part, None) is None:
            raise ModelError(f"{path}: no weights of the {part} there; use a checkpoint that has them")
    for name, module in model.named_modules():
        packed = {"weight": (mx.uint32,)} if "scales" in module else {}
        if packed and module.mode != "affine":
            packed["scales"] = (mx.uint8,)
        for key, value in module.items():
            if isinstance(value, mx.array) and value.dtype not in packed.get(key, _FLOATS) and not key.startswith("_"):
                raise ModelError(f"{path}: {name}.{key} is stored as {value.dtype}; download the checkpoint again")


def check_processor(path: Path, model: Any, processor: Any) -> None:
    """Refuse a tokenizer or an image processor of another model: every token has a row, patches are of one size."""
    tokens, rows = len(processor.tokenizer), int(model.language_model.model.embed_tokens.weight.shape[0])
    if tokens > rows:
        raise ModelError(
            f"{path}: the tokenizer has {tokens} tokens, the embedding {rows} rows; copy the original's tokenizer"
        )
    vision, images = model.config.vision_config, processor.image_processor
    sizes = {
        "patch_size": "patch_size",
        "merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    for stated, needed in sizes.items():
        found, wanted = getattr(images, stated), getattr(vision, needed)
        if found != wanted:
            raise ModelError(
                f"{path}: the image processor's {stated} is {reprlib.repr(found)}, the vision tower needs {wanted}; "
                "copy preprocessor_config.json from the original checkpoint"
            )
