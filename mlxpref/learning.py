"""What a step learns from its groups: the updates of the adapter, unless something is not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlxpref.config import TrainSettings
from mlxpref.groups import Groups
from mlxpref.grpo import kl_to_reference
from mlxpref.lora import adapter_off
from mlxpref.objective import Targets, targets_of
from mlxpref.rollout import Rollout
from mlxpref.scoring import Completions
from mlxpref.stopwatch import Stopwatch
from mlxpref.update import Descent, descend, logprobs_of
from mlxpref.vlm import VLM

__all__ = ["Learned", "learn"]


@dataclass(frozen=True)
class Learned:
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


def learn(vlm: VLM, optimizer: optim.Optimizer, groups: Groups, settings: TrainSettings, watch: Stopwatch) -> Learned:
    """Update the adapter with the groups that teach something, `settings.updates_per_rollout` times."""
    chosen = np.flatnonzero(groups.earned.taught).tolist()
    if not chosen:
        return Learned()
    prompts = [groups.prompts[i] for i in chosen]
    rows = [rollout for i in chosen for rollout in groups.rollouts[i]]
    completions = Completions.of([rollout.tokens for rollout in rows])
    targets = _targets(groups, chosen, settings)
    if settings.kl:
        with adapter_off(vlm.model):
            targets = replace(targets, reference=logprobs_of(vlm, prompts, completions, settings))
        watch.lap("score")
    learned = Learned()
    for update in range(settings.updates_per_rollout):
        descent = descend(vlm, prompts, completions, targets, settings)
        loss, norm, clipped = _apply(vlm, optimizer, descent, settings.max_grad_norm)
        learned = replace(learned, clip_fraction=clipped / max(int(completions.lengths.sum()), 1))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if update == 0:
            # The old policy's log-probabilities are those of the scoring pass, not of sampling.
            targets = replace(targets, old=descent.logprobs)
            mismatch, kl = _distances(descent.logprobs, targets.reference, completions, rows)
            learned = replace(learned, loss=loss, grad_norm=norm, mismatch=mismatch, kl=kl, updated=finite)
        if not finite:
            return replace(learned, loss=loss, grad_norm=norm)
    return learned


def _targets(groups: Groups, chosen: Sequence[int], settings: TrainSettings) -> Targets:
    """The targets of the chosen groups, weighted within all of the step."""
    earned = groups.earned
    lengths = [[len(rollout.tokens) for rollout in group] for group in groups.rollouts]
    y = np.array([lesson.y for lesson in groups.lessons])
    return targets_of(lengths, earned.answered, earned.advantages, y, chosen, settings, earned.counted)


def _apply(vlm: VLM, optimizer: optim.Optimizer, descent: Descent, max_grad_norm: float) -> tuple[float, float, float]:
    """Loss, length of the gradient and clipped tokens of an update, which is made unless one of the first two is not
    finite."""
    gradient, norm = optim.clip_grad_norm(descent.gradient, max_grad_norm)
    loss, length, clipped = (float(np.array(value)) for value in (descent.loss, norm, descent.clipped))
    if math.isfinite(loss) and math.isfinite(length):
        optimizer.update(vlm.model, gradient)
        mx.eval(vlm.model.trainable_parameters(), optimizer.state)
    return loss, length, clipped


def _distances(
    logprobs: mx.array, reference: mx.array | None, completions: Completions, rollouts: Sequence[Rollout]
) -> tuple[float, float]:
    """How far scoring is from sampling, and the divergence from the reference, a token."""
    mask = completions.mask
    count = max(int(mask.sum()), 1)
    sampled = np.zeros(mask.shape)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.logprobs)] = rollout.logprobs
    distance = np.where(mask, np.abs(np.array(logprobs) - sampled), 0).sum() / count
    kl = math.nan
    if reference is not None:
        kl = float(np.where(mask, np.array(kl_to_reference(logprobs, reference)), 0).sum() / count)
    return float(distance), kl
