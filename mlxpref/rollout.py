"""Rollouts: completions of comparisons, written in batches and read where they answer.

Rows of a batch advance together, one token a step; a row leaves the batch when it is done. Random numbers are
keyed by seed, comparison and sample, so what is sampled does not depend on the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import numpy as np

from mlxpref.errors import DataError
from mlxpref.template import ANSWER_OPEN, CLOSING, NO_THINKING
from mlxpref.verdict import Verdict, at_answer
from mlxpref.vlm import VLM, Prompt

__all__ = ["Rollout", "Sampling", "roll_out"]

_ANSWER_TOKENS = 8
"""Tokens that a completion may still write after its reasoning was closed for it."""


@dataclass(frozen=True)
class Sampling:
    """How completions are written.

    `temperature` 0 takes the likeliest token. `until` "answer" stops at the answer position, where the labels'
    probabilities are read; "end" goes on until the answer is written. `close` ends the reasoning of a completion that
    runs out of tokens, so that it can be read all the same.
    """

    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    until: Literal["answer", "end"] = "answer"
    close: bool = True


@dataclass(frozen=True)
class Rollout:
    """A completion: the tokens that were chosen with their log-probabilities, and the verdict that they say."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    verdict: Verdict


@dataclass
class _Row:
    """One completion while it is being written."""

    position: int
    uniforms: np.ndarray
    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    labels: tuple[float, float] | None = None
    closed: bool = False
    done: bool = False


def roll_out(
    vlm: VLM, prompts: Sequence[Prompt], sampling: Sampling, keys: Sequence[tuple[int, ...]]
) -> list[list[Rollout]]:
    """Write `sampling.samples` completions for each of P prompts; a list of P lists.

    `keys` tell the comparisons apart: the random numbers of a completion come from its key, its sample and the seed. A
    prompt that already ends at its answer position is read at once, without a decoding step.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + sampling.max_tokens > vlm.context:
        raise DataError(
            f"a comparison takes {longest} tokens and its completion up to {sampling.max_tokens}; "
            f"the model reads at most {vlm.context}: give a smaller --max-pixels or --max-tokens"
        )
    cache, logits = vlm.prefill(prompts)
    rows = [
        _new_row(vlm, prompt, sampling, (*key, sample))
        for prompt, key in zip(prompts, keys, strict=True)
        for sample in range(sampling.samples)
    ]
    if sampling.samples > 1:
        cache.repeat(sampling.samples)
        logits = mx.repeat(logits, sampling.samples, 0)
    live = rows
    while live:
        _read_labels(vlm, live, logits)
        for row in live:
            row.done = row.done or _is_done(row, sampling)
        kept = [i for i, row in enumerate(live) if not row.done]
        if len(kept) < len(live):
            live = [live[i] for i in kept]
            if not live:
                break
            cache.take(kept)
            logits = logits[mx.array(kept)]
        _advance(vlm, live, logits, sampling)
        ids = np.array([[row.written[-1]] for row in live], np.int32)
        logits = vlm.extend(cache, ids, np.array([row.position for row in live]))[:, 0]
        mx.async_eval(logits)
        for row in live:
            row.position += 1
    finished = [_finish(vlm, row) for row in rows]
    return [finished[p * sampling.samples : (p + 1) * sampling.samples] for p in range(len(prompts))]


def _new_row(vlm: VLM, prompt: Prompt, sampling: Sampling, key: tuple[int, ...]) -> _Row:
    uniforms = np.random.default_rng([sampling.seed, *key]).random(sampling.max_tokens + _ANSWER_TOKENS)
    answers_at_once = tuple(prompt.ids[-len(vlm.words.no_thinking) :]) == vlm.words.no_thinking
    return _Row(prompt.following, uniforms, NO_THINKING if answers_at_once else "")


def _read_labels(vlm: VLM, live: list[_Row], logits: mx.array) -> None:
    """Read the labels' probabilities of the rows that stand at their answer position."""
    reading = [i for i, row in enumerate(live) if row.labels is None and not row.forced and at_answer(row.text)]
    if not reading:
        return
    probabilities = mx.softmax(logits[mx.array(reading)], axis=-1)
    sums = mx.stack([probabilities[:, mx.array(ids)].sum(axis=-1) for ids in vlm.words.label_ids], axis=-1)
    for i, (first, second) in zip(reading, np.array(sums).tolist(), strict=True):
        live[i].labels = (first, second)


def _is_done(row: _Row, sampling: Sampling) -> bool:
    """Whether a row has said what it was asked for, or has no tokens left to say it."""
    if row.forced:
        return False
    if row.labels is not None and sampling.until == "answer":
        return True
    if row.labels is not None and "</answer>" in row.text.rpartition("</think>")[2]:
        return True
    if not sampling.close and row.labels is None and len(row.tokens) >= sampling.max_tokens:
        return True
    return len(row.tokens) >= sampling.max_tokens + _ANSWER_TOKENS


def _advance(vlm: VLM, live: list[_Row], logits: mx.array, sampling: Sampling) -> None:
    """Choose each row's next token: the next forced one, or one that the model says."""
    for row in live:
        if len(row.tokens) == sampling.max_tokens and row.labels is None and not row.closed:
            row.closed = True
            row.forced = list(vlm.words.control(ANSWER_OPEN if "</think>" in row.text else CLOSING))
    chosen, logprobs = _choose(logits, live, sampling)
    for row, token, logprob in zip(live, chosen, logprobs, strict=True):
        if row.forced:
            token = row.forced.pop(0)
        else:
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.done = token in vlm.ends
        row.written.append(token)
        if not row.done:
            row.text += vlm.words.pieces[token]


def _choose(logits: mx.array, live: list[_Row], sampling: Sampling) -> tuple[list[int], list[float]]:
    """One token a row from logits (R, V), with its log-probability under the distribution it was drawn from.

    Drawn by inverting the cumulative distribution at the row's own uniform number.
    """
    if sampling.temperature == 0:
        scaled = logits
        tokens = mx.argmax(logits, axis=-1)
    else:
        scaled = logits / sampling.temperature
        cumulative = mx.cumsum(mx.softmax(scaled, axis=-1), axis=-1)
        numbers = [row.uniforms[min(len(row.tokens), len(row.uniforms) - 1)] for row in live]
        # Above 0, so that the first token is not taken where its probability is 0.
        threshold = mx.maximum(mx.array(numbers, mx.float32)[:, None] * cumulative[:, -1:], 1e-9)
        tokens = mx.minimum((cumulative < threshold).sum(axis=-1), logits.shape[-1] - 1)
        # Sums in parallel need not rise without exception: a token that cannot be is never taken.
        possible = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] > -mx.inf
        tokens = mx.where(possible, tokens, mx.argmax(logits, axis=-1).astype(tokens.dtype))
    picked = mx.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - mx.logsumexp(scaled, axis=-1)
    return np.array(tokens).tolist(), np.array(picked).tolist()


def _finish(vlm: VLM, row: _Row) -> Rollout:
    ids = [token for token in row.written if token not in vlm.ends]
    opening = NO_THINKING if row.text.startswith(NO_THINKING) else ""
    first, second = row.labels or (0.0, 0.0)
    verdict = Verdict(opening + vlm.words.decode(ids), first, second, row.closed, len(row.tokens))
    return Rollout(tuple(row.tokens), tuple(row.logprobs), verdict)
