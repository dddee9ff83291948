"""Rollouts: sampled log-probabilities equal recomputed ones, batches change nothing, every completion is read."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.checkpoints import bounds
from mlxpref.engine.kv_cache import BranchedKVCache
from mlxpref.engine.rollout import Rollout, Sampling, roll_out
from mlxpref.engine.template import CLOSING, Form
from mlxpref.engine.vlm import VLM, ComparisonInput
from tests.conftest import append_block, hidden_states, picture
from tests.tolerance import PROBABILITY

KEYS = [(i,) for i in range(5)]


def inputs_of(vlm: VLM, count: int = 5, form: Form = "choice", think: bool = True) -> list[ComparisonInput]:
    sizes = [(84, 84), (140, 84), (56, 112)]
    return [
        vlm.input(picture(i, sizes[i % 3]), picture(i + 50, sizes[i % 2]), f"a {i} hat", form, think)
        for i in range(count)
    ]


def recomputed_logprobs(
    vlm: VLM, comparison: ComparisonInput, tokens: tuple[int, ...], temperature: float
) -> np.ndarray:
    """The log-probabilities of tokens by one forward over comparison and completion together."""
    following = np.broadcast_to(comparison.next_position + np.arange(len(tokens)), (3, len(tokens)))
    positions = np.concatenate([comparison.positions, following], axis=1)
    ids = np.concatenate([comparison.ids, np.array(tokens, np.int32)])
    hidden = hidden_states(vlm, [ComparisonInput(ids, positions.astype(np.int32), comparison.images, 0)])
    logits = vlm.head(hidden)[0, len(comparison) - 1 : -1] / (temperature or 1)
    logprobs = logits[mx.arange(len(tokens)), mx.array(tokens)] - mx.logsumexp(logits, axis=-1)
    return np.array(logprobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_sampled_logprobs_equal_recomputed_ones(tiny_vlm: VLM, temperature: float) -> None:
    inputs = inputs_of(tiny_vlm)
    sampling = Sampling(samples=2, temperature=temperature, max_tokens=6)
    for comparison, rollouts in zip(inputs, roll_out(tiny_vlm, inputs, sampling, KEYS[:5]), strict=True):
        for rollout in rollouts:
            tokens = rollout.tokens[: sampling.max_tokens]
            expected = recomputed_logprobs(tiny_vlm, comparison, tokens, temperature)
            assert np.abs(np.array(rollout.logprobs[: len(tokens)]) - expected).max() < 1e-4


def same(a: Rollout, b: Rollout) -> bool:
    return a.tokens == b.tokens and np.allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_samples_do_not_depend_on_the_batch(tiny_vlm: VLM) -> None:
    inputs = inputs_of(tiny_vlm)
    sampling = Sampling(samples=2, temperature=1.0, max_tokens=8, seed=3)
    together = roll_out(tiny_vlm, inputs, sampling, KEYS[:5])
    for key, comparison in enumerate(inputs):
        alone = roll_out(tiny_vlm, [comparison], sampling, [KEYS[key]])[0]
        assert all(same(a, b) for a, b in zip(alone, together[key], strict=True))


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_finished_completions_leave_the_batch(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished branches and rows are dropped, and columns that no branch sees any more."""
    monkeypatch.setattr(tiny_vlm, "eos_ids", frozenset(range(0, 350, 12)))
    monkeypatch.setattr("mlxpref.checkpoints.bounds.row_copies", lambda *_: 1)
    dropped = {"select_rows": 0, "drop_branches": 0}
    for name in dropped:
        original = getattr(BranchedKVCache, name)

        def counted(cache: BranchedKVCache, kept: Any, name: str = name, original: Any = original) -> None:
            before = cache.branch_ids.shape
            original(cache, kept)
            dropped[name] += cache.branch_ids.shape != before

        monkeypatch.setattr(BranchedKVCache, name, counted)
    inputs = inputs_of(tiny_vlm)
    sampling = Sampling(samples=16, temperature=1.0, max_tokens=60, seed=1, close=False)
    together = roll_out(tiny_vlm, inputs, sampling, KEYS[:5])
    lengths = [len(one.tokens) for group in together for one in group]
    assert len(set(lengths)) > 10
    assert min(dropped.values()) > 0, dropped
    monkeypatch.undo()
    monkeypatch.setattr(tiny_vlm, "eos_ids", frozenset(range(0, 350, 12)))
    assert bounds.row_copies(min(map(len, inputs)), 60, 16) > 1
    for key, (comparison, group) in enumerate(zip(inputs, together, strict=True)):
        alone = roll_out(tiny_vlm, [comparison], sampling, [KEYS[key]], rows=1)[0]
        assert all(same(a, b) for a, b in zip(alone, group, strict=True))
        for one in group[::4]:
            expected = recomputed_logprobs(tiny_vlm, comparison, one.tokens, 1.0)
            assert np.abs(np.array(one.logprobs) - expected).max() < 1e-4


