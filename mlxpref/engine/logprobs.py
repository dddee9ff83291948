"""Scoring: what the policy gives the tokens of completions, with gradients that reach the prompt.

Each prompt runs once and its keys and values serve all rollouts of its group; gradients flow back into them. Layers are
recomputed in the backward pass, and so is the head, in chunks of positions, one after the other: the logits of all
positions never exist at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.decoder import Block, KeysValues, Prefix, run_block
from mlxpref.engine.kv_cache import following_positions
from mlxpref.engine.vlm import VLM, ComparisonInput

__all__ = ["Completions", "Logprobs", "PromptState", "completion_logprobs", "prefill"]

_FINITE = -1e4
"""What a log-probability is raised to before it is multiplied by 0: minus infinity times 0 would be no number."""


@dataclass(frozen=True)
class Completions:
    """The completions of P groups of G: tokens (R, T), padded with 0, and lengths (R,); R = P G, group by group."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Completions":
        """Completions as they were written, padded to the longest."""
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), int(lengths.max(initial=0))), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
        return cls(tokens, lengths)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(R, T): where a token was written."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def part(self, rows: slice) -> "Completions":
        """Some of the rows, padded to their own longest."""
        lengths = self.lengths[rows]
        return Completions(self.tokens[rows, : int(lengths.max(initial=0))], lengths)


@dataclass(frozen=True)
class PromptState:
    """P prompts after they ran: keys and values by layer, whose their columns are, and what says the first token.

    `following` (P,) are the positions that come next, `states` (P, D).
    """

    layers: Sequence[KeysValues]
    owners: NDArray[np.int32]
    following: NDArray[np.int64]
    states: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """What completions depend on: all keys and values, and the states."""
        return [*(part for pair in self.layers for part in pair), self.states]

    def of(self, arrays: Sequence[mx.array]) -> "PromptState":
        """The same prompts, read with other arrays."""
        return replace(self, layers=list(zip(arrays[:-1:2], arrays[1:-1:2], strict=True)), states=arrays[-1])


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (R, T) of the tokens, 0 where none was written, and (R, 2) of the labels after the last one."""

    logprobs: mx.array
    label_logprobs: mx.array


def prefill(vlm: VLM, prompts: Sequence[ComparisonInput], recompute: bool = True) -> PromptState:
    """Run prompts once; see `run_block` for `recompute`."""
    block = vlm.block(prompts)
    ends = np.array([len(prompt) - 1 for prompt in prompts])
    states, layers = run_block(vlm.language.model, block, recompute=recompute, ends=ends)
    return PromptState(layers, block.owners, np.array([prompt.following for prompt in prompts]), states)


def completion_logprobs(
    vlm: VLM, prompts: PromptState, completions: Completions, temperature: float = 1.0, recompute: bool = True
) -> Logprobs:
    """Score R completions of P prompts, R / P in a row for each; see `run_block` for `recompute`.

    The temperature is that of the sampling, so that the policy scored is the policy that sampled; the labels'
    probabilities are read without it, as a judge reads them.
    """
    states = _states(vlm, prompts, completions, recompute)
    ends = states[mx.arange(len(completions.lengths)), mx.array(completions.lengths)]
    label_logprobs = mx.concatenate([_label_logprobs(vlm, part) for part in _parts(vlm, ends)])
    mask = completions.mask
    written = np.flatnonzero(mask.reshape(-1))
    if not len(written):
        return Logprobs(mx.zeros(mask.shape), label_logprobs)
    width = states.shape[-1]
    saying = states[:, :-1].reshape(-1, width)[mx.array(written)]
    targets = mx.array(completions.tokens.reshape(-1)[written])
    found = _chunked_logprobs(vlm, saying, targets, temperature)
    place = np.zeros(mask.size, np.int32)
    place[written] = np.arange(len(written))
    logprobs = mx.where(mx.array(mask), found[mx.array(place.reshape(mask.shape))], 0)
    return Logprobs(logprobs, label_logprobs)


def _states(vlm: VLM, prompts: PromptState, completions: Completions, recompute: bool) -> mx.array:
    """The hidden states (R, T + 1, D) that say the first token, the second, ..., and what follows the last."""
    trunk, group = vlm.language.model, len(completions.tokens) // len(prompts.following)
    rows = np.repeat(np.arange(len(prompts.following)), group)
    states = mx.repeat(prompts.states, group, 0)[:, None]
    columns = completions.tokens.shape[1]
    if not columns:
        return states
    positions = mx.array(following_positions(prompts.following[rows], columns))
    embeddings = trunk.embed_tokens(mx.array(completions.tokens))
    block = Block(embeddings, positions, np.zeros(completions.tokens.shape, np.int32))
    said, _ = run_block(trunk, block, [Prefix(prompts.layers, prompts.owners, rows)], recompute)
    return mx.concatenate([states, said], axis=1)


def _parts(vlm: VLM, values: mx.array) -> list[mx.array]:
    """Values of positions in chunks whose logits fit the bound."""
    size = max(1, bounds.HEAD_LOGITS // int(vlm.language.model.embed_tokens.weight.shape[0]))
    return [values[i : i + size] for i in range(0, len(values), size)]


def _chunked_logprobs(vlm: VLM, states: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) of targets (N,) from hidden states (N, D), one chunk after the other."""
    found: list[mx.array] = []
    for part, target in zip(_parts(vlm, states), _parts(vlm, targets), strict=True):
        if found:
            # A chunk waits for the one before it, and backwards for the one after: else all logits exist at once.
            part = part + 0 * mx.maximum(found[-1][:1, None], _FINITE).astype(part.dtype)
        found.append(_token_logprobs(vlm, part, target, temperature))
    return mx.concatenate(found)


def _token_logprobs(vlm: VLM, states: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) of targets (N,) from hidden states (N, D); the logits are made again in the backward."""

    def run(states: mx.array) -> mx.array:
        logits = vlm.head(states) / temperature
        return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)

    return mx.checkpoint(run)(states)


def _label_logprobs(vlm: VLM, states: mx.array) -> mx.array:
    """Log-probabilities (N, 2) of the labels, all variants of each, from hidden states (N, D)."""

    def run(states: mx.array) -> mx.array:
        logits = vlm.head(states)
        variants = [mx.logsumexp(logits[:, mx.array(ids)], axis=-1) for ids in vlm.words.label_ids]
        return mx.stack(variants, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)

    return mx.checkpoint(run)(states)
