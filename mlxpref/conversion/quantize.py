"""Recipes of a conversion, their plan for each layer, and the change of lazy layers."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.engine.experts import ROUTER
from mlxpref.errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32")
"""The types of weights that are not quantized."""
_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
"""The types in the heads of safetensors files."""
GROUP_SIZES = (32, 64, 128)
_BITS = (2, 3, 4, 5, 6, 8)
_MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8")
_RECIPES = ("none", *(str(bits) for bits in _BITS), *_MIXED, "mxfp4")
_MX_GROUP = 32
"""The group size of mxfp4."""
_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.")
_VALUES = ("v_proj", "in_proj_qkv", "down_proj")
"""The layers to which mixed recipes give more bits: values, of recurrent layers together with queries and keys."""


@dataclass(frozen=True)
class LayerQuantization:
    """The storage of one layer."""

    bits: int
    group_size: int
    mode: str = "affine"


_OF_ROUTER = LayerQuantization(8, 64)
"""A router's least storage, that of mlx-vlm's own conversion."""


@dataclass(frozen=True)
class Recipe:
    """The bits of a conversion; `bits` None keeps the weights in floating point.

    `high_bits` are for the layers that matter most, `vision_bits` for the vision tower, None for its own precision.
    mxfp4 has 4 bits and groups of 32. ConfigError for combinations that MLX lacks.
    """

    bits: int | None = 4
    group_size: int = 64
    mode: str = "affine"
    high_bits: int | None = None
    vision_bits: int | None = None

    def __post_init__(self) -> None:
        for bits in (self.bits, self.high_bits, self.vision_bits):
            if bits is not None and bits not in _BITS:
                raise ConfigError(f"{bits} bits: MLX quantizes to {', '.join(map(str, _BITS))}")
        if self.mode not in ("affine", "mxfp4") or self.group_size not in GROUP_SIZES:
            raise ConfigError(f"mode {self.mode}, groups of {self.group_size}: give affine or mxfp4, and 32, 64 or 128")
        if self.mode == "mxfp4" and (self.bits, self.group_size, self.high_bits) != (4, _MX_GROUP, None):
            raise ConfigError("mxfp4 has 4 bits and groups of 32")

    @classmethod
    def named(cls, name: str, group_size: int = 64, vision_bits: int | None = None) -> "Recipe":
        """The recipe of a name, such as `none`, `4`, `mixed_4_8` or `mxfp4`; ConfigError for any other."""
        if name not in _RECIPES:
            raise ConfigError(f"recipe {name!r}: there are {', '.join(_RECIPES)}")
        if name == "none":
            return cls(None, group_size, vision_bits=vision_bits)
        if name == "mxfp4":
            return cls(4, _MX_GROUP, "mxfp4", vision_bits=vision_bits)
        low, _, high = name.removeprefix("mixed_").partition("_")
        return cls(int(low), group_size, high_bits=int(high) if high else None, vision_bits=vision_bits)

    @property
    def name(self) -> str:
        """The name for `named`, followed by the vision tower's bits, if any."""
        base = "none" if self.bits is None else "mxfp4" if self.mode == "mxfp4" else str(self.bits)
        if self.high_bits:
            base = f"mixed_{self.bits}_{self.high_bits}"
        return f"{base}+vision{self.vision_bits}" if self.vision_bits else base

    @property
    def default_layer(self) -> LayerQuantization | None:
        """The storage of most layers."""
        return None if self.bits is None else LayerQuantization(self.bits, self.group_size, self.mode)


def plan_layers(model: nn.Module, recipe: Recipe) -> tuple[dict[str, LayerQuantization], list[str]]:
    """The plan: each layer's storage by module path, and the layers of the recipe that stay unquantized.

    The group size does not divide the width of these. Mixed recipes give more bits to the value and down projections,
    those of experts, too, of the first and last eighth of the layers and of every third between, and to embedding and
    head. A router, which chooses experts, has 8 bits in every recipe.
    """
    plan: dict[str, LayerQuantization] = {}
    unquantized = []
    for path, module in model.named_modules():
        layer = _asked(path, model, recipe) if hasattr(module, "to_quantized") else None
        if layer is None:
            continue
        # On loading mlx-vlm quantizes only layers whose weights are a multiple of 64.
        if module.weight.shape[-1] % layer.group_size or module.weight.size % 64:
            unquantized.append(path)
        else:
            plan[path] = layer
    return plan, unquantized


