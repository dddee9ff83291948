"""Scoring: the shared comparison gives what full sequences give, values and gradients, and gradients reach it."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.checkpoints import bounds
from mlxpref.engine import logprobs as scoring
from mlxpref.engine.logprobs import Completions, completion_logprobs, prefill
from mlxpref.engine.lora import adapter_off, adapter_weights, attach_lora, lora_targets
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm
from tests.conftest import GOLDEN, hidden_states, picture
from tests.tolerance import tolerance

GROUP = 3


def material(vlm: VLM) -> tuple[list[ComparisonInput], Completions]:
    """Three comparisons of different lengths, with completions of different lengths."""
    sizes = [(84, 84), (140, 84), (56, 112)]
    inputs = [
        vlm.input(picture(i, s), picture(i + 9, sizes[0]), f"{i} hats", "choice", True) for i, s in enumerate(sizes)
    ]
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 200, length).tolist() for length in (5, 2, 7, 1, 6, 3, 4, 7, 2)]
    return inputs, Completions.of(rows)


def full_sequence(vlm: VLM, comparison: ComparisonInput, tokens: list[int]) -> tuple[mx.array, mx.array]:
    """Log-probabilities and label log-probabilities by one forward over comparison and completion together."""
    following = np.broadcast_to(comparison.next_position + np.arange(len(tokens)), (3, len(tokens)))
    positions = np.concatenate([comparison.positions, following], axis=1).astype(np.int32)
    ids = np.concatenate([comparison.ids, np.array(tokens, np.int32)])
    hidden = hidden_states(vlm, [ComparisonInput(ids, positions, comparison.images, 0)])
    logits = vlm.head(hidden)[0, len(comparison) - 1 :]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    labels = mx.stack([mx.logsumexp(logprobs[-1, mx.array(ids)]) for ids in vlm.tokenizer.label_ids])
    return logprobs[mx.arange(len(tokens)), mx.array(tokens)], labels


def losses(vlm: VLM) -> tuple[Any, Any]:
    """The same weighted sum of log-probabilities, by the shared comparison and by full sequences."""
    inputs, completions = material(vlm)
    weights = np.random.default_rng(1).normal(size=completions.tokens.shape) * completions.mask

    def shared(_: Any) -> mx.array:
        scores = completion_logprobs(vlm, prefill(vlm, inputs), completions)
        return (scores.logprobs * mx.array(weights.astype(np.float32))).sum() + scores.label_logprobs.sum()

    def full(_: Any) -> mx.array:
        total = mx.array(0.0)
        for row, length in enumerate(completions.lengths):
            tokens = completions.tokens[row, :length].tolist()
            logprobs, labels = full_sequence(vlm, inputs[row // GROUP], tokens)
            total = total + (logprobs * mx.array(weights[row, :length].astype(np.float32))).sum() + labels.sum()
        return total

    return shared, full


def assert_equal_gradients(actual: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Equal but for the order of additions, of which the largest gradient has as many as there are tokens."""
    allowed = max(tolerance(weight, 512, layers=4) for weight in expected.values())
    for name, weight in expected.items():
        assert mx.abs(actual[name] - weight).max().item() < allowed, name


def test_sharing_keeps_values_and_gradients(trained: VLM) -> None:
    results = [nn.value_and_grad(trained.model, loss)(trained.model) for loss in losses(trained)]
    (value, gradient), (expected, expected_gradient) = results
    assert value.item() == pytest.approx(expected.item(), abs=tolerance(expected, 512, layers=4))
    ours, theirs = dict(tree_flatten(gradient)), dict(tree_flatten(expected_gradient))
    assert set(ours) == set(adapter_weights(trained.model))
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_exist_in_chunks_only(gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, chunk = 4096, 128
    monkeypatch.setattr(bounds, "HEAD_LOGITS", vocabulary * chunk)
    weight = mx.random.normal((vocabulary, 32))
    model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    vlm: Any = SimpleNamespace(head=lambda states: states @ weight.T, decoder=model)

    def total(states: mx.array, targets: mx.array) -> mx.array:
        return scoring.chunked_logprobs(vlm, states, targets, 1.0).sum()

    peaks = []
    for count in (8 * chunk, 32 * chunk):
        states, targets = mx.random.normal((count, 32)), mx.zeros(count, mx.int32)
        mx.eval(weight, states, targets)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(total)(states, targets) if gradient else total(states, targets))
        peaks.append((mx.get_peak_memory() - before) / (4 * vocabulary * chunk))
    assert max(peaks) < 7.5, "chunks of logits"
    assert peaks[1] < 1.2 * peaks[0]


