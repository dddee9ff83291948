"""Questions of every built-in profile are those that transformers makes of the same chat, token by token.

The golden ids are of transformers alone; see scripts/make_profile_golden.py, which makes them again where a profile or
a text was changed.
"""

import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlxpref.demo import JUDGE
from mlxpref.engine.profile import built_in_profiles
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ConfigError, ModelError
from tests.conftest import FAMILIES, GOLDEN, picture
from tests.engine.profile_texts import HOSTILE, PROMPTS, digest
from tests.engine.real_vocabulary import IDS, real_tokenizer

TOKENIZERS = (*FAMILIES, "demo", "qwen2_5", "qwen3")
IMAGE_TOKENS = (9, 6)
CRITERION = "the sharper eyes"


@cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a tiny family, of the demo judge, or with Qwen's real vocabulary."""
    if name in ("qwen2_5", "qwen3"):
        return real_tokenizer(thinks=name == "qwen3")
    return AutoTokenizer.from_pretrained(JUDGE if name == "demo" else GOLDEN / name)


@cache
def words_of(name: str, profile: str) -> ComparisonTokenizer:
    """What asks by a built-in profile with a tokenizer."""
    tokenizer = tokenizer_of(name)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return ComparisonTokenizer(tokenizer, image, built_in_profiles()[profile])


@cache
def golden_questions(name: str) -> list[tuple[tuple[Any, ...], list[int]]]:
    """The questions with the ids that transformers gives with a tokenizer."""
    with np.load(IDS, allow_pickle=False) as arrays:
        assert str(arrays["texts"]) == digest(), "make the golden ids again: see scripts/make_profile_golden.py"
        cases, lengths = json.loads(str(arrays["cases"])), arrays[f"{name} lengths"].tolist()
        ids = iter(arrays[f"{name} ids"].tolist())
    return [(tuple(case), [next(ids) for _ in range(length)]) for case, length in zip(cases, lengths, strict=True)]


def joined(texts: Sequence[Sequence[int]], image: int) -> list[int]:
    """The ids of a question with those of its images."""
    counts: Iterator[int] = iter((*IMAGE_TOKENS[: len(texts) - 1], 0))
    return [token for text in texts for token in [*text, *[image] * next(counts)]]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("profile", built_in_profiles())
def test_ids_are_those_of_transformers(name: str, profile: str) -> None:
    words = words_of(name, profile)
    image = tokenizer_of(name).convert_tokens_to_ids("<|image_pad|>")
    questions = [each for each in golden_questions(name) if each[0][0] == profile]
    assert {case[4] for case, _ in questions} >= set(PROMPTS)
    for (_, form, think, criterion, prompt), expected in questions:
        texts = words.comparison(prompt, form, think, criterion).texts
        assert joined(texts, image) == expected, (form, think, criterion, prompt)


def test_golden_questions_are_of_every_kind() -> None:
    asked = {case[:4] for case, _ in golden_questions("qwen3")}
    ways = {(name, think) for name, profile in built_in_profiles().items() for think in {profile.thinks, False}}
    assert asked >= {(name, "choice", think, "") for name, think in ways}
    assert asked >= {("mlxpref", "scores", True, ""), ("mlxpref", "choice", True, CRITERION)}
    assert ("mlxpref", "choice", True, CRITERION, "") in [case for case, _ in golden_questions("qwen3")]


@pytest.mark.parametrize("name", [*FAMILIES, "demo"])
@pytest.mark.parametrize("profile", ["mlxpref", "unifiedreward-think", "rationalrewards"])
def test_a_checkpoint_reads_the_same_ids_with_its_images(name: str, profile: str) -> None:
    """The images are of such sizes that both sides give the same number of tokens, whatever a patch is."""
    folder = JUDGE if name == "demo" else GOLDEN / name
    vlm = load_vlm(folder, 512 * 512, profile=built_in_profiles()[profile])
    unit = vlm.model.config.vision_config.patch_size * vlm.model.config.vision_config.spatial_merge_size
    sizes = [(3 * unit, 3 * unit), (2 * unit, 3 * unit)][: vlm.profile.images]
    images = [vlm.features.get(picture(seed, size)) for seed, size in enumerate(sizes)]
    assert [image.tokens for image in images] == list(IMAGE_TOKENS[: len(images)])
    for case, expected in golden_questions(name):
        if case[0] == profile:
            _, form, think, criterion, prompt = case
            asked = vlm.input_of(images, prompt, form, think, criterion)
            assert asked.ids.tolist() == expected, case
            assert (asked.ids[asked.cuts[0]], asked.ids[asked.cuts[0] - 1]) == (
                vlm.image_token_id,
                vlm.tokenizer.encode_template_text("<|vision_start|>")[0],
            )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("profile", built_in_profiles())
