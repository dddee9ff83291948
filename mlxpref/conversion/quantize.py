"""What is asked of a conversion, and what that means for each layer of a model: its bits, group size and mode."""

import re
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlxpref.errors import ConfigError

__all__ = ["BITS", "RECIPES", "LayerQuantization", "Recipe", "plan_layers"]

BITS = (2, 3, 4, 5, 6, 8)
_MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8")
RECIPES = ("none", *(str(bits) for bits in BITS), *_MIXED, "mxfp4")
"""Every recipe that has a name."""
_MX_GROUP = 32
"""The group size that mxfp4 is defined with."""
_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerQuantization:
    """How one layer is stored."""

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True)
class Recipe:
    """What is asked: `bits` None keeps the weights as they are.

    `high_bits` are for the layers that matter more than others, `vision_bits` for the vision tower, None for its own
    precision. mxfp4 has 4 bits and groups of 32. ConfigError for what MLX does not have.
    """

    bits: int | None = 4
    group_size: int = 64
    mode: str = "affine"
    high_bits: int | None = None
    vision_bits: int | None = None

    def __post_init__(self) -> None:
        for bits in (self.bits, self.high_bits, self.vision_bits):
            if bits is not None and bits not in BITS:
                raise ConfigError(f"{bits} bits: MLX quantizes to {', '.join(map(str, BITS))}")
        if self.mode not in ("affine", "mxfp4") or self.group_size not in (32, 64, 128):
            raise ConfigError(f"mode {self.mode}, groups of {self.group_size}: give affine or mxfp4, and 32, 64 or 128")
        if self.mode == "mxfp4" and (self.bits, self.group_size, self.high_bits) != (4, _MX_GROUP, None):
            raise ConfigError("mxfp4 has 4 bits and groups of 32")

    @classmethod
    def named(cls, name: str, group_size: int = 64, vision_bits: int | None = None) -> "Recipe":
        """The recipe of a name, one of RECIPES; ConfigError for any other."""
        if name not in RECIPES:
            raise ConfigError(f"recipe {name!r}: there are {', '.join(RECIPES)}")
        if name == "none":
            return cls(None, group_size, vision_bits=vision_bits)
        if name == "mxfp4":
            return cls(4, _MX_GROUP, "mxfp4", vision_bits=vision_bits)
        low, _, high = name.removeprefix("mixed_").partition("_")
        return cls(int(low), group_size, high_bits=int(high) if high else None, vision_bits=vision_bits)

    @property
    def name(self) -> str:
        """What it is called: a name of RECIPES, with the vision tower's bits behind it if it has any."""
        base = "none" if self.bits is None else "mxfp4" if self.mode == "mxfp4" else str(self.bits)
        if self.high_bits:
            base = f"mixed_{self.bits}_{self.high_bits}"
        return f"{base}+vision{self.vision_bits}" if self.vision_bits else base

    @property
    def layer(self) -> LayerQuantization | None:
        """How most layers are stored."""
        return None if self.bits is None else LayerQuantization(self.bits, self.group_size, self.mode)


def plan_layers(model: nn.Module, recipe: Recipe) -> tuple[dict[str, LayerQuantization], list[str]]:
    """How each layer is stored, by module path, and the layers that stay as they are though they were asked for.

    These are those whose width the group size does not divide. Mixed recipes give more bits to the value and down
    projections of the first and last eighth of the layers and of every third between, and to embedding and head.
    """
    plan: dict[str, LayerQuantization] = {}
    left = []
    for path, module in model.named_modules():
        wanted = _wanted(path, model, recipe) if hasattr(module, "to_quantized") else None
        if wanted is None:
            continue
        # mlx-vlm quantizes no layer on loading whose weights are not a multiple of 64.
        if module.weight.ndim != 2 or module.weight.shape[-1] % wanted.group_size or module.weight.size % 64:
            left.append(path)
        else:
            plan[path] = wanted
    return plan, left


def _wanted(path: str, model: Any, recipe: Recipe) -> LayerQuantization | None:
    """What a recipe asks of a layer."""
    if not path.startswith("language_model."):
        bits = recipe.vision_bits if path.startswith("vision_tower.") else None
        # Its widths are odd, so the smallest groups fit most of them.
        return LayerQuantization(bits, _MX_GROUP) if bits else None
    if recipe.high_bits and _matters(path, len(model.language_model.model.layers)):
        return LayerQuantization(recipe.high_bits, recipe.group_size, recipe.mode)
    return recipe.layer


def _matters(path: str, count: int) -> bool:
    """Whether a layer gets the higher bits of a mixed recipe (as llama.cpp's Q4_K_M and mlx-lm choose them)."""
    found = _LAYER.match(path)
    if found is None:
        return True  # embedding and head
    index, eighth = int(found[1]), count // 8
    chosen = index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
    return chosen and path.endswith(("v_proj", "down_proj"))
