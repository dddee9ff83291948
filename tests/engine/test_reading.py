"""Completions in the form of each built-in profile's judge: where the answer stands, and what was written there."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.engine.profile import Profile, built_in_profiles, own_profile
from mlxpref.engine.reading import Reader
from mlxpref.engine.tokenizer import ComparisonTokenizer
from tests.conftest import read_verdict
from tests.engine.profile_texts import COMPLETIONS, FLEX, THINK, Written
from tests.engine.real_vocabulary import real_tokenizer

NAMES = tuple(built_in_profiles())
EVERY = [(name, written) for name, texts in COMPLETIONS.items() for written in texts]
"""Every completion with its profile's name."""


@cache
def reader_of(name: str) -> Reader:
    return Reader(built_in_profiles()[name])


@cache
def streaming_of(name: str) -> ComparisonTokenizer:
    """What reads a judge's completions in the alphabet of the vocabulary."""
    return ComparisonTokenizer(real_tokenizer(thinks=True), 0, built_in_profiles()[name])


def prefixes(text: str) -> Iterator[str]:
    return (text[:end] for end in range(len(text) + 1))


def label_end(text: str, profile: Profile) -> int:
    """The end of the label that a text's answer begins with."""
    start = Reader(profile).start(text)
    assert start is not None
    match = re.compile(r"\s*\w+").match(text, start)
    return match.end() if match else start


def test_every_profile_has_completions() -> None:
    assert set(COMPLETIONS) == set(NAMES)
    for name, texts in COMPLETIONS.items():
        if not built_in_profiles()[name].is_point:
            assert {each.written for each in texts} >= {1, 0, None}, name
        assert {each.well_formed for each in texts} == {True, False}, name


@pytest.mark.parametrize(("name", "completion"), EVERY)
def test_a_completion_is_read(name: str, completion: Written) -> None:
    reader = reader_of(name)
    assert reader.written(completion.text) == completion.written
    assert reader.is_well_formed(completion.text, think=reader.profile.thinks) is completion.well_formed
    assert reader.reasoning(completion.text) == completion.reasoning


@pytest.mark.parametrize(("name", "completion"), EVERY)
def test_the_answer_that_counts_is_behind_its_lead(name: str, completion: Written) -> None:
    profile, text = built_in_profiles()[name], completion.text
    start = reader_of(name).start(text)
    if completion.levels:
        assert start is not None
        assert text[start:].split()[0].strip(".") == completion.levels[-1]
    elif completion.written in (0, 1):
        assert start is not None
        assert "".join(text[:start].split()).endswith("".join(profile.lead.split()))
        assert text[start:].split()[0].strip('."},').partition("<")[0] == ("1" if completion.written else "2")


@pytest.mark.parametrize(("name", "completion"), EVERY)
def test_answer_positions_are_found_while_it_is_written(name: str, completion: Written) -> None:
    """Character by character: each label that counts, or may count later, stands right behind such a position."""
    profile, reader = built_in_profiles()[name], reader_of(name)
    positions: dict[int, list[str]] = {}
    for text in prefixes(completion.text):
        if (number := reader.answer_number(text)) is not None:
            positions.setdefault(number, []).append(completion.text[len(text) :])
    assert list(positions) == list(range(len(positions)))
    if profile.is_point:
        assert tuple(rests[0].split()[0].strip(".") for rests in positions.values()) == completion.levels
    elif completion.written is not None and completion.written != 0.5:
        counted = positions[max(positions) if profile.counts == "last" else 0]
        labels = profile.first if completion.written else profile.second
        assert counted[-1].lstrip().startswith(labels)
        assert len({rest.strip() for rest in counted}) == 1
    if profile.counts == "first" and not profile.is_point:
        assert set(positions) <= {0}


