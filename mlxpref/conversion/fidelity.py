"""Fidelity: the distance of a model's answers from those of another one to the same comparisons.

Only one model is in memory at a time: its answers are arrays that outlive it.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, logsumexp, softmax

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.memory import judging_plan, model_size
from mlxpref.checkpoints.recommended import device_working_set
from mlxpref.config import JudgeSettings
from mlxpref.data.images import load_image
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.adapters import load_adapter
from mlxpref.engine.completion import Sampling
from mlxpref.engine.image_features import Features
from mlxpref.engine.logprobs import Completions, completion_logprobs, prefill
from mlxpref.engine.positions import text_positions
from mlxpref.engine.profile import Profile
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm
from mlxpref.errors import ModelError
from mlxpref.log import logger, track
from mlxpref.preferences import Comparison, Pair, Preference, Question, SingleImage, shown
from mlxpref.text import format_bytes

MAX_PIXELS = 512 * 512
"""The pixel budget of images."""
COMPLETION_TOKENS = 48
"""The most tokens of a completion to compare."""
_BUILT_IN = 8
"""The number of pairs of built-in pictures."""
_BY_CHANCE = 0.05
"""The probability that a coin agrees as often, above which a model is doubted."""
_TOGETHER = 8
"""Comparisons in a batch: some 7,000 tokens at 512 x 512 pixels."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a model to N comparisons, asked by its profile in Q questions, without thinking and with it.

    The questions are the comparisons, or each of their images for a judge of single images. `logits` (Q, V) are of the
    answer position, `label_logprobs` (Q, labels) of the labels there, over all variants, in nats. `p_first` (N,) are
    the preferences for the first image, from 0 to 1. `completions` are Q sequences of tokens that begin with thinking,
    `token_logprobs` the model's log-probabilities of them. `prompts` are the token ids of all questions.
    """

    logits: NDArray[np.float32]
    label_logprobs: NDArray[np.float64]
    p_first: NDArray[np.float64]
    completions: tuple[tuple[int, ...], ...]
    token_logprobs: tuple[NDArray[np.float32], ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite; logits of suppressed tokens are minus infinity."""
        return bool(
            np.isfinite(self.label_logprobs).all()
            and not np.isnan(self.logits).any()
            and all(np.isfinite(row).all() for row in self.token_logprobs)
        )


@dataclass(frozen=True)
class Fidelity:
    """The differences of a model from a reference on `comparisons`; logarithms in nats.

    `kl_answer` is the divergence of its distribution at the answer position from the reference's, over all tokens: the
    mean, and the maximum over comparisons. `agreement` is the share of comparisons where both prefer the same image.
    Differences are absolute: of the preference for the first image, of the labels' log-probabilities, and of those of
    the `tokens` in the reference's completions.
    """

    comparisons: int
    kl_answer: float
    kl_answer_max: float
    agreement: float
    p_first_difference: float
    label_logprob_difference: float
    label_logprob_difference_max: float
    token_logprob_difference: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As in mlxpref.json."""
        return asdict(self)

    @property
    def doubt(self) -> str | None:
        """What is wrong with the verdicts, if they are the reference's no more often than by chance."""
        agreeing = round(self.agreement * self.comparisons)
        by_chance = sum(comb(self.comparisons, k) for k in range(agreeing, self.comparisons + 1)) / 2**self.comparisons
        if agreeing == self.comparisons or by_chance < _BY_CHANCE:
            return None
        return (
            f"the same verdict in only {agreeing} of {self.comparisons} comparisons, which chance gives, too: do not "
            "trust this model; take more bits, or compare on pictures of your own (--preferences)"
        )


def built_in_comparisons() -> list[Comparison]:
    """Comparisons of the demo's pictures, each pair in both orders."""
    return _in_both_orders(demo_preferences("test", _BUILT_IN))


