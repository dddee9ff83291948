"""Tiny models that are asked by a profile, and heads that write a script."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.profile import Profile, built_in_profiles
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.engine.vlm import VLM, ComparisonInput
from tests.conftest import picture, tiny_model

SIZES = ((84, 84), (140, 84), (56, 112), (84, 84))
NAMES = tuple(built_in_profiles())
TIE_WORD = "answer"
"""A word that is one token of the tiny vocabularies; `Both` is several there."""


def asked_by(vlm: VLM, profile: Profile | str) -> VLM:
    """The same model, asked by another profile."""
    other = copy(vlm)
    other.__dict__.pop("_label_rows", None)
    other.is_unreadable = False
    other.profile = built_in_profiles()[profile] if isinstance(profile, str) else profile
    other.tokenizer = ComparisonTokenizer(vlm.tokenizer.hf_tokenizer, vlm.image_token_id, other.profile)
    return other


def question(vlm: VLM, images: Sequence[int], prompt: str = "a hat", think: bool = True) -> ComparisonInput:
    """The question about some pictures, or about the first of them, as the profile asks."""
    features = [vlm.features.get(picture(seed, SIZES[seed % len(SIZES)])) for seed in images[: vlm.profile.images]]
    return vlm.input_of(features, prompt, "choice", think and vlm.profile.thinks)


def follow(vlm: VLM, monkeypatch: pytest.MonkeyPatch, script: Sequence[str | int]) -> Callable[[int], np.ndarray]:
    """Let a model write a text's tokens, each by some 50 %; behind the script the completion ends.

    A text in the script is its tokens, a number that of a token. Returns the probabilities (V,) of the k-th call of the
    head: that after the question gives the first token, and one after what leads to an answer gives the answer. The
    other half differs from call to call.
    """
    tokenizer, calls = vlm.tokenizer, [0]
    tokens = [t for each in script for t in (tokenizer.encode_template_text(each) if isinstance(each, str) else [each])]
    tokens.append(min(vlm.eos_ids))

    def probabilities(call: int) -> np.ndarray:
        p = np.random.default_rng(call).random(len(tokenizer.vocabulary)) ** 8
        p /= 2 * p.sum()
        p[tokens[min(call, len(tokens) - 1)]] += 0.5
        return p

    def head(states: mx.array) -> mx.array:
        logits = mx.log(mx.array(probabilities(calls[0]).astype(np.float32)))
        calls[0] += 1
        return mx.broadcast_to(logits, (*states.shape[:-1], len(logits)))

    monkeypatch.setattr(vlm, "head", head)
    return probabilities


def model(profile: str, **changes: Any) -> VLM:
    """A tiny model that is asked by a built-in profile, or one like it."""
    found = built_in_profiles()[profile]
    if found.tie_opening:
        changes = {"tie_opening": (TIE_WORD,)} | changes
    return asked_by(tiny_model("qwen3_vl"), replace(found, **changes))


def write(vlm: VLM, think: bool = True, prefill: Any = None, **sampling: Any) -> Rollout:
    """One completion of a question."""
    asked = question(vlm, (0, 1), think=think)
    return roll_out(vlm, [asked], Sampling(**{"max_tokens": 400} | sampling), [(0,)], prefill=prefill)[0][0]


def count(vlm: VLM, *texts: str) -> int:
    """The number of tokens of texts that are written or appended one after the other."""
    return sum(len(vlm.tokenizer.encode_template_text(text)) for text in texts)


def masses(vlm: VLM, p: np.ndarray) -> list[float]:
    """The probabilities of the labels among those of all tokens."""
    return [float(p[list(ids)].sum()) for ids in vlm.tokenizer.label_ids]