def test_samples_differ_by_seed_key_and_number(tiny_vlm: VLM) -> None:
    comparison = inputs_of(tiny_vlm, 1)[0]

    def tokens(seed: int, key: int) -> list[tuple[int, ...]]:
        sampling = Sampling(samples=4, temperature=1.0, max_tokens=8, seed=seed)
        return [rollout.tokens for rollout in roll_out(tiny_vlm, [comparison], sampling, [KEYS[key]])[0]]

    assert len(set(tokens(0, 0))) == 4
    assert tokens(0, 0) == tokens(0, 0)
    assert set(tokens(0, 0)).isdisjoint(tokens(1, 0))
    assert set(tokens(0, 0)).isdisjoint(tokens(0, 1))


@pytest.mark.parametrize("family", ["qwen2_vl"])
def test_tokens_are_drawn_by_their_probability(tiny_vlm: VLM) -> None:
    """1,000 first tokens against the distribution they come from, by the chi-square statistic's own spread."""
    comparison = inputs_of(tiny_vlm, 1)[0]
    _, logits = tiny_vlm.prefill([comparison])
    p = np.array(mx.softmax(logits[0], axis=-1), np.float64)
    sampling = Sampling(samples=1000, temperature=1.0, max_tokens=1, until="answer")
    tokens = np.array([rollout.tokens[0] for rollout in roll_out(tiny_vlm, [comparison], sampling, KEYS[:1])[0]])
    likely = np.argsort(-p)[:8]
    counts = np.array([(tokens == token).sum() for token in likely] + [(~np.isin(tokens, likely)).sum()])
    expected = 1000 * np.append(p[likely], 1 - p[likely].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 30  # eight degrees of freedom: 26 is passed once in a thousand
    assert not set(tokens.tolist()) & set(tiny_vlm.suppressed_ids)


def test_vision_tokens_are_never_sampled(tiny_vlm: VLM) -> None:
    sampling = Sampling(samples=8, temperature=50.0, max_tokens=12)
    rollouts = roll_out(tiny_vlm, inputs_of(tiny_vlm, 3), sampling, KEYS[:3])
    tokens = {token for group in rollouts for rollout in group for token in rollout.tokens}
    assert len(tokens) > 100
    assert not tokens & set(tiny_vlm.suppressed_ids)


def test_completion_out_of_tokens_is_closed(tiny_vlm: VLM) -> None:
    for form, until in (("choice", "answer"), ("choice", "end"), ("scores", "end")):
        sampling = Sampling(max_tokens=3, until=until)  # type: ignore[arg-type]
        for (rollout,) in roll_out(tiny_vlm, inputs_of(tiny_vlm, form=form), sampling, KEYS[:5]):  # type: ignore[arg-type]
            if len(rollout.tokens) < 3:
                continue  # it ended by itself
            assert rollout.verdict.closed
            assert "</think><answer>" in rollout.verdict.text
            assert 0 < rollout.verdict.label_mass <= 1


def test_closing_equals_a_full_forward(tiny_vlm: VLM) -> None:
    comparison = inputs_of(tiny_vlm, 1)[0]
    (rollout,) = roll_out(tiny_vlm, [comparison], Sampling(max_tokens=2), KEYS[:1])[0]
    ids = (*rollout.tokens, *tiny_vlm.tokenizer.encode_template_text(CLOSING))
    cache, _ = tiny_vlm.prefill([comparison])
    logits = append_block(tiny_vlm, cache, np.array([ids], np.int32), np.array([comparison.next_position]))[0, -1]
    p = np.array(mx.softmax(logits))
    first, second = (p[list(ids)].sum() for ids in tiny_vlm.tokenizer.label_ids)
    assert rollout.verdict.p_label_first == pytest.approx(first, abs=PROBABILITY)
    assert rollout.verdict.p_label_second == pytest.approx(second, abs=PROBABILITY)


def test_no_thinking_decodes_nothing(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a decoding step")

    monkeypatch.setattr(tiny_vlm, "extend", refuse)
    for (rollout,) in roll_out(tiny_vlm, inputs_of(tiny_vlm, think=False), Sampling(), KEYS[:5]):
        assert rollout.tokens == ()
        assert rollout.verdict.label_mass > 0
        assert not rollout.verdict.closed
