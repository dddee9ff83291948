"""Whether a run fits the device, said before it begins; and which settings would make it fit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import ModelSize, Plan, judging_plan, training_plan
from mlxpref.checkpoints.model_shapes import shapes_from
from mlxpref.checkpoints.resolve import device_working_set
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.errors import ConfigError

__all__ = ["checkpoint_at", "gigabytes", "images_seen", "plan_judging", "plan_training", "require"]

S = TypeVar("S", TrainSettings, JudgeSettings)

_CHANGES: dict[str, tuple[float, int]] = {
    "recompute": (1, 1),
    "micro_batch": (0.5, 1),
    "rows": (0.5, 1),
    "max_pixels": (9 / 16, 128 * 128),
    "max_tokens": (0.5, 32),
    "group": (0.5, 2),
}
"""Settings that memory can be saved by: what their value is multiplied by, and the least that it makes sense to set.

The first three change no result.
"""


def plan_training(checkpoint: Checkpoint, settings: TrainSettings, preferences: int) -> Plan:
    """The plan of training the checkpoint on this device; ConfigError where it does not fit."""
    model, images = checkpoint_at(checkpoint), images_seen(settings, preferences)
    return require(lambda chosen: training_plan(model, chosen, images), settings, device_working_set(), "training")


def plan_judging(checkpoint: Checkpoint, settings: JudgeSettings, images: int) -> Plan:
    """The plan of judging images with the checkpoint on this device; ConfigError where it does not fit."""
    model = checkpoint_at(checkpoint)
    return require(lambda chosen: judging_plan(model, chosen, images), settings, device_working_set(), "judging")


def images_seen(settings: TrainSettings, preferences: int) -> int:
    """How many images a training run sees at most, of a number of preferences."""
    return 2 * min(preferences, settings.steps * settings.comparisons or preferences)


def checkpoint_at(checkpoint: Checkpoint) -> ModelSize:
    """A checkpoint as it is loaded on this device: on a CPU all floating point numbers become float32."""
    import mlx.core as mx

    float_bytes = 4 if mx.default_device().type == mx.DeviceType.cpu else None
    shapes = shapes_from(checkpoint.config)
    weights, pixels = checkpoint.weight_bytes(float_bytes), checkpoint.max_pixels or 1 << 30
    return ModelSize(shapes, weights, float_bytes or shapes.float_bytes, pixels)


def require(plan_of: Callable[[S], Plan], settings: S, working_set: int, what: str) -> Plan:
    """The plan of a run that fits a working set in bytes; ConfigError with advice for one that does not."""
    plan = plan_of(settings)
    if plan.peak <= working_set:
        return plan
    found = [f"{_options(changes)} ({gigabytes(peak)})" for changes, peak in _fitting(plan_of, settings, working_set)]
    needs = f"{what} needs about {gigabytes(plan.peak)}, this device recommends at most {gigabytes(working_set)}"
    if len(found) > 1:
        raise ConfigError(f"{needs}: try {', '.join(found[:-1])} or {found[-1]}")
    if found:
        raise ConfigError(f"{needs}: try {found[0]}")
    weights = f"weights {'alone ' if plan.weights > working_set else ''}take {gigabytes(plan.weights)}"
    raise ConfigError(
        f"{needs}, and no settings make it fit: its {weights}; take a smaller model, or one of fewer bits"
    )


def _fitting(plan_of: Callable[[S], Plan], settings: S, working_set: int) -> list[tuple[dict[str, Any], int]]:
    """Changes of settings that fit, with the peak: of one setting each; where there is none, of several together."""
    ladders = {name: steps for name in _CHANGES if (steps := _smaller(settings, name))}

    def peak(changes: Mapping[str, Any]) -> int:
        return plan_of(replace(settings, **changes)).peak

    singles = ([{name: value} for value in steps] for name, steps in ladders.items())
    first = (next((one for one in steps if peak(one) <= working_set), None) for steps in singles)
    fitting: list[dict[str, Any]] = [one for one in first if one]
    if not fitting:
        longest = max(map(len, ladders.values()), default=0)
        rungs = ({name: steps[min(i, len(steps) - 1)] for name, steps in ladders.items()} for i in range(longest))
        fitting = [_needed(each, peak, working_set) for each in rungs if peak(each) <= working_set][:1]
    return [(changes, peak(changes)) for changes in fitting]


def _needed(changes: dict[str, Any], peak: Callable[[Mapping[str, Any]], int], working_set: int) -> dict[str, Any]:
    """Changes that fit together, without those that they fit without; what changes no result stays longest."""
    for name in reversed(_CHANGES):
        fewer = {other: value for other, value in changes.items() if other != name}
        changes = fewer if peak(fewer) <= working_set else changes
    return changes


def _smaller(settings: Any, name: str) -> list[Any]:
    """Smaller and smaller values of a setting, for as long as they make sense."""
    value, steps = getattr(settings, name, None), []
    if value is None or isinstance(value, bool):
        return [True] if value is False else []
    factor, least = _CHANGES[name]
    while (value := int(value * factor)) >= least:
        steps.append(value)
    return steps


def _options(changes: Mapping[str, Any]) -> str:
    """Changes of settings as the command line takes them."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changes.items()]
    return " with ".join(flags)


def gigabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
