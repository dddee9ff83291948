"""What is written about a pair: it is read as it is written, and each untruth is found by its name."""

from dataclasses import replace

import pytest

from mlxpref.demo.briefs import Requirement
from mlxpref.demo.pictures import PictureSpec
from mlxpref.demo.preferences import PairSpec, demo_pairs
from mlxpref.demo.reasons import Truth, read_reasons, reasons_text, true_account, truth_of

BRIEF = Requirement("circle", "green"), Requirement("cross", "triangle"), Requirement("square", "blue")
PAIR = PairSpec(
    BRIEF, PictureSpec("green", "red", "blue", "blue"), PictureSpec("orange", "blue", "red", "green", "blurry")
)
TEXT = (
    "Image 1: circle green for green fits, cross blue with triangle blue fits, square red for blue fails: two met, "
    "clean. Image 2: circle orange for green fails, cross green with triangle red fails, square blue for blue fits: "
    "one met, blurry."
)
ALL_TRUE = Truth(1.0, 1.0, 1.0, 1.0, 1.0)


def test_words() -> None:
    assert reasons_text(*(true_account(BRIEF, each) for each in (PAIR.a, PAIR.b))) == TEXT


@pytest.mark.parametrize("split", ["train", "heldout", "four"])
def test_what_is_written_is_read(split: str) -> None:
    for pair in demo_pairs(split, 100):
        accounts = [true_account(pair.brief, each) for each in (pair.a, pair.b)]
        text = reasons_text(*accounts)
        assert read_reasons(text) == accounts
        assert truth_of([(pair, text, pair.better == "a")]) == ALL_TRUE
        assert truth_of([(pair.swapped, text, None)]) != ALL_TRUE


@pytest.mark.parametrize(
    ("written", "instead", "name", "share"),
    [
        ("circle green for", "circle red for", "facts", 7 / 8),
        ("triangle blue fits", "triangle red fits", "facts", 7 / 8),
        ("for blue fails", "for blue fits", "verdicts", 5 / 6),
        ("two met", "three met", "sums", 1 / 2),
        ("circle green for green fits, ", "", "complete", 5 / 6),
        ("square blue for", "square blue with", "complete", 5 / 6),
    ],
)
def test_untruth_has_a_name(written: str, instead: str, name: str, share: float) -> None:
    truth = truth_of([(PAIR, TEXT.replace(written, instead), True)])
    assert getattr(truth, name) == pytest.approx(share)
    assert truth.follows == 1


def test_an_answer_against_the_reasons() -> None:
    assert truth_of([(PAIR, TEXT, False)]) == replace(ALL_TRUE, follows=0.0)
    equal = TEXT.replace("two met, clean", "one met, blurry")
    assert truth_of([(PAIR, equal, False)]).follows is None


@pytest.mark.parametrize("text", ["", "Image 1: a fine picture.", TEXT[:40]])
def test_what_cannot_be_read_is_not_true(text: str) -> None:
    assert truth_of([(PAIR, text, True)]) == Truth(0.0, None, None, None, None)


def test_one_image_only() -> None:
    truth = truth_of([(PAIR, TEXT.partition(" Image 2")[0], True)])
    assert truth == Truth(0.5, 1.0, 1.0, 1.0, None)
