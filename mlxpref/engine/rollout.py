"""Rollouts: completions of comparisons, written in batches and read where they answer.

The completions of a comparison are branches of one row: its prompt's keys and values exist once. All advance together,
one token a step, and tokens are chosen on the device; the host looks at them every few steps, and what is done leaves
the batch. Random numbers are keyed by seed, comparison and sample, so what is sampled does not depend on the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.kv_cache import PADDING, BranchedKVCache
from mlxpref.engine.template import ANSWER_OPEN, CLOSING, NO_THINKING
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.errors import DataError
from mlxpref.verdict import Verdict, at_answer, verdicts_from_json, verdicts_to_json

__all__ = ["Prefill", "Rollout", "Sampling", "roll_out"]

_CROWDED = 0.75
"""The share of rows that are still written, above which finished ones stay where they are."""

Prefill = Callable[[Sequence[ComparisonInput]], tuple[BranchedKVCache, mx.array]]
"""Runs prompts: their keys and values, and the logits (P, V) after each."""


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

    def to_json(self) -> list[Any]:
        """The rollout as a list, numbers to the last bit."""
        return [self.tokens, self.logprobs, verdicts_to_json([self.verdict])]

    @classmethod
    def from_json(cls, told: Sequence[Any]) -> "Rollout":
        """What `to_json` gave."""
        tokens, logprobs, verdicts = told
        return cls(tuple(tokens), tuple(logprobs), *verdicts_from_json(verdicts))


@dataclass
class _Completion:
    """One completion while it is being written: a branch of its comparison's row."""

    number: int
    position: int
    uniforms: NDArray[np.float32]
    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    labels: tuple[float, float] | None = None
    closed: bool = False
    done: bool = False


