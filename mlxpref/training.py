"""Training: GRPO with LoRA and soft rewards, as a generator that yields one report a step.

A step draws comparisons, lets the policy write a group of rollouts for each, rewards them by what people prefer, and
updates the adapter once. Reasoning tokens get the policy gradient; where the reward integrates the answer out, the
answer position gets the exact gradient of the reward with the weight of one token of its rollout.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from numpy.typing import NDArray

from mlxpref.config import BUILT_IN_REWARDS, TrainSettings
from mlxpref.earnings import Earnings, Lesson, earn, form_of
from mlxpref.errors import DataError, ModelError
from mlxpref.grpo import kl_to_reference
from mlxpref.lora import adapter_off, adapter_weights, attach_lora, linear_layers
from mlxpref.objective import targets_of
from mlxpref.own_reward import load_reward
from mlxpref.pairs import Pair, share_for_first, shown
from mlxpref.preferences import Preference
from mlxpref.rewards import EXACT_REWARDS
from mlxpref.rollout import Rollout, Sampling, roll_out
from mlxpref.scoring import Completions
from mlxpref.update import Descent, descend, logprobs_of
from mlxpref.verdict import Strategy
from mlxpref.vlm import VLM, Prompt

__all__ = ["RolloutRecord", "StepReport", "Trainer"]

_MOST_FAILURES = 3
"""Steps in a row whose loss or gradient may be not finite before training stops."""


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout as it is kept in rollouts.jsonl."""

    step: int
    prompt: str
    y: float
    text: str
    p_first: float | None
    label_mass: float | None
    reward: float
    advantage: float


@dataclass(frozen=True)
class StepReport:
    """What one step did; shares from 0 to 1, seconds, natural logarithms.

    `accuracy` is the share of rollouts that agree with the majority, `mismatch` the mean distance between the
    log-probabilities of sampling and of scoring, `skipped` the groups that taught nothing.
    """

    step: int
    steps: int
    reward: float
    accuracy: float
    format_rate: float
    label_mass: float
    loss: float
    grad_norm: float
    kl: float
    clip_fraction: float
    mismatch: float
    skipped: int
    groups: int
    updated: bool
    tokens: int
    learning_rate: float
    rollout_seconds: float
    update_seconds: float
    seconds_left: float
    peak_bytes: int
    rollouts: tuple[RolloutRecord, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The report as a line of log.jsonl; a number that is not finite, which JSON lacks, is null."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollouts"}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class _Judged:
    """The rollouts of a step with what they earned: P groups of G."""

    lessons: Sequence[Lesson]
    prompts: Sequence[Prompt]
    rollouts: Sequence[Sequence[Rollout]]
    earned: Earnings


