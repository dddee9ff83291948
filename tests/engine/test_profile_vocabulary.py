"""Every built-in profile with Qwen's real vocabulary, where words are other tokens than in that of a toy."""

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest

from mlxpref.engine.profile import Profile, built_in_profiles
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.errors import ConfigError
from tests.engine.profile_texts import COMPLETIONS, LETTERS, NO_ASCII
from tests.engine.real_vocabulary import VOCABULARY, real_tokenizer

NAMES = tuple(built_in_profiles())
THINKS = pytest.mark.parametrize("thinks", [True, False], ids=["qwen3", "qwen2_5"])


def words_with(profile: Profile, thinks: bool) -> ComparisonTokenizer:
    tokenizer = real_tokenizer(thinks)
    return ComparisonTokenizer(tokenizer, tokenizer.convert_tokens_to_ids("<|image_pad|>"), profile)


@cache
def words_of(name: str, thinks: bool) -> ComparisonTokenizer:
    return words_with(built_in_profiles()[name], thinks)


def tokens_of(text: str, thinks: bool = True) -> list[str]:
    return [str(token) for token in real_tokenizer(thinks).tokenize(text)]


def test_the_vocabulary_is_not_a_toys() -> None:
    assert tokens_of("<answer>") == ["<", "answer", ">"]
    assert tokens_of("</think><answer>") == ["</think>", "<", "answer", ">"]
    assert tokens_of("</think><answer>", thinks=False) == ["</", "think", "><", "answer", ">"]
    assert tokens_of("</think>\n<answer>Image 1", thinks=False)[:4] == ["</", "think", ">Ċ", "<"]
    assert tokens_of("10") == ["1", "0"]
    assert tokens_of('"winner": "Image 1"')[-4:] == ["Image", "Ġ", "1", '"']
    assert len(VOCABULARY.read_bytes()) < 100_000


@THINKS
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_single_tokens(name: str, thinks: bool) -> None:
    words, profile = words_of(name, thinks), built_in_profiles()[name]
    decoded = [{words.hf_tokenizer.decode([token]).strip() for token in ids} for ids in words.label_ids]
    assert decoded == [set(label) for label in profile.labels]
    assert sum(map(len, words.label_ids)) == len({token for ids in words.label_ids for token in ids})
    assert {words.hf_tokenizer.decode([token]) for token in words.tie_opening_ids} <= {"Both", " Both"}
    assert bool(words.tie_opening_ids) is bool(profile.tie_opening)


@THINKS
@pytest.mark.parametrize("name", NAMES)
def test_what_leads_to_an_answer_ends_right_before_it(name: str, thinks: bool) -> None:
    """Whatever label follows, it is the next token of the same text, and not joined to what is before it."""
    words, profile = words_of(name, thinks), built_in_profiles()[name]
    at_once = "" if profile.tie_opening else profile.closings(at_once=True)[0]
    leads = {at_once: words.at_once_ids} | {
        text: words.closing_ids(False, number) for number, text in enumerate(profile.closings())
    }
    if profile.think_end:
        behind = profile.closing.partition(profile.think_end)[2]
        leads[behind] = words.closing_ids(True)
    for text, ids in leads.items():
        assert words.hf_tokenizer.decode(list(ids)) == text
        for label in [label for labels in profile.labels for label in labels] if text else ():
            *before, last = words.encode_template_text(text + label)
            assert tuple(before) == ids
            assert any(last in label_ids for label_ids in words.label_ids)
    chat = words.comparison("a red kite", "choice", True).texts[-1]
    assert words.comparison("a red kite", "choice", False).texts[-1] == chat + words.at_once_ids


@THINKS
@pytest.mark.parametrize("name", NAMES)
def test_closing_in_the_middle_of_reasons(name: str, thinks: bool) -> None:
    """Reasons that end anywhere, and are led to an answer, are read, and the words of both are as they were."""
    words, profile = words_of(name, thinks), built_in_profiles()[name]
    completion = next(each.text for each in COMPLETIONS[name] if each.well_formed)
    ids = words.encode_template_text(completion)
    for end in range(len(ids) + 1) if profile.thinks else ():
        text = "".join(words.vocabulary[token] for token in ids[:end])
        if words.streaming_reader.start(text) is not None and profile.counts == "first":
            break
        had = words.streaming_reader.has_thought(text)
        numbers: Sequence[int] = [words.streaming_reader.answer_number(text) or 0]
        if profile.is_point:
            numbers = range(len(words.streaming_reader._leads(text)), len(profile.aspects))
        for number in numbers:
            led = words.closing_ids(had, number)
            text += "".join(words.vocabulary[token] for token in led)
            assert words.streaming_reader.answer_number(text) is not None, text
            if profile.is_point:
                assert words.streaming_reader.answer_number(text) == number
                text += profile.levels[0]
        if profile.think_end:
            assert text.count(profile.think_end) == 1


