"""A completion while it is written, and the rollout that it becomes.

Axes: labels of the judge's profile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.profile import Profile
from mlxpref.engine.vlm import VLM, ComparisonInput
from mlxpref.verdict import Verdict, verdicts_from_json, verdicts_to_json


@dataclass(frozen=True)
class Sampling:
    """The sampling of completions.

    `temperature` 0 takes the likeliest token. `until` "answer" stops at the answer position, which gives the labels'
    probabilities: before the first token after the profile's lead that is not blank. "end" also writes the answer.
    Where the last of several answers counts, a completion is written to its end, and "answer" cuts it at that answer.
    `close` ends the reasoning of a completion that runs out of tokens, so that it still gets an answer. `keep_experts`
    keeps those that each token is given, for the update.
    """

    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    until: Literal["answer", "end"] = "answer"
    close: bool = True
    keep_experts: bool = False


@dataclass(frozen=True)
class Rollout:
    """A completion: the model's tokens with their log-probabilities, and the verdict.

    `labels` (answers, labels) are the probabilities of the profile's labels at each answer that counts. `experts`
    (tokens, E, K) are those that each token was given in the E layers with experts, if they were kept.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    verdict: Verdict
    experts: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)
    labels: tuple[tuple[float, ...], ...] = field(default=(), compare=False, repr=False)

    def to_json(self) -> list[Any]:
        """The rollout as a list, numbers to the last bit; without experts and labels, which only its process needs."""
        return [self.tokens, self.logprobs, verdicts_to_json([self.verdict])]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> "Rollout":
        """The rollout that `to_json` wrote."""
        tokens, logprobs, verdicts = values
        (verdict,) = verdicts_from_json(verdicts)
        return cls(tuple(tokens), tuple(logprobs), verdict)


@dataclass
class Completion:
    """An unfinished completion: branch `branch` of its comparison's row; `position` is that of its next token.

    `tokens` are the model's own with their `experts` (E, K), `ids` all tokens in the row, with the closing ones;
    `text` is in the vocabulary's alphabet and begins with the opening in the comparison. `labels` are the probabilities
    of the labels by answer, `tie` that of a tie in place of the lead, `marks` the numbers of tokens and ids before each
    answer. `closings` counts what was appended to lead to an answer, `answers_before` the answers before the last of
    these.
    """

    comparison: ComparisonInput
    branch: int
    position: int
    uniforms: NDArray[np.float32]
    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    experts: list[NDArray[np.int32]] = field(default_factory=list)
    labels: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    marks: dict[int, tuple[int, int]] = field(default_factory=dict)
    tie: float = 0.0
    is_tie: bool = False
    closings: int = 0
    answers_before: int = 0
    done: bool = False

    @property
    def is_led(self) -> bool:
        """Whether its next answer is the one that counts: it does without reasons, or they were ended."""
        return self.closings > 0 or not self.comparison.think


def start_completion(
    vlm: VLM, comparison: ComparisonInput, sampling: Sampling, key: tuple[int, ...], number: int
) -> Completion:
    """A completion of a comparison before its first token."""
    count = sampling.max_tokens + bounds.ANSWER_TOKENS
    uniforms = np.random.default_rng([sampling.seed, *key, number]).random(count).astype(np.float32)
    opening = vlm.tokenizer.in_alphabet(comparison.opening)
    return Completion(comparison, number, comparison.next_position, uniforms, opening)


def accept_token(vlm: VLM, completion: Completion, token: int, logprob: float) -> None:
    """Add the model's next token."""
    completion.tokens.append(token)
    completion.logprobs.append(logprob)
    completion.done = token in vlm.eos_ids
    append_token(vlm, completion, token)


def append_token(vlm: VLM, completion: Completion, token: int) -> None:
    """Add a token to the row."""
    completion.ids.append(token)
    completion.position += 1
    if not completion.done:
        completion.text += vlm.tokenizer.vocabulary[token]


def finish_completion(vlm: VLM, completion: Completion, sampling: Sampling) -> Rollout:
    """The rollout of a finished completion; of one whose last answer counts, up to that answer if it ends there."""
    profile, reader = vlm.profile, vlm.tokenizer.reader
    tokens, ids, comparison = completion.tokens, completion.ids, completion.comparison
    later = reader.takes_later_answers and not profile.is_point
    ended = bool(tokens) and tokens[-1] in vlm.eos_ids
    cut_off = later and not (ended or completion.is_led)  # before the answer that counts
    labels = {} if cut_off else completion.labels
    written_tokens = len(tokens)
    mark = completion.marks[max(labels)] if labels else (written_tokens, len(ids))
    if later and sampling.until == "answer":
        tokens, ids = tokens[: mark[0]], ids[: mark[1]]

    def text_of(ids: Sequence[int]) -> str:
        return comparison.opening + vlm.tokenizer.decode([token for token in ids if token not in vlm.eos_ids])

    text = text_of(ids)
    is_tie = sampling.until == "end" and completion.is_tie
    if is_tie:
        text = profile.tie_opening[0]
    verdict = Verdict(
        text,
        closed=completion.closings > 0 and comparison.think,
        tokens=written_tokens,
        reasoning=reader.reasoning(text) if comparison.think else "",
        written=None if cut_off else reader.written(text, comparison.form),
        well_formed=not cut_off and reader.is_well_formed(text, comparison.form, comparison.think),
        answer_start=0 if is_tie else len(text_of(ids[: mark[1]])) if labels else None,
        answer_tokens=mark[0],
        **_label_values(profile, labels, completion.tie),
    )
    experts = np.stack(completion.experts[: len(tokens)]) if completion.experts and tokens else None
    answers = list(labels.values()) if profile.is_point else [labels[max(labels)]] if labels else []
    probabilities = tuple(tuple(map(float, answer)) for answer in answers)
    return Rollout(tuple(tokens), tuple(completion.logprobs[: len(tokens)]), verdict, experts, probabilities)


def _label_values(profile: Profile, labels: Mapping[int, NDArray[np.float32]], tie: float) -> dict[str, Any]:
    """The values of a verdict that come from the labels' probabilities (labels,) by answer.

    A score of some aspects only is none: that of another image may be one of others.
    """
    if len(labels) < max(1, len(profile.aspects)):
        return {}
    if profile.is_point:
        masses = np.stack(list(labels.values())).astype(np.float64)  # (aspects, levels)
        scores = masses @ np.array(profile.levels, np.float64) / masses.sum(axis=1)
        return {"p_label_first": float(masses.sum(axis=1).mean()), "score": float(scores.mean())}
    first, second, *ties = (float(value) for value in labels[max(labels)])
    return {
        "p_label_first": first * (1 - tie),
        "p_label_second": second * (1 - tie),
        "p_label_tie": ties[0] if ties else tie,
    }