class Trainer:
    """Trains the adapter of a model on preferences; the base weights never change.

    Iterate over `steps()`: the adapter is on the model from the start and better after every step.
    """

    def __init__(self, vlm: VLM, preferences: Sequence[Preference], settings: TrainSettings) -> None:
        self.vlm, self.settings = vlm, settings
        usable = [p for p in preferences if settings.reward == "brier" or not p.is_tie]
        if not usable:
            raise DataError(
                f"all {len(preferences)} preferences are ties, of which reward {settings.reward} learns nothing; "
                "give other data, or --reward brier"
            )
        draw = np.random.default_rng([settings.seed, 0])
        kept = draw.permutation(len(usable))[: max(1, math.ceil(settings.fraction * len(usable)))]
        self.preferences = [usable[i] for i in sorted(kept)]
        self.step_count = settings.steps or math.ceil(len(self.preferences) / settings.comparisons)
        if adapter_weights(vlm.model):
            raise ModelError(f"{vlm.path}: the model carries an adapter already; train one that is freshly loaded")
        self._own_reward = None if settings.reward in BUILT_IN_REWARDS else load_reward(settings.reward)
        mx.random.seed(settings.seed)
        attach_lora(vlm.model, list(linear_layers(vlm.model)), settings.rank, settings.lora_scale)
        self.optimizer = optim.AdamW(learning_rate=self._schedule(), betas=[0.9, 0.95], weight_decay=0.0)
        # A step lies in one epoch or reaches into the next: two orders are enough.
        self._order = lru_cache(maxsize=2)(self._draw_order)
        self._failures = 0

    @property
    def state(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What the next step depends on beside the settings: the adapter and the optimizer as arrays, and numbers.

        Random numbers are keyed by step, so no generator has a state.
        """
        kept: dict[str, mx.array] = dict(tree_flatten(self.optimizer.state))
        arrays = {f"optimizer.{name}": value for name, value in kept.items()}
        arrays |= {f"adapter.{name}": weight for name, weight in adapter_weights(self.vlm.model).items()}
        return arrays, {"failures": self._failures}

    def restore(self, arrays: Mapping[str, mx.array], numbers: Mapping[str, Any]) -> None:
        """Go on from a state that a trainer with the same settings and data had."""
        adapter = [(n.removeprefix("adapter."), w) for n, w in arrays.items() if n.startswith("adapter.")]
        self.vlm.model.update(tree_unflatten(adapter))
        self.optimizer.init(self.vlm.model.trainable_parameters())
        self.optimizer.state = tree_map_with_path(lambda path, _: arrays[f"optimizer.{path}"], self.optimizer.state)
        self._failures = int(numbers["failures"])

    def steps(self, done: int = 0) -> Iterator[StepReport]:
        """Train after `done` steps, one report a step; ModelError after three steps in a row that are not finite."""
        started = time.perf_counter()
        for step in range(done + 1, self.step_count + 1):
            mx.reset_peak_memory()
            before = time.perf_counter()
            judged = self._judge(self._lessons(step))
            written = time.perf_counter()
            mx.clear_cache()  # what one phase let go of is of other sizes than what the next one needs
            measured = self._update(judged)
            mx.clear_cache()
            now = time.perf_counter()
            left = (now - started) / (step - done) * (self.step_count - step)
            yield self._report(step, judged, measured, written - before, now - written, left)
            self._stop_if_failing(step, measured)

    def _schedule(self) -> Any:
        settings = self.settings
        total = self.step_count * settings.updates
        warmup = min(settings.warmup_steps * settings.updates, max(total - 1, 1))
        peak = settings.learning_rate
        rise = optim.linear_schedule(peak / warmup, peak, warmup) if warmup else None
        fall = optim.cosine_decay(peak, max(total - warmup, 1), peak * 0.1)
        return optim.join_schedules([rise, fall], [warmup]) if rise else fall

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """The order of the preferences in an epoch."""
        return np.random.default_rng([self.settings.seed, 1, epoch]).permutation(len(self.preferences))

    def _lessons(self, step: int) -> list[Lesson]:
        """The comparisons of a step: each preference once an epoch, sides drawn, never taken from the data."""
        settings, count = self.settings, len(self.preferences)
        lessons = []
        for place in range(settings.comparisons):
            epoch, rank = divmod((step - 1) * settings.comparisons + place, count)
            preference = self.preferences[self._order(epoch)[rank]]
            a_first = bool(np.random.default_rng([settings.seed, 2, step, place]).random() < 0.5)
            comparison = shown(Pair(preference.a, preference.b, preference.prompt))[0 if a_first else 1]
            lessons.append(Lesson(comparison, share_for_first(preference.p_a, a_first), (step, place)))
        return lessons

    def _judge(self, lessons: Sequence[Lesson]) -> _Judged:
        """Let the policy write, and reward what it wrote."""
        settings = self.settings
        form = form_of(settings)
        images = [image for lesson in lessons for image in (lesson.comparison.first, lesson.comparison.second)]
        self.vlm.features.get_all(images)
        shown_now = [lesson.comparison for lesson in lessons]
        prompts = [self.vlm.prompt(c.first, c.second, c.prompt, form, settings.think) for c in shown_now]
        exact = settings.reward in EXACT_REWARDS
        sampling = Sampling(
            samples=settings.group if settings.think or not exact else 1,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            until="answer" if exact else "end",
            close=False,
        )
        keys = [lesson.key for lesson in lessons]
        rollouts = roll_out(self.vlm, prompts, sampling, keys, settings.rows)
        verdicts = [[rollout.verdict for rollout in group] for group in rollouts]
        return _Judged(lessons, prompts, rollouts, earn(settings, lessons, verdicts, self._own_reward))

    def _update(self, judged: _Judged) -> dict[str, float]:
        """One step of the optimizer on the groups that teach something; what it measured."""
        chosen = np.flatnonzero(judged.earned.taught).tolist()
        measured = {"loss": 0.0, "grad_norm": 0.0, "kl": 0.0, "clip_fraction": 0.0, "mismatch": 0.0, "updated": 0.0}
        if not len(chosen):
            return measured
        rows = [rollout for i in chosen for rollout in judged.rollouts[i]]
        completions = Completions.of([rollout.tokens for rollout in rows])
        prompts = [judged.prompts[i] for i in chosen]
        targets = targets_of(
            [[len(rollout.tokens) for rollout in group] for group in judged.rollouts],
            judged.earned.answered,
            judged.earned.advantages,
            np.array([lesson.y for lesson in judged.lessons]),
            chosen,
            self.settings,
        )

        if self.settings.kl:
            with adapter_off(self.vlm.model):
                targets = replace(targets, reference=logprobs_of(self.vlm, prompts, completions, self.settings))
        for update in range(self.settings.updates):
            descent = descend(self.vlm, prompts, completions, targets, self.settings)
            found = self._apply(descent, int(completions.lengths.sum()))
            if update == 0:
                # The old policy's log-probabilities are those of the scoring pass, not of sampling.
                targets = replace(targets, old=descent.logprobs)
                measured |= found | _distances(descent.logprobs, targets.reference, completions, rows)
            measured |= {"clip_fraction": found["clip_fraction"], "updated": found["updated"]}
        return measured

    def _apply(self, descent: Descent, tokens: int) -> dict[str, float]:
        """One update of the adapter, unless loss or gradient is not finite."""
        gradient, norm = optim.clip_grad_norm(descent.gradient, self.settings.max_grad_norm)
        loss, length, clipped = (float(np.array(value)) for value in (descent.loss, norm, descent.clipped))
        found = {"loss": loss, "grad_norm": length, "clip_fraction": clipped / max(tokens, 1)}
        finite = math.isfinite(loss) and math.isfinite(length)
        if finite:
            self.optimizer.update(self.vlm.model, gradient)
            mx.eval(self.vlm.model.trainable_parameters(), self.optimizer.state)
        return found | {"updated": float(finite)}

    def _stop_if_failing(self, step: int, measured: dict[str, float]) -> None:
        finite = math.isfinite(measured["loss"]) and math.isfinite(measured["grad_norm"])
        self._failures = 0 if finite else self._failures + 1
        if self._failures >= _MOST_FAILURES:
            raise ModelError(
                f"step {step}: loss or gradient was not finite {_MOST_FAILURES} times in a row; the adapter is that of "
                f"the last finite step; try a smaller --learning-rate than {self.settings.learning_rate}"
            )

    def _report(
        self, step: int, judged: _Judged, measured: dict[str, float], rollout: float, update: float, left: float
    ) -> StepReport:
        groups = judged.rollouts
        verdicts = [r.verdict for group in groups for r in group]
        read: Strategy = "soft" if form_of(self.settings) == "choice" else "score"
        choice = read == "soft"
        records = tuple(
            RolloutRecord(
                step=step,
                prompt=lesson.comparison.prompt,
                y=lesson.y,
                text=r.verdict.text,
                p_first=r.verdict.p_first(read),
                label_mass=r.verdict.label_mass if choice else None,
                reward=float(judged.earned.rewards[i, j]),
                advantage=float(judged.earned.advantages[i, j]),
            )
            for i, lesson in enumerate(judged.lessons)
            for j, r in enumerate(groups[i])
        )
        return StepReport(
            step=step,
            steps=self.step_count,
            reward=float(judged.earned.rewards.mean()),
            accuracy=float(judged.earned.right.mean()),
            format_rate=float(judged.earned.well_formed.mean()),
            label_mass=float(np.mean([v.label_mass for v in verdicts])) if choice else math.nan,
            loss=measured["loss"],
            grad_norm=measured["grad_norm"],
            kl=measured["kl"],
            clip_fraction=measured["clip_fraction"],
            mismatch=measured["mismatch"],
            skipped=int((~judged.earned.taught).sum()),
            groups=len(groups),
            updated=bool(measured["updated"]),
            tokens=sum(v.tokens for v in verdicts),
            learning_rate=float(self.optimizer.learning_rate.item()),
            rollout_seconds=round(rollout, 4),
            update_seconds=round(update, 4),
            seconds_left=left,
            peak_bytes=int(mx.get_peak_memory()),
            rollouts=records,
        )


def _distances(
    logprobs: mx.array, reference: mx.array | None, completions: Completions, rollouts: Sequence[Rollout]
) -> dict[str, float]:
    """How far scoring is from sampling, and the divergence from the reference, a token."""
    mask = completions.mask
    count = max(int(mask.sum()), 1)
    sampled = np.zeros(mask.shape)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.logprobs)] = rollout.logprobs
    distance = np.where(mask, np.abs(np.array(logprobs) - sampled), 0).sum() / count
    kl = 0.0
    if reference is not None:
        kl = float(np.where(mask, np.array(kl_to_reference(logprobs, reference)), 0).sum() / count)
    return {"mismatch": float(distance), "kl": kl}
