"""Rollouts: sampled log-probabilities equal recomputed ones, batches change nothing, every completion is read."""

import json
from copy import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlxpref.checkpoints import bounds
from mlxpref.engine.branched_cache import BranchedCache
from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.profile import Form, own_profile
from mlxpref.engine.reading import Reader
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.tokenizer import ComparisonTokenizer
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
        original = getattr(BranchedCache, name)

        def counted(cache: BranchedCache, kept: Any, name: str = name, original: Any = original) -> None:
            before = cache.branch_ids.shape
            original(cache, kept)
            dropped[name] += cache.branch_ids.shape != before

        monkeypatch.setattr(BranchedCache, name, counted)
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
    ids = (*rollout.tokens, *tiny_vlm.tokenizer.encode_template_text(own_profile().closing))
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


# blanks before the answer


def follow(vlm: VLM, monkeypatch: pytest.MonkeyPatch, script: list[int]) -> None:
    """Let the model write these tokens, each by 90 %; else the labels of the k-th position have k + 1 to 1."""
    calls = [0]
    first, second = (ids[0] for ids in vlm.tokenizer.label_ids)

    def head(states: mx.array) -> mx.array:
        wanted = script[min(calls[0], len(script) - 1)]
        p = np.full(len(vlm.tokenizer.vocabulary), 1e-9, np.float32)
        p[wanted] += 0.9
        p[first] += 0.01 * (calls[0] + 1)
        p[second] += 0.01
        calls[0] += 1
        return mx.broadcast_to(mx.log(mx.array(p)), (*states.shape[:-1], len(p)))

    monkeypatch.setattr(vlm, "head", head)


def joining(words: ComparisonTokenizer, left: str, right: str) -> ComparisonTokenizer:
    """The tokenizer with one more merge, whose token takes the place of another, as in Qwen's own vocabulary."""
    description = json.loads(words.hf_tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    gone = next(name for name in reversed(model["vocab"]) if len(name) > 3 and name.isalpha())
    model["vocab"][left + right] = model["vocab"].pop(gone)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [[left, right], *(merge for merge in merges if gone not in (*merge, "".join(merge)))]
    hf_tokenizer = copy(words.hf_tokenizer)
    hf_tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))
    image_token = words.hf_tokenizer.convert_tokens_to_ids(words.image_token)
    return ComparisonTokenizer(hf_tokenizer, image_token, own_profile())


@pytest.mark.parametrize("family", ["qwen3_vl"])
@pytest.mark.parametrize("until", ["answer", "end"])
@pytest.mark.parametrize("blanks", [0, 1, 3, 11])
@pytest.mark.parametrize("way", ["separate", "joined", "closed", "at once"])
def test_blanks_before_the_answer_belong_to_the_way_there(
    tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch, until: Any, blanks: int, way: str
) -> None:
    """The labels are read where the answer is written, whether the vocabulary joins `>` and a line feed or not."""
    words = tiny_vlm.tokenizer
    blank = next(iter(words.encode_template_text("\n")))
    assert blank in words.blank_ids
    lead = [*words.encode_template_text("a</think><answer>")]
    if way == "joined":
        monkeypatch.setattr(tiny_vlm, "tokenizer", words := joining(words, ">", "Ċ"))
        lead = [*words.encode_template_text("a</think><answer>\n")]
        assert len(lead) == len(words.encode_template_text("a</think><answer>"))
    script = [*([] if way == "at once" else lead), *[blank] * blanks, words.label_ids[0][0]]
    if way == "closed":
        lead = [*words.encode_template_text("a a")]
        script = [*lead, blank, *script[-1 - blanks :]]
    script += [*words.encode_template_text("</answer>"), *[min(tiny_vlm.eos_ids)] * 20]
    follow(tiny_vlm, monkeypatch, script)
    sampling = Sampling(max_tokens=len(lead) if way == "closed" else 40, until=until)
    inputs = inputs_of(tiny_vlm, 1, think=way != "at once")
    (rollout,) = roll_out(tiny_vlm, inputs, sampling, KEYS[:1])[0]
    steps = blanks + {"at once": 0, "closed": len(lead) + 1}.get(way, len(lead))
    if way == "closed" and blanks == 11:
        return  # more blanks than an answer may have tokens
    verdict = rollout.verdict
    assert verdict.p_first("soft") == pytest.approx((91 + steps) / (92 + steps), abs=1e-5)
    assert verdict.closed is (way == "closed")
    if until == "answer":
        assert len(rollout.tokens) == steps - (way == "closed")
        assert Reader(own_profile()).answer_number(verdict.text) == 0
    else:
        assert verdict.p_first("select") == 1


def test_sampled_readings_without_thinking_are_equal(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training a group without thinking has one rollout, whatever follows the lead-in."""
    blank = next(iter(tiny_vlm.tokenizer.encode_template_text("\n")))
    follow(tiny_vlm, monkeypatch, [blank] * 9)
    sampling = Sampling(samples=3, temperature=1.0)
    rollouts = roll_out(tiny_vlm, inputs_of(tiny_vlm, 1, think=False), sampling, KEYS[:1])[0]
    assert {rollout.tokens for rollout in rollouts} == {()}


# templates that begin the completion themselves

OPENINGS = ["", "<think>\n", "<think>\n\n</think>\n\n"]


@pytest.mark.parametrize("family", ["qwen3_vl"])
@pytest.mark.parametrize("ending", OPENINGS)
@pytest.mark.parametrize("think", [True, False])
def test_what_the_template_writes_belongs_to_the_form(
    tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch, ending: str, think: bool
) -> None:
    words = ComparisonTokenizer(copy(tiny_vlm.tokenizer.hf_tokenizer), tiny_vlm.image_token_id, own_profile())
    end = "assistant\n{% endif %}"
    assert words.hf_tokenizer.chat_template.endswith(end)
    words.hf_tokenizer.chat_template = words.hf_tokenizer.chat_template.replace(
        end, f"assistant\n{ending}{{% endif %}}"
    )
    monkeypatch.setattr(tiny_vlm, "tokenizer", words)
    inputs = inputs_of(tiny_vlm, 1, think=think)
    prompt = words.hf_tokenizer.decode(inputs[0].ids[inputs[0].cuts[1] :].tolist()).rpartition("assistant\n")[2]
    thought = "it shows the hat</think><answer>"
    written = "" if not think else thought if ending == OPENINGS[1] else "<think>" + thought
    follow(tiny_vlm, monkeypatch, [*words.encode_template_text(written + "1</answer>"), min(tiny_vlm.eos_ids)])
    (rollout,) = roll_out(tiny_vlm, inputs, Sampling(max_tokens=60, until="end"), KEYS[:1])[0]
    whole = prompt + written
    assert whole.count("<think>") == whole.count("</think>") == 1
    assert rollout.verdict.text == whole + "1</answer>"
    assert rollout.verdict.well_formed
    assert rollout.verdict.reasoning == ("it shows the hat" if think else "")
    assert rollout.verdict.p_first("select") == 1
    at_once, to_think = (words.comparison("a hat", "choice", each) for each in (False, True))
    assert at_once.texts[2] == to_think.texts[2] + words.at_once_ids
    assert Reader(own_profile()).answer_number(at_once.opening) == 0