def test_a_chunk_after_an_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "HEAD_LOGITS", 8 * 4)
    weight = mx.concatenate([mx.array([-mx.inf]), mx.zeros(7)])
    model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=mx.zeros((8, 2))))
    vlm: Any = SimpleNamespace(head=lambda states: states.sum(1, keepdims=True) * 0 + weight, decoder=model)
    targets = mx.array([0] + 7 * [1])
    actual = np.array(scoring.chunked_logprobs(vlm, mx.ones((8, 2)), targets, 1.0))
    assert actual[0] == -np.inf
    np.testing.assert_allclose(actual[1:], -np.log(7), rtol=1e-5)


def test_long_block_in_pieces(trained: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "TARGET_TOKENS", 40)
    monkeypatch.setattr(bounds, "MIN_COLUMNS", 40)
    inputs, _ = material(trained)
    assert min(map(len, inputs)) > 2 * 40
    test_sharing_keeps_values_and_gradients(trained)


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_recomputing_takes_less_memory(trained: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "HEAD_LOGITS", 1 << 16)
    trained.decoder.layers *= 4  # the checkpoint has too few for one layer to be little of the whole
    inputs, _ = material(trained)
    rows = np.random.default_rng(0).integers(5, 200, (3 * 8, 40)).tolist()
    completions = Completions.of(rows)
    actual, peaks = [], []
    for recompute in (True, False):

        def loss(_: Any, recompute: bool = recompute) -> mx.array:
            scores = completion_logprobs(trained, prefill(trained, inputs, recompute), completions, recompute=recompute)
            return scores.logprobs.mean() + scores.label_logprobs.mean()

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        value, gradient = nn.value_and_grad(trained.model, loss)(trained.model)
        mx.eval(value, gradient)
        peaks.append(mx.get_peak_memory() - before)
        actual.append(dict(tree_flatten(gradient)))
    assert_equal_gradients(actual[0], actual[1])
    assert peaks[0] < 0.6 * peaks[1]


@pytest.mark.parametrize(("family", "bits"), [("qwen2_vl", 8), ("qwen2_5_vl", 4), ("qwen3_vl", 4)])
def test_gradients_through_a_quantized_base(family: str, bits: int) -> None:
    vlm = load_vlm(GOLDEN / family, 512 * 512)
    nn.quantize(
        vlm.decoder.layers[0].mlp,
        group_size=32,
        bits=bits,
        class_predicate=lambda _, m: isinstance(m, nn.Linear),
    )
    attach_lora(vlm.model, lora_targets(vlm.model), rank=4, scale=2.0)
    mx.random.seed(1)
    weights = {n: 0.05 * mx.random.normal(w.shape) for n, w in adapter_weights(vlm.model).items()}
    vlm.model.load_weights(list(weights.items()), strict=False)
    test_sharing_keeps_values_and_gradients(vlm)


