"""Scoring: what the policy gives the tokens of completions, with gradients that reach the prompt.

Each prompt runs once and its keys and values serve all rollouts of its group; gradients flow back into them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.vlm import VLM, Prompt

__all__ = ["Completions", "Scores", "score"]


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


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (R, T) of the tokens, and (R, 2) of the labels at the position after the last one.

    Undefined outside the completions' mask.
    """

    logprobs: mx.array
    label_logprobs: mx.array


def score(vlm: VLM, prompts: Sequence[Prompt], completions: Completions, temperature: float = 1.0) -> Scores:
    """Score R completions of P prompts, R / P in a row for each.

    The temperature is that of the sampling, so that the policy scored is the policy that sampled; the labels'
    probabilities are read without it, as a judge reads them.
    """
    group = len(completions.tokens) // len(prompts)
    cache, hidden = vlm.hidden(prompts)
    states = hidden[mx.arange(len(prompts)), mx.array([len(prompt) - 1 for prompt in prompts])]
    states = mx.repeat(states, group, 0)[:, None]
    if completions.tokens.shape[1]:
        cache.repeat(group)
        start = np.repeat([prompt.following for prompt in prompts], group)
        states = mx.concatenate([states, vlm.extend_hidden(cache, completions.tokens, start)], axis=1)
    logits = vlm.head(states)
    answers = logits[mx.arange(len(completions.lengths)), mx.array(completions.lengths)]
    variants = [mx.logsumexp(answers[:, mx.array(ids)], axis=-1) for ids in vlm.words.label_ids]
    label_logprobs = mx.stack(variants, axis=-1) - mx.logsumexp(answers, axis=-1, keepdims=True)
    if not completions.tokens.shape[1]:
        return Scores(mx.zeros(completions.tokens.shape), label_logprobs)
    written = logits[:, :-1] / temperature
    chosen = mx.take_along_axis(written, mx.array(completions.tokens)[..., None], axis=-1)[..., 0]
    return Scores(chosen - mx.logsumexp(written, axis=-1), label_logprobs)
