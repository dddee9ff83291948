"""The rollouts of a step: the policy's completions of its comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.data.left_out import LeftOut
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.logprobs import Logprobs
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.errors import ImageError
from mlxpref.training.rewards import RewardMix
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict

D = TypeVar("D", bound=np.generic)


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of a comparison, and which of them ran out of tokens.

    `input` is the policy's input, None if another process wrote the rollouts. With a listener, `heard` has each
    rollout's reward by it, and `reference` and `read_reference` what it gave to the rollouts (G rows) and to the answer
    that is read at once (1 row), where this process asked it for that.
    """

    comparison: TrainingComparison
    input: ComparisonInput | None
    rollouts: Sequence[Rollout]
    truncated: Sequence[bool]
    heard: Sequence[float] = ()
    reference: Logprobs | None = None
    read_reference: Logprobs | None = None

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict of each rollout."""
        return [rollout.verdict for rollout in self.rollouts]


def of_other_order(groups: Sequence[RolloutGroup], values: NDArray[D]) -> NDArray[D]:
    """Return values (P, ...) of groups in the order that gives each one that of its preference's other order.

    Each preference has two groups, one after the other.
    """
    pairs = zip(groups[::2], groups[1::2], strict=True)
    assert all(one.comparison.preference is other.comparison.preference for one, other in pairs)
    swapped: NDArray[Any] = values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)
    return swapped


def sample_groups(
    vlm: VLM,
    comparisons: Sequence[TrainingComparison],
    settings: TrainSettings,
    mix: RewardMix,
    processes: ProcessGroup = SINGLE_PROCESS,
    left_out: LeftOut | None = None,
) -> list[RolloutGroup]:
    """Let the policy write a group of rollouts for each comparison; each process writes its share, all get the whole.

    Without thinking a group has one rollout if the answer is integrated out: all would be equal. An image that cannot
    be read is an ImageError; with `left_out` it is added there, and its comparisons have no group.
    """
    sampling = Sampling(
        samples=settings.group if settings.think or not mix.exact else 1,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        until="answer" if mix.exact else "end",
        close=False,
        keep_experts=True,
    )
    # Each image is encoded alone: the other images of a batch change the last bits of its features, and a resumed run
    # would have other batches.
    shard = {i: comparisons[i] for i in processes.shard(len(comparisons))}
    inputs: dict[int, ComparisonInput] = {}
    unreadable: dict[int, ImageError] = {}
    for i, c in shard.items():
        try:
            inputs[i] = vlm.input(c.first, c.second, c.prompt, mix.form, settings.think)
        except ImageError as error:
            if left_out is None:
                raise
            unreadable[i] = error
    keys = [comparisons[i].key for i in inputs]
    rollouts = roll_out(vlm, list(inputs.values()), sampling, keys, settings.rows) if inputs else []
    written = [(i, [each.to_json() for each in group]) for i, group in zip(inputs, rollouts, strict=True)]
    parts = processes.all_gather([written, [(error.name, error.reason) for error in unreadable.values()]])
    if left_out is not None:
        left_out.add(dict(each for _, errors in parts for each in errors))
    own = dict(zip(inputs, rollouts, strict=True))
    others = ((i, [Rollout.from_json(each) for each in group]) for part, _ in parts for i, group in part)
    groups = [(i, own.get(i, group)) for i, group in others]
    return [
        RolloutGroup(comparisons[i], inputs.get(i), group, [is_truncated(vlm, each, sampling) for each in group])
        for i, group in groups
    ]


def is_truncated(vlm: VLM, rollout: Rollout, sampling: Sampling) -> bool:
    """Return whether a completion ran out of tokens before its end and its answer."""
    if len(rollout.tokens) < sampling.max_tokens or rollout.tokens[-1] in vlm.eos_ids:
        return False
    reader = vlm.tokenizer.reader
    answered = sampling.until == "answer" or (
        not reader.takes_later_answers and reader.is_answered(rollout.verdict.text)
    )
    return rollout.verdict.label_mass == 0 or not answered
