"""Tiny models that are asked by a profile, and heads that write a script."""

from collections.abc import Callable, Sequence
from copy import copy

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.engine.profile import Profile, built_in_profiles
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.engine.vlm import VLM, ComparisonInput
from tests.conftest import picture, tiny_model

SIZES = ((84, 84), (140, 84), (56, 112), (84, 84))
NAMES = tuple(built_in_profiles())


def asked_by(vlm: VLM, profile: Profile | str) -> VLM:
    """The same model, asked by another profile."""
    other = copy(vlm)
    other.__dict__.pop("_label_rows", None)
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
