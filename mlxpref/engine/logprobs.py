"""Log-probabilities that the policy gives the tokens of completions, with gradients that reach the comparison.

Each comparison runs once, and what the layers remember of it serves all completions of its group; gradients flow back
into that. The backward pass recomputes the layers, and the head in chunks of positions, one after the other: the logits
of all positions never exist at once.

Axes: P comparisons, G completions of each, R = P * G rows, T tokens of a completion, D width of a hidden state, V size
of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.decoder import run_block
from mlxpref.engine.experts import NO_CHOICE, Routing
from mlxpref.engine.layers import Block, Memory, Prefix
from mlxpref.engine.positions import text_positions
from mlxpref.engine.vlm import VLM, ComparisonInput

_UNCERTAIN = -1e-6
"""The largest log-probability of a tie that leaves the other answers a finite one."""
_FINITE = -1e4
"""The least log-probability that is multiplied by 0: minus infinity times 0 is no number."""


@dataclass(frozen=True)
class Completions:
    """The completions of P groups, group by group: tokens (R, T), padded with 0, and lengths (R,).

    The last `led` tokens of each row were not written: they lead to its answer. `experts` (E, R, T, K) are those that
    the tokens were given while they were written, NO_CHOICE where there was none.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    led: int = 0
    experts: NDArray[np.int32] | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        lead: Sequence[int] = (),
        experts: Sequence[NDArray[np.int32] | None] = (),
    ) -> "Completions":
        """Completions of different lengths, each followed by `lead`, padded to the longest.

        `experts` (T, E, K) each are those of the rows' own tokens, None for a row without.
        """
        rows = [(*row, *lead) for row in rows]
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), int(lengths.max(initial=0))), np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        return cls(tokens, lengths, len(lead), _padded_experts(experts, tokens.shape[1]))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(R, T): where there is a token that was written."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None] - self.led

    def part(self, rows: slice) -> "Completions":
        """Some of the rows, padded to their own longest."""
        lengths = self.lengths[rows]
        columns = int(lengths.max(initial=0))
        experts = None if self.experts is None else self.experts[:, rows, :columns]
        return Completions(self.tokens[rows, :columns], lengths, self.led, experts)


def _padded_experts(rows: Sequence[NDArray[np.int32] | None], columns: int) -> NDArray[np.int32] | None:
    """The experts (T, E, K) of rows as (E, R, `columns`, K); None without any."""
    first = next((row for row in rows if row is not None), None)
    if first is None:
        return None
    result = np.full((first.shape[1], len(rows), columns, first.shape[2]), NO_CHOICE, np.int32)
    for number, row in enumerate(rows):
        if row is not None:
            result[:, number, : len(row)] = row.swapaxes(0, 1)  # (T, E, K) -> (E, T, K)
    return result


@dataclass(frozen=True)
class PromptState:
    """P comparisons after they ran: what each layer remembers, and the branch ids (P, S) of their columns.

    `states` (P, D) are those of the last tokens, `next_positions` (P,) the positions after them.
    """

    layers: Sequence[Memory]
    branch_ids: NDArray[np.int32]
    next_positions: NDArray[np.int64]
    states: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that completions depend on: what the layers remember, and the states."""
        return [*(array for pair in self.layers for array in pair), self.states]

    def with_arrays(self, arrays: Sequence[mx.array]) -> "PromptState":
        """The same comparisons with other `arrays`."""
        return replace(self, layers=list(zip(arrays[:-1:2], arrays[1:-1:2], strict=True)), states=arrays[-1])


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (R, T) of the tokens, 0 where there is none, and (R, labels) of the labels after the last one.

    `answer_states` (R, D) are the hidden states there, `answer_kl` (R,) the divergence of the distribution there from a
    reference's. `other_experts` () counts those that the completions were given and that are not chosen now.
    """

    logprobs: mx.array
    label_logprobs: mx.array
    answer_states: mx.array | None = None
    answer_kl: mx.array | None = None
    other_experts: mx.array | None = None


def prefill(vlm: VLM, comparisons: Sequence[ComparisonInput], recompute: bool = True) -> PromptState:
    """Run comparisons once; see `run_block` for `recompute`."""
    block = vlm.block(comparisons)
    last = np.array([len(comparison) - 1 for comparison in comparisons])
    states, layers = run_block(vlm.decoder, block, recompute=recompute, last_positions=last)
    next_positions = np.array([comparison.next_position for comparison in comparisons])
    return PromptState(layers, block.branch_ids, next_positions, states)