@THINKS
@pytest.mark.parametrize("name", NAMES)
def test_the_lead_is_found_however_it_is_split(name: str, thinks: bool) -> None:
    """Its own tokens, tokens of one character each, and such that go on with blanks."""
    words, profile = words_of(name, thinks), built_in_profiles()[name]
    reasons = f"{profile.think_begin}so{profile.think_end}" if profile.think_end else ""
    lead = profile.lead.rstrip()
    splits = [words.encode_template_text(lead), [i for letter in lead for i in words.encode_template_text(letter)]]
    blanks = ["", " ", "\n", "\n\n", " \n"]
    for split, blank in product(splits, blanks):
        ids = [*words.encode_template_text(reasons), *split, *words.encode_template_text(blank)]
        text = ""
        found = []
        for token in ids:
            text += words.vocabulary[token]
            found.append(words.streaming_reader.answer_number(text))
        assert found[-1] == 0
        assert found[: len(words.encode_template_text(reasons)) + len(split) - 1].count(0) == 0
    joined = words.encode_template_text(f"{reasons}{lead}\n")
    assert words.streaming_reader.answer_number("".join(words.vocabulary[token] for token in joined)) == 0


@THINKS
def test_a_lead_that_is_no_ascii_is_found_among_tokens_of_bytes(thinks: bool) -> None:
    profile = Profile(
        "pair",
        "{image}{image}{prompt}",
        "答え： 図",
        think_begin="【考】",
        think_end="【了】",
        first=("1",),
        second=("2",),
    )
    words = words_with(profile, thinks)
    ids = words.encode_template_text(NO_ASCII)
    tokens = [words.vocabulary[token] for token in ids]
    assert not any(words.in_alphabet("【了】") == token for token in tokens)
    spelled, found = "", []
    for token in ids:
        spelled += words.vocabulary[token]
        found.append(words.streaming_reader.answer_number(spelled))
    assert [number for number in found if number is not None] == [0]
    assert found[-1] == 0
    assert words.closing_ids(False) == words.encode_template_text("【了】答え： 図")
    assert words.closing_ids(True) == words.encode_template_text("答え： 図")


@THINKS
def test_a_label_may_take_the_blank_before_it(thinks: bool) -> None:
    """What leads to it then ends before the blank, as the judge's own token for the label begins with it."""
    profile = Profile("pair", "{image}{image}{prompt}", "Answer: ", counts="last", first=("A",), second=("B",))
    words = words_with(profile, thinks)
    assert tokens_of(LETTERS[0], thinks) == ["Answer", ":", "ĠA"]
    assert [words.vocabulary[token] for token in words.at_once_ids] == ["Answer", ":"]
    assert words.closing_ids(False) == words.at_once_ids
    for label, ids, text in zip("AB", words.label_ids, LETTERS, strict=True):
        assert {words.vocabulary[token] for token in ids} >= {label, f"Ġ{label}"}
        assert words.encode_template_text(text) in [(*words.at_once_ids, token) for token in ids]


@THINKS
@pytest.mark.parametrize("labels", [("first one", "2"), ("1", "12"), ("1", "2", "draw game")])
def test_labels_of_several_tokens_are_an_error(labels: tuple[str, ...], thinks: bool) -> None:
    first, second, *tie = ((label,) for label in labels)
    profile = Profile("pair", "{image}{image}{prompt}", "Answer: ", first=first, second=second, tie=(*tie, ())[0])
    wrong = next(label for label in labels if len(label) > 1)
    with pytest.raises(ConfigError, match=rf"'{wrong}' is no single token of this judge's tokenizer"):
        _ = words_with(profile, thinks).label_ids


@THINKS
def test_a_tie_of_several_tokens_is_an_error(thinks: bool) -> None:
    profile = Profile(
        "pair", "{image}{image}{prompt}", "Image ", thinks=False, first=("1",), second=("2",), tie_opening=("Neither",)
    )
    with pytest.raises(ConfigError, match="'Neither' is no single token"):
        _ = words_with(profile, thinks).label_ids