@pytest.mark.parametrize(("name", "completion"), EVERY)
def test_the_vocabularys_alphabet_changes_nothing(name: str, completion: Written) -> None:
    """A completion in the tokens of Qwen3, one after the other: the same positions as in the text."""
    words = streaming_of(name)
    ids = words.encode_template_text(completion.text)
    assert words.hf_tokenizer.decode(list(ids)) == completion.text
    spelled = ""
    for end, token in enumerate(ids, 1):
        spelled += words.vocabulary[token]
        text = words.hf_tokenizer.decode(list(ids[:end]))
        assert words.streaming_reader.answer_number(spelled) == words.reader.answer_number(text), text
        assert words.streaming_reader.is_answered(spelled) == words.reader.is_answered(text), text
        assert words.streaming_reader.has_thought(spelled) == words.reader.has_thought(text), text
    start = words.reader.start(completion.text)
    place = words.streaming_reader.start(spelled)
    assert place == (None if start is None else len(words.in_alphabet(completion.text[:start])))


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_cut_anywhere(name: str) -> None:
    """Up to its label nothing was answered; from there on the answer is the same however much of the rest is there."""
    profile, reader = built_in_profiles()[name], reader_of(name)
    for completion in COMPLETIONS[name]:
        if completion.written not in (0, 1) or not completion.well_formed or profile.is_point:
            continue
        end = label_end(completion.text, profile)
        start = reader.start(completion.text)
        assert start is not None
        for text in prefixes(completion.text):
            if len(text) >= end:
                assert reader.written(text) == completion.written, text
            elif profile.counts == "first":
                assert reader.written(text) is None, text
            if len(text) < start and profile.counts == "first":
                assert not reader.is_answered(text)
        assert reader.is_answered(completion.text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at_once", [True, False])
def test_closings_end_at_the_answer(name: str, at_once: bool) -> None:
    """Behind unfinished reasons, or from the very beginning; a judge of single images is led from one to the next."""
    profile, reader = built_in_profiles()[name], reader_of(name)
    text = "" if at_once else profile.think_begin + ("It is sharp. " if profile.thinks else "")
    for number, closing in enumerate(profile.closings(at_once)):
        text += closing
        assert reader.answer_number(text) == number
        text += profile.labels[0][0]
        assert reader.answer_number(text) is None
        assert reader.is_answered(text + profile.end)
    assert reader.is_well_formed(text + profile.end, think=not at_once and profile.thinks)
    if profile.is_point:
        assert all(aspect in text for aspect in profile.aspects)
    else:
        assert reader.written(text + profile.end) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if built_in_profiles()[name].counts == "last"])
def test_a_judge_whose_last_answer_counts_may_change_its_mind(name: str) -> None:
    profile, reader = built_in_profiles()[name], reader_of(name)
    one, other = (profile.lead + label[0] + profile.end for label in profile.labels[:2])
    for text in (f"So {one} and {other}", f"{one}\n{one}\n{other}"):
        assert reader.written(text) == 0
        start = reader.start(text)
        assert start is not None
        assert reader.answer_number(text[:start]) == text.count(profile.lead) - 1


@pytest.mark.parametrize("name", [name for name in NAMES if built_in_profiles()[name].think_end])
def test_no_answer_stands_in_the_reasons(name: str) -> None:
    profile, reader = built_in_profiles()[name], reader_of(name)
    answer = profile.lead + profile.first[0]
    for text in (profile.lead, profile.think_begin + profile.lead, profile.think_begin + answer, answer):
        assert [reader.answer_number(each) for each in prefixes(text)] == [None] * (len(text) + 1)
        assert reader.start(text) is None
    both = f"{profile.think_begin}{answer}{profile.think_end}{profile.lead}{profile.second[0]}"
    assert reader.written(both) == 0


def test_a_tie_begins_the_answer() -> None:
    reader = reader_of("unifiedreward-pair")
    assert reader.written("Image 1 is better. Both are good.") == 1
    assert [reader.written(f"Both{end}") for end in ("", ".", ":", " of them", "\n")] == [0.5] * 5
    assert reader.start("Both Image 1 and Image 2 are good") is None
    assert reader.is_well_formed("Both of them", think=False)


def test_a_tie_is_a_label_of_its_own() -> None:
    profile = Profile("pair", "{image}{image}{prompt}", "Answer: ", first=("1",), second=("2",), tie=("tie", "0"))
    reader = Reader(profile)
    assert [reader.written(f"So. Answer: {label}") for label in ("1", "2", "tie", "0", "tied")] == [
        1,
        0,
        0.5,
        0.5,
        None,
    ]
    assert reader.is_well_formed("So. Answer: tie")


def test_labels_may_have_variants_of_several_letters() -> None:
    profile = Profile("pair", "{image}{image}{prompt}", "[[", first=("A", "first"), second=("B", "AB"), end="]]")
    labels = ("A", "first", "B", "AB", "firsts", "A or B", "A, A", "A: a hat")
    written = [Reader(profile).written(f"So. [[{label}]]") for label in labels]
    assert written == [1, 1, 0, 0, None, None, None, None]
    lenient = Reader(replace(profile, after=": as it is"))
    assert [lenient.written(f"So. [[{label}]]") for label in labels] == [1, 1, 0, 0, None, None, 1, 1]


def test_our_own_answer_is_a_label_and_nothing_else() -> None:
    own = Reader(own_profile())
    for answer in ("1 and more words 2", "1 <b>", "1 is better"):
        text = f"<think>a</think><answer>{answer}</answer>"
        assert own.written(text) is None
        assert not own.is_well_formed(text)
    assert not own.is_well_formed("<think>a</answer></think><answer>1</answer>")


# our own form

POSITIONS = {
    "<think>a</think><answer>": True,
    "<think>a</think>\n<answer>": True,
    "a</think> so <answer>": True,
    "<think></think><answer>": True,
    "<think>a</think><answer>\n": True,
    "<think>a</think><answer>Ċ": True,
    "<think>a</think><answer> ĠĊĊ": True,
    "<think>a</think><answer>\n1": False,
    "<think>a</think><answer>Ġx": False,
    "<answer>": False,
    "<think><answer>": False,
    "<answer></think>": False,
    "<think>a</think><answer>1": False,
    "<think>a</think><answer>1</answer><answer>": False,
    "<think>a</think><answe": False,
    "": False,
}