def roll_out(
    vlm: VLM,
    prompts: Sequence[ComparisonInput],
    sampling: Sampling,
    keys: Sequence[tuple[int, ...]],
    rows: int | None = None,
    prefill: Prefill | None = None,
) -> list[list[Rollout]]:
    """Write `sampling.samples` completions for each of P prompts; a list of P lists.

    `keys` tell the comparisons apart: the random numbers of a completion come from its key, its sample and the seed. A
    prompt that already ends at its answer position is read at once, without a decoding step. At most `rows` completions
    are written together, but those of one comparison always are. `prefill` runs the prompts where the model's own way,
    each as a whole, is not the shortest.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + sampling.max_tokens > vlm.context:
        raise DataError(
            f"a comparison takes {longest} tokens and its completion up to {sampling.max_tokens}; "
            f"the model reads at most {vlm.context}: give a smaller --max-pixels or --max-tokens"
        )
    size = len(prompts) if rows is None else max(1, rows // sampling.samples)
    finished: list[list[Rollout]] = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        cache, logits = (prefill or vlm.prefill)(prompts[part])
        groups = [
            [_new_branch(vlm, prompt, sampling, key, number) for number in range(sampling.samples)]
            for prompt, key in zip(prompts[part], keys[part], strict=True)
        ]
        copies = bounds.prompt_copies(longest, sampling.max_tokens, sampling.samples)
        if copies > 1:
            rows_of = np.repeat(np.arange(len(groups)), copies)
            cache.take(rows_of.tolist())
            logits = logits[mx.array(rows_of)]
        _Batch(vlm, sampling, cache, [group[i::copies] for group in groups for i in range(copies)], logits).write()
        finished += [[_finish(vlm, branch) for branch in group] for group in groups]
    return finished


def _new_branch(
    vlm: VLM, prompt: ComparisonInput, sampling: Sampling, key: tuple[int, ...], number: int
) -> _Completion:
    uniforms = np.random.default_rng([sampling.seed, *key, number]).random(sampling.max_tokens + bounds.ANSWER_TOKENS)
    answers_at_once = tuple(prompt.ids[-len(vlm.words.no_thinking) :]) == vlm.words.no_thinking
    return _Completion(number, prompt.following, uniforms.astype(np.float32), NO_THINKING if answers_at_once else "")


class _Batch:
    """Completions that are written together: for each row of a cache, the branches that are not done.

    `logits` (B, M, V) say each branch's next token, for M the most branches of a row; `probabilities` are those of the
    model itself, whatever the temperature.
    """

    def __init__(
        self,
        vlm: VLM,
        sampling: Sampling,
        cache: BranchedKVCache,
        groups: Sequence[list[_Completion]],
        logits: mx.array,
    ) -> None:
        self.vlm, self.sampling, self.cache = vlm, sampling, cache
        self.live = [list(group) for group in groups]
        self._variants = mx.array([i for ids in vlm.words.label_ids for i in ids])
        self.logits = mx.repeat(logits[:, None], max(map(len, groups)), axis=1)
        self.probabilities = mx.softmax(self.logits, axis=-1)

    def write(self) -> None:
        """Write until every branch is done."""
        self._read_labels()
        written = 0
        while self._drop_finished():
            if written == self.sampling.max_tokens and self._close():
                continue
            limit = self.sampling.max_tokens
            steps = min(bounds.STEPS_TOGETHER, (limit if written < limit else limit + bounds.ANSWER_TOKENS) - written)
            self._advance(steps, written)
            written += steps

    def _branches(self) -> list[tuple[int, int, _Completion]]:
        """Every branch with its row and its place in the row."""
        return [(row, place, branch) for row, group in enumerate(self.live) for place, branch in enumerate(group)]

    def _placed(self, value: Callable[[_Completion], object], default: object, dtype: type) -> NDArray[Any]:
        """One value a branch, (B, M), with a default where a row has fewer branches."""
        columns = max(len(group) for group in self.live)
        return np.array([[*map(value, group), *[default] * (columns - len(group))] for group in self.live], dtype)

    def _read_labels(self) -> None:
        """Read the labels' probabilities of the branches that stand at their answer position now."""
        if any(at_answer(branch.text) for _, _, branch in self._branches()):
            labels = self._label_mass(self.probabilities[..., self._variants])
            for row, place, branch in self._branches():
                _update_status(branch, labels[row, place], self.sampling)

    def _label_mass(self, variants: mx.array) -> NDArray[np.float32]:
        """The probabilities (..., 2) of the labels, summed over the variants (..., K) of both."""
        count = len(self.vlm.words.label_ids[0])
        found = np.array(variants)
        return np.stack([found[..., :count].sum(-1), found[..., count:].sum(-1)], axis=-1)

    def _drop_finished(self) -> bool:
        """Let go of what is done; whether anything is left."""
        kept = [[place for place, branch in enumerate(group) if not branch.done] for group in self.live]
        going = [row for row, places in enumerate(kept) if places]
        if not going or all(len(places) == len(group) for places, group in zip(kept, self.live, strict=True)):
            return bool(going)
        rows = list(range(len(kept)))
        if len(going) <= _CROWDED * len(kept):
            self.cache.take(going)
            rows = going
        self.live = [[self.live[row][place] for place in kept[row]] for row in rows]
        columns = max(len(group) for group in self.live)
        places = np.array([kept[row] + [0] * (columns - len(kept[row])) for row in rows])
        index = mx.array(np.array(rows))[:, None], mx.array(places)
        self.logits, self.probabilities = self.logits[index], self.probabilities[index]
        self.cache.forget([{branch.number for branch in group} for group in self.live])
        return True

    def _advance(self, steps: int, written: int) -> None:
        """Write `steps` tokens of every branch on the device, then look at them."""
        owners = self._placed(lambda branch: branch.number, PADDING, np.int32)
        positions = mx.array(self._placed(lambda branch: branch.position, 0, np.int32))
        blank = np.full(steps, 0.5, np.float32)
        uniforms = mx.array(self._placed(lambda branch: branch.uniforms[written : written + steps], blank, np.float32))
        self.cache.announce(owners, steps)
        every = positions[..., None] + mx.arange(steps)
        turning = self.vlm.turning(every.flatten(1))
        angles = [part.reshape(*every.shape, -1) for part in turning] if turning else []
        kept: tuple[list[mx.array], ...] = ([], [], [])
        for step in range(steps):
            tokens, logprobs = self._choose(uniforms[..., step])
            now = (angles[0][:, :, step], angles[1][:, :, step]) if angles else None
            self.logits = self.vlm.head(self.vlm.extend(self.cache, tokens, every[..., step], now))
            self.probabilities = mx.softmax(self.logits, axis=-1)
            found = tokens, logprobs, self.probabilities[..., self._variants]
            mx.async_eval(self.logits, *found)
            for values, value in zip(kept, found, strict=True):
                values.append(value)
        tokens_now, logprobs_now = (np.array(mx.stack(values, axis=2)) for values in kept[:2])
        labels_now = self._label_mass(mx.stack(kept[2], axis=2))
        for row, place, branch in self._branches():
            for step in range(steps):
                if not branch.done:
                    _accept(self.vlm, branch, int(tokens_now[row, place, step]), float(logprobs_now[row, place, step]))
                    _update_status(branch, labels_now[row, place, step], self.sampling)

    def _choose(self, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        """One token a branch (B, M), with its log-probability under the distribution it was drawn from.

        Drawn by inverting the cumulative distribution at the branch's own uniform number.
        """
        temperature = self.sampling.temperature
        if temperature == 0:
            probabilities, tokens = self.probabilities, mx.argmax(self.logits, axis=-1)
        else:
            scaled = temperature != 1
            probabilities = mx.softmax(self.logits / temperature, axis=-1) if scaled else self.probabilities
            cumulative = mx.cumsum(probabilities, axis=-1)
            # Above 0, so that the first token is not taken where its probability is 0.
            threshold = mx.maximum(uniforms[..., None] * cumulative[..., -1:], 1e-9)
            tokens = mx.minimum((cumulative < threshold).sum(axis=-1), self.logits.shape[-1] - 1)
            # Sums in parallel need not rise without exception: a token that cannot be is never taken.
            possible = mx.take_along_axis(self.logits, tokens[..., None], axis=-1)[..., 0] > -mx.inf
            tokens = mx.where(possible, tokens, mx.argmax(self.logits, axis=-1).astype(tokens.dtype))
        return tokens, mx.log(mx.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0])

    def _close(self) -> bool:
        """End the reasoning of the branches that have no tokens left for it, in one block; whether there were any."""
        closing = [item for item in self._branches() if item[2].labels is None and not item[2].closed]
        if not closing:
            return False
        forced = {
            (row, place): self.vlm.words.control(ANSWER_OPEN if "</think>" in branch.text else CLOSING)
            for row, place, branch in closing
        }
        rows, places = self.logits.shape[:2]
        ids = np.zeros((rows, max(map(len, forced.values())), places), np.int32)
        owners, positions, last = np.full_like(ids, PADDING), np.zeros_like(ids), np.zeros((rows, places), np.int32)
        for row, place, branch in closing:
            words = forced[row, place]
            ids[row, : len(words), place] = words
            owners[row, : len(words), place] = branch.number
            positions[row, : len(words), place] = branch.position + np.arange(len(words))
            last[row, place] = (len(words) - 1) * places + place
        blocks = [values.reshape(rows, -1) for values in (ids, owners, positions)]
        self.cache.announce(blocks[1])
        states = self.vlm.extend(self.cache, mx.array(blocks[0]), mx.array(blocks[2]))
        closed = self.vlm.head(states[mx.arange(rows)[:, None], mx.array(last)])
        is_closed = np.zeros((rows, places, 1), bool)
        for row, place, branch in closing:
            is_closed[row, place] = branch.closed = True
            for token in forced[row, place]:
                _append(self.vlm, branch, token)
        self.logits = mx.where(mx.array(is_closed), closed, self.logits)
        self.probabilities = mx.softmax(self.logits, axis=-1)
        self._read_labels()
        return True


