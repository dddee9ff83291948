"""Each profile's own cuts: what its questions share runs once, and nothing that is read changes by it."""

from collections.abc import Sequence
from itertools import permutations

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.engine.decoder import Block
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.vlm import VLM, ComparisonInput, TokenSegment
from tests.engine.profile_models import NAMES, SIZES, asked_by, question

PROMPTS = ("a hat", "two boats in the fog, at night")
IMAGES_FIRST = ("unifiedreward-think", "unifiedreward-flex", "unifiedreward-pair", "plain")


def questions(vlm: VLM, prompt: str, think: bool = False) -> list[ComparisonInput]:
    """All ordered pairs of pictures of several sizes, or all of these pictures."""
    shown = permutations(range(len(SIZES)), vlm.profile.images)
    return [question(vlm, images, prompt, think) for images in shown]


def whole(vlm: VLM, asked: Sequence[ComparisonInput]) -> np.ndarray:
    """The probabilities (B, V) after each question, run alone and as a whole."""
    return np.stack([np.array(mx.softmax(vlm.prefill([each])[1][0])) for each in asked])


@pytest.mark.parametrize("profile", NAMES)
@pytest.mark.parametrize("think", [False, True])
def test_probabilities_equal_whole_questions(tiny_vlm: VLM, profile: str, think: bool) -> None:
    vlm = asked_by(tiny_vlm, profile)
    asked = [each for prompt in PROMPTS for each in questions(vlm, prompt, think)]
    assert len({len(each) for each in asked}) > 3
    cache = PrefixCache(vlm)
    for start in range(0, len(asked), 5):
        batch = asked[start : start + 5]
        _, logits = cache.prefill(batch)
        assert logits.dtype == mx.float32
        difference = np.abs(np.array(mx.softmax(logits, axis=-1)) - whole(vlm, batch)).max()
        assert difference < 1e-5


def ran(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[TokenSegment]:
    """The segments that a model runs from now on."""
    segments: list[TokenSegment] = []
    block = vlm.block

    def counting(asked: Sequence[TokenSegment]) -> Block:
        segments.extend(asked)
        return block(asked)

    monkeypatch.setattr(vlm, "block", counting)
    return segments


def run_all(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> tuple[list[ComparisonInput], list[TokenSegment]]:
    """The questions of two prompts, and what runs for them."""
    asked = [each for prompt in PROMPTS for each in questions(vlm, prompt)]
    segments = ran(vlm, monkeypatch)
    cache = PrefixCache(vlm)
    for start in range(0, len(asked), 5):
        cache.prefill(asked[start : start + 5])
    return asked, segments


@pytest.mark.parametrize("profile", IMAGES_FIRST)
def test_a_first_image_runs_once_for_all_opponents_and_prompts(
    tiny_vlm: VLM, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = asked_by(tiny_vlm, profile)
    asked, segments = run_all(vlm, monkeypatch)
    rests = [each.parts[2] for each in asked]
    assert all(PROMPTS[number // (len(asked) // 2)] in decoded(vlm, rest) for number, rest in enumerate(rests))
    firsts = [each for each in segments if len(each.images) == 1 and not is_rest(vlm, each)]
    assert len(firsts) == len(SIZES)
    assert len({id(each.images[0]) for each in firsts}) == len(SIZES)
    instruction = len(asked[0].parts[0])
    assert sum(map(len, segments)) == instruction + sum(map(len, firsts)) + sum(map(len, rests))


def test_our_own_instruction_and_prompt_run_once_for_all_images(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = asked_by(tiny_vlm, "mlxpref")
    asked, segments = run_all(vlm, monkeypatch)
    instructions = [each for each in segments if not each.images]
    assert [prompt in decoded(vlm, each) for prompt, each in zip(PROMPTS, instructions, strict=True)] == [True, True]
    firsts = [each for each in segments if len(each.images) == 1 and not is_rest(vlm, each)]
    assert len(firsts) == len(SIZES) * len(PROMPTS)
    total = sum(map(len, [*instructions, *firsts, *(each.parts[2] for each in asked)]))
    assert sum(map(len, segments)) == total


def test_a_single_images_prompt_runs_once_for_all_images(tiny_vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = asked_by(tiny_vlm, "rationalrewards")
    asked, segments = run_all(vlm, monkeypatch)
    starts = [each for each in segments if not each.images and any(prompt in decoded(vlm, each) for prompt in PROMPTS)]
    assert len(starts) == len(PROMPTS)
    assert sum(bool(each.images) for each in segments) == len(asked) == len(SIZES) * len(PROMPTS)


def decoded(vlm: VLM, segment: TokenSegment) -> str:
    return str(vlm.tokenizer.hf_tokenizer.decode(segment.ids.tolist()))


def is_rest(vlm: VLM, segment: TokenSegment) -> bool:
    """Whether a segment goes to the end of a question."""
    return "assistant" in decoded(vlm, segment)