@pytest.mark.parametrize(("text", "expected"), POSITIONS.items())
def test_answer_position_of_our_own_form(text: str, expected: bool) -> None:
    assert (Reader(own_profile()).answer_number(text) == 0) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>7 4</answer>", (7, 4)),
        ("<think>a</think><answer>7.5, 10</answer>", (7.5, 10)),
        ("<think>a</think><answer>0 0", (0, 0)),
        ("<think>a</think><answer>11 4</answer>", None),
        ("<think>a</think><answer>7</answer>", None),
        ("<think>a</think><answer>74</answer>", None),
        ("<think>a</think><answer>7 4 2</answer>", None),
        ("<think>a</think><answer>-7 4</answer>", None),
        (f"<think>a</think><answer>{'9' * 400} 4</answer>", None),
        ("<think>7 4</think>", None),
    ],
)
def test_the_written_scores(text: str, expected: tuple[float, float] | None) -> None:
    assert Reader(own_profile()).written_scores(text) == expected


@pytest.mark.parametrize(("scores", "p"), [("7 4", 1), ("4 7", 0), ("4 4", 0.5)])
def test_equal_scores_are_undecided(scores: str, p: float) -> None:
    assert read_verdict(f"</think><answer>{scores}</answer>", form="scores").p_first("score") == p
    assert read_verdict(f"</think><answer>{scores}</answer>", form="choice").p_first("select") is None


def test_reason_is_one_line() -> None:
    reader = Reader(own_profile())
    assert reader.reasoning("<think>so\n much \x1b[31mred\u202e</think><answer>1</answer>") == "so much [31mred"
    assert reader.reasoning("no tags at all") == "no tags at all"
    assert reader.reasoning("<think></think><answer>") == ""


@pytest.mark.parametrize(
    ("text", "form", "think", "expected"),
    [
        ("<think>a</think><answer>1</answer>", "choice", True, True),
        ("<think>a\nb</think>\n<answer>2</answer>\n", "choice", True, True),
        ("<think>a</think><answer>7 4</answer>", "scores", True, True),
        ("<think>a</think><answer>7 4</answer>", "choice", True, False),
        ("<think>a</think><answer>3</answer>", "choice", True, False),
        ("<think> </think><answer>1</answer>", "choice", True, False),
        ("<think></think><answer>1</answer>", "choice", False, True),
        ("so <think>a</think><answer>1</answer>", "choice", True, False),
        ("<think>a</think><answer>1</answer> yes", "choice", True, False),
        ("<think>a<think>b</think><answer>1</answer>", "choice", True, False),
        ("<think>a <answer>1</answer></think><answer>1</answer>", "choice", True, False),
        ("<think>a</think><answer>", "choice", True, True),
        ("<think>a</think><answer>", "scores", True, True),
        ("<think></think><answer>", "choice", True, False),
    ],
)
def test_answer_form(text: str, form: str, think: bool, expected: bool) -> None:
    assert Reader(own_profile()).is_well_formed(text, form, think) is expected  # type: ignore[arg-type]


# any text

PIECES = sorted(
    {piece for name in NAMES for piece in re.split(r"(\s+)", built_in_profiles()[name].closing) if piece}
    | {"<think>", "</think>", "</answer>", '"', "1", "2", "3", "10", "Both", "Image", " ", "\n", "Ġ", "a", "：", "🦊"}
    | {THINK, FLEX}
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14).map("".join)


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
def test_any_text_is_read(name: str, text: str) -> None:
    """Nothing fails; an answer stands behind its lead, and it is read where its position was found."""
    profile, reader = built_in_profiles()[name], reader_of(name)
    start, written = reader.start(text), reader.written(text)
    assert written in (None, 0, 0.5, 1)
    assert reader.written(text, "scores") in (None, 0, 0.5, 1)
    assert "\n" not in reader.reasoning(text)
    if start is not None:
        assert "".join(text[:start].split()).endswith("".join(profile.lead.split()))
        assert reader.answer_number(text[:start]) is not None
    if written not in (None, 0.5):
        assert start is not None
    if reader.is_well_formed(text) and not profile.is_point:
        assert written is not None or reader.answer_number(text) is not None
    if reader.answer_number(text) is not None:
        assert start is not None
        assert not reader.is_answered(text)


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
def test_any_text_is_read_in_the_vocabularys_alphabet(name: str, text: str) -> None:
    """A line feed that is one character there, and a letter that is several, change no position."""
    if any(blank in text for blank in "ĠĊĉč▁"):
        return  # these stand for blanks
    words = streaming_of(name)
    plain, spelled = words.reader, words.in_alphabet(text)
    if text.isascii():  # other blanks of Unicode are none of the vocabulary's
        assert words.streaming_reader.answer_number(spelled) == plain.answer_number(text)
    start = plain.start(text)
    assert words.streaming_reader.start(spelled) == (None if start is None else len(words.in_alphabet(text[:start])))
    assert words.streaming_reader.has_thought(spelled) == plain.has_thought(text)
