"""Training: GRPO with LoRA and mixed rewards, as a generator that yields one report a step.

A step shows comparisons, lets the policy write a group of rollouts for each, rewards them by what people prefer, and
updates the adapter, once or `updates_per_rollout` times. Reasoning tokens get the policy gradient; where a reward
integrates the answer out, the answer position gets its exact gradient with the weight of one token of its rollout.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.lora import adapter_weights, attach_lora, linear_layers
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError
from mlxpref.preferences import Preference
from mlxpref.training.custom_reward import CustomReward, load_rewards
from mlxpref.training.held_out import HeldOut
from mlxpref.training.policy_update import update_policy
from mlxpref.training.rewards import reward_mix
from mlxpref.training.rollouts import sample_step
from mlxpref.training.sampler import ComparisonSampler, held_out_split, part_of
from mlxpref.training.step_report import RolloutRecord, StepReport, held_out_metrics, measured_shares, rollout_records
from mlxpref.training.stopwatch import Stopwatch

__all__ = ["RolloutRecord", "StepReport", "Trainer"]

_MOST_FAILURES = 3
"""Steps in a row whose loss or gradient may be not finite before training stops."""
_ROUNDING = 1e-3
"""How far the lengths of the adapters of several processes may be apart between two comparisons of them."""


class Trainer:
    """Trains the adapter of a model on preferences; the base weights never change.

    Iterate over `steps()`: the adapter is on the model from the start and better after every step. `preferences` are
    those that are learned from, `held_out` measures with others. With `settings.patience`, the model has the adapter of
    the best measurement once the iteration has come to its end; until then, `adapter` has its weights. `own` are the
    rewards that are not ours, where they are loaded already. Of several `processes`, each does its share of a step and
    makes the same update; all report the same but for times, memory and bytes.
    """

    def __init__(
        self,
        vlm: VLM,
        preferences: Sequence[Preference],
        settings: TrainSettings,
        own: Mapping[str, CustomReward] | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.vlm, self.settings, self.processes = vlm, settings, processes
        mix = reward_mix(settings.reward)
        if mix.exact and mix.own and not settings.think:
            raise ConfigError(
                f"reward {settings.reward}: without thinking nothing is written that {mix.own[0]} could judge, as soft "
                "and brier integrate the answer out; leave one of them out, or think"
            )
        usable = [p for p in preferences if "brier" in mix.names or not p.is_tie]
        if not usable:
            raise DataError(
                f"all {len(preferences)} preferences are ties, of which reward {settings.reward} learns nothing; "
                "give other data, or --reward brier"
            )
        learned_from, kept_out = held_out_split(usable, settings.held_out, settings.seed)
        self.preferences = part_of(learned_from, settings.fraction, settings.seed)
        self.held_out = HeldOut(vlm, kept_out, settings, processes)
        self.step_count = settings.steps or math.ceil(len(self.preferences) / settings.comparisons)
        if adapter_weights(vlm.model):
            raise ModelError(
                f"{vlm.checkpoint.folder}: the model carries an adapter already; train one that is freshly loaded"
            )
        self._own = load_rewards(settings.reward) if own is None else own
        self._timetable = ComparisonSampler(self.preferences, settings)
        attach_lora(vlm.model, list(linear_layers(vlm.model)), settings.rank, settings.lora_scale, settings.seed)
        self.optimizer = optim.AdamW(learning_rate=self._schedule(), betas=[0.9, 0.95], weight_decay=0.0)
        self.optimizer.init(vlm.model.trainable_parameters())
        self._failures = 0

    @property
    def adapter(self) -> dict[str, mx.array]:
        """The weights that a user wants now, by their full names: with patience the best measured ones so far."""
        return self.best_adapter or adapter_weights(self.vlm.model)

    @property
    def best_adapter(self) -> dict[str, mx.array]:
        """The weights of the best measurement so far, by their full names; none without patience."""
        return dict(self.held_out.best)

    @property
    def stopped_early(self) -> bool:
        """Whether measurements without a better one ended training, or will where it goes on."""
        return self.held_out.over

    @property
    def state(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What the next step depends on beside the settings: adapters and the optimizer as arrays, and numbers.

        Random numbers are keyed by step, so no generator has a state.
        """
        best, measured = self.held_out.state
        kept: dict[str, mx.array] = dict(tree_flatten(self.optimizer.state))
        arrays = {f"optimizer.{name}": value for name, value in kept.items()}
        arrays |= {f"adapter.{name}": weight for name, weight in adapter_weights(self.vlm.model).items()}
        arrays |= {f"best.{name}": weight for name, weight in best.items()}
        return arrays, {"failures": self._failures, "held_out": measured}

    def restore(self, arrays: Mapping[str, mx.array], numbers: Mapping[str, Any]) -> None:
        """Go on from a state that a trainer with the same settings and data had."""
        self.vlm.model.update(tree_unflatten(list(_under("adapter.", arrays).items())))
        self.optimizer.state = tree_map_with_path(lambda path, _: arrays[f"optimizer.{path}"], self.optimizer.state)
        self.held_out.restore(_under("best.", arrays), numbers["held_out"])
        self._failures = int(numbers["failures"])

    def steps(self, done: int = 0) -> Iterator[StepReport]:
        """Train after `done` steps, one report a step; ModelError after three steps in a row that are not finite.

        `state` is complete whenever a report is yielded.
        """
        started = time.perf_counter()
        for step in range(done + 1, self.step_count + 1):
            if self.held_out.over:
                break
            report, finite = self._step(step)
            self._failures = 0 if finite else self._failures + 1
            if step % self.settings.save_every == 0:
                self._keep_equal(step)
            left = (time.perf_counter() - started) / (step - done) * (self.step_count - step)
            yield replace(report, seconds_left=left)
            self._stop_if_failing(step)
        if self.best_adapter:
            self.vlm.model.update(tree_unflatten(list(self.best_adapter.items())))

    def _step(self, step: int) -> tuple[StepReport, bool]:
        """One step, and whether its loss and its gradient are finite."""
        mx.reset_peak_memory()
        watch, sent, waited = Stopwatch(), self.processes.sent_bytes, self.processes.wait_seconds
        groups, written = sample_step(self.vlm, self._timetable, step, self.settings, self._own, self.processes)
        mx.clear_cache()  # what one phase let go of is of other sizes than what the next one needs
        watch.lap("rollout")
        learned = update_policy(self.vlm, self.optimizer, groups, self.settings, watch, self.processes)
        mx.clear_cache()
        watch.lap("update")
        measured = None
        if self.held_out.is_due(step, self.step_count):
            measured = held_out_metrics(self.held_out.measure())
            mx.clear_cache()
            watch.lap("evaluation")
        shares = measured_shares(written, groups, self.settings)
        seconds: dict[str, Any] = watch.seconds()
        report = StepReport(
            step=step,
            steps=self.step_count,
            **shares,
            **asdict(learned),
            **seconds,
            tokens_per_second=shares["tokens"] / seconds["rollout_seconds"],
            learning_rate=float(self.optimizer.learning_rate.item()),
            seconds_left=0.0,
            peak_bytes=int(mx.get_peak_memory()),
            held_out=measured,
            sent_bytes=self.processes.sent_bytes - sent,
            wait_seconds=round(self.processes.wait_seconds - waited, 4),
            rollouts=rollout_records(step, groups, self.settings),
        )
        return report, learned.finite

    def _keep_equal(self, step: int) -> None:
        """See that all processes have one adapter, and give them that of process 0 where processes round differently.

        MlxprefError where the difference is more than that.
        """
        if self.processes.size == 1:
            return
        weights = [np.array(weight.astype(mx.float32)) for _, weight in sorted(adapter_weights(self.vlm.model).items())]
        digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest()
        length = math.sqrt(sum(float((weight.astype(np.float64) ** 2).sum()) for weight in weights))
        told = self.processes.all_gather([digest, length])
        for rank, (_, other) in enumerate(told):
            if abs(other - told[0][1]) > _ROUNDING * told[0][1]:
                raise MlxprefError(
                    f"step {step}: process {rank} has another adapter than process 0 (of length {other}, not "
                    f"{told[0][1]}); go on from the last checkpoint with --resume"
                )
        if any(other != told[0][0] for other, _ in told):
            arrays, numbers = self.state
            self.restore(self.processes.broadcast_arrays(arrays), numbers)

    def _schedule(self) -> Any:
        """The learning rate of every update: it rises from near 0, then falls along a cosine to a tenth."""
        settings = self.settings
        total = self.step_count * settings.updates_per_rollout
        warmup = min(settings.warmup_steps * settings.updates_per_rollout, max(total - 1, 1))
        peak, falling = settings.learning_rate, max(total - warmup, 1)
        rest = optim.cosine_decay(peak, falling, peak * 0.1)
        rise = optim.linear_schedule(peak / warmup, peak, warmup) if warmup else None
        return optim.join_schedules([rise, rest], [warmup]) if rise else rest

    def _stop_if_failing(self, step: int) -> None:
        if self._failures >= _MOST_FAILURES:
            raise ModelError(
                f"step {step}: loss or gradient was not finite {_MOST_FAILURES} times in a row; the adapter is that of "
                f"the last finite step; try a smaller --learning-rate than {self.settings.learning_rate}"
            )


def _under(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
