"""Training: GRPO with LoRA and mixed rewards, as a generator that yields one report a step.

A step shows comparisons, lets the policy write a group of rollouts for each, rewards them by what people prefer, and
updates the adapter, once or `updates_per_rollout` times.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxpref.config import TrainSettings
from mlxpref.data.left_out import LeftOut
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.lora import adapter_off, adapter_weights, attach_lora, lora_targets
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ConfigError, DataError, MlxprefError, ModelError
from mlxpref.judge.verdict_source import say_if_unreadable
from mlxpref.preferences import Preference
from mlxpref.training.custom_reward import load_rewards
from mlxpref.training.gradients import policy_gradient, reference_scores, with_reference
from mlxpref.training.group_rewards import GroupRewards, reward_groups
from mlxpref.training.held_out import HeldOut
from mlxpref.training.listener import listen, with_heard
from mlxpref.training.loss import LossInputs, loss_inputs, reading_of
from mlxpref.training.policy_update import UpdateResult, update_policy
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup, sample_groups
from mlxpref.training.sampler import ComparisonSampler, TrainingComparison, held_out_split, random_subset
from mlxpref.training.step_report import (
    StepMeter,
    StepReport,
    held_out_metrics,
    json_value,
    measured_shares,
    rollout_records,
)

_MAX_FAILURES = 3
"""Training stops after this many steps in a row whose loss or gradient is not finite."""
_REPLACEMENTS = 10
"""A place of a step whose images cannot be read is given to another comparison so often."""
_ROUNDING = 1e-3
"""The largest difference of several processes' adapter lengths between two checks."""


