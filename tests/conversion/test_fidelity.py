"""Fidelity: numbers against an independent computation, zero for the same model, worse with every bit that is lost."""

import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from scipy.special import expit

from mlxpref.conversion.fidelity import (
    COMPLETION_TOKENS,
    Answers,
    Fidelity,
    answers_of,
    built_in_comparisons,
    comparisons_of,
    fidelity_of,
)
from mlxpref.demo import JUDGE
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import DataError
from mlxpref.preferences import Comparison, Preference
from tests.conftest import FAMILIES, GOLDEN, append_block, hidden_states, picture

COMPARISONS = built_in_comparisons()


@cache
def reference(folder: Path) -> Answers:
    return answers_of(load_vlm(folder, 512 * 512), COMPARISONS)


def rounded(folder: Path, bits: int) -> VLM:
    """A model whose language layers went through a quantization, as floats again: quick on a CPU."""
    vlm = load_vlm(folder, 512 * 512)
    for _, layer in vlm.language_model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight = mx.dequantize(*mx.quantize(layer.weight, 32, bits), group_size=32, bits=bits)
    return vlm


def answers(logits: np.ndarray, labels: np.ndarray, tokens: list[list[float]]) -> Answers:
    completions = tuple(tuple(range(len(row))) for row in tokens)
    rows = tuple(np.array(row, np.float32) for row in tokens)
    p_first = expit(labels[:, 0] - labels[:, 1])
    return Answers(logits.astype(np.float32), labels, p_first, completions, rows, ((1, 2),) * len(logits))


def test_numbers_by_hand() -> None:
    from scipy.special import log_softmax, rel_entr, softmax

    rng = np.random.default_rng(0)
    first, second = (4 * rng.standard_normal((5, 300)).astype(np.float32) for _ in range(2))
    first[:, 7] = second[:, 7] = -np.inf
    labels = [log_softmax(x.astype(np.float64), axis=-1)[:, [10, 20]] for x in (first, second)]
    tokens: list[list[list[float]]] = [
        [[-0.5, -1.0], [-2.0], [], [-0.25], [-3.0]],
        [[-0.5, -1.5], [-4.0], [], [0.0], [-3.0]],
    ]
    fidelity = fidelity_of(*(answers(x, y, z) for x, y, z in zip((first, second), labels, tokens, strict=True)))
    p, q = (softmax(x.astype(np.float64), axis=-1) for x in (first, second))
    kl = rel_entr(p, q).sum(axis=-1)
    assert fidelity.kl_answer == pytest.approx(kl.mean(), rel=1e-9)
    assert fidelity.kl_answer_max == pytest.approx(kl.max(), rel=1e-9)
    p_first = [x[:, 10] / (x[:, 10] + x[:, 20]) for x in (p, q)]
    assert fidelity.p_first_difference == pytest.approx(np.abs(p_first[0] - p_first[1]).mean(), rel=1e-9)
    assert fidelity.agreement == ((p_first[0] > 0.5) == (p_first[1] > 0.5)).mean()
    assert 0 < fidelity.agreement < 1
    assert fidelity.label_logprob_difference == pytest.approx(np.abs(labels[0] - labels[1]).mean())
    assert fidelity.label_logprob_difference_max == pytest.approx(np.abs(labels[0] - labels[1]).max())
    assert fidelity.token_logprob_difference == pytest.approx((0 + 0.5 + 2 + 0.25 + 0) / 5)
    assert (fidelity.comparisons, fidelity.tokens) == (5, 5)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5, 0.0])
def test_small_divergences(size: float) -> None:
    """To second order, KL = Var_p[log q - log p] / 2: a sum whose terms cancel would be noise here."""
    rng = np.random.default_rng(1)
    logits, moved = rng.standard_normal((3, 5000)).astype(np.float32), rng.standard_normal((3, 5000))
    other = (logits + size * moved).astype(np.float32)
    d = other.astype(np.float64) - logits
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    expected = ((p * d**2).sum(-1) - (p * d).sum(-1) ** 2).mean() / 2
    labels = np.zeros((3, 2))
    fidelity = fidelity_of(answers(logits, labels, [[]] * 3), answers(other, labels, [[]] * 3)).kl_answer
    assert fidelity == pytest.approx(expected, rel=max(size, 1e-4), abs=0)
    assert (fidelity > 0) == (size > 0)


def test_impossible_tokens() -> None:
    """Log-probabilities beyond what a float can raise e to."""
    one, other = np.array([[0.0, -2000.0, 5.0]]), np.array([[5.0, 0.0, -2000.0]])
    fidelity = fidelity_of(answers(one, np.zeros((1, 2)), [[]]), answers(other, np.zeros((1, 2)), [[]]))
    assert fidelity.kl_answer == pytest.approx(2005 * math.exp(5) / (1 + math.exp(5)), rel=1e-2)


@pytest.mark.parametrize("folder", [JUDGE, *(GOLDEN / name for name in FAMILIES)])
def test_fewer_bits_are_less_exact(folder: Path) -> None:
    before = reference(folder)
    assert before.finite
    same = fidelity_of(before, answers_of(load_vlm(folder, 512 * 512), COMPARISONS, before.completions))
    assert same == Fidelity(len(COMPARISONS), 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, sum(map(len, before.completions)))
    fidelities = [
        fidelity_of(before, answers_of(rounded(folder, bits), COMPARISONS, before.completions)) for bits in (8, 6, 4, 2)
    ]
    for name in ("kl_answer", "kl_answer_max", "token_logprob_difference"):
        values = [getattr(each, name) for each in fidelities]
        assert values == sorted(values), name
    for name in ("kl_answer", "p_first_difference", "label_logprob_difference", "token_logprob_difference"):
        assert 0 < 10 * getattr(fidelities[0], name) < getattr(fidelities[-1], name), name
    assert fidelities[0].agreement >= max(0.9, fidelities[-1].agreement)


