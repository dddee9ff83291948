"""Adapters: LoRA weights and their config in mlx-vlm's format, put on a model only where they fit it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.errors import ModelError
from mlxpref.lora import attach_lora, linear_layers

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "load_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapters.safetensors"


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a folder's adapter on a model in place.

    Names and shapes are checked before anything changes: an adapter of another model is a ModelError, where
    mlx-vlm would load nothing and say nothing.
    """
    parameters, weights = _read(folder)
    rank, scale = int(parameters["rank"]), float(parameters["scale"])
    layers = linear_layers(model)
    names = sorted({name.rpartition(".")[0] for name in weights})
    _check(folder, weights, layers, rank)
    attach_lora(model, names, rank, scale, float(parameters.get("dropout", 0.0)))
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The LoRA parameters and the weights of an adapter folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such adapter folder")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name} there; an adapter folder is what `mlxpref train` writes")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        parameters = config["lora_parameters"]
        if config.get("fine_tune_type", "lora") != "lora" or not {"rank", "scale"} <= set(parameters):
            raise ModelError(f"{folder / ADAPTER_CONFIG}: not a plain LoRA adapter with `rank` and `scale`")
        weights = mx.load(str(folder / ADAPTER_WEIGHTS))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: damaged adapter: {type(error).__name__}: {error}") from error
    assert isinstance(weights, dict)
    return parameters, weights


def _check(folder: Path, weights: Mapping[str, mx.array], layers: Mapping[str, nn.Module], rank: int) -> None:
    """Refuse an adapter whose names or shapes are not this model's."""
    for name, weight in weights.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in ("lora_a", "lora_b"):
            raise ModelError(f"{folder}: adapter of another model: the judge has no layer {layer!r}")
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