def completion_logprobs(
    vlm: VLM,
    state: PromptState,
    completions: Completions,
    temperature: float = 1.0,
    recompute: bool = True,
    reference: mx.array | None = None,
) -> Logprobs:
    """The log-probabilities of R completions of P comparisons, G in a row for each; see `run_block` for `recompute`.

    The temperature is that of the sampling, so that the scored policy is the sampling policy; the labels' probabilities
    ignore it, as in judging. `reference` (R, D) are the `answer_states` of the model that the divergence is from.
    """
    routing = None if completions.experts is None else Routing(completions.experts)
    states = _states(vlm, state, completions, recompute, routing)  # (R, T + 1, D)
    others = mx.stack(routing.others).sum() if routing and routing.others else None
    rows = mx.arange(len(completions.lengths))
    last = states[rows, mx.array(completions.lengths)]  # (R, D)
    label_logprobs = _label_logprobs(vlm, last, vlm.tokenizer.label_ids)  # (R, labels)
    if vlm.tokenizer.tie_opening_ids:
        before = states[rows, mx.array(completions.lengths - completions.led)]  # (R, D): where a tie would begin
        tie = _label_logprobs(vlm, before, [vlm.tokenizer.tie_opening_ids])  # (R, 1)
        label_logprobs = mx.concatenate(
            [label_logprobs + mx.log1p(-mx.exp(mx.minimum(tie, _UNCERTAIN))), tie], axis=1
        )  # (R, labels + 1)
    kl = None if reference is None else _divergence(vlm, last, reference)
    mask = completions.mask
    places = np.flatnonzero(mask)  # (N,): the places of the tokens among R * T
    if not len(places):
        return Logprobs(mx.zeros(mask.shape), label_logprobs, last, kl, others)
    before = states[:, :-1].reshape(-1, states.shape[-1])[mx.array(places)]  # (R, T, D) -> (R * T, D) -> (N, D)
    targets = mx.array(completions.tokens.reshape(-1)[places])  # (R, T) -> (R * T,) -> (N,)
    token_logprobs = chunked_logprobs(vlm, before, targets, temperature)
    place = np.zeros(mask.size, np.int32)
    place[places] = np.arange(len(places))
    spread = token_logprobs[mx.array(place.reshape(mask.shape))]  # (N,) -> (R, T)
    return Logprobs(mx.where(mx.array(mask), spread, 0), label_logprobs, last, kl, others)


def _states(
    vlm: VLM, state: PromptState, completions: Completions, recompute: bool, routing: Routing | None
) -> mx.array:
    """The hidden states (R, T + 1, D) that predict the first token, the second, ..., and the one after the last."""
    group = len(completions.tokens) // len(state.next_positions)
    rows = np.repeat(np.arange(len(state.next_positions)), group)
    first = mx.repeat(state.states, group, axis=0)[:, None]  # (P, D) -> (R, D) -> (R, 1, D)
    columns = completions.tokens.shape[1]
    if not columns:
        return first
    positions = mx.array(text_positions(state.next_positions[rows], columns))  # (3, R, T)
    embeddings = vlm.embed(mx.array(completions.tokens))  # (R, T, D)
    block = Block(embeddings, positions, np.zeros(completions.tokens.shape, np.int32), routing=routing)
    states, _ = run_block(vlm.decoder, block, [Prefix(state.layers, state.branch_ids, rows)], recompute)
    return mx.concatenate([first, states], axis=1)  # (R, T + 1, D)


def _chunks(vlm: VLM, array: mx.array) -> list[mx.array]:
    """An array (N, ...) of positions in chunks whose logits keep to the bound."""
    size = max(1, bounds.HEAD_LOGITS // int(vlm.decoder.embed_tokens.weight.shape[0]))
    return [array[i : i + size] for i in range(0, len(array), size)]


def chunked_logprobs(vlm: VLM, states: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) of targets (N,) from hidden states (N, D), one chunk after the other."""
    logprobs: list[mx.array] = []
    for chunk, target in zip(_chunks(vlm, states), _chunks(vlm, targets), strict=True):
        if logprobs:
            # A chunk waits for the previous one, and backwards for the next one: else all logits exist at once.
            chunk = chunk + 0 * mx.maximum(logprobs[-1][:1, None], _FINITE).astype(chunk.dtype)
        logprobs.append(_token_logprobs(vlm, chunk, target, temperature))
    return mx.concatenate(logprobs)


def _token_logprobs(vlm: VLM, states: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) of targets (N,) from hidden states (N, D); the logits are recomputed backwards."""

    def run(states: mx.array) -> mx.array:
        logits = vlm.head(states) / temperature  # (N, V)
        target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]  # (N, 1) -> (N,)
        return target_logits - mx.logsumexp(logits, axis=-1)

    return mx.checkpoint(run)(states)


def _divergence(vlm: VLM, states: mx.array, reference: mx.array) -> mx.array:
    """The Kullback-Leibler divergence (N,) of the next token's distribution from that of other states, both (N, D)."""

    def run(states: mx.array, reference: mx.array) -> mx.array:
        logits, others = vlm.head(states), vlm.head(reference)  # (N, V); suppressed tokens have none
        ours, theirs = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (logits, others))
        terms = mx.exp(ours) * mx.where(mx.isinf(ours), 0, ours - theirs)
        return terms.sum(axis=-1)

    parts = zip(_chunks(vlm, states), _chunks(vlm, reference), strict=True)
    return mx.concatenate([mx.checkpoint(run)(*part) for part in parts])


def _label_logprobs(vlm: VLM, states: mx.array, labels: Sequence[Sequence[int]]) -> mx.array:
    """Log-probabilities (N, labels) of labels, all variants of each together, from hidden states (N, D)."""

    def run(states: mx.array) -> mx.array:
        logits = vlm.head(states)  # (N, V)
        each = [mx.logsumexp(logits[:, mx.array(list(ids))], axis=-1) for ids in labels]  # (N,) each
        # (N, labels) - (N, 1)
        return mx.stack(each, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)

    return mx.concatenate([mx.checkpoint(run)(chunk) for chunk in _chunks(vlm, states)])
