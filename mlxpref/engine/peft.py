"""Reads and writes PEFT's adapter format; refuses anything beyond plain LoRA with a reason.

PEFT stores `base_model.model.<path>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), where <path> is the module's
in transformers; MLX's layers hold `lora_a` (in, r) and `lora_b` (r, out). The scale is alpha / r, or alpha / sqrt(r).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.checkpoints.names import hub_name, mlx_name
from mlxpref.errors import ModelError
from mlxpref.files import write_file
from mlxpref.text import first_ten

AGAIN = "copy or train the adapter again"
PEFT_WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it into its base (in PEFT `merge_and_unload`), save that, and give it with --model"
_NAME = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
"""Values of init_lora_weights, besides true and false, that leave the base's weights as they are."""
_HARMLESS = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "eva_config", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio",
    "base_model", "base", "template", "profile", "trained",
}  # fmt: skip
"""Keys that are read here, or say nothing about what the weights do. Any other one that is set is another adapter."""


def peft_weights(
    file: Path, config: Mapping[str, Any], arrays: Mapping[str, mx.array]
) -> tuple[int, float, dict[str, mx.array]]:
    """Rank, scale, and weights by MLX's names, of an adapter with this config and these arrays in a file.

    The tensors' names determine the layers, not the config's targets; a name of another kind stays as it is. ModelError
    for another kind of adapter than plain LoRA.
    """
    rank, scale = peft_parameters(file.parent / ADAPTER_CONFIG, config)
    weights: dict[str, mx.array] = {}
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        if match and array.ndim != 2:
            raise ModelError(f"{file}: damaged adapter: {name} has {array.ndim} dimensions, not 2; save it again")
        key = f"{mlx_name(match['path'])}.lora_{match['part'].lower()}" if match else mlx_name(name)
        if key in weights:
            raise ModelError(f"{file}: damaged adapter: {key} is there twice; save it again")
        weights[key] = array.T if match else array  # (r, in) or (out, r) -> (in, r) or (r, out)
    return rank, scale, weights


def write_peft(folder: Path, weights: Mapping[str, mx.array], rank: int, scale: float, base_name: str) -> None:
    """Write weights by MLX's names as an adapter that PEFT puts on transformers' model.

    Targets are whole paths: a bare `down_proj` would include the vision tower's.
    """
    arrays: dict[str, mx.array] = {}
    targets = set()
    for key, array in weights.items():
        path, _, part = key.rpartition(".")
        target = hub_name(path)
        targets.add(target)
        arrays[f"base_model.model.{target}.lora_{part[-1].upper()}.weight"] = mx.contiguous(array.T.astype(mx.float32))
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), dict(sorted(arrays.items())), {"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "revision": None,
        "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "target_modules": sorted(targets),
    }  # fmt: skip
    write_file(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def peft_parameters(file: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of a config in a file; ModelError for anything but plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: a {str(kind)[:40]!r} adapter; only plain LoRA can be put on: {MERGE}")
    start = config.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start is None or str(start).lower() in _PLAIN_STARTS):
        raise ModelError(
            f"{file}: init_lora_weights is {str(start)[:40]!r}, which may have changed the base's weights, too: save "
            f"it as plain LoRA with PEFT (`save_pretrained` with path_initial_model_for_weight_conversion), or {MERGE}"
        )
    if extras := [key[:40] for key in sorted(config.keys() - _HARMLESS) if config[key]]:
        raise ModelError(f"{file}: it sets {first_ten(extras, ', ')}; only plain LoRA can be put on: {MERGE}")
    if config.get("bias") not in (None, "none"):
        raise ModelError(
            f"{file}: it trains biases (bias {str(config['bias'])[:20]!r}); only plain LoRA can be put on: {MERGE}"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"{file}: r is {str(rank)[:40]!r}, not a whole number from 1 on; save the adapter again")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{file}: lora_alpha is {str(alpha)[:40]!r}, not a number; save the adapter again")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