def comparisons_of(preferences: Sequence[Preference], limit: int = 64) -> list[Comparison]:
    """Comparisons of preferences spread over the list, each pair in both orders, at most `limit`.

    Decodes every image, so that a damaged one is a DataError before work starts.
    """
    count = min(len(preferences), max(1, limit // 2))
    spread = [preferences[i * len(preferences) // count] for i in range(count)]
    for preference in spread:
        for image in (preference.a, preference.b):
            load_image(image)
    return _in_both_orders(spread)


def _in_both_orders(preferences: Sequence[Preference]) -> list[Comparison]:
    return [comparison for p in preferences for comparison in shown(Pair(p.a, p.b, p.prompt))]


def ask_source(
    source: Checkpoint,
    comparisons: Sequence[Comparison],
    adapter: Path | None = None,
    profile: Profile | None = None,
) -> tuple[Answers | None, str | None]:
    """The answers of a source in its own precision, or the reason why there are none.

    With the `adapter`, if any, and asked by the `profile`, None in our own way. The source leaves memory afterwards.
    ModelError if it cannot be loaded.
    """
    if not comparisons:
        return None, "it was not asked for"
    settings = JudgeSettings(max_tokens=COMPLETION_TOKENS, max_pixels=MAX_PIXELS, rows=_TOGETHER)
    peak, working_set = judging_plan(model_size(source), settings, 2 * _TOGETHER).peak, device_working_set()
    if peak > working_set:
        sizes = f"it needs about {format_bytes(peak)}, this device recommends at most {format_bytes(working_set)}"
        return None, f"the source does not fit in memory: {sizes}"
    logger.info(f"asking {source.folder} about {len(comparisons)} comparisons, to see what the conversion changes")
    vlm = load_vlm(source, MAX_PIXELS, profile=profile)
    if adapter is not None:
        load_adapter(vlm.model, adapter)
    answers = answers_of(vlm, comparisons)
    del vlm
    gc.collect()
    mx.clear_cache()
    if not answers.finite:
        return None, "the source's own log-probabilities are not finite"
    return answers, None


def compare_with_source(
    vlm: VLM, comparisons: Sequence[Comparison], reference: Answers | None = None
) -> Fidelity | None:
    """The fidelity of a converted model to its source's answers, the `reference`; None without one.

    Without a reference the model still answers once. ModelError for answers that are not finite, and for a model with
    other tokens for the comparisons.
    """
    if reference is None:
        one = built_in_comparisons()[:1]
        answers = answers_of(vlm, one, [()] * len(questions_of(vlm.profile, one)))
    else:
        answers = answers_of(vlm, comparisons, reference.completions)
    if not answers.finite:
        raise ModelError("its log-probabilities are not finite: take another type for unquantized weights")
    if reference is None:
        return None
    if answers.prompts != reference.prompts:
        raise ModelError("it reads comparisons as other tokens than its source does")
    return fidelity_of(reference, answers)


def questions_of(profile: Profile, comparisons: Sequence[Comparison]) -> list[Question]:
    """What a judge is asked to answer comparisons: them, or each of their images once."""
    if not profile.is_point:
        return list(comparisons)
    every = [SingleImage(image, each.prompt) for each in comparisons for image in each.images]
    return list({_key(each.image, each.prompt): each for each in every}.values())


def _key(image: object, prompt: str) -> tuple[int, str]:
    return id(image), prompt  # a picture in memory has no hash


def answers_of(
    vlm: VLM, comparisons: Sequence[Comparison], completions: Sequence[Sequence[int]] | None = None
) -> Answers:
    """The answers of a model to comparisons, at least one.

    `completions` are another model's for each question, to be scored; None lets this one write its own, greedily. Both
    are scored in the same way, so that equal models give equal numbers.
    """
    questions = questions_of(vlm.profile, comparisons)
    logits: list[NDArray[np.float32]] = []
    token_logprobs: list[NDArray[np.float32]] = []
    tokens: list[tuple[int, ...]] = []
    prompts: list[tuple[int, ...]] = []
    starts = range(0, len(questions), _TOGETHER)
    for start in track(starts, len(starts), f"answering {len(comparisons)} comparisons"):
        part = slice(start, start + _TOGETHER)
        features = iter(vlm.features.get_all(image for each in questions[part] for image in each.images))
        asked = [([next(features) for _ in each.images], each.prompt) for each in questions[part]]
        at_once = [_at_once(vlm, images, prompt) for images, prompt in asked]
        thinking = [vlm.input_of(images, prompt, "choice", think=True) for images, prompt in asked]
        logits.append(np.array(vlm.prefill(at_once)[1]))
        rows = _written(vlm, thinking) if completions is None else [tuple(row) for row in completions[part]]
        tokens += rows
        token_logprobs += _scored(vlm, thinking, rows)
        prompts += [tuple(prompt.ids.tolist()) for prompt in (*at_once, *thinking)]
    together = np.concatenate(logits)
    labels = _label_logprobs(vlm, together)
    p_first = _preferences(vlm.profile, comparisons, labels)
    return Answers(together, labels, p_first, tuple(tokens), tuple(token_logprobs), tuple(prompts))


def _at_once(vlm: VLM, images: Sequence[Features], prompt: str) -> ComparisonInput:
    """A question up to its answer position, of a point judge to that of its first score; a tie may come before it."""
    asked = vlm.input_of(images, prompt, "choice", think=False)
    lead = vlm.tokenizer.lead_ids
    positions = text_positions(np.array([asked.next_position]), len(lead))[:, 0]  # (3, L)
    return replace(
        asked,
        ids=np.concatenate([asked.ids, np.array(lead, np.int32)]),
        positions=np.concatenate([asked.positions, positions], axis=1),
        next_position=asked.next_position + len(lead),
    )


def _preferences(
    profile: Profile, comparisons: Sequence[Comparison], label_logprobs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The preferences (N,) for the first image, from the labels' log-probabilities (Q, labels).

    A tie counts half. Of single images they come from the difference of two scores, by the logistic function.
    """
    shares = softmax(label_logprobs, axis=-1)  # (Q, labels)
    if not profile.is_point:
        return np.asarray(shares[:, 0] + shares[:, 2:].sum(axis=-1) / 2)
    scores = shares @ np.array(profile.levels, np.float64)  # (Q,)
    keys = dict.fromkeys(_key(image, c.prompt) for c in comparisons for image in c.images)
    score_of = dict(zip(keys, scores, strict=True))
    pairs = np.array([[score_of[_key(image, c.prompt)] for image in c.images] for c in comparisons])  # (N, 2)
    return np.asarray(expit(pairs[:, 0] - pairs[:, 1]))


def _written(vlm: VLM, prompts: Sequence[ComparisonInput]) -> list[tuple[int, ...]]:
    """The likeliest completions of prompts."""
    sampling = Sampling(max_tokens=COMPLETION_TOKENS, until="end", close=False)
    groups = roll_out(vlm, prompts, sampling, [(0,)] * len(prompts))
    return [rollout.tokens for group in groups for rollout in group]


def _scored(
    vlm: VLM, prompts: Sequence[ComparisonInput], completions: Sequence[Sequence[int]]
) -> Iterator[NDArray[np.float32]]:
    """The log-probabilities of the tokens of a completion for each prompt."""
    states = prefill(vlm, prompts, recompute=False)
    rows = np.array(completion_logprobs(vlm, states, Completions.of(completions), recompute=False).logprobs)  # (N, T)
    return (row[: len(tokens)] for row, tokens in zip(rows, completions, strict=True))


def _label_logprobs(vlm: VLM, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The labels' log-probabilities (Q, labels) from logits (Q, V), summed over the variants of each."""
    with np.errstate(invalid="ignore"):  # of a broken model; see `Answers.finite`
        every = log_softmax(logits.astype(np.float64), axis=-1)
        return np.stack([logsumexp(every[:, list(ids)], axis=-1) for ids in vlm.tokenizer.label_ids], axis=-1)


def fidelity_of(reference: Answers, other: Answers) -> Fidelity:
    """The fidelity of a model's answers to a reference's, with scores of the reference's completions.

    Raises ValueError for answers to other questions, or about other completions.
    """
    if reference.prompts != other.prompts or reference.completions != other.completions:
        raise ValueError("answers to other questions than the reference's, or about other completions")
    kl = np.array(
        [
            _kl(*log_softmax(np.stack(pair).astype(np.float64), axis=-1))
            for pair in zip(reference.logits, other.logits, strict=True)
        ]
    )
    labels = np.abs(reference.label_logprobs - other.label_logprobs)
    sides = [np.sign(answers.p_first - 0.5) for answers in (reference, other)]
    tokens = [np.concatenate(answers.token_logprobs).astype(np.float64) for answers in (reference, other)]
    return Fidelity(
        comparisons=len(reference.p_first),
        kl_answer=float(kl.mean()),
        kl_answer_max=float(kl.max()),
        agreement=float((sides[0] == sides[1]).mean()),
        p_first_difference=float(np.abs(reference.p_first - other.p_first).mean()),
        label_logprob_difference=float(labels.mean()),
        label_logprob_difference_max=float(labels.max()),
        token_logprob_difference=float(np.abs(tokens[0] - tokens[1]).mean()) if tokens[0].size else 0.0,
        tokens=int(tokens[0].size),
    )


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """The divergence of q from p, from log-probabilities (V,); tokens impossible in both add nothing.

    Sums q - p - p log(q/p), which is equal, as both sum to 1; no term is negative, so none cancel.
    """
    possible = p > -np.inf
    p, q = p[possible], q[possible]
    return max(0.0, float((np.exp(q) - np.exp(p) * (1.0 + q - p)).sum()))
