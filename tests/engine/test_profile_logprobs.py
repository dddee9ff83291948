"""Ties in training: their probabilities are those of the rollouts, and their gradient that of difference quotients."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxpref.engine.completion import Sampling
from mlxpref.engine.logprobs import Completions, completion_logprobs, prefill
from mlxpref.engine.profile import Profile, built_in_profiles
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm
from mlxpref.verdict import Verdict
from tests.conftest import FAMILIES, GOLDEN
from tests.engine.profile_models import TIE_WORD, asked_by, question

OPENING = replace(built_in_profiles()["unifiedreward-pair"], tie_opening=(TIE_WORD,))
LABEL = replace(built_in_profiles()["plain"], tie=("0",))
PLAIN = built_in_profiles()["plain"]
PROFILES = pytest.mark.parametrize("profile", [OPENING, LABEL, PLAIN], ids=["opening", "label", "none"])


def asked(vlm: VLM) -> list[ComparisonInput]:
    return [question(vlm, images, f"{len(images)} hats", think=False) for images in ((0, 1), (1, 2), (2, 0))]


def probabilities(verdict: Verdict) -> list[float]:
    ties = [verdict.p_label_tie] if verdict.p_label_tie else []
    return [verdict.p_label_first, verdict.p_label_second, *ties]


@PROFILES
def test_probabilities_at_once_are_those_of_the_rollouts(trained: VLM, profile: Profile) -> None:
    vlm = asked_by(trained, profile)
    inputs = asked(vlm)
    rollouts = roll_out(vlm, inputs, Sampling(), [(number,) for number in range(3)])
    lead = vlm.tokenizer.lead_ids
    assert bool(lead) is bool(profile.tie_opening)
    scores = completion_logprobs(vlm, prefill(vlm, inputs), Completions.of([[]] * 3, lead))
    found = np.exp(np.array(scores.label_logprobs))
    assert found.shape == (3, 2 + bool(profile.tie or profile.tie_opening))
    for row, (rollout,) in zip(found, rollouts, strict=True):
        assert row.tolist() == pytest.approx(probabilities(rollout.verdict), rel=1e-4)
    assert np.ptp(found, axis=0).min() > 1e-6, "three questions have three answers"
    assert scores.logprobs.shape[1] == len(lead)
    assert mx.abs(scores.logprobs).max().item() == 0 if lead else True, "what leads to an answer was not written"


@pytest.mark.parametrize("profile", [LABEL, PLAIN], ids=["label", "none"])
def test_probabilities_behind_reasons_are_those_of_the_rollouts(trained: VLM, profile: Profile) -> None:
    """Of completions out of tokens, which are led to their answer."""
    vlm = asked_by(trained, profile)
    vlm.eos_ids = frozenset()  # none ends by itself
    inputs = [question(vlm, images, "a hat") for images in ((0, 1), (1, 2), (2, 0))]
    sampling = Sampling(samples=2, temperature=1.0, max_tokens=4)
    groups = roll_out(vlm, inputs, sampling, [(number,) for number in range(3)])
    rollouts = [each for group in groups for each in group]
    assert all(each.verdict.closed for each in rollouts)
    completions = Completions.of([each.tokens for each in rollouts], vlm.tokenizer.closing_ids(False))
    scores = completion_logprobs(vlm, prefill(vlm, inputs), completions)
    for row, logprobs, rollout in zip(
        np.exp(np.array(scores.label_logprobs)), np.array(scores.logprobs), rollouts, strict=True
    ):
        assert row.tolist() == pytest.approx(probabilities(rollout.verdict), rel=1e-4)
        assert logprobs[:4].tolist() == pytest.approx(list(rollout.logprobs), abs=1e-4)
        assert not logprobs[4:].any()


@PROFILES
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith("_moe")])  # a router's choice jumps
def test_gradient_equals_the_difference_quotient(trained: VLM, profile: Profile) -> None:
    """Of a sum of all labels' log-probabilities, each with a weight of its own, in a direction of all weights."""
    vlm = asked_by(trained, profile)
    inputs = asked(vlm)
    completions = Completions.of([[]] * 3, vlm.tokenizer.lead_ids)
    columns = 2 + bool(profile.tie or profile.tie_opening)
    weights = mx.array(np.random.default_rng(0).normal(size=(3, columns)).astype(np.float32))

    def loss(_: Any) -> mx.array:
        scores = completion_logprobs(vlm, prefill(vlm, inputs), completions)
        return (weights * scores.label_logprobs).sum()

    _, gradient = nn.value_and_grad(vlm.model, loss)(vlm.model)
    rng = np.random.default_rng(1)
    direction = tree_map(lambda g: mx.array(rng.normal(size=g.shape).astype(np.float32)), gradient)
    slopes = zip(dict(tree_flatten(gradient)).values(), dict(tree_flatten(direction)).values(), strict=True)
    slope = sum((g * d).sum().item() for g, d in slopes)
    start = vlm.model.trainable_parameters()

    def moved(step: float) -> float:
        vlm.model.update(tree_map(lambda w, d: w + step * d, start, direction))
        return float(loss(None).item())

    near, far = ((moved(step) - moved(-step)) / (2 * step) for step in (2e-3, 4e-3))
    vlm.model.update(start)
    quotient = (4 * near - far) / 3  # without the error of the second order
    assert abs(quotient) > 1e-2
    assert slope == pytest.approx(quotient, rel=0.02)


