"""What a step learns from its groups: the updates of the adapter, unless something is not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.logprobs import Completions
from mlxpref.engine.lora import adapter_off
from mlxpref.engine.rollout import Rollout
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.training.gradients import GradientResult, logprobs_of, policy_gradient
from mlxpref.training.grpo import kl_to_reference
from mlxpref.training.loss import LossInputs, loss_inputs
from mlxpref.training.rollouts import RolloutGroups
from mlxpref.training.stopwatch import Stopwatch

__all__ = ["UpdateResult", "update_policy"]


@dataclass(frozen=True)
class UpdateResult:
    """What the updates of a step measured: the first one, but `clip_fraction` the last one.

    `mismatch` is the mean distance between the log-probabilities of sampling and of scoring, `kl` the divergence from
    the reference a token, not a number where the reference was not asked. Where an update is not finite, `loss` and
    `grad_norm` are its own, and no further one follows; `updated` says whether any came before it.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: float = math.nan
    clip_fraction: float = 0.0
    mismatch: float = 0.0
    updated: bool = False

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def update_policy(
    vlm: VLM,
    optimizer: optim.Optimizer,
    groups: RolloutGroups,
    settings: TrainSettings,
    watch: Stopwatch,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> UpdateResult:
    """Update the adapter with the groups that teach something, `settings.updates_per_rollout` times.

    Each process takes the gradient of the groups that it wrote; what is done with the sum, and said of it, is the same
    in all of them.
    """
    teaching = np.flatnonzero(groups.earned.taught).tolist()
    if not teaching:
        return UpdateResult()
    count = max(sum(len(rollout.tokens) for i in teaching for rollout in groups.rollouts[i]), 1)
    chosen, prompts = _own(groups, teaching)
    rows = [rollout for i in chosen for rollout in groups.rollouts[i]]
    completions = Completions.of([rollout.tokens for rollout in rows])
    targets = _targets(groups, chosen, settings)
    if settings.kl and chosen:
        with adapter_off(vlm.model):
            targets = replace(targets, reference=logprobs_of(vlm, prompts, completions, settings))
        watch.lap("score")
    learned = UpdateResult()
    for update in range(settings.updates_per_rollout):
        descent = policy_gradient(vlm, prompts, completions, targets, settings) if chosen else _nothing(vlm)
        distance, kl = _distances(descent.logprobs, targets.reference, completions, rows)
        loss, clipped, distance, kl = processes.all_sum_numbers(
            float(np.array(descent.loss)), float(np.array(descent.clipped)), distance, kl
        )
        norm = _apply(vlm, optimizer, processes.all_sum(descent.gradient), loss, settings.max_grad_norm)
        learned = replace(learned, clip_fraction=clipped / count)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if update == 0:
            # The old policy's log-probabilities are those of the scoring pass, not of sampling.
            targets = replace(targets, old=descent.logprobs)
            learned = replace(learned, loss=loss, grad_norm=norm, mismatch=distance / count, updated=finite)
            learned = replace(learned, kl=kl / count if settings.kl else math.nan)
        if not finite:
            return replace(learned, loss=loss, grad_norm=norm)
    return learned


def _own(groups: RolloutGroups, numbers: Sequence[int]) -> tuple[list[int], list[ComparisonInput]]:
    """Those of some groups that this process wrote, and their prompts."""
    found = [(i, prompt) for i in numbers if (prompt := groups.prompts[i]) is not None]
    return [i for i, _ in found], [prompt for _, prompt in found]


def _nothing(vlm: VLM) -> GradientResult:
    """What a process adds whose groups teach nothing."""
    gradient = tree_map(mx.zeros_like, vlm.model.trainable_parameters())
    return GradientResult(mx.array(0.0), gradient, mx.zeros((0, 0)), mx.array(0))


def _targets(groups: RolloutGroups, chosen: Sequence[int], settings: TrainSettings) -> LossInputs:
    """The targets of the chosen groups, weighted within all of the step."""
    earned = groups.earned
    lengths = [[len(rollout.tokens) for rollout in group] for group in groups.rollouts]
    y = np.array([lesson.y for lesson in groups.lessons])
    return loss_inputs(lengths, earned.answered, earned.advantages, y, chosen, settings, earned.counted)


def _apply(vlm: VLM, optimizer: optim.Optimizer, gradient: dict[str, Any], loss: float, max_grad_norm: float) -> float:
    """The length of the gradient of an update, which is made unless that or the loss is not finite."""
    gradient, norm = optim.clip_grad_norm(gradient, max_grad_norm)
    length = float(np.array(norm))
    if math.isfinite(loss) and math.isfinite(length):
        optimizer.update(vlm.model, gradient)
        mx.eval(vlm.model.trainable_parameters(), optimizer.state)
    return length


def _distances(
    logprobs: mx.array, reference: mx.array | None, completions: Completions, rollouts: Sequence[Rollout]
) -> tuple[float, float]:
    """How far scoring is from sampling, and the divergence from the reference: sums over tokens."""
    mask = completions.mask
    sampled = np.zeros(mask.shape)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.logprobs)] = rollout.logprobs
    distance = np.where(mask, np.abs(np.array(logprobs) - sampled), 0).sum()
    kl = 0.0
    if reference is not None:
        kl = float(np.where(mask, np.array(kl_to_reference(logprobs, reference)), 0).sum())
    return float(distance), kl