def test_answers_against_plain_forwards(tiny_vlm: VLM) -> None:
    """Against plain forwards of whole rows, one comparison at a time."""
    comparisons = [
        Comparison(picture(1), picture(2, (112, 84)), "a hat"),
        Comparison(picture(3), picture(1), "two cats on a mat"),
    ]
    answers = answers_of(tiny_vlm, comparisons)
    for i, comparison in enumerate(comparisons):
        first, second, text = comparison.first, comparison.second, comparison.prompt
        prompt = tiny_vlm.input(first, second, text, "choice", think=False)
        hidden = hidden_states(tiny_vlm, [prompt])
        logits = np.array(tiny_vlm.head(hidden[:, -1]))[0].astype(np.float64)
        assert np.allclose(logits, answers.logits[i], rtol=0, atol=1e-4)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        masses = [probabilities[list(ids)].sum() for ids in tiny_vlm.tokenizer.label_ids]
        assert answers.label_logprobs[i] == pytest.approx(np.log(masses), abs=1e-4)
        assert answers.p_first[i] == pytest.approx(masses[0] / sum(masses), abs=1e-4)
        tokens = np.array(answers.completions[i])
        assert 0 < len(tokens) <= COMPLETION_TOKENS + 8
        # Greedy by hand, all tokens at once behind the prompt.
        prompt = tiny_vlm.input(first, second, text, "choice", think=True)
        cache, start = tiny_vlm.prefill([prompt])
        after = append_block(tiny_vlm, cache, tokens[None], np.array([prompt.next_position]))[0]
        saying = mx.concatenate([start, after[:-1]]).astype(mx.float32)
        assert mx.argmax(saying, axis=-1).tolist() == tokens.tolist()
        logprobs = np.array(saying - mx.logsumexp(saying, axis=-1, keepdims=True))[np.arange(len(tokens)), tokens]
        assert answers.token_logprobs[i] == pytest.approx(logprobs, abs=1e-4)


def test_half_precision(tiny_vlm: VLM) -> None:
    """In bfloat16 numbers are finite and near, but not the same."""
    if tiny_vlm.checkpoint.family.name == "Qwen3-VL-MoE" and mx.default_device().type == mx.DeviceType.cpu:
        pytest.skip("MLX multiplies experts on a CPU in float32 only")
    before = answers_of(tiny_vlm, COMPARISONS[:2])
    half = answers_of(load_vlm(tiny_vlm.checkpoint, 512 * 512, mx.bfloat16), COMPARISONS[:2], before.completions)
    fidelity = fidelity_of(before, half)
    assert half.finite
    assert 0 < fidelity.kl_answer < 0.01


def test_answers_that_are_not_finite(tiny_vlm: VLM) -> None:
    broken = load_vlm(tiny_vlm.checkpoint, 512 * 512)
    broken.model.language_model.update(tree_map(lambda x: x * mx.nan, broken.model.language_model.parameters()))
    assert not answers_of(broken, COMPARISONS[:1], [()]).finite
    whole = answers_of(tiny_vlm, COMPARISONS[:1], [()])
    assert whole.finite
    assert not replace(whole, token_logprobs=(np.array([-np.inf], np.float32),)).finite


def test_answers_to_other_questions(tiny_vlm: VLM) -> None:
    one, other = (answers_of(tiny_vlm, COMPARISONS[i : i + 1], [(5, 6)]) for i in (0, 2))
    with pytest.raises(ValueError, match="other questions"):
        fidelity_of(one, other)
    with pytest.raises(ValueError, match="other completions"):
        fidelity_of(one, answers_of(tiny_vlm, COMPARISONS[:1], [(5, 7)]))


def test_built_in_comparisons() -> None:
    assert len(COMPARISONS) >= 16
    for one, other in zip(COMPARISONS[::2], COMPARISONS[1::2], strict=True):
        assert one == Comparison(other.second, other.first, other.prompt)
    assert built_in_comparisons() == COMPARISONS
    assert len({comparison.prompt for comparison in COMPARISONS}) > 4


def test_comparisons_of_preferences(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture(0).save(file)
    preferences = [Preference(str(i), file, picture(i), 1.0) for i in range(10)]
    comparisons = comparisons_of(preferences, limit=6)
    assert [comparison.prompt for comparison in comparisons] == ["0", "0", "3", "3", "6", "6"]
    assert [comparison.first == file for comparison in comparisons] == [True, False] * 3
    assert len(comparisons_of(preferences)) == 20
    assert len(comparisons_of(preferences[:1], limit=1)) == 2
    shutil.move(file, tmp_path / "b.png")
    with pytest.raises(DataError, match=r"a\.png"):
        comparisons_of(preferences)


@pytest.mark.parametrize(
    ("agreeing", "of", "doubted"),
    [(0, 16, True), (8, 16, True), (11, 16, True), (12, 16, False), (16, 16, False), (3, 4, True), (4, 4, False),
     (40, 64, False), (36, 64, True), (1, 1, False), (0, 1, True)],
)  # fmt: skip
def test_a_verdict_that_a_coin_gives_is_doubted(agreeing: int, of: int, doubted: bool) -> None:
    """At a share that 64 comparisons tell from chance, 16 do not."""
    fidelity = Fidelity(of, 0, 0, agreeing / of, 0, 0, 0, 0, 0)
    assert bool(fidelity.doubt) == doubted
    assert not doubted or f"{agreeing} of {of}" in str(fidelity.doubt)
