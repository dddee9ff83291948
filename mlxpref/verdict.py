"""A verdict: one completion's answer about the two images of a comparison."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlxpref.text import CONTROL, shorten

Strategy = Literal["soft", "select", "score"]
STRATEGIES: tuple[Strategy, ...] = ("soft", "select", "score")

BLANKS = "ĠĊĉč▁ \n\t\r"
"""Blank characters in text, and in byte-level and sentencepiece vocabularies."""
_ANSWER = re.compile(r"</think>.*?<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_FORM = re.compile(r"<think>((?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>[^<]*</answer>", re.DOTALL)
_NUMBER = r"(\d+(?:\.\d+)?)"
_SCORES = re.compile(rf"\s*{_NUMBER}[\s,;/]+{_NUMBER}\s*")


@dataclass(frozen=True)
class Verdict:
    """One completion's answer: its text, and the probabilities of both labels at its answer position.

    A label's probability is the sum over its token variants. Both are 0 if the completion did not reach the position;
    the verdict is then unreadable. `closed` means that the completion ran out of tokens and got an appended end of
    reasoning. `tokens` is the number of written tokens.
    """

    text: str
    p_label_first: float = 0.0
    p_label_second: float = 0.0
    closed: bool = False
    tokens: int = 0

    def __repr__(self) -> str:
        p_first = f"{p:.4f}" if (p := self.p_first("soft")) is not None else "unreadable"
        return f"Verdict(p_first={p_first}, reasoning={shorten(self.reasoning, 80)!r}, tokens={self.tokens})"

    @property
    def label_mass(self) -> float:
        """The probability of both labels together; the rest is on tokens that are no answer."""
        return self.p_label_first + self.p_label_second

    @property
    def reasoning(self) -> str:
        """The reasons before the answer."""
        return reasoning_of(self.text)

    def p_first(self, strategy: Strategy) -> float | None:
        """The preference for the first image, from 0 to 1, by a strategy; None for an unreadable verdict."""
        if strategy == "soft":
            return self.p_label_first / self.label_mass if self.label_mass > 0 else None
        if strategy == "select":
            answer = written_answer(self.text)
            return None if answer is None else float(answer == 1)
        scores = written_scores(self.text)
        return None if scores is None else 0.5 * (1 + (scores[0] > scores[1]) - (scores[0] < scores[1]))


def at_answer(text: str) -> bool:
    """Whether a text ends at its answer position: after the first <answer> behind </think>, and blanks after that.

    Blanks belong to the way there, because a vocabulary may join `>` and a line feed in one token.
    """
    _, thought, rest = text.partition("</think>")
    _, tag, answer = rest.partition("<answer>")
    return bool(thought and tag) and not answer.strip(BLANKS)


def reasoning_of(text: str) -> str:
    """The words between <think> and </think>, on one line, without control characters."""
    words = text.partition("</think>")[0].partition("<think>")
    return " ".join(CONTROL.sub(" ", words[2] or words[0]).split())


def is_well_formed(text: str, form: str = "choice", think: bool = True) -> bool:
    """Whether a completion is <think>reasons</think>, then <answer> with a label ("choice") or two scores ("scores").

    The reasons may be empty only if the judge was not asked to `think`.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None or (think and not match.group(1).strip()):
        return False
    return (written_answer(text) if form == "choice" else written_scores(text)) is not None


def written_answer(text: str) -> Literal[1, 2] | None:
    """The label in the written answer; None where there is none."""
    match = _ANSWER.search(text)
    answer = match.group(1).strip() if match else ""
    return 1 if answer == "1" else 2 if answer == "2" else None


def written_scores(text: str) -> tuple[float, float] | None:
    """The scores from 0 to 10 in the written answer, of the first and the second image; None where there are none."""
    match = _ANSWER.search(text)
    numbers = _SCORES.fullmatch(match.group(1)) if match else None
    if numbers is None:
        return None
    first, second = float(numbers.group(1)), float(numbers.group(2))
    return (first, second) if max(first, second) <= 10 and math.isfinite(first + second) else None


def verdicts_to_json(verdicts: Sequence[Verdict]) -> list[list[Any]]:
    """Verdicts as lists, exact in JSON."""
    return [[v.text, v.p_label_first, v.p_label_second, v.closed, v.tokens] for v in verdicts]


def verdicts_from_json(rows: Sequence[Sequence[Any]]) -> tuple[Verdict, ...]:
    """The verdicts in lists of `verdicts_to_json`."""
    return tuple(Verdict(*row) for row in rows)
