"""The rollouts of a step: what the policy writes about the comparisons that it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.rollout import Rollout, Sampling, roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.training.rewards import RewardMix
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict

__all__ = ["RolloutGroups", "is_truncated", "sample_groups"]


@dataclass(frozen=True)
class RolloutGroups:
    """P groups of G rollouts: the comparisons shown, what was written, and whether it ran out of tokens.

    Of several processes, each knows all groups, and has the `inputs` of those that it wrote itself.
    """

    comparisons: Sequence[TrainingComparison]
    inputs: Sequence[ComparisonInput | None]
    rollouts: Sequence[Sequence[Rollout]]
    truncated: Sequence[Sequence[bool]]

    def __len__(self) -> int:
        return len(self.comparisons)

    def __add__(self, others: "RolloutGroups") -> "RolloutGroups":
        """Return these groups, and then others."""
        return RolloutGroups(*([*getattr(self, f.name), *getattr(others, f.name)] for f in fields(self)))

    def select(self, groups: Sequence[int]) -> "RolloutGroups":
        """Return some of the groups, by index."""
        return RolloutGroups(*([getattr(self, f.name)[i] for i in groups] for f in fields(self)))

    @property
    def verdicts(self) -> list[list[Verdict]]:
        """P lists of G: what each rollout says."""
        return [[rollout.verdict for rollout in group] for group in self.rollouts]


def sample_groups(
    vlm: VLM,
    comparisons: Sequence[TrainingComparison],
    settings: TrainSettings,
    mix: RewardMix,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> RolloutGroups:
    """Let the policy write a group of rollouts for each comparison; each process writes its share, all know the whole.

    Without thinking there is one rollout a group where the answer is integrated out: all would be the same.
    """
    sampling = Sampling(
        samples=settings.group if settings.think or not mix.exact else 1,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        until="answer" if mix.exact else "end",
        close=False,
    )
    mine = processes.shard(len(comparisons))
    # Each image is encoded by itself: in a batch its features would differ in the last bits with what is beside it, and
    # a resumed run encodes it beside others.
    shown = [comparisons[i].comparison for i in mine]
    inputs = [vlm.input(c.first, c.second, c.prompt, mix.form, settings.think) for c in shown]
    keys = [comparisons[i].key for i in mine]
    written = roll_out(vlm, inputs, sampling, keys, settings.rows) if inputs else []
    parts = processes.all_gather([[rollout.to_json() for rollout in group] for group in written])
    rollouts = [[Rollout.from_json(each) for each in group] for part in parts for group in part]
    return RolloutGroups(
        comparisons,
        [*[None] * mine.start, *inputs, *[None] * (len(comparisons) - mine.stop)],
        rollouts,
        [[is_truncated(rollout, sampling, vlm.eos_ids) for rollout in group] for group in rollouts],
    )


def is_truncated(rollout: Rollout, sampling: Sampling, eos_ids: frozenset[int]) -> bool:
    """Return whether a completion had neither ended nor said what was asked for when it ran out of tokens."""
    if len(rollout.tokens) < sampling.max_tokens or rollout.tokens[-1] in eos_ids:
        return False
    answered = sampling.until == "answer" or "</answer>" in rollout.verdict.text.rpartition("</think>")[2]
    return rollout.verdict.label_mass == 0 or not answered
