"""Reading completions: where the answer is, what was written, what is unreadable."""

import pytest

from mlxpref.verdict import Verdict, at_answer, is_well_formed, reasoning_of, written_answer, written_scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>", True),
        ("<think>a</think>\n<answer>", True),
        ("a</think> so <answer>", True),
        ("<think></think><answer>", True),
        ("<think>a</think><answer>\n", True),
        ("<think>a</think><answer>Ċ", True),
        ("<think>a</think><answer> ĠĊĊ", True),
        ("<think>a</think><answer>\n1", False),
        ("<think>a</think><answer>Ġx", False),
        ("<answer>", False),
        ("<think><answer>", False),
        ("<answer></think>", False),
        ("<think>a</think><answer>1", False),
        ("<think>a</think><answer>1</answer><answer>", False),
        ("<think>a</think><answe", False),
        ("", False),
    ],
)
def test_answer_position(text: str, expected: bool) -> None:
    assert at_answer(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>1</answer>", 1),
        ("<think>a</think>\n<answer> 2 </answer>", 2),
        ("<think>a</think><answer>2", 2),
        ("<think>I say <answer>1</answer></think><answer>2</answer>", 2),
        ("<think>a</think><answer>12</answer>", None),
        ("<think>a</think><answer>3</answer>", None),
        ("<think>a</think><answer></answer>", None),
        ("<answer>1</answer>", None),
        ("<think>a</think>1", None),
        ("", None),
    ],
)
def test_the_written_answer(text: str, expected: int | None) -> None:
    assert written_answer(text) == expected


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
        ("<think>7 4</think>", None),
    ],
)
def test_the_written_scores(text: str, expected: tuple[float, float] | None) -> None:
    assert written_scores(text) == expected


def test_strategies_read_a_completion_differently() -> None:
    verdict = Verdict("<think>a</think><answer>2</answer>", 0.3, 0.1)
    assert verdict.p_first("soft") == pytest.approx(0.75)
    assert verdict.p_first("select") == 0
    assert verdict.p_first("score") is None
    assert verdict.label_mass == pytest.approx(0.4)


@pytest.mark.parametrize(("scores", "p"), [("7 4", 1), ("4 7", 0), ("4 4", 0.5)])
def test_equal_scores_are_undecided(scores: str, p: float) -> None:
    assert Verdict(f"</think><answer>{scores}</answer>").p_first("score") == p


def test_no_answer_is_unreadable() -> None:
    verdict = Verdict("I like both")
    assert [verdict.p_first(strategy) for strategy in ("soft", "select", "score")] == [None, None, None]


def test_reason_is_one_line() -> None:
    assert reasoning_of("<think>so\n much \x1b[31mred\u202e</think><answer>1</answer>") == "so much [31mred"
    assert reasoning_of("no tags at all") == "no tags at all"
    assert reasoning_of("<think></think><answer>") == ""


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
    ],
)
def test_answer_form(text: str, form: str, think: bool, expected: bool) -> None:
    assert is_well_formed(text, form, think) is expected
