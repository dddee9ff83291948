"""The listener: the judge without its adapter reads a rollout's reasons and answers after them.

How likely it finds the side that people prefer is added to the rollout's reward, so reasons that lead another reader to
the right answer earn more (arXiv 2506.22832). It has no gradient of its own. What the listener gives to each token is
kept for the divergence of `--kl`, so that the judge without its adapter runs once.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.logprobs import Logprobs
from mlxpref.engine.lora import adapter_off
from mlxpref.engine.vlm import VLM
from mlxpref.training.gradients import joined, reference_scores, with_reference
from mlxpref.training.group_rewards import GroupRewards
from mlxpref.training.loss import LossInputs, loss_inputs, p_first_of
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup


def listen(
    vlm: VLM,
    groups: Sequence[RolloutGroup],
    settings: TrainSettings,
    mix: RewardMix,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> list[RolloutGroup]:
    """Return groups with the listener's rewards; each process asks about its own, all get the whole.

    A rollout that did not reach its answer earns nothing.
    """
    if not groups:
        return []
    # Without a divergence nobody needs the reference of the answer that is read at once.
    asked = settings if settings.kl else replace(settings, read_weight=0.0)
    tokenizer, size = vlm.tokenizer, len(groups[0].rollouts)
    inputs = loss_inputs(groups, _unrewarded(len(groups), size), asked, mix, tokenizer.at_once_ids, tokenizer.lead_ids)
    own: dict[int, RolloutGroup] = {}
    if inputs.prompts:
        with adapter_off(vlm.model):
            scores, read = reference_scores(vlm, inputs, settings)
        p_first = np.array(p_first_of(scores.label_logprobs), np.float64).reshape(-1, size)  # (P, G) of this process
        mine = [i for i, group in enumerate(groups) if group.input is not None]
        for number, i in enumerate(mine):
            rows = slice(number * size, (number + 1) * size)
            columns = inputs.completions.part(rows).tokens.shape[1]
            own[i] = replace(
                groups[i],
                heard=_rewards(groups[i], p_first[number]),
                reference=_part(scores, rows, columns),
                read_reference=read and _part(read, slice(number, number + 1)),
            )
    heard = processes.all_gather([[i, group.heard] for i, group in own.items()])
    values = {i: each for part in heard for i, each in part}
    return [own.get(i, replace(group, heard=values[i])) for i, group in enumerate(groups)]


def with_heard(inputs: LossInputs, groups: Sequence[RolloutGroup]) -> LossInputs:
    """Return the inputs of groups with what the listener gave to them as the reference."""
    scores = [group.reference for group in groups if group.reference]
    read = [group.read_reference for group in groups if group.read_reference]
    return with_reference(inputs, joined(scores), joined(read) if read else None)


def _rewards(group: RolloutGroup, p_first: NDArray[np.float64]) -> list[float]:
    """The listener's probability of people's side for each rollout, from its preferences for the first image (G,)."""
    y = group.comparison.y
    reached = np.array([verdict.label_mass > 0 for verdict in group.verdicts])
    rewards: list[float] = np.where(reached, p_first * y + (1 - p_first) * (1 - y), 0.0).tolist()
    return rewards


def _unrewarded(count: int, size: int) -> GroupRewards:
    """The rewards of `count` groups of `size` rollouts that are all to be scored, with advantages of 0."""
    nothing, every, groups = np.zeros((count, size)), np.ones((count, size), bool), np.ones(count, bool)
    return GroupRewards(nothing, {}, nothing, every, every, every, every, groups, groups)


def _part(scores: Logprobs, rows: slice, columns: int | None = None) -> Logprobs:
    """Some rows of scores, cut to a number of columns."""
    states = scores.answer_states
    return Logprobs(
        scores.logprobs[rows, :columns], scores.label_logprobs[rows], None if states is None else states[rows]
    )
