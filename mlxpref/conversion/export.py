"""Exports an adapter: for PEFT, fused into a model for MLX, or into one for transformers."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.names import hub_name
from mlxpref.checkpoints.safetensors import read_file_tensor_infos, read_tensor_infos
from mlxpref.conversion.convert import convert, plain_config
from mlxpref.conversion.fidelity import built_in_comparisons
from mlxpref.conversion.keep_profile import profile_to_keep, write_profile
from mlxpref.conversion.model_card import write_card
from mlxpref.conversion.quantize import Recipe, cast, dequantize, quantized_layers, stored_types
from mlxpref.conversion.verify import public_name, write_record
from mlxpref.conversion.writer import check_space, folder_bytes, new_folder, write_model
from mlxpref.data.learned import keep_learned
from mlxpref.engine.adapters import check_base, read_adapter, trained_settings
from mlxpref.engine.lora import fuse_adapter
from mlxpref.engine.mlx_model import lazy_model
from mlxpref.engine.peft import PEFT_WEIGHTS, write_peft
from mlxpref.engine.profile import own_profile
from mlxpref.engine.weights import to_hub
from mlxpref.log import logger


def export_adapter(
    adapter: Path,
    output: Path,
    to: str,
    base: Path | Checkpoint,
    base_name: str,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    any_base: bool = False,
) -> dict[str, Any]:
    """Write an adapter of the model in `base` into the folder `output`, with a model card; return what was written.

    `peft`: an adapter in float32 for PEFT. `fused`: the model for MLX with the adapter in its weights, quantized by
    `recipe`, None as before. `hf`: the same for transformers, never quantized. `dtype` is the type of unquantized
    weights, None the model's own. The profile by which the adapter was trained goes with it. ModelError for an adapter
    of another model, unless `any_base`.
    """
    base = Checkpoint.open(base)
    kept = profile_to_keep(None, base_name, base.folder, adapter)
    profile = kept or own_profile()
    for line in check_base(adapter, base, profile, any_base):
        logger.warning(line)
    conversion: dict[str, Any] = {}
    if to == "fused":
        conversion = convert(
            base, output, recipe, dtype=dtype, shard_size=shard_size, name=base_name, requantize=True, adapter=adapter,
            overwrite=overwrite, comparisons=built_in_comparisons(),
            profile=kept, finish=lambda folder: write_card(folder, to, adapter, base_name, profile),
        )  # fmt: skip
    else:
        with new_folder(output, overwrite, [base.folder, adapter]) as folder:
            if to == "peft":
                rank, scale, weights = read_adapter(adapter, lazy_model(base))
                write_peft(folder, weights, rank, scale, base_name)
            else:
                model_weights = _fused_for_transformers(base, adapter, dtype)
                check_space(output, sum(int(weight.nbytes) for weight in model_weights.values()))
                write_model(folder, base.folder, plain_config(base.config, dtype), model_weights, shard_size, kind="pt")
            write_profile(folder, kept)
            keep_learned(folder, [adapter, base.folder])
            write_card(folder, to, adapter, base_name, profile)
            write_record(folder, {"adapter": public_name(adapter), "trained": trained_settings(adapter)})
    tensors = len(read_file_tensor_infos(output / PEFT_WEIGHTS) if to == "peft" else read_tensor_infos(output))
    result: dict[str, Any] = {"path": str(output), "to": to, "adapter": str(adapter), "base_model": base_name}
    result |= {"profile": profile.name, "tensors": tensors}
    names = ("recipe", "quantized_layers", "bits_per_weight", "fidelity")
    result |= {name: conversion[name] for name in names if name in conversion}
    return result | {"bytes": folder_bytes(output)}


def _fused_for_transformers(base: Checkpoint, adapter: Path, dtype: str | None) -> dict[str, mx.array]:
    """The weights of a model with an adapter in them, lazily, under the hub's names and in its layouts."""
    model = lazy_model(base)
    _, scale, lora = read_adapter(adapter, model)
    dequantize(model, quantized_layers(model))
    stored, given = stored_types(base), getattr(mx, dtype) if dtype else None
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.RMSNorm)]
    cast(model, given, stored, apart_from=norms)  # half precision would round 1 + w
    fuse_adapter(model, scale, lora)
    weights = to_hub(dict(tree_flatten(model.parameters())), base.family)
    for name in (f"{norm}.weight" for norm in norms):
        weights[name] = weights[name].astype(given or stored[name])
    return {hub_name(name, base.family.model_type): weight for name, weight in weights.items()}
