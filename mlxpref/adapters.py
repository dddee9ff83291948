"""Adapters: LoRA weights and their config in mlx-vlm's format, put on a model only where they fit it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxpref.errors import ModelError
from mlxpref.files import write_text
from mlxpref.lora import attach_lora, linear_layers
from mlxpref.template import template_version

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "base_of", "load_adapter", "mismatches", "save_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapters.safetensors"


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a folder's adapter on a model in place.

    Names and shapes are checked before anything changes: an adapter of another model is a ModelError, where
    mlx-vlm would load nothing and say nothing.
    """
    rank, scale, dropout, weights = _read(folder)
    layers = linear_layers(model)
    names = sorted({name.rpartition(".")[0] for name in weights})
    _check(folder, weights, layers, rank)
    attach_lora(model, names, rank, scale, dropout)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())


def base_of(path: Path) -> dict[str, str]:
    """What an adapter is trained on: the checkpoint's name and fingerprint, and the version of the template."""
    weights = sorted(f"{file.name} {file.stat().st_size}" for file in path.glob("*.safetensors"))
    content = (path / "config.json").read_bytes() + "\n".join(weights).encode()
    fingerprint = hashlib.sha256(content).hexdigest()[:16]
    return {"base_model": str(path), "base_fingerprint": fingerprint, "template": template_version()}


def save_adapter(
    weights: Mapping[str, mx.array], folder: Path, rank: int, scale: float, base: Mapping[str, str] | None = None
) -> None:
    """Write an adapter into a folder, in mlx-vlm's format; each file replaces the one before at once.

    `base` says what it was trained on (see `base_of`); mlx-vlm passes over it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({name.rpartition(".")[0] for name in weights}),
        },
        **(base or {}),
    }
    # MLX adds the ending to a name that lacks it, so the temporary name has it too.
    temporary = folder / f".{os.getpid()}.{ADAPTER_WEIGHTS}"
    try:
        mx.save_safetensors(str(temporary), dict(sorted(weights.items())), {"format": "mlx"})
        temporary.replace(folder / ADAPTER_WEIGHTS)
    except (OSError, RuntimeError) as error:  # MLX raises the latter for a full disk
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: cannot be written ({error}); an adapter saved before is still there"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def mismatches(folder: Path, path: Path) -> list[str]:
    """What the adapter in a folder was trained on that the checkpoint at a path is not; a line each."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    ours, lines = base_of(path), []
    if config.get("base_fingerprint") not in (None, ours["base_fingerprint"]):
        lines.append(f"{folder}: the adapter was trained on {config.get('base_model')}, which this judge is not")
    if config.get("template") not in (None, ours["template"]):
        lines.append(f"{folder}: the adapter was trained with other words than this version asks with")
    return lines


def _read(folder: Path) -> tuple[int, float, float, dict[str, mx.array]]:
    """Rank, scale, dropout and weights of an adapter folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such adapter folder")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name} there; an adapter folder is what `mlxpref train` writes")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config.get("fine_tune_type", "lora") != "lora":
            raise ModelError(f"{folder}: a {config['fine_tune_type']!r} adapter; only plain LoRA can be put on")
        parameters = config["lora_parameters"]
        rank, scale = int(parameters["rank"]), float(parameters["scale"])
        dropout = float(parameters.get("dropout", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: not in mlx-vlm's format, with `rank` and `scale` under `lora_parameters` "
            f"({type(error).__name__}: {error}); train or convert the adapter again"
        ) from error
    try:
        weights = mx.load(str(folder / ADAPTER_WEIGHTS))
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: damaged: {error}; copy or train it again") from error
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: holds no weights; copy or train it again")
    return rank, scale, dropout, weights


def _check(folder: Path, weights: Mapping[str, mx.array], layers: Mapping[str, nn.Module], rank: int) -> None:
    """Refuse an adapter whose names or shapes are not this model's."""
    for name, weight in sorted(weights.items()):
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in ("lora_a", "lora_b"):
            raise ModelError(f"{folder}: adapter of another model: the judge has no place for {name}")
        outputs, inputs = _shape(layers[layer])
        expected = (inputs, rank) if part == "lora_a" else (rank, outputs)
        if weight.shape != expected:
            raise ModelError(
                f"{folder}: adapter of another model: {name} is {weight.shape}, the judge's layer takes {expected}"
            )
        if f"{layer}.{'lora_b' if part == 'lora_a' else 'lora_a'}" not in weights:
            raise ModelError(f"{folder}: damaged adapter: {layer} has only one of lora_a and lora_b")


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, quantized or not."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
