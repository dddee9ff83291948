"""Checks that a folder and its loaded model are complete: files, parts, types of weights, sizes that agree."""

import reprlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.safetensors import TensorInfo
from mlxpref.errors import ModelError

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)
"""The types of weights that can be computed."""


def check_folder(checkpoint: Checkpoint) -> None:
    """ModelError, with the missing part, for a folder that would load wrongly or not at all."""
    _ = checkpoint.config  # what it is comes first
    if not any(place.startswith("vision_tower.") for place in checkpoint.places.values()):
        raise ModelError(
            f"{checkpoint.folder}: no weights of the vision_tower there, so it is blind; use a checkpoint that has them"
        )
    _check_sizes(checkpoint)
    _check_head(checkpoint)


def check_model(path: Path, model: nn.Module) -> None:
    """ModelError for a model, lazy or not, that lacks a part or has weights of unusable types.

    mlx-vlm silently drops a vision tower without weights, and accepts integers as weights.
    """
    for part in ("vision_tower", "language_model"):
        if getattr(model, part, None) is None:
            raise ModelError(f"{path}: no weights of the {part} there; use a checkpoint that has them")
    for name, module in model.named_modules():
        types = {"weight": (mx.uint32,)} if "scales" in module else {}
        if types and module.mode != "affine":
            types["scales"] = (mx.uint8,)
        for key, value in module.items():
            if isinstance(value, mx.array) and value.dtype not in types.get(key, _FLOATS) and not key.startswith("_"):
                raise ModelError(f"{path}: {name}.{key} is stored as {value.dtype}; download the checkpoint again")


def check_processor(path: Path, model: Any, processor: Any) -> None:
    """ModelError for a tokenizer or an image processor of another model: tokens without a row, other patches."""
    tokens, rows = len(processor.tokenizer), int(model.language_model.model.embed_tokens.weight.shape[0])
    if model.config.image_token_id >= rows:
        raise ModelError(f"{path}: config.json has no image_token_id of its vocabulary; use the original checkpoint")
    if tokens > rows:
        raise ModelError(
            f"{path}: the tokenizer has {tokens} tokens, the embedding {rows} rows; copy the original's tokenizer"
        )
    vision, images = model.config.vision_config, processor.image_processor
    if not (images.max_pixels > 0 and images.min_pixels >= 0):
        sizes = f"{reprlib.repr(images.min_pixels)} to {reprlib.repr(images.max_pixels)}"
        raise ModelError(f"{path}: the image processor takes images of {sizes} pixels; copy the original's processor")
    for name, of_vision in (("patch_size",) * 2, ("merge_size", "spatial_merge_size"), ("temporal_patch_size",) * 2):
        size, tower_size = getattr(images, name), getattr(vision, of_vision)
        if size != tower_size:
            raise ModelError(
                f"{path}: the image processor's {name} is {reprlib.repr(size)}, the vision tower needs {tower_size}; "
                "copy preprocessor_config.json from the original checkpoint"
            )


def _check_sizes(checkpoint: Checkpoint) -> None:
    """ModelError for sizes that the folder's files do not fill, before any allocation of these sizes.

    mlx-vlm compares names and shapes one by one when it loads.
    """
    config, tensors, family = checkpoint.config, checkpoint.tensors, checkpoint.family
    text, vision = family.language(config), config["vision_config"]
    layers, depth, hidden = text["num_hidden_layers"], vision.get("depth", 32), text["hidden_size"]
    weights = (
        text["vocab_size"] * hidden
        + 3 * hidden * family.inner_width(text)
        + depth * 4 * vision[family.vision_width] ** 2
    )
    stored_bytes = sum(tensor.size for tensor in tensors.values())
    # 2 bits a weight are the fewest that MLX quantizes to.
    if layers + depth > len(tensors) or weights > 4 * stored_bytes:
        claim = f"{layers + depth} layers and {weights / 1e6:.4g} million weights or more"
        content = f"{len(tensors)} tensors in {stored_bytes / 1e6:.4g} MB"
        raise ModelError(
            f"{checkpoint.folder}: config.json is of {claim}, the safetensors hold {content}: they are not of one "
            "model; download the checkpoint again"
        )


def _check_head(checkpoint: Checkpoint) -> None:
    """ModelError for a stored head that differs from the embedding although the config ties them."""
    config, tensors = checkpoint.stored_config, checkpoint.tensors
    if not config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings")):
        return
    for name in (name for name in tensors if "lm_head." in name):
        key = name.rpartition(".")[2]
        twin = next((tensors[other] for other in tensors if other.endswith(f"embed_tokens.{key}")), None)
        if twin is None or not _same(tensors[name], twin):
            raise ModelError(
                f"{checkpoint.folder}: config.json says that the head is the embedding, but {name} is another; set "
                "tie_word_embeddings to what the model was trained with"
            )


def _same(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors are stored as the same bytes."""
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same and all(one == other for one, other in zip(first.chunks(), second.chunks(), strict=True))