def test_a_ties_share_is_taken_from_the_labels(trained: VLM) -> None:
    """The labels' probabilities behind the lead, as another profile without ties reads them, times what is left."""
    vlm = asked_by(trained, OPENING)
    without = asked_by(trained, replace(OPENING, tie_opening=()))
    scores = [
        np.exp(np.array(completion_logprobs(each, prefill(each, inputs), completions).label_logprobs))
        for each, inputs, completions in (
            (vlm, asked(vlm), Completions.of([[]] * 3, vlm.tokenizer.lead_ids)),
            (without, asked(without), Completions.of([[]] * 3)),
        )
    ]
    tie = scores[0][:, 2]
    assert tie.min() > 0
    np.testing.assert_allclose(scores[0][:, :2], scores[1] * (1 - tie[:, None]), rtol=1e-4)
    _, logits = vlm.prefill(asked(vlm))
    expected = np.array(mx.softmax(logits, axis=-1))[:, list(vlm.tokenizer.tie_opening_ids)].sum(axis=1)
    np.testing.assert_allclose(tie, expected, rtol=1e-4)


@pytest.mark.parametrize("profile", [OPENING, LABEL], ids=["opening", "label"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_half_precision_rounds_no_label_and_no_tie(family: str, profile: Profile) -> None:
    """Their logits are products in float32; others are rounded to the states' type."""
    vlm = load_vlm(GOLDEN / family, 512 * 512, mx.bfloat16, profile)
    states = mx.random.normal((3, vlm.model.config.text_config.hidden_size), key=mx.random.key(0)).astype(mx.bfloat16)
    tied = vlm.language_model.args.tie_word_embeddings
    rows = (vlm.decoder.embed_tokens if tied else vlm.language_model.lm_head).weight.astype(mx.float32)
    exact = np.array(states.astype(mx.float32)) @ np.array(rows).T
    ids = [i for variants in (*vlm.tokenizer.label_ids, vlm.tokenizer.tie_opening_ids) for i in variants]
    found = np.array(vlm.head(states))
    np.testing.assert_allclose(found[:, ids], exact[:, ids], rtol=1e-5, atol=1e-5)
    others = np.setdiff1d(np.arange(found.shape[1]), [*ids, *vlm.suppressed_ids])
    assert np.abs(found[:, others] - exact[:, others]).max() > 1e-3