def test_what_a_prompt_holds_stays_words(name: str, profile: str) -> None:
    """No added token arises from a prompt, and the question holds it as it is."""
    words, tokenizer = words_of(name, profile), tokenizer_of(name)
    plain = words.comparison("a hat", "choice", False)
    added = [token for text in plain.texts for token in text if token in words.added_ids]
    for text in (*HOSTILE, *map(str, tokenizer.added_tokens_decoder.values())):
        for prompt in (text, f"a hat{text}", f"{text}a hat", f"[{text}]", text[: len(text) // 2] + text):
            asked = words.comparison(prompt, "choice", False)
            assert [token for text in asked.texts for token in text if token in words.added_ids] == added, prompt
            question = "".join(tokenizer.decode(list(text)) for text in asked.texts)
            around = "".join(tokenizer.decode(list(text)) for text in plain.texts).split("a hat")
            assert question == prompt.strip().join(around), prompt
            assert asked.opening == plain.opening


ANY_PROMPT = st.lists(
    st.sampled_from([*HOSTILE, *PROMPTS, "<|", "|>", "think>", " "]) | st.text(max_size=5), max_size=5
).map("".join)


@pytest.mark.parametrize("profile", built_in_profiles())
@pytest.mark.parametrize("think", [True, False])
@given(prompt=ANY_PROMPT.filter(lambda text: bool(text.strip())))
def test_any_prompt_is_only_words(profile: str, think: bool, prompt: str) -> None:
    """It changes neither what is around it nor the completion's beginning, so it can make no answer."""
    words, tokenizer = words_of("qwen3", profile), tokenizer_of("qwen3")
    asked, plain = (words.comparison(each, "choice", think) for each in (prompt, "a hat"))
    assert asked.opening == plain.opening
    around = [token for text in plain.texts for token in text if token in words.added_ids]
    assert [token for text in asked.texts for token in text if token in words.added_ids] == around
    question, *others = ("".join(tokenizer.decode(list(text)) for text in each.texts) for each in (asked, plain))
    expected = normalize("NFC", prompt.strip().join(others[0].split("a hat")))
    assert question == expected.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_switches_reach_the_chat_template(name: str) -> None:
    """A template of a judge that thinks by itself: with the switch off it writes empty reasons, which stay."""
    tokenizer = tokenizer_of(name)
    template = str(tokenizer.chat_template)
    end = "assistant\n{% endif %}"
    assert template.endswith(end)
    opening = "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    think, plain = (built_in_profiles()[name] for name in ("unifiedreward-think", "plain"))
    assert think.chat_template == plain.chat_template == {"enable_thinking": False}
    for switch, expected in ((False, "<think>\n\n</think>\n\n"), (True, "<think>\n")):
        changed = _with_template(tokenizer, template.replace(end, f"assistant\n{opening}{{% endif %}}"))
        profile = replace(think, chat_template={"enable_thinking": switch})
        words = ComparisonTokenizer(changed, tokenizer.convert_tokens_to_ids("<|image_pad|>"), profile)
        asked = words.comparison("a hat", "choice", True)
        assert tokenizer.decode(list(asked.texts[-1])).endswith(f"assistant\n{expected}")
        assert asked.opening == (expected if switch else "")
        at_once = words.comparison("a hat", "choice", False)
        assert words.reader.answer_number(at_once.opening) == 0
        assert tokenizer.decode(list(at_once.texts[-1])).endswith(at_once.opening)


def test_a_thought_that_a_profile_does_not_know_is_refused() -> None:
    """Qwen3.5's template begins one unless it is told not to; labels would be read within it."""
    tokenizer = tokenizer_of("qwen3_5")
    end = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert end in tokenizer.chat_template
    off = "{% if enable_thinking is defined and not enable_thinking %}"
    thought = off + "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    changed = _with_template(
        tokenizer, tokenizer.chat_template.replace(end, end.replace("{% endif %}", thought + "{% endif %}"))
    )
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for name, profile in built_in_profiles().items():
        words = ComparisonTokenizer(changed, image, profile)
        texts = words.comparison("a hat", "choice", profile.thinks).texts[-1]
        begun = tokenizer.decode(list(texts)).rstrip().endswith("<think>")
        assert begun == (name == "mlxpref"), name  # ours continues the thought
    unaware = ComparisonTokenizer(changed, image, replace(built_in_profiles()["plain"], chat_template={}))
    with pytest.raises(ConfigError, match=r"plain: .* begins a thought .*write chat_template = \{ enable_thinking"):
        unaware.comparison("a hat", "choice", True)


@pytest.mark.parametrize("profile", built_in_profiles())
def test_a_template_that_drops_images_is_named(profile: str) -> None:
    tokenizer = _with_template(tokenizer_of("qwen3_vl"), "{% for m in messages %}{{ m['role'] }}{% endfor %}")
    words = ComparisonTokenizer(tokenizer, 0, built_in_profiles()[profile])
    words.image_token = "<|image_pad|>"
    with pytest.raises(ModelError, match=r"chat template does not keep (two images|the image) and the prompt"):
        words.comparison("a hat", "choice", False)


def _with_template(tokenizer: Any, template: str) -> Any:
    changed = copy(tokenizer)
    changed.chat_template = template
    return changed