def _accept(vlm: VLM, branch: _Completion, token: int, logprob: float) -> None:
    """Take a token that the model chose."""
    branch.tokens.append(token)
    branch.logprobs.append(logprob)
    branch.done = token in vlm.ends
    _append(vlm, branch, token)


def _append(vlm: VLM, branch: _Completion, token: int) -> None:
    branch.written.append(token)
    branch.position += 1
    if not branch.done:
        branch.text += vlm.words.pieces[token]


def _update_status(branch: _Completion, labels: NDArray[np.float32], sampling: Sampling) -> None:
    """Read the labels where a branch stands at its answer position, and see whether it has said what was asked for."""
    if branch.labels is None and not branch.done and at_answer(branch.text):
        branch.labels = float(labels[0]), float(labels[1])
    read, count = branch.labels is not None, len(branch.tokens)
    branch.done = (
        branch.done
        or (read and sampling.until == "answer")
        or (read and "</answer>" in branch.text.rpartition("</think>")[2])
        or (not read and not sampling.close and count >= sampling.max_tokens)
        or count >= sampling.max_tokens + bounds.ANSWER_TOKENS
    )


def _finish(vlm: VLM, branch: _Completion) -> Rollout:
    ids = [token for token in branch.written if token not in vlm.ends]
    opening = NO_THINKING if branch.text.startswith(NO_THINKING) else ""
    first, second = branch.labels or (0.0, 0.0)
    verdict = Verdict(opening + vlm.words.decode(ids), first, second, branch.closed, len(branch.tokens))
    return Rollout(tuple(branch.tokens), tuple(branch.logprobs), verdict)
