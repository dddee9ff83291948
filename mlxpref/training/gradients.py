"""The gradient of a step: for a bounded number of completions at a time, and each prompt once.

The loss is a sum over completions with the weights of the whole step, so the batches change only the order of float
additions. A prompt's completions that do not fit together run in parts behind its keys and values; the sum of their
gradients by these runs back through the prompt once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import completion_logprobs, prefill
from mlxpref.engine.vlm import VLM
from mlxpref.training.loss import LossInputs, step_loss

Part = tuple[mx.array, mx.array, mx.array]
"""Of some completions: the loss (), the number of clipped tokens (), their log-probabilities (R, T)."""


@dataclass(frozen=True)
class GradientResult:
    """The loss () of R completions, its gradient, their log-probabilities (R, T), the number of clipped tokens ().

    The gradient is a tree of arrays like the model's trainable weights.
    """

    loss: mx.array
    gradient: Any
    logprobs: mx.array
    clipped: mx.array


def policy_gradient(vlm: VLM, inputs: LossInputs, settings: TrainSettings) -> GradientResult:
    """Return the gradient by the trainable weights, from `settings.micro_batch` completions at a time.

    It is 0 without completions: another process may have some.
    """
    weights = vlm.model.trainable_parameters()
    gradient: Any = tree_map(mx.zeros_like, weights)
    if not inputs.prompts:
        return GradientResult(mx.array(0.0), gradient, mx.zeros((0, 0)), mx.array(0))
    parts: list[Part] = []
    for some, rows in _batches(inputs, settings.micro_batch):
        batch = inputs.part(some, rows)
        of_batch = _one_group_in_parts if rows.stop - rows.start > settings.micro_batch else _whole_groups
        new, batch_gradient = of_batch(vlm, batch, settings)
        gradient = batch_gradient if not parts else tree_map(mx.add, gradient, batch_gradient)
        parts += [(loss, clipped, _padded(logprobs, inputs)) for loss, clipped, logprobs in new]
        mx.eval(gradient, parts)
    losses, clipped, logprobs = (list(each) for each in zip(*parts, strict=True))
    return GradientResult(mx.stack(losses).sum(), gradient, mx.concatenate(logprobs), mx.stack(clipped).sum())


def policy_logprobs(vlm: VLM, inputs: LossInputs, settings: TrainSettings) -> mx.array:
    """Return the log-probabilities (R, T) without a gradient, with the arithmetic of `policy_gradient`."""
    parts = []
    for some, rows in _batches(inputs, settings.micro_batch):
        prompts = prefill(vlm, inputs.prompts[some], settings.recompute)
        for chunk in _chunks(rows, settings.micro_batch):
            completions = inputs.completions.part(chunk)
            logprobs = completion_logprobs(vlm, prompts, completions, settings.temperature, settings.recompute)
            parts.append(_padded(logprobs.logprobs, inputs))
            mx.eval(parts[-1])
    return mx.concatenate(parts)  # (R, T)


def _whole_groups(vlm: VLM, inputs: LossInputs, settings: TrainSettings) -> tuple[list[Part], Any]:
    """Whole groups, forward and backward at once."""

    def objective(_: nn.Module) -> Part:
        prompts = prefill(vlm, inputs.prompts, settings.recompute)
        logprobs = completion_logprobs(vlm, prompts, inputs.completions, settings.temperature, settings.recompute)
        return *step_loss(logprobs, inputs, settings), logprobs.logprobs

    part, gradient = nn.value_and_grad(vlm.model, objective)(vlm.model)
    return [part], gradient


def _one_group_in_parts(vlm: VLM, inputs: LossInputs, settings: TrainSettings) -> tuple[list[Part], Any]:
    """One group, some of its completions at a time."""
    prompt = prefill(vlm, inputs.prompts, recompute=False)
    mx.eval(prompt.arrays)
    weights = vlm.model.trainable_parameters()
    parts: list[Part] = []
    gradient: Any = None  # by the weights, and by the prompt's keys, values and states
    for rows in _chunks(slice(0, len(inputs.completions.lengths)), settings.micro_batch):
        chunk = inputs.part(slice(0, 1), rows)

        def objective(weights: Any, arrays: list[mx.array], some: LossInputs = chunk) -> Part:
            vlm.model.update(weights)
            logprobs = completion_logprobs(
                vlm, prompt.with_arrays(arrays), some.completions, settings.temperature, settings.recompute
            )
            return *step_loss(logprobs, some, settings), logprobs.logprobs

        part, part_gradient = mx.value_and_grad(objective, argnums=(0, 1))(weights, prompt.arrays)
        gradient = part_gradient if gradient is None else tree_map(mx.add, gradient, part_gradient)
        parts.append(part)
        mx.eval(_by_layer(*gradient), parts)
    vlm.model.update(weights)
    by_weights, by_arrays = gradient
    names, values = zip(*tree_flatten(weights), strict=True)

    def prompt_arrays(*values: mx.array) -> list[mx.array]:
        vlm.model.update(tree_unflatten(list(zip(names, values, strict=True))))
        return prefill(vlm, inputs.prompts, settings.recompute).arrays

    _, through_prompt = mx.vjp(prompt_arrays, list(values), by_arrays)
    vlm.model.update(weights)
    direct = dict(tree_flatten(by_weights))
    total = [(name, direct[name] + more) for name, more in zip(names, through_prompt, strict=True)]
    return parts, tree_unflatten(total)


def _by_layer(by_weights: Any, by_arrays: Sequence[mx.array]) -> list[mx.array]:
    """Gradients by weights, and by `PromptState.arrays`, in the order of layers: the order of their evaluation.

    In the order of kinds, every layer's arrays for the second kind would wait for the first: two to three times the
    memory.
    """
    layers = [list(by_arrays[start : start + 2]) for start in range(0, len(by_arrays) - 1, 2)]
    weights: dict[str, mx.array] = dict(tree_flatten(by_weights))
    for name, value in weights.items():
        layers[int(name.partition(".layers.")[2].partition(".")[0])].append(value)
    return [*(value for layer in layers for value in layer), by_arrays[-1]]


def _batches(inputs: LossInputs, micro_batch: int) -> Iterator[tuple[slice, slice]]:
    """Prompts that run together, and their rows: whole groups within a bound on rows, at least one group."""
    group = len(inputs.completions.lengths) // len(inputs.prompts)
    size = max(1, micro_batch // group)
    for start in range(0, len(inputs.prompts), size):
        end = min(start + size, len(inputs.prompts))
        yield slice(start, end), slice(start * group, end * group)


def _chunks(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _padded(logprobs: mx.array, inputs: LossInputs) -> mx.array:
    """(R, T of a part) to (R, T) of all."""
    return mx.pad(logprobs, [(0, 0), (0, inputs.completions.tokens.shape[1] - logprobs.shape[1])])
