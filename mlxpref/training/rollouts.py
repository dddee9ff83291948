"""The rollouts of a step: the policy's completions of its comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.rollout import Rollout, Sampling, roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.training.rewards import RewardMix
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of a comparison, and which of them ran out of tokens.

    `input` is the policy's input, None if another process wrote the rollouts.
    """

    comparison: TrainingComparison
    input: ComparisonInput | None
    rollouts: Sequence[Rollout]
    truncated: Sequence[bool]

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict of each rollout."""
        return [rollout.verdict for rollout in self.rollouts]


def sample_groups(
    vlm: VLM,
    comparisons: Sequence[TrainingComparison],
    settings: TrainSettings,
    mix: RewardMix,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> list[RolloutGroup]:
    """Let the policy write a group of rollouts for each comparison; each process writes its share, all get the whole.

    Without thinking a group has one rollout if the answer is integrated out: all would be equal.
    """
    sampling = Sampling(
        samples=settings.group if settings.think or not mix.exact else 1,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        until="answer" if mix.exact else "end",
        close=False,
    )
    # Each image is encoded alone: the other images of a batch change the last bits of its features, and a resumed run
    # would have other batches.
    shard = {i: comparisons[i] for i in processes.shard(len(comparisons))}
    inputs = {i: vlm.input(c.first, c.second, c.prompt, mix.form, settings.think) for i, c in shard.items()}
    keys = [comparison.key for comparison in shard.values()]
    rollouts = roll_out(vlm, list(inputs.values()), sampling, keys, settings.rows) if inputs else []
    parts = processes.all_gather([[rollout.to_json() for rollout in group] for group in rollouts])
    groups = [[Rollout.from_json(rollout) for rollout in group] for part in parts for group in part]
    return [
        RolloutGroup(comparison, inputs.get(i), group, [is_truncated(each, sampling, vlm.eos_ids) for each in group])
        for i, (comparison, group) in enumerate(zip(comparisons, groups, strict=True))
    ]


def is_truncated(rollout: Rollout, sampling: Sampling, eos_ids: frozenset[int]) -> bool:
    """Return whether a completion ran out of tokens before its end and its answer."""
    if len(rollout.tokens) < sampling.max_tokens or rollout.tokens[-1] in eos_ids:
        return False
    answered = sampling.until == "answer" or "</answer>" in rollout.verdict.text.rpartition("</think>")[2]
    return rollout.verdict.label_mass == 0 or not answered