def _asked(path: str, model: Any, recipe: Recipe) -> LayerQuantization | None:
    """A recipe's storage of a layer."""
    if not path.startswith("language_model."):
        bits = recipe.vision_bits if path.startswith("vision_tower.") else None
        # The smallest groups divide most of its unusual widths.
        return LayerQuantization(bits, _MX_GROUP) if bits else None
    if recipe.bits and recipe.bits < _OF_ROUTER.bits and path.endswith(ROUTER):
        return _OF_ROUTER
    if recipe.high_bits and _matters(path, len(model.language_model.model.layers)):
        return LayerQuantization(recipe.high_bits, recipe.group_size, recipe.mode)
    return recipe.default_layer


def _matters(path: str, count: int) -> bool:
    """Whether a layer gets the higher bits of a mixed recipe.

    The layers are those of llama.cpp's Q4_K_M and of mlx-lm's `mixed_quant_predicate_builder`. Unlike there, they
    include the embedding, as it may be the head, too, and what makes a recurrent layer's values; any group size works.
    """
    match = _LAYER.match(path)
    if match is None:
        return True  # embedding and head
    index, eighth = int(match[1]), count // 8
    more = index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
    return more and path.endswith(_VALUES)


def quantized_layers(model: nn.Module) -> dict[str, LayerQuantization]:
    """The storage of each quantized layer of a model, by module path."""
    return {
        path: LayerQuantization(layer.bits, layer.group_size, layer.mode)
        for path, layer in model.named_modules()
        if "scales" in layer
    }


def quantize(model: nn.Module, plan: Mapping[str, LayerQuantization]) -> None:
    """Quantize layers as planned, lazily."""
    nn.quantize(model, class_predicate=lambda path, _: vars(plan[path]) if path in plan else False)


def dequantize(model: nn.Module, paths: Collection[str]) -> None:
    """Replace quantized layers by plain ones with the same weights, lazily."""
    from mlx_vlm.models.switch_layers import SwitchLinear

    layers = dict(model.named_modules())
    plain = []
    for path in paths:
        layer: Any = layers[path]
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode
        )  # (outputs, inputs), of experts (experts, outputs, inputs)
        *experts, outputs, inputs = weight.shape
        if isinstance(layer, nn.QuantizedEmbedding):
            dense: Any = nn.Embedding(outputs, inputs)
        else:
            kind: Any = SwitchLinear if experts else nn.Linear
            dense = kind(inputs, outputs, *experts, bias="bias" in layer)
            if "bias" in layer:
                dense.bias = layer.bias
        dense.weight = weight
        plain.append((path, dense))
    model.update_modules(tree_unflatten(plain))


def cast(
    model: nn.Module, dtype: mx.Dtype | None, stored: Mapping[str, mx.Dtype], apart_from: Collection[str] = ()
) -> None:
    """Convert all floating point weights, except some layers', to a type, lazily; None is each one's own, as `stored`.

    The logarithms of a recurrent layer's decays keep their own, as in mlx-vlm's conversion: they are few, and a state
    multiplies by what they are exponents of at every token.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    updates = []
    for key, weight in weights.items():
        path, _, name = key.rpartition(".")
        if mx.issubdtype(weight.dtype, mx.floating) and path not in apart_from:
            own = stored.get(key, weight.dtype)
            updates.append((key, weight.astype(own if dtype is None or name == "A_log" else dtype)))
    model.update(tree_unflatten(updates))


def stored_types(checkpoint: Checkpoint) -> dict[str, mx.Dtype]:
    """The types of stored floating point tensors, by place in the model; loading makes zero-centred norms wider."""
    found = {place: _FLOATS.get(checkpoint.tensors[name].dtype) for name, place in checkpoint.places.items()}
    return {place: dtype for place, dtype in found.items() if dtype is not None}
