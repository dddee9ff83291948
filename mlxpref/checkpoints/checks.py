"""Whether a folder and what was loaded from it are a whole model: files, parts, types of weights, sizes that agree."""

import reprlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.safetensors import TensorInfo
from mlxpref.errors import ModelError

__all__ = ["check_folder", "check_model", "check_processor"]

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)
"""The types that weights are computed in."""
_CHUNK = 1 << 24


def check_folder(checkpoint: Checkpoint) -> None:
    """Refuse a folder that would load wrongly or not at all; the ModelError says what is missing."""
    _check_sizes(checkpoint)
    _check_head(checkpoint)


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


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse a config of sizes that the folder's files do not fill, before anything of these sizes is made.

    Names and shapes one by one are mlx-vlm's to compare, when it loads. Raises ModelError.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    text, vision = {**config, **(config.get("text_config") or {})}, config["vision_config"]
    layers, depth = text["num_hidden_layers"], vision.get("depth", 32)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    width = vision["embed_dim" if config["model_type"] == "qwen2_vl" else "hidden_size"]
    stated = text["vocab_size"] * hidden + layers * 3 * hidden * inner + depth * 4 * width**2
    stored = sum(tensor.size for tensor in tensors.values())
    # 2 bits a weight are the fewest that MLX quantizes to.
    if layers + depth > len(tensors) or stated > 4 * stored:
        raise ModelError(
            f"{checkpoint.folder}: config.json is of {layers + depth} layers and {stated / 1e6:.4g} million weights or "
            f"more, the safetensors hold {len(tensors)} tensors in {stored / 1e6:.4g} MB: they are not of one model; "
            "download the checkpoint again"
        )


def _check_head(checkpoint: Checkpoint) -> None:
    """Where the config says that the head is the embedding, one that is stored as well has to be the same."""
    stored, tensors = checkpoint.stored_config, checkpoint.tensors
    if not stored.get("tie_word_embeddings", (stored.get("text_config") or {}).get("tie_word_embeddings")):
        return
    for name, head in tensors.items():
        if "lm_head." not in name:
            continue
        twin = next((tensors[n] for n in tensors if n.endswith(f"embed_tokens.{name.rpartition('.')[2]}")), None)
        if twin is None or not _same(head, twin):
            raise ModelError(
                f"{checkpoint.folder}: config.json says that the head is the embedding, but {name} is another; set "
                "tie_word_embeddings to what the model was trained with"
            )


def _same(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        sizes = (min(_CHUNK, first.size - done) for done in range(0, first.size, _CHUNK))
        return all(one.read(size) == other.read(size) for size in sizes)