def test_gradients_reach_the_comparison(trained: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, _ = losses(trained)
    whole = dict(tree_flatten(nn.value_and_grad(trained.model, shared)(trained.model)[1]))
    whole_run = scoring.run_block

    def stopped(
        decoder: Any, block: Any, prefixes: Any = (), recompute: bool = True, last_positions: Any = None
    ) -> Any:
        states, layers = whole_run(decoder, block, prefixes, recompute, last_positions)
        if not prefixes:
            return mx.stop_gradient(states), [(mx.stop_gradient(k), mx.stop_gradient(v)) for k, v in layers]
        return states, layers

    monkeypatch.setattr(scoring, "run_block", stopped)
    cut = dict(tree_flatten(nn.value_and_grad(trained.model, shared)(trained.model)[1]))
    difference = sum(mx.abs(whole[n] - cut[n]).sum().item() for n in whole)
    assert difference > 0.1 * sum(mx.abs(w).sum().item() for w in whole.values())


def test_labels_are_read_after_the_last_token(trained: VLM) -> None:
    inputs, completions = material(trained)
    scores = completion_logprobs(trained, prefill(trained, inputs), completions)
    for row, length in enumerate(completions.lengths):
        _, labels = full_sequence(trained, inputs[row // GROUP], completions.tokens[row, :length].tolist())
        assert mx.abs(scores.label_logprobs[row] - labels).max().item() < 1e-4


def test_answers_without_completions(trained: VLM) -> None:
    inputs = [trained.input(picture(1), picture(2), "a hat", "choice", think=False)]
    scores = completion_logprobs(trained, prefill(trained, inputs), Completions.of([[]]))
    assert scores.logprobs.shape == (1, 0)
    _, logits = trained.prefill(inputs)
    expected = [mx.softmax(logits[0])[mx.array(ids)].sum().item() for ids in trained.tokenizer.label_ids]
    assert mx.exp(scores.label_logprobs[0]).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_reference_is_the_base(trained: VLM, family: str) -> None:
    base = load_vlm(GOLDEN / family, 512 * 512)
    inputs, completions = material(base)
    expected = completion_logprobs(base, prefill(base, inputs), completions).logprobs
    ours, _ = material(trained)
    on = completion_logprobs(trained, prefill(trained, ours), completions).logprobs
    with adapter_off(trained.model):
        off = completion_logprobs(trained, prefill(trained, ours), completions).logprobs
        mx.eval(off)
    mask = mx.array(completions.mask)
    assert mx.abs(mx.where(mask, off - expected, 0)).max().item() == 0
    assert mx.abs(mx.where(mask, on - expected, 0)).max().item() > 1e-3
    name = lora_targets(base.model)[0]
    adapted, plain = (dict(vlm.model.named_modules())[name] for vlm in (trained, base))
    compiled = mx.compile(lambda x: adapted(x), inputs=[trained.model.state])
    states = mx.random.normal((1, 2, base.model.config.text_config.hidden_size))
    with_adapter = compiled(states)
    with adapter_off(trained.model):
        without = compiled(states)
        mx.eval(without)
    assert mx.allclose(without, plain(states), atol=1e-5)
    assert mx.abs(with_adapter - without).max().item() > 1e-4
    assert mx.array_equal(compiled(states), with_adapter)


def test_divergence_at_the_answer_position(trained: VLM, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of both whole distributions, by full sequences; its gradient is that of the difference quotient."""
    monkeypatch.setattr(bounds, "HEAD_LOGITS", 2 * 512)  # in chunks
    base = load_vlm(GOLDEN / family, 512 * 512)
    inputs, completions = material(trained)
    with adapter_off(trained.model):
        reference = completion_logprobs(trained, prefill(trained, inputs), completions).answer_states
        mx.eval(reference)
    scores = completion_logprobs(trained, prefill(trained, inputs), completions, reference=reference)
    theirs, _ = material(base)
    for row, length in enumerate(completions.lengths):
        tokens = completions.tokens[row, :length].tolist()
        p, q = (
            mx.softmax(_last_logits(vlm, comparisons[row // GROUP], tokens))
            for vlm, comparisons in ((trained, inputs), (base, theirs))
        )
        p, q = (np.array(each, np.float64) for each in (p, q))
        expected = (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
        assert scores.answer_kl is not None
        assert scores.answer_kl[row].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert expected > 1e-4

    def divergence(states: mx.array) -> mx.array:
        return scoring._divergence(trained, states, reference).sum()

    states = scores.answer_states
    assert states is not None
    gradient, direction = mx.grad(divergence)(states), mx.random.normal(states.shape, key=mx.random.key(0))
    step = 1e-2
    quotient = (divergence(states + step * direction) - divergence(states - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(quotient.item(), rel=0.02)
    assert mx.abs(mx.grad(divergence)(reference)).max().item() < 1e-5


def _last_logits(vlm: VLM, comparison: ComparisonInput, tokens: list[int]) -> mx.array:
    following = np.broadcast_to(comparison.next_position + np.arange(len(tokens)), (3, len(tokens)))
    positions = np.concatenate([comparison.positions, following], axis=1).astype(np.int32)
    ids = np.concatenate([comparison.ids, np.array(tokens, np.int32)])
    return vlm.head(hidden_states(vlm, [ComparisonInput(ids, positions, comparison.images, 0)]))[0, -1]
