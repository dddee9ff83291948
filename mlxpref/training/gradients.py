"""The gradient of a step: for a bounded number of completions at a time, and each prompt once.

The loss is a sum over completions with the weights of the whole step, so the batches change only the order of float
additions. A prompt's completions that do not fit together run in parts behind its keys and values; the sum of their
gradients by these runs back through the prompt once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import Logprobs, PromptState, completion_logprobs, prefill
from mlxpref.engine.vlm import VLM
from mlxpref.training.loss import LossInputs, step_loss

Part = tuple[mx.array, mx.array, mx.array]
"""Of some completions: the loss (), the measurements (4,) of `step_loss`, their log-probabilities (R, T)."""


@dataclass(frozen=True)
class GradientResult:
    """The loss () of R completions, its gradient, their log-probabilities (R, T), the measurements (4,) of `step_loss`.

    The gradient is a tree of arrays like the model's trainable weights.
    """

    loss: mx.array
    gradient: Any
    logprobs: mx.array
    measurements: mx.array


def policy_gradient(vlm: VLM, inputs: LossInputs, settings: TrainSettings) -> GradientResult:
    """Return the gradient by the trainable weights, from `settings.micro_batch` completions at a time.

    It is 0 without completions: another process may have some.
    """
    weights = vlm.model.trainable_parameters()
    gradient: Any = tree_map(mx.zeros_like, weights)
    if not inputs.prompts:
        return GradientResult(mx.array(0.0), gradient, mx.zeros((0, 0)), mx.zeros(4))
    parts: list[Part] = []
    logprobs: list[mx.array] = []
    for batch in _batches(inputs, settings.micro_batch):
        pieces = batch.pieces(settings.micro_batch)
        in_parts = len(batch.completions.lengths) > settings.micro_batch
        new, more = (_one_group_in_parts if in_parts else _whole_groups)(vlm, pieces, settings)
        gradient = more if not parts else tree_map(mx.add, gradient, more)
        parts += new
        logprobs += [_padded(part[2], inputs) for part, piece in zip(new, pieces, strict=True) if not piece.is_read]
        mx.eval(gradient, parts, logprobs)
    losses, measurements, _ = (list(each) for each in zip(*parts, strict=True))
    return GradientResult(
        mx.stack(losses).sum(), gradient, mx.concatenate(logprobs), mx.stack(measurements).sum(axis=0)
    )


def reference_scores(vlm: VLM, inputs: LossInputs, settings: TrainSettings) -> tuple[Logprobs, Logprobs | None]:
    """Return what the model at present gives to the completions, and to the answers read at once, if there are any.

    It is by the arithmetic of `policy_gradient`; the model's routers choose for themselves.
    """
    scored: dict[bool, list[Logprobs]] = {False: [], True: []}
    for batch in _batches(inputs, settings.micro_batch):
        prompts = prefill(vlm, batch.prompts, settings.recompute)
        for piece in batch.pieces(settings.micro_batch):
            alone = replace(piece, completions=replace(piece.completions, experts=None))
            scores = _scores(vlm, prompts, alone, settings)
            mx.eval(scores.logprobs, scores.label_logprobs, scores.answer_states)
            scored[piece.is_read].append(scores)
    return joined(scored[False]), joined(scored[True]) if inputs.read else None


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """Return the rows of several parts together, (R, T) of the longest."""
    columns = max(part.logprobs.shape[1] for part in parts)
    logprobs = [mx.pad(part.logprobs, [(0, 0), (0, columns - part.logprobs.shape[1])]) for part in parts]
    states = [part.answer_states for part in parts if part.answer_states is not None]
    labels = mx.concatenate([part.label_logprobs for part in parts])
    return Logprobs(mx.concatenate(logprobs), labels, mx.concatenate(states))


def with_reference(inputs: LossInputs, scores: Logprobs, read: Logprobs | None) -> LossInputs:
    """Return the inputs with the `reference_scores` of the model without its adapter."""
    return replace(
        inputs,
        reference=_padded(scores.logprobs, inputs),  # (R, T)
        reference_states=scores.answer_states if inputs.mix.exact else None,  # (R, D)
        read=inputs.read and replace(inputs.read, reference_states=read.answer_states if read else None),
    )


def _scores(vlm: VLM, prompts: PromptState, piece: LossInputs, settings: TrainSettings) -> Logprobs:
    """The log-probabilities of some completions behind their prompts."""
    options = settings.temperature, settings.recompute, piece.reference_states
    return completion_logprobs(vlm, prompts, piece.completions, *options)


def _whole_groups(vlm: VLM, pieces: Sequence[LossInputs], settings: TrainSettings) -> tuple[list[Part], Any]:
    """Whole groups, forward and backward at once."""

    def objective(_: nn.Module) -> tuple[mx.array, list[Part]]:
        prompts = prefill(vlm, pieces[0].prompts, settings.recompute)
        parts: list[Part] = []
        for piece in pieces:
            logprobs = _scores(vlm, prompts, piece, settings)
            parts.append((*step_loss(logprobs, piece, settings), logprobs.logprobs))
        return sum((part[0] for part in parts[1:]), parts[0][0]), parts

    (_, parts), gradient = nn.value_and_grad(vlm.model, objective)(vlm.model)
    return parts, gradient


def _one_group_in_parts(vlm: VLM, pieces: Sequence[LossInputs], settings: TrainSettings) -> tuple[list[Part], Any]:
    """One group, some of its completions at a time."""
    prompt = prefill(vlm, pieces[0].prompts, recompute=False)
    mx.eval(prompt.arrays)
    weights = vlm.model.trainable_parameters()
    parts: list[Part] = []
    gradient: Any = None  # by the weights, and by the prompt's keys, values and states
    for piece in pieces:

        def objective(weights: Any, arrays: list[mx.array], some: LossInputs = piece) -> Part:
            vlm.model.update(weights)
            logprobs = _scores(vlm, prompt.with_arrays(arrays), some, settings)
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
        return prefill(vlm, pieces[0].prompts, settings.recompute).arrays

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


def _batches(inputs: LossInputs, micro_batch: int) -> Iterator[LossInputs]:
    """What runs together: whole groups within a bound on completions, at least one group."""
    group = len(inputs.completions.lengths) // len(inputs.prompts)
    size = max(1, micro_batch // group)
    for start in range(0, len(inputs.prompts), size):
        end = min(start + size, len(inputs.prompts))
        yield inputs.part(slice(start, end), slice(start * group, end * group))


def _padded(logprobs: mx.array, inputs: LossInputs) -> mx.array:
    """(R, T of a part) to (R, T) of all."""
    return mx.pad(logprobs, [(0, 0), (0, inputs.completions.tokens.shape[1] - logprobs.shape[1])])
