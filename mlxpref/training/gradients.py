"""The gradient of a step: a bounded number of completions at a time, and each prompt once.

The loss is a sum over completions whose weights are those of the whole step, so what is computed together changes the
result by the order of float additions only. Completions of one prompt that do not fit together are scored in turn
behind its keys and values; what flows back into these is summed, and goes through the prompt once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import Completions, Logprobs, completion_logprobs, prefill
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.training.loss import LossInputs, step_loss

__all__ = ["GradientResult", "logprobs_of", "policy_gradient"]


@dataclass(frozen=True)
class GradientResult:
    """The loss of R completions, its gradient, their log-probabilities (R, T), and how many tokens were clipped."""

    loss: mx.array
    gradient: dict[str, Any]
    logprobs: mx.array
    clipped: mx.array


def policy_gradient(
    vlm: VLM, prompts: Sequence[ComparisonInput], completions: Completions, targets: LossInputs, settings: TrainSettings
) -> GradientResult:
    """The gradient by the model's trainable weights, `settings.micro_batch` completions at a time."""
    found: list[tuple[mx.array, mx.array, mx.array]] = []
    gradient: Any = None
    group = len(completions.lengths) // len(prompts)
    for some, rows in _batches(len(prompts), group, settings.micro_batch):
        part = completions.part(rows)
        each = _one_group_in_parts if group > settings.micro_batch else _whole_groups
        parts, added = each(vlm, prompts[some], part, targets.part(rows, part.tokens.shape[1]), settings)
        gradient = added if gradient is None else tree_map(mx.add, gradient, added)
        found += [(loss, clipped, _widened(logprobs, completions)) for loss, clipped, logprobs in parts]
        mx.eval(gradient, found)
    loss, clipped, logprobs = ([each[number] for each in found] for number in range(3))
    return GradientResult(mx.stack(loss).sum(), gradient, mx.concatenate(logprobs), mx.stack(clipped).sum())


def logprobs_of(
    vlm: VLM, prompts: Sequence[ComparisonInput], completions: Completions, settings: TrainSettings
) -> mx.array:
    """The log-probabilities (R, T) of completions without a gradient, by the same arithmetic as `policy_gradient`."""
    found = []
    group = len(completions.lengths) // len(prompts)
    for some, rows in _batches(len(prompts), group, settings.micro_batch):
        reads = prefill(vlm, prompts[some], settings.recompute)
        for chunk in _chunks(rows, settings.micro_batch):
            scores = completion_logprobs(vlm, reads, completions.part(chunk), settings.temperature, settings.recompute)
            found.append(_widened(scores.logprobs, completions))
            mx.eval(found[-1])
    return mx.concatenate(found)


Found = list[tuple[mx.array, mx.array, mx.array]]
"""The loss, the clipped tokens and the log-probabilities of some completions at a time."""


def _whole_groups(
    vlm: VLM, prompts: Sequence[ComparisonInput], completions: Completions, targets: LossInputs, settings: TrainSettings
) -> tuple[Found, Any]:
    """Whole groups, forward and backward at once."""

    def objective(_: nn.Module) -> tuple[mx.array, mx.array, mx.array]:
        reads = prefill(vlm, prompts, settings.recompute)
        scores = completion_logprobs(vlm, reads, completions, settings.temperature, settings.recompute)
        return *step_loss(scores, targets, settings), scores.logprobs

    found, gradient = nn.value_and_grad(vlm.model, objective)(vlm.model)
    return [found], gradient


def _one_group_in_parts(
    vlm: VLM, prompts: Sequence[ComparisonInput], completions: Completions, targets: LossInputs, settings: TrainSettings
) -> tuple[Found, Any]:
    """One group, some of its completions at a time."""
    reads = prefill(vlm, prompts, recompute=False)
    mx.eval(reads.arrays)
    weights = vlm.model.trainable_parameters()
    found: Found = []
    gradient: Any = None
    for rows in _chunks(slice(0, len(completions.lengths)), settings.micro_batch):
        part = completions.part(rows)
        wanted = targets.part(rows, part.tokens.shape[1])

        def objective(
            weights: Any, arrays: list[mx.array], part: Completions = part, wanted: LossInputs = wanted
        ) -> Any:
            vlm.model.update(weights)
            scores: Logprobs = completion_logprobs(
                vlm, reads.of(arrays), part, settings.temperature, settings.recompute
            )
            return *step_loss(scores, wanted, settings), scores.logprobs

        one, added = mx.value_and_grad(objective, argnums=(0, 1))(weights, reads.arrays)
        gradient = added if gradient is None else tree_map(mx.add, gradient, added)
        found.append(one)
        mx.eval(_in_layers(*gradient), found)
    vlm.model.update(weights)
    by_weights, by_arrays = gradient
    names, values = zip(*tree_flatten(weights), strict=True)

    def again(*values: mx.array) -> list[mx.array]:
        vlm.model.update(tree_unflatten(list(zip(names, values, strict=True))))
        return prefill(vlm, prompts, settings.recompute).arrays

    _, through = mx.vjp(again, list(values), by_arrays)
    vlm.model.update(weights)
    direct = dict(tree_flatten(by_weights))
    return found, tree_unflatten([(name, direct[name] + more) for name, more in zip(names, through, strict=True)])


def _in_layers(by_weights: Any, by_arrays: Sequence[mx.array]) -> list[mx.array]:
    """Gradients by weights, and by `Read.arrays`, in the order of layers: the order in which they are evaluated.

    One kind after the other, what only the second kind needs of every layer would exist until the first is done: two
    to three times the memory.
    """
    layers = [list(by_arrays[start : start + 2]) for start in range(0, len(by_arrays) - 1, 2)]
    weights: dict[str, mx.array] = dict(tree_flatten(by_weights))
    for name, value in weights.items():
        layers[int(name.partition(".layers.")[2].partition(".")[0])].append(value)
    return [*(value for layer in layers for value in layer), by_arrays[-1]]


def _batches(count: int, group: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Prompts that run together, and their completions: whole groups within a bound on rows, at least one."""
    size = max(1, rows // group)
    for start in range(0, count, size):
        end = min(start + size, count)
        yield slice(start, end), slice(start * group, end * group)


def _chunks(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _widened(logprobs: mx.array, completions: Completions) -> mx.array:
    return mx.pad(logprobs, [(0, 0), (0, completions.tokens.shape[1] - logprobs.shape[1])])
