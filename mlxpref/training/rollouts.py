"""The groups of a step: what the policy writes about the comparisons it is shown, and what that earns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.rollout import Rollout, Sampling, roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.training.custom_reward import CustomReward
from mlxpref.training.group_rewards import GroupRewards, form_of, reward_groups
from mlxpref.training.rewards import reward_mix
from mlxpref.training.sampler import ComparisonSampler, TrainingComparison

__all__ = ["RolloutGroups", "sample_groups", "sample_step"]


@dataclass(frozen=True)
class RolloutGroups:
    """P groups of G rollouts: what was shown, what was written, and what it earned.

    Of several processes, each knows all groups, and has the `prompts` of those that it wrote itself.
    """

    lessons: Sequence[TrainingComparison]
    prompts: Sequence[ComparisonInput | None]
    rollouts: Sequence[Sequence[Rollout]]
    earned: GroupRewards

    def __len__(self) -> int:
        return len(self.lessons)

    def only(self, numbers: Sequence[int]) -> "RolloutGroups":
        """Some of the groups, by number."""
        return RolloutGroups(
            [self.lessons[i] for i in numbers],
            [self.prompts[i] for i in numbers],
            [self.rollouts[i] for i in numbers],
            self.earned.only(numbers),
        )

    def __add__(self, others: "RolloutGroups") -> "RolloutGroups":
        """These groups, and then others."""
        return RolloutGroups(
            [*self.lessons, *others.lessons],
            [*self.prompts, *others.prompts],
            [*self.rollouts, *others.rollouts],
            self.earned + others.earned,
        )


def sample_step(
    vlm: VLM,
    timetable: ComparisonSampler,
    step: int,
    settings: TrainSettings,
    own: Mapping[str, CustomReward],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[RolloutGroups, RolloutGroups]:
    """The groups that a step learns from, and all that were written for it.

    Up to `settings.resample` times, groups without signal give their places to other comparisons; as long as one has
    none, its place stays its own. Which ones come next depends on the step alone, and their random numbers on the step,
    the place and the time, so not on what runs together.
    """
    written = sample_groups(vlm, timetable.of_step(step), settings, own, processes)
    places, spare = list(range(len(written))), timetable.spare(step)
    for again in range(1, settings.resample + 1):
        idle = [place for place, number in enumerate(places) if not written.earned.signal[number]]
        # The spare ones come second: where they end, none of them may be taken for nothing.
        others = list(zip(idle, spare, strict=False))
        if not others:
            break
        lessons = [timetable.instead(step, place, number, again) for place, number in others]
        for number, (place, _) in enumerate(others, start=len(written)):
            places[place] = number
        written += sample_groups(vlm, lessons, settings, own, processes)
    return written.only(places), written


def sample_groups(
    vlm: VLM,
    lessons: Sequence[TrainingComparison],
    settings: TrainSettings,
    own: Mapping[str, CustomReward],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> RolloutGroups:
    """Let the policy write a group for each lesson, and reward what it wrote; each process does its share of them."""
    mine = processes.shard(len(lessons))
    written = _write(vlm, [lessons[i] for i in mine], settings, own) if mine else None
    if processes.size == 1:
        assert written
        return written
    told = [written.earned.to_json(), [[r.to_json() for r in group] for group in written.rollouts]] if written else None
    everyone = [part for part in processes.all_gather(told) if part]
    prompts: list[ComparisonInput | None] = [None] * len(lessons)
    prompts[mine.start : mine.stop] = written.prompts if written else []
    return RolloutGroups(
        lessons,
        prompts,
        [[Rollout.from_json(each) for each in group] for _, groups in everyone for group in groups],
        reduce(add, (GroupRewards.from_json(earned) for earned, _ in everyone)),
    )


def _write(
    vlm: VLM, lessons: Sequence[TrainingComparison], settings: TrainSettings, own: Mapping[str, CustomReward]
) -> RolloutGroups:
    form, exact = form_of(settings), reward_mix(settings.reward).exact
    shown_now = [lesson.comparison for lesson in lessons]
    # Each image is encoded by itself: in a batch its features would differ in the last bits with what is beside it, and
    # a run that was ended and goes on encodes it beside others.
    prompts = [vlm.prompt(c.first, c.second, c.prompt, form, settings.think) for c in shown_now]
    sampling = Sampling(
        samples=settings.group if settings.think or not exact else 1,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        until="answer" if exact else "end",
        close=False,
    )
    rollouts = roll_out(vlm, prompts, sampling, [lesson.key for lesson in lessons], settings.rows)
    verdicts = [[rollout.verdict for rollout in group] for group in rollouts]
    truncated = np.array([[_ran_out(vlm, rollout, sampling) for rollout in group] for group in rollouts])
    return RolloutGroups(lessons, prompts, rollouts, reward_groups(settings, lessons, verdicts, truncated, own))


def _ran_out(vlm: VLM, rollout: Rollout, sampling: Sampling) -> bool:
    """Whether a completion had not said what was asked for when it ran out of tokens."""
    if len(rollout.tokens) < sampling.max_tokens or rollout.tokens[-1] in vlm.ends:
        return False
    said = sampling.until == "answer" or "</answer>" in rollout.verdict.text.rpartition("</think>")[2]
    return rollout.verdict.label_mass == 0 or not said
