"""The planned peaks of `scripts.rehearsal`, in bytes, and how much of everything it does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import (
    MemoryPlan,
    ModelSize,
    judging_plan,
    model_size,
    training_plan,
    with_fitting_batches,
)
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.profile import own_profile
from scripts.memory_table import quantized_size
from scripts.rehearsal_shapes import Shape

__all__ = ["SHARD", "Plans", "Sizes", "converting", "making"]

SHARD = 5 * 10**9
"""Bytes of a file of the converted model, as `mlxpref convert` writes it."""
_DRAWN = 8
"""Bytes of a random number while it is drawn."""


@dataclass(frozen=True)
class Sizes:
    """The sides of pictures in pixels, a completion's tokens, a step's comparisons, and the completions of each."""

    side: int = 512
    tokens: int = JudgeSettings().max_tokens
    comparisons: int = TrainSettings().comparisons
    group: int = TrainSettings().group

    def judging(self, think: bool) -> dict[str, Any]:
        """The settings of a judge."""
        return {"think": think, "max_tokens": self.tokens, "max_pixels": self.side**2}

    def training(self, think: bool) -> TrainSettings:
        """The settings of a training of one step."""
        return TrainSettings(steps=1, comparisons=self.comparisons, group=self.group, **self.judging(think))


def making(shape: Shape) -> int:
    """Of making a checkpoint: a file, and the largest tensor while it is drawn."""
    return shape.shard + _DRAWN * shape.largest


def converting(folder: Path, recipe: Recipe, sizes: Sizes) -> int:
    """Of a conversion: a file with the source of its largest tensor, or what was written, loaded and asked once."""
    source = Checkpoint.open(folder)
    stored = ModelSize.from_config(source.config, source.weight_bytes())
    written = quantized_size(source.config, stored, recipe.bits).weights
    largest = _embedding(stored) * stored.float_bytes
    plans = Plans(sizes, quantized_size(source.config, model_size(source), recipe.bits))
    return max(min(written, SHARD) + largest, plans.loading(recipe), plans.judging(False, 2))


@dataclass(frozen=True)
class Plans:
    """The planned peaks of a model's work."""

    sizes: Sizes
    size: ModelSize

    def loading(self, recipe: Recipe) -> int:
        """Of loading: the weights; on a CPU, which computes in float32, with what the embedding is made from."""
        is_widened = self.size.float_bytes == 4 and recipe.bits is None
        return self.size.weights + (2 * _embedding(self.size) if is_widened else 0)

    def judging(self, think: bool, images: int, phase: str = "") -> int:
        """Of judging so many images, or only of a phase of it."""

        def plan_of(settings: JudgeSettings) -> MemoryPlan:
            return judging_plan(self.size, settings, images, *own_profile().text_tokens)

        plan = plan_of(with_fitting_batches(plan_of, JudgeSettings(**self.sizes.judging(think)), ()))
        return plan.weights + plan.resident + plan.phases[phase] if phase else plan.peak

    def training(self, think: bool) -> int:
        """Of a step of training."""

        def plan_of(settings: TrainSettings) -> MemoryPlan:
            return training_plan(self.size, settings, settings.comparisons, think, *own_profile().text_tokens)

        return plan_of(with_fitting_batches(plan_of, self.sizes.training(think), ())).peak


def _embedding(size: ModelSize) -> int:
    """The numbers of the embedding, the largest tensor."""
    return size.vocabulary * size.text[0]