class Trainer:
    """Trains the adapter of a model on preferences; the base weights never change.

    Iterate over `steps()`: the adapter is on the model from the start, and every step updates it. `preferences` are to
    learn from, `held_out` measures with others. `mix` are the settings' rewards, if already loaded. `start` are the
    weights of an adapter to go on from, by their full names; without, a fresh one is on all linear layers. Each of
    several `processes` does its share of a step and makes the same update; all report the same but for times, memory
    and bytes. Images that cannot be read go to `left_out`; the preferences stay the same, so that a resumed run makes
    the same steps. ConfigError, DataError or ModelError for unusable settings, data or models.
    """

    def __init__(
        self,
        vlm: VLM,
        preferences: Sequence[Preference],
        settings: TrainSettings,
        mix: RewardMix | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
        start: Mapping[str, mx.array] | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.vlm, self.settings, self.processes = vlm, settings, processes
        self.left_out = left_out or LeftOut(settings.data, preferences)
        self.mix = mix or load_rewards(settings.rewards)
        if self.mix.exact and self.mix.custom and not settings.think:
            raise ConfigError(
                f"reward {settings.reward}: without thinking nothing is written that {self.mix.custom[0]} could judge, "
                "as soft and brier integrate the answer out; leave one of them out, or think"
            )
        asked = [name for name in ("agreement", "listener_weight") if getattr(settings, name)]
        if asked and not self.mix.exact:
            raise ConfigError(
                f"setting {asked[0]}: reward {settings.reward} does not integrate the answer out; take soft or brier"
            )
        usable = [p for p in preferences if "brier" in self.mix.names or not p.is_tie]
        if not usable:
            raise DataError(
                f"all {len(preferences)} preferences are ties, of which reward {settings.reward} learns nothing; "
                "give other data, or --reward brier"
            )
        learned_from, held_out = held_out_split(usable, settings.held_out, settings.seed)
        count = max(1, math.ceil(settings.fraction * len(learned_from)))
        self.preferences = random_subset(learned_from, count, settings.seed, "fraction")
        self.held_out = HeldOut(vlm, held_out, settings, self.mix, processes, self.left_out)
        self.step_count = settings.steps or math.ceil(len(self.preferences) * settings.orders / settings.comparisons)
        if adapter_weights(vlm.model):
            raise ModelError(
                f"{vlm.checkpoint.folder}: the model carries an adapter already; train one that is freshly loaded"
            )
        self.sampler = ComparisonSampler(self.preferences, settings)
        layers = sorted({name.rpartition(".")[0] for name in start}) if start else lora_targets(vlm.model)
        attach_lora(vlm.model, layers, settings.rank, settings.lora_scale, settings.seed)
        weights = {name: weight.astype(mx.float32) for name, weight in (start or {}).items()}
        vlm.model.update(tree_unflatten(list(weights.items())))
        self.optimizer = optim.AdamW(learning_rate=self._learning_rate(), betas=[0.9, 0.95], weight_decay=0.0)
        self.optimizer.init(vlm.model.trainable_parameters())
        self._failures = 0

    @property
    def adapter(self) -> dict[str, mx.array]:
        """The current weights by their full names, with patience the best ones so far."""
        return self.held_out.best or adapter_weights(self.vlm.model)

    def adapter_step(self, step: int) -> int:
        """The step that `adapter` is of, after a step."""
        return self.held_out.best_step if self.held_out.best else step

    @property
    def trained(self) -> dict[str, Any]:
        """The settings that a judge with the adapter takes from its training, for `trained_settings`."""
        settings = self.settings
        return {
            "think": settings.think,
            "max_pixels": self.vlm.features.max_pixels,
            "max_tokens": settings.max_tokens,
            "read_weight": settings.read_weight if reading_of(settings, self.mix) else 0.0,
        }

    @property
    def state(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """The state that the next step depends on: adapters and the optimizer as arrays, and numbers.

        Random numbers have keys by step, so there is no generator state.
        """
        best, evaluations = self.held_out.state
        parts = {"optimizer": self.optimizer.state, "adapter": adapter_weights(self.vlm.model)}
        arrays = dict(tree_flatten(parts | ({"best": best} if best else {})))
        numbers = {"failures": self._failures, "held_out": evaluations, "left_out": dict(self.left_out.reasons)}
        return arrays, numbers

    def restore(self, arrays: Mapping[str, mx.array], numbers: Mapping[str, Any]) -> None:
        """Continue from the state of a trainer with the same settings and data; KeyError where a part is missing."""
        self.vlm.model.update(tree_unflatten(list(_under("adapter.", arrays).items())))
        self.optimizer.state = tree_map_with_path(lambda path, _: arrays[f"optimizer.{path}"], self.optimizer.state)
        self.held_out.restore(_under("best.", arrays), numbers["held_out"])
        self.left_out.reasons |= numbers.get("left_out", {})  # earlier versions had none
        self._failures = int(numbers["failures"])

    def measure_start(self) -> dict[str, Any] | None:
        """Measure the held-out preferences before the first step: a line of the log; None without them."""
        evaluation = self.held_out.measure(0, self.step_count)
        if not evaluation:
            return None
        return {"step": 0, "steps": self.step_count, "held_out": json_value(held_out_metrics(evaluation))}

    def steps(self, done: int = 0) -> Iterator[StepReport]:
        """Train after `done` steps, one report a step; ModelError after three steps in a row that are not finite.

        `state` is complete at every yield. At the end the model has the best adapter with `settings.patience`, else the
        last one.
        """
        start = time.perf_counter()
        for step in range(done + 1, self.step_count + 1):
            if self.held_out.should_stop:
                break
            report = self._step(step)
            if step % self.settings.save_every == 0:
                self._keep_equal(step)
            seconds_left = (time.perf_counter() - start) / (step - done) * (self.step_count - step)
            yield replace(report, seconds_left=seconds_left)
            if self._failures >= _MAX_FAILURES:
                raise ModelError(
                    f"step {step}: loss or gradient was not finite {_MAX_FAILURES} times in a row; the adapter is that "
                    f"of the last finite step; try a smaller --learning-rate than {self.settings.learning_rate}"
                )
        self.vlm.model.update(tree_unflatten(list(self.adapter.items())))

    def _step(self, step: int) -> StepReport:
        """Make one step and return its report."""
        vlm, settings, mix, processes = self.vlm, self.settings, self.mix, self.processes
        meter = StepMeter(processes, vlm.features)

        comparisons, unused = self.sampler.for_step(step), self.sampler.unused(step)  # P comparisons
        rollouts, left_out = self._sample(step, comparisons, unused, meter)  # P x G completions
        if step == 1:
            say_if_unreadable(vlm, [verdict for group in rollouts for verdict in group.verdicts])
        rewards = reward_groups(rollouts, settings, mix, processes)  # (P, G)
        # All groups written, and the P to learn from.
        rollouts, rewards, indices = self._resample(step, rollouts, rewards, unused, meter)
        meter.end_phase("rollout")

        loss_rollouts, loss_rewards = [rollouts[i] for i in indices], rewards.select(indices)
        inputs = loss_inputs(
            loss_rollouts, loss_rewards, settings, mix, vlm.tokenizer.at_once_ids, vlm.tokenizer.lead_ids
        )  # (R, T)
        updates = settings.updates_per_rollout if loss_rewards.has_gradient.any() or reading_of(settings, mix) else 0
        if settings.kl and inputs.prompts:
            inputs = self._with_reference(inputs, loss_rollouts)
            meter.end_phase("score")
        result = UpdateResult()
        for update in range(updates):
            gradient = policy_gradient(vlm, inputs, settings)
            latest = update_policy(vlm, self.optimizer, gradient, inputs, settings, processes)
            result = result.then(latest) if update else latest
            if not result.finite:
                break
            if update == 0 and settings.method == "grpo":
                # The old policy's log-probabilities come from the scoring pass, not from sampling.
                inputs = replace(inputs, old=gradient.logprobs)
        self._failures = self._failures + 1 if updates and not result.finite else 0
        meter.end_phase("update")

        evaluation = self.held_out.measure(step, self.step_count)
        if evaluation:
            meter.end_phase("evaluation")
        shares = measured_shares(rollouts, rewards, mix, settings)
        return StepReport(
            step=step,
            steps=self.step_count,
            **shares,
            **asdict(result),
            skipped=int((~loss_rewards.has_gradient).sum()),
            resampled=len(rollouts) - len(loss_rollouts),
            groups=len(loss_rollouts),
            left_out=left_out,
            learning_rate=float(self.optimizer.learning_rate.item()),
            held_out=held_out_metrics(evaluation) if evaluation else None,
            rollouts=rollout_records(step, loss_rollouts, loss_rewards, mix),
            **meter.fields(shares["tokens"]),
        )

    def _sample(
        self, step: int, comparisons: Sequence[TrainingComparison], unused: Iterator[int], meter: StepMeter
    ) -> tuple[list[RolloutGroup], int]:
        """The groups of comparisons, and the number of those that were left out as an image cannot be read.

        Unused preferences of the step take their places, while there are any. DataError if nothing can be read.
        """
        groups, left_out = self._written(comparisons, meter), 0
        for _ in range(_REPLACEMENTS):
            empty = {each.place for each in comparisons} - {group.comparison.place for group in groups}
            left_out += len(empty)
            others = self.sampler.replacements(step, list(empty), unused, 0)
            if not others:
                break
            groups += self._written(others, meter)
        if not groups:
            raise DataError(
                f"step {step}: none of its images can be read; is their disk still there? then continue with --resume"
            )
        return sorted(groups, key=lambda group: group.comparison.place), left_out

    def _written(self, comparisons: Sequence[TrainingComparison], meter: StepMeter) -> list[RolloutGroup]:
        """The policy's groups of comparisons, of which each preference has all its orders; with the listener's rewards.

        Of several processes, one may read an image that another one cannot.
        """
        settings, mix, processes, orders = self.settings, self.mix, self.processes, self.settings.orders
        groups = sample_groups(self.vlm, comparisons, settings, mix, processes, self.left_out)
        found = Counter(group.comparison.place // orders for group in groups)
        groups = [group for group in groups if found[group.comparison.place // orders] == orders]
        if settings.listener_weight:
            meter.end_phase("rollout")
            groups = listen(self.vlm, groups, settings, mix, processes)
            meter.end_phase("score")
        return groups

    def _with_reference(self, inputs: LossInputs, groups: Sequence[RolloutGroup]) -> LossInputs:
        """The inputs of groups with the answers of the model without its adapter, which a listener has given."""
        if self.settings.listener_weight:
            return with_heard(inputs, groups)
        with adapter_off(self.vlm.model):
            return with_reference(inputs, *reference_scores(self.vlm, inputs, self.settings))

    def _resample(
        self, step: int, rollouts: list[RolloutGroup], rewards: GroupRewards, unused: Iterator[int], meter: StepMeter
    ) -> tuple[list[RolloutGroup], GroupRewards, list[int]]:
        """Give the places of preferences without an advantage to others, up to `settings.resample` times.

        Returns all groups of the step, their rewards, and for each of its P places the index of the group for the loss.
        The next comparisons depend only on the step, their random numbers on step, place and attempt, not on the
        batches.
        """
        orders = self.settings.orders
        latest = {group.comparison.place: index for index, group in enumerate(rollouts)}
        for attempt in range(1, self.settings.resample + 1):
            teaching = {place // orders for place, index in latest.items() if rewards.has_advantage[index]}
            idle = [place for place in latest if place // orders not in teaching]
            comparisons = self.sampler.replacements(step, idle, unused, attempt)
            if not comparisons:
                break
            if others := self._written(comparisons, meter):
                latest |= {group.comparison.place: index for index, group in enumerate(others, start=len(rollouts))}
                rollouts = [*rollouts, *others]
                rewards = rewards + reward_groups(others, self.settings, self.mix, self.processes)
        return rollouts, rewards, list(latest.values())

    def _keep_equal(self, step: int) -> None:
        """Give all processes the adapter of process 0 where their machines round differently.

        MlxprefError for a larger difference.
        """
        if self.processes.size == 1:
            return
        weights = [np.array(weight.astype(mx.float32)) for _, weight in sorted(adapter_weights(self.vlm.model).items())]
        digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest()
        length = math.sqrt(sum(float((weight.astype(np.float64) ** 2).sum()) for weight in weights))
        digests, lengths = zip(*self.processes.all_gather([digest, length]), strict=True)
        for rank, other in enumerate(lengths):
            if abs(other - lengths[0]) > _ROUNDING * lengths[0]:
                raise MlxprefError(
                    f"step {step}: process {rank} has another adapter than process 0 (of length {other}, not "
                    f"{lengths[0]}); continue from the last saved step with --resume"
                )
        if len(set(digests)) > 1:
            arrays, numbers = self.state
            self.restore(self.processes.broadcast_arrays(arrays), numbers)

    def _learning_rate(self) -> Any:
        """The learning rate of every update: it rises from near 0 to its peak, then falls along a cosine to a tenth."""
        settings = self.settings
        total = self.step_count * settings.updates_per_rollout
        warmup = min(settings.warmup_steps * settings.updates_per_rollout, max(total - 1, 1))
        peak = settings.learning_rate
        fall = optim.cosine_decay(peak, max(total - warmup, 1), peak * 0.1)
        if not warmup:
            return fall
        return optim.join_schedules([optim.linear_schedule(peak / warmup, peak, warmup), fall], [warmup])


def _under(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
