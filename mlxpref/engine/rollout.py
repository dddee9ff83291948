"""Rollouts: batches of completions of comparisons, and the verdicts at their answers.

The completions of a comparison are branches of one row: its keys and values exist once, its states once for each. All
advance together, one token a step, and tokens are chosen on the device. The host reads them every few steps, and
finished completions leave the batch. Random numbers are keyed by seed, comparison and sample, so that samples do not
depend on the batch.

Axes: B rows, M branches of a row at most, S steps, V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.branched_cache import PADDING, BranchedCache
from mlxpref.engine.completion import (
    Completion,
    Rollout,
    Sampling,
    accept_token,
    append_token,
    finish_completion,
    start_completion,
)
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.errors import DataError

_CROWDED = 0.75
"""Above this share of unfinished rows the finished ones stay in the batch."""

Prefill = Callable[[Sequence[ComparisonInput]], tuple[BranchedCache, mx.array]]
"""Runs comparisons; returns what the layers remember of them, and the logits (B, V) after each."""


def roll_out(
    vlm: VLM,
    comparisons: Sequence[ComparisonInput],
    sampling: Sampling,
    keys: Sequence[tuple[int, ...]],
    rows: int | None = None,
    prefill: Prefill | None = None,
) -> list[list[Rollout]]:
    """Write `sampling.samples` completions for each of P comparisons; returns P lists.

    `keys` tell the comparisons apart: the random numbers of a completion come from its key, its sample and the seed. A
    comparison that already ends at its answer position needs no decoding step. At most `rows` completions run together,
    but those of one comparison always do. `prefill` replaces the model's own, for instance by a prefix cache. DataError
    for more tokens than the model reads.
    """
    longest = max(len(comparison) for comparison in comparisons)
    if longest + sampling.max_tokens > vlm.context:
        raise DataError(
            f"a comparison takes {longest} tokens and its completion up to {sampling.max_tokens}; "
            f"the model reads at most {vlm.context}: give a smaller --max-pixels or --max-tokens"
        )
    size = len(comparisons) if rows is None else max(1, rows // sampling.samples)
    rollouts: list[list[Rollout]] = []
    for start in range(0, len(comparisons), size):
        part = slice(start, start + size)
        cache, logits = (prefill or vlm.prefill)(comparisons[part])
        groups = [
            [start_completion(vlm, comparison, sampling, key, number) for number in range(sampling.samples)]
            for comparison, key in zip(comparisons[part], keys[part], strict=True)
        ]
        copies = bounds.row_copies(longest, sampling.max_tokens, sampling.samples)
        if copies > 1:
            copied = np.repeat(np.arange(len(groups)), copies)
            cache.select_rows(copied.tolist())
            logits = logits[mx.array(copied)]  # (P, V) -> (P * copies, V)
        _Batch(vlm, sampling, cache, [group[i::copies] for group in groups for i in range(copies)], logits).write()
        rollouts += [[finish_completion(vlm, completion, sampling) for completion in group] for group in groups]
    return rollouts


class _Batch:
    """A batch of completions: the unfinished ones of each row of a cache.

    `logits` (B, M, V) predict each completion's next token; `probabilities` are the model's own, without the
    temperature. `limit` is the number of tokens after which a completion is led to its answer.
    """

    def __init__(
        self, vlm: VLM, sampling: Sampling, cache: BranchedCache, rows: Sequence[list[Completion]], logits: mx.array
    ) -> None:
        self.vlm, self.sampling, self.cache = vlm, sampling, cache
        self.rows = [list(row) for row in rows]
        cache.begin_branches(self._gather(lambda each: each.branch, PADDING, np.int32))  # (B, M)
        self._label_ids = mx.array([i for ids in vlm.tokenizer.label_ids for i in ids])
        self.logits = mx.repeat(logits[:, None], max(map(len, rows)), axis=1)  # (B, V) -> (B, M, V)
        self.probabilities = mx.softmax(self.logits, axis=-1)
        profile = vlm.profile
        led = (profile.is_point or profile.tie_opening) and not rows[0][0].comparison.think
        self.limit = 0 if led else sampling.max_tokens

    def write(self) -> None:
        """Write tokens until every completion is done."""
        self._read_labels()
        count = 0
        while self._drop_finished():
            if count == self.limit and self._close():
                continue
            most = self.limit if count < self.limit else self.limit + bounds.ANSWER_TOKENS
            steps = min(bounds.STEPS_TOGETHER, most - count)
            self._advance(steps, count)
            count += steps

    def _completions(self) -> list[tuple[int, int, Completion]]:
        """Every completion with its row and its place in the row."""
        return [(number, place, each) for number, row in enumerate(self.rows) for place, each in enumerate(row)]

    def _gather(self, value: Callable[[Completion], object], default: object, dtype: type) -> NDArray[Any]:
        """One value a completion, (B, M) or (B, M, S); the default fills rows with fewer completions."""
        columns = max(len(row) for row in self.rows)
        return np.array([[*map(value, row), *[default] * (columns - len(row))] for row in self.rows], dtype)

    def _read_labels(self) -> None:
        """Read the labels' probabilities of the completions at their answer position."""
        number = self.vlm.tokenizer.streaming_reader.answer_number
        if any(number(completion.text) is not None for _, _, completion in self._completions()):
            labels = self._label_mass(self.probabilities[..., self._label_ids])
            for row, place, completion in self._completions():
                self._update_status(completion, labels[row, place])
            self._look_ahead()

    def _is_final(self, completion: Completion) -> bool:
        """Whether a completion reached the answer that counts, or all answers of a judge of single images."""
        if self.vlm.profile.is_point:
            return len(completion.labels) >= len(self.vlm.profile.aspects)
        later = self.vlm.tokenizer.streaming_reader.takes_later_answers
        return len(completion.labels) > completion.answers_before and (completion.is_led or not later)

    def _update_status(self, completion: Completion, labels: NDArray[np.float32]) -> None:
        """Keep the labels' probabilities (labels,) at an answer position, and set whether the completion is done."""
        reader = self.vlm.tokenizer.streaming_reader
        count = len(completion.tokens)
        number = None if completion.done else reader.answer_number(completion.text)
        # Behind the answer that counts there is no other one, but blanks on the way there move its place.
        if number is not None and (number in completion.labels or not self._is_final(completion)):
            completion.labels[number] = labels
            completion.marks[number] = count, len(completion.ids)
        final = self._is_final(completion)
        completion.done = (
            completion.done
            or (final and (completion.is_tie or reader.is_answered(completion.text)))
            or (not final and not self.sampling.close and count >= self.limit > 0)
            or count >= self.limit + bounds.ANSWER_TOKENS
        )

    def _end_before(self, completion: Completion, token: int) -> None:
        """End a completion at its answer position unless its next token is another blank on the way there."""
        if self.sampling.until == "answer" and self._is_final(completion) and token not in self.vlm.tokenizer.blank_ids:
            completion.done = True

    def _look_ahead(self) -> None:
        """End the completions at their answer position by their next tokens, which need no step of the model.

        A comparison that is read at once, while completions are sampled, ends without: all its samples are equal.
        """
        waiting = any(self._is_final(each) and not each.done for _, _, each in self._completions())
        if self.sampling.until == "end" or not waiting:
            return
        uniforms = self._gather(lambda each: each.uniforms[len(each.tokens) % len(each.uniforms)], 0.5, np.float32)
        tokens = np.array(self._choose(mx.array(uniforms))[0])  # (B, M)
        for row, place, completion in self._completions():
            thinks = completion.comparison.think or bool(completion.tokens)
            at_once = not thinks and self.sampling.temperature > 0
            self._end_before(completion, -1 if at_once else int(tokens[row, place]))

    def _label_mass(self, variants: mx.array) -> NDArray[np.float32]:
        """The probabilities (..., labels), from those of the variants of all (..., variants)."""
        ends = np.cumsum([len(ids) for ids in self.vlm.tokenizer.label_ids])[:-1]
        parts = np.split(np.array(variants), ends, axis=-1)
        return np.stack([part.sum(-1) for part in parts], axis=-1)

    def _drop_finished(self) -> bool:
        """Drop finished completions; returns whether any are left."""
        live = [[place for place, each in enumerate(row) if not each.done] for row in self.rows]
        unfinished = [number for number, places in enumerate(live) if places]
        if not unfinished or all(len(places) == len(row) for places, row in zip(live, self.rows, strict=True)):
            return bool(unfinished)
        numbers = list(range(len(live)))
        if len(unfinished) <= _CROWDED * len(live):
            self.cache.select_rows(unfinished)
            numbers = unfinished
        self.rows = [[self.rows[number][place] for place in live[number]] for number in numbers]
        columns = max(len(row) for row in self.rows)
        places = np.array([live[number] + [0] * (columns - len(live[number])) for number in numbers])
        index = mx.array(np.array(numbers))[:, None], mx.array(places)  # (new B, 1), (new B, new M)
        self.logits, self.probabilities = self.logits[index], self.probabilities[index]
        self.cache.drop_branches([{completion.branch for completion in row} for row in self.rows])
        return True

    def _advance(self, steps: int, start: int) -> None:
        """Write `steps` tokens of every completion on the device, then read them."""
        branch_ids = self._gather(lambda each: each.branch, PADDING, np.int32)  # (B, M)
        positions = mx.array(self._gather(lambda each: each.position, 0, np.int32))  # (B, M)
        blank = np.full(steps, 0.5, np.float32)
        uniforms = mx.array(self._gather(lambda each: each.uniforms[start : start + steps], blank, np.float32))
        self.cache.reserve(branch_ids, steps)
        every = positions[..., None] + mx.arange(steps)  # (B, M, S)
        tables = self.vlm.rotary_tables(every.flatten(1))  # of (B, M * S)
        rotary = [table.reshape(*every.shape, -1) for table in tables] if tables else []  # (B, M, S, W) each
        outputs: tuple[list[mx.array], ...] = ([], [], [], [])
        for step in range(steps):
            tokens, logprobs = self._choose(uniforms[..., step])
            now = (rotary[0][:, :, step], rotary[1][:, :, step]) if rotary else None
            experts = list[mx.array]()
            self.logits = self.vlm.head(self.vlm.extend(self.cache, tokens, every[..., step], now, experts))
            self.probabilities = mx.softmax(self.logits, axis=-1)
            results = [tokens, logprobs, self.probabilities[..., self._label_ids]]
            if experts and self.sampling.keep_experts:
                results.append(mx.stack(experts, axis=1).reshape(*tokens.shape, len(experts), -1))  # (B, M, E, K)
            mx.async_eval(self.logits, *results)
            for values, value in zip(outputs, results, strict=False):
                values.append(value)
        all_tokens, all_logprobs = (np.array(mx.stack(values, axis=2)) for values in outputs[:2])  # (B, M, S)
        all_labels = self._label_mass(mx.stack(outputs[2], axis=2))  # (B, M, S, labels)
        all_experts = np.array(mx.stack(outputs[3], axis=2)) if outputs[3] else None  # (B, M, S, E, K)
        for row, place, completion in self._completions():
            for step in range(steps):
                token, logprob = int(all_tokens[row, place, step]), float(all_logprobs[row, place, step])
                self._end_before(completion, token)
                if not completion.done:
                    accept_token(self.vlm, completion, token, logprob)
                    if all_experts is not None:
                        completion.experts.append(all_experts[row, place, step])
                    self._update_status(completion, all_labels[row, place, step])
        self._look_ahead()

    def _choose(self, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        """One token a completion (B, M), with its log-probability under the distribution it was drawn from.

        Inverts the cumulative distribution at the completion's own uniform number (B, M).
        """
        temperature = self.sampling.temperature
        if temperature == 0:
            probabilities, tokens = self.probabilities, mx.argmax(self.logits, axis=-1)
        else:
            scaled = temperature != 1
            probabilities = mx.softmax(self.logits / temperature, axis=-1) if scaled else self.probabilities
            cumulative = mx.cumsum(probabilities, axis=-1)  # (B, M, V)
            # Above 0, so that a first token of probability 0 is never chosen.
            threshold = mx.maximum(uniforms[..., None] * cumulative[..., -1:], 1e-9)  # (B, M, 1)
            tokens = mx.minimum((cumulative < threshold).sum(axis=-1), self.logits.shape[-1] - 1)
            # Parallel sums may not rise monotonically: exclude impossible tokens.
            possible = mx.take_along_axis(self.logits, tokens[..., None], axis=-1)[..., 0] > -mx.inf
            tokens = mx.where(possible, tokens, mx.argmax(self.logits, axis=-1).astype(tokens.dtype))
        return tokens, mx.log(mx.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0])

    def _close(self) -> bool:
        """Lead completions without tokens left to their answer; returns whether there were any.

        The closing tokens run as one block (B, C * M): C tokens at most, each followed by those of the next place.
        """
        most = max(1, len(self.vlm.profile.aspects))
        closing = [item for item in self._completions() if not self._is_final(item[2]) and item[2].closings < most]
        if not closing:
            return False
        closings = {(row, place): self._closing_ids(completion) for row, place, completion in closing}
        if tie_ids := self.vlm.tokenizer.tie_opening_ids:
            ties = np.array(self.probabilities[..., mx.array(tie_ids)].sum(axis=-1))  # (B, M)
            leads = np.array(self.probabilities[..., self.vlm.tokenizer.lead_ids[0]])  # (B, M)
            for row, place, completion in closing:
                completion.tie = float(ties[row, place])
                completion.is_tie = bool(ties[row, place] > leads[row, place])
        rows, places = self.logits.shape[:2]
        ids = np.zeros((rows, max(map(len, closings.values())), places), np.int32)  # (B, C, M)
        branch_ids, positions = np.full_like(ids, PADDING), np.zeros_like(ids)
        last, is_closed = np.zeros((rows, places), np.int32), np.zeros((rows, places, 1), bool)
        for row, place, completion in closing:
            tokens = closings[row, place]
            ids[row, : len(tokens), place] = tokens
            branch_ids[row, : len(tokens), place] = completion.branch
            positions[row, : len(tokens), place] = completion.position + np.arange(len(tokens))
            last[row, place] = (len(tokens) - 1) * places + place
            is_closed[row, place] = True
            completion.closings += 1
            completion.answers_before = len(completion.labels)
            for token in tokens:
                append_token(self.vlm, completion, token)
        self.cache.reserve(branch_ids.reshape(rows, -1))  # (B, C * M), as the two below
        states = self.vlm.extend(self.cache, mx.array(ids.reshape(rows, -1)), mx.array(positions.reshape(rows, -1)))
        closed = self.vlm.head(states[mx.arange(rows)[:, None], mx.array(last)])  # (B, M, V)
        self.logits = mx.where(mx.array(is_closed), closed, self.logits)
        self.probabilities = mx.softmax(self.logits, axis=-1)
        self._read_labels()
        return True

    def _closing_ids(self, completion: Completion) -> tuple[int, ...]:
        """What leads a completion to its next answer; behind an answer position, from the likeliest label on."""
        tokenizer, written = self.vlm.tokenizer, tuple[int, ...]()
        if completion.labels and tokenizer.streaming_reader.answer_number(completion.text) is not None:
            written = tokenizer.label_ids[int(np.argmax(completion.labels[max(completion.labels)]))][:1]
        has_thought = tokenizer.streaming_reader.has_thought(completion.text)
        number = len(completion.labels) if self.vlm.profile.is_point else 0
        return written + tokenizer.closing_ids(has_thought, number)
