"""The prefix tree: what is shared runs once, and nothing that is read or written changes by it."""

from collections.abc import Sequence
from itertools import permutations

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.engine.completion import Sampling
from mlxpref.engine.decoder import Block
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.rollout import roll_out
from mlxpref.engine.vlm import VLM, ComparisonInput, TokenSegment
from tests.conftest import append_block, picture
from tests.tolerance import PROBABILITY

SIZES = [(84, 84), (140, 84), (56, 112), (84, 84)]


def comparisons(vlm: VLM, think: bool = False, prompt: str = "a hat") -> list[ComparisonInput]:
    """All ordered pairs of pictures of several sizes."""
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    return [vlm.input(a, b, prompt, "choice", think) for a, b in permutations(pictures, 2)]


def whole(vlm: VLM, prompts: list[ComparisonInput]) -> np.ndarray:
    """The probabilities (B, V) after each prompt, run alone and as a whole."""
    return np.stack([np.array(mx.softmax(vlm.prefill([prompt])[1][0])) for prompt in prompts])


def test_probabilities_equal_whole_comparisons(tiny_vlm: VLM) -> None:
    prompts = comparisons(tiny_vlm) + comparisons(tiny_vlm, prompt="two boats in the fog, at night")
    assert len({len(prompt) for prompt in prompts}) > 3
    tree = PrefixCache(tiny_vlm)
    for batch in (prompts[:5], prompts[5:17], prompts[17:], prompts[3:4]):
        _, logits = tree.prefill(batch)
        assert np.abs(np.array(mx.softmax(logits, axis=-1)) - whole(tiny_vlm, batch)).max() < PROBABILITY


@pytest.fixture
def ran(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model runs, call by call."""
    tokens: list[int] = []
    block = tiny_vlm.block

    def counting(segments: Sequence[TokenSegment]) -> Block:
        tokens.append(sum(map(len, segments)))
        return block(segments)

    monkeypatch.setattr(tiny_vlm, "block", counting)
    return tokens


def test_shared_prefix_runs_once(tiny_vlm: VLM, ran: list[int]) -> None:
    inputs = comparisons(tiny_vlm)
    cache = PrefixCache(tiny_vlm)
    for start in range(0, len(inputs), 5):
        cache.prefill(inputs[start : start + 5])
    parts = [each.parts for each in inputs]
    firsts = {id(part[1].images[0]): len(part[1]) for part in parts}
    assert len(firsts) == len(SIZES)
    assert sum(ran) == len(parts[0][0]) + sum(firsts.values()) + sum(len(part[2]) for part in parts)
    assert [sum(map(len, part)) for part in parts] == [len(each) for each in inputs]


def test_evicted_prefix_runs_again(tiny_vlm: VLM, ran: list[int]) -> None:
    inputs = comparisons(tiny_vlm)
    roomy, narrow = PrefixCache(tiny_vlm), PrefixCache(tiny_vlm, memory=1)
    expected = [roomy.prefill([each])[1] for each in inputs]
    once = sum(ran)
    for each, logits in zip(inputs, expected, strict=True):
        result = narrow.prefill([each])[1]
        assert np.abs(np.array(mx.softmax(result) - mx.softmax(logits))).max() < PROBABILITY
    assert sum(ran) > 2 * once


def test_equal_texts_of_different_images_differ(tiny_vlm: VLM) -> None:
    tree = PrefixCache(tiny_vlm)
    first = tiny_vlm.input(picture(1), picture(3), "a hat", "choice", False)
    second = tiny_vlm.input(picture(2), picture(3), "a hat", "choice", False)
    assert first.ids.tolist() == second.ids.tolist()
    logits = [tree.prefill([prompt])[1] for prompt in (first, second)]
    result = np.concatenate([np.array(mx.softmax(each, axis=-1)) for each in logits])
    assert np.abs(result - whole(tiny_vlm, [first, second])).max() < PROBABILITY
    assert np.abs(result[0] - result[1]).max() > PROBABILITY


def test_decoding_continues_behind_the_cache(tiny_vlm: VLM) -> None:
    prompts = comparisons(tiny_vlm, think=True)
    tokens = np.random.default_rng(0).integers(5, 200, (len(prompts), 3)).astype(np.int32)
    starts = np.array([prompt.next_position for prompt in prompts])
    cache, _ = PrefixCache(tiny_vlm).prefill(prompts)
    expected, _ = tiny_vlm.prefill(prompts)
    difference = mx.softmax(append_block(tiny_vlm, cache, tokens, starts), axis=-1) - mx.softmax(
        append_block(tiny_vlm, expected, tokens, starts), axis=-1
    )
    assert np.abs(np.array(difference)).max() < PROBABILITY


@pytest.mark.parametrize("samples", [1, 3])
def test_rollouts_are_equal(tiny_vlm: VLM, samples: int) -> None:
    prompts = comparisons(tiny_vlm, think=True)[:5]
    sampling = Sampling(samples=samples, temperature=1.0, max_tokens=10)
    keys = [(i, 7) for i in range(5)]  # no draw of theirs lies so near a boundary that rounding decides
    expected = roll_out(tiny_vlm, prompts, sampling, keys)
    result = roll_out(tiny_vlm, prompts, sampling, keys, rows=2 * samples, prefill=PrefixCache(tiny_vlm).prefill)
    assert [[r.tokens for r in group] for group in result] == [[r.tokens for r in group] for group in expected]
