"""Weights in the form of the hub's files and in that of mlx-vlm's models, lazily, by their names in the latter.

Where the two differ: MLX has the channels of a convolution last, a norm that the hub stores as w of 1 + w is stored as
1 + w, and the experts of a layer are three tensors by projection.
"""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlxpref.checkpoints.families import Family

_LAYER = r"language_model\.model\.layers\.\d+\."
_CENTRED = re.compile(rf"(?:{_LAYER}(?:\w+_layernorm|self_attn\.[qk]_norm)|language_model\.model\.norm)\.weight")
"""The norms of a zero-centred family that are so; that of its recurrent layers is an ordinary one."""
_EXPERTS = re.compile(rf"(?P<mlp>{_LAYER}mlp)\.experts\.(?P<projection>gate_up_proj|down_proj)")
_EXPERT = re.compile(rf"(?P<mlp>{_LAYER}mlp)\.experts\.(?P<number>\d+)\.(?P<projection>\w+_proj)\.weight")
_SWITCH = re.compile(rf"(?P<mlp>{_LAYER}mlp)\.switch_mlp\.(?P<projection>gate|up|down)_proj\.weight")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
Weights = Mapping[str, mx.array]


def to_mlx(weights: Weights, family: Family, text: Mapping[str, Any]) -> dict[str, mx.array]:
    """Stored weights in the form of mlx-vlm's model; what has it already stays as it is.

    `text` are the language model's settings. The sum 1 + w is in float32: mlx-vlm's own is in the weight's type, where
    half precision rounds it.
    """
    convolutions = {name for name, weight in weights.items() if _is_time_convolution(name, weight)}
    result: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if name in convolutions:
            result[name] = weight.moveaxis(2, 1)  # (channels, 1, time) -> (channels, time, 1)
        elif convolutions and family.zero_centred_norms and _CENTRED.fullmatch(name):
            result[name] = 1.0 + weight.astype(mx.float32)
        elif not _EXPERT.fullmatch(name) and not _EXPERTS.fullmatch(name):
            result[name] = weight
    return result | _experts_to_mlx(weights, text)


def to_hub(weights: Weights, family: Family) -> dict[str, mx.array]:
    """The weights of mlx-vlm's unquantized model in the form of the hub's files, in the same order."""
    result: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if match := _SWITCH.fullmatch(name):
            if match["projection"] == "up":
                continue
            names = ("down",) if match["projection"] == "down" else ("gate", "up")
            parts = [weights[f"{match['mlp']}.switch_mlp.{each}_proj.weight"] for each in names]
            joint = mx.concatenate([part.swapaxes(1, 2) for part in parts], axis=2)  # (experts, inputs, outputs)
            result[f"{match['mlp']}.experts.{'_'.join(names)}_proj"] = mx.contiguous(joint)
        elif name.endswith(".conv1d.weight"):
            result[name] = mx.contiguous(weight.moveaxis(1, 2))  # (channels, time, 1) -> (channels, 1, time)
        elif family.zero_centred_norms and _CENTRED.fullmatch(name):
            result[name] = (weight.astype(mx.float32) - 1.0).astype(weight.dtype)
        elif weight.ndim == 5:  # (out, time, height, width, channels) -> (out, channels, time, height, width)
            result[name] = mx.contiguous(weight.transpose(0, 4, 1, 2, 3))
        else:
            result[name] = weight
    return result


def _is_time_convolution(name: str, weight: mx.array) -> bool:
    """Whether a tensor is a convolution over time in torch's layout, (channels, 1, time)."""
    return name.endswith(".conv1d.weight") and weight.shape[-1] != 1


def _experts_to_mlx(weights: Weights, text: Mapping[str, Any]) -> dict[str, mx.array]:
    """The experts of the hub, by projection (experts, outputs, inputs).

    The hub has (experts, inputs, outputs), transformers 5 in memory (experts, outputs, inputs), and older files a
    tensor for each expert.
    """
    result: dict[str, mx.array] = {}
    single: dict[str, dict[int, mx.array]] = {}
    for name, weight in weights.items():
        if match := _EXPERT.fullmatch(name):
            place = f"{match['mlp']}.switch_mlp.{match['projection']}.weight"
            single.setdefault(place, {})[int(match["number"])] = weight
        elif match := _EXPERTS.fullmatch(name):
            is_mlx = _has_outputs_first(weights, match["mlp"], text["hidden_size"])
            parts = mx.split(weight, 2, axis=1 if is_mlx else 2) if "gate" in match["projection"] else [weight]
            for projection, part in zip(_PROJECTIONS[match["projection"]], parts, strict=True):
                result[f"{match['mlp']}.switch_mlp.{projection}.weight"] = part if is_mlx else part.swapaxes(1, 2)
    return result | {place: mx.stack([each[i] for i in sorted(each)]) for place, each in single.items()}


def _has_outputs_first(weights: Weights, mlp: str, hidden: int) -> bool:
    """Whether a layer's experts are stored as (experts, outputs, inputs); at most one of its tensors is square."""
    joint, down = (weights[f"{mlp}.experts.{name}"].shape[1:] for name in ("gate_up_proj", "down_proj"))
    return down[0] == hidden if joint[0] == joint[1] else joint[1] == hidden
