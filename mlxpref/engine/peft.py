"""Reads and writes PEFT's adapter format; refuses anything beyond plain LoRA with a reason.

PEFT stores `base_model.model.<path>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), where <path> is the module's
in transformers; MLX's layers hold `lora_a` (in, r) and `lora_b` (r, out). The scale is alpha / r, or alpha / sqrt(r).
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref.checkpoints.safetensors import read_file_tensor_infos
from mlxpref.errors import ModelError
from mlxpref.files import write_file

AGAIN = "copy or train the adapter again"
PEFT_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# Paths of the language model and the vision tower in transformers: since 4.52, and before (also in the hub's files).
_PLACES = (
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "language_model.model."),
    (re.compile(r"^(model\.)?visual\."), "vision_tower."),
    (re.compile(r"^lm_head$"), "language_model.lm_head"),
    (re.compile(r"^model\."), "language_model.model."),
)
_REFUSED = (
    "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication",
    "use_qalora", "use_bdlora", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
"""Keys of a config that make an adapter more than plain LoRA with one rank and one scale."""


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT, by its files."""
    return (folder / PEFT_WEIGHTS).is_file() or (folder / "adapter_model.bin").is_file()


def read_peft(
    folder: Path, config: Mapping[str, Any], layers: Collection[str]
) -> tuple[int, float, dict[str, mx.array]]:
    """Rank, scale, and weights by MLX's names, of an adapter with this config for a model with these linear layers.

    The tensors' names determine the layers, not the config's targets. ModelError for another kind of adapter, or a
    tensor without a place.
    """
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ModelError(f"{folder}: its weights are pickled (adapter_model.bin), which may run code; save safetensors")
    rank, scale = _parameters(folder / ADAPTER_CONFIG, config)
    read_file_tensor_infos(folder / PEFT_WEIGHTS, AGAIN)
    arrays = mx.load(str(folder / PEFT_WEIGHTS))
    assert isinstance(arrays, dict)
    weights: dict[str, mx.array] = {}
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        path = _mlx_path(match["path"]) if match else ""
        if match is None or path not in layers:
            raise ModelError(
                f"{folder}: adapter of another model: the judge has no place for {name[:120]!r}; give it with its own"
            )
        if array.ndim != 2:
            raise ModelError(f"{folder}: damaged adapter: {name} has {array.ndim} dimensions, not 2; save it again")
        key = f"{path}.lora_{match['part'].lower()}"
        if key in weights:
            raise ModelError(f"{folder}: damaged adapter: {key} is there twice; save it again")
        weights[key] = array.T  # (r, in) or (out, r) -> (in, r) or (r, out)
    return rank, scale, weights


def write_peft(folder: Path, weights: Mapping[str, mx.array], rank: int, scale: float, base_name: str) -> None:
    """Write weights by MLX's names as an adapter that PEFT puts on transformers' model.

    Targets are whole paths: a bare `down_proj` would include the vision tower's.
    """
    arrays: dict[str, mx.array] = {}
    targets = set()
    for key, array in weights.items():
        path, _, part = key.rpartition(".")
        target = _transformers_path(path)
        targets.add(target)
        arrays[f"base_model.model.{target}.lora_{part[-1].upper()}.weight"] = mx.contiguous(array.T.astype(mx.float32))
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), dict(sorted(arrays.items())), {"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": sorted(targets),
    }
    write_file(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def _parameters(file: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of a config in a file; ModelError for anything but plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: a {str(kind)[:40]!r} adapter; only plain LoRA can be put on")
    if extras := [key for key in _REFUSED if config.get(key)]:
        raise ModelError(f"{file}: it sets {', '.join(extras)}; only plain LoRA can be put on: merge with PEFT")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{file}: it trains biases (bias {str(config['bias'])[:20]!r}); only plain LoRA can be put on")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"{file}: r is {str(rank)[:40]!r}, not a whole number from 1 on; save the adapter again")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{file}: lora_alpha is {str(alpha)[:40]!r}, not a number; save the adapter again")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _mlx_path(path: str) -> str:
    """A module's path in mlx-vlm's models, from the one in transformers'."""
    for start, ours in _PLACES:
        if match := start.match(path):
            return ours + path[match.end() :]
    return path


def _transformers_path(path: str) -> str:
    """A module's path in transformers' models, from the one in mlx-vlm's."""
    for ours, theirs in (("language_model.model.", "model.language_model."), ("vision_tower.", "model.visual.")):
        if path.startswith(ours):
            return theirs + path.removeprefix(ours)
    return path.removeprefix("language_model.")
