"""One update of the adapter with the summed gradient of all processes, unless something is not finite."""

import math
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.experts import NO_CHOICE
from mlxpref.engine.vlm import VLM
from mlxpref.training.gradients import GradientResult
from mlxpref.training.loss import LossInputs


@dataclass(frozen=True)
class UpdateResult:
    """The measurements of a step's updates: those of the first one, but the last one's `clip_fraction`.

    `mismatch` is the mean distance between the log-probabilities of sampling and of scoring, `kl` the divergence from
    the reference a token or answer position, `read_accuracy` the share of the answers read at once that agree with the
    majority, `rerouted` the share of the experts that the update would not have given to the tokens that were written
    with them. All are NaN where nothing was measured. `loss` and `grad_norm` are those of an update that is not finite,
    if any, which ends the step's updates; `updated` says whether there was one before it.
    """

    loss: float = math.nan
    grad_norm: float = math.nan
    kl: float = math.nan
    clip_fraction: float = math.nan
    mismatch: float = math.nan
    read_accuracy: float = math.nan
    rerouted: float = math.nan
    updated: bool = False

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def then(self, later: "UpdateResult") -> "UpdateResult":
        """Return the measurements of this update and a later one of the same step."""
        source = self if later.finite else later
        return replace(self, clip_fraction=later.clip_fraction, loss=source.loss, grad_norm=source.grad_norm)


def update_policy(
    vlm: VLM,
    optimizer: optim.Optimizer,
    gradient: GradientResult,
    inputs: LossInputs,
    settings: TrainSettings,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> UpdateResult:
    """Change the adapter by the clipped sum of all processes' gradients, and return the measurements.

    All processes make the same update. Nothing changes if the loss or the gradient's norm is not finite.
    """
    mask, logprobs = inputs.completions.mask, np.array(gradient.logprobs)  # (R, T)
    distance = float(np.where(mask, np.abs(logprobs - inputs.sampled), 0).sum())
    experts = inputs.completions.experts
    given = 0.0 if experts is None else float((experts != NO_CHOICE).sum())
    loss, distance, clipped, divergence, right, others, read, given = processes.all_sum_numbers(
        float(np.array(gradient.loss)),
        distance,
        *np.array(gradient.measurements, np.float64).tolist(),
        len(inputs.read.prompts) if inputs.read else 0,
        given,
    )
    total, norm = optim.clip_grad_norm(processes.all_sum(gradient.gradient), settings.max_grad_norm)
    result = UpdateResult(
        loss=loss,
        grad_norm=float(np.array(norm)),
        kl=_mean(divergence, inputs.step_positions) if settings.kl else math.nan,
        clip_fraction=_mean(clipped, inputs.step_tokens),
        mismatch=_mean(distance, inputs.step_tokens),
        read_accuracy=_mean(right, read),
        rerouted=_mean(others, given),
    )
    if not result.finite:
        return result
    optimizer.update(vlm.model, total)
    mx.eval(vlm.model.trainable_parameters(), optimizer.state)
    return replace(result, updated=True)


def _mean(total: float, count: float) -> float:
    """The mean of `count` values, NaN of none."""
    return total / count if count else math.nan
