"""A verdict: what one completion says about the two images it was shown."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "STRATEGIES",
    "Strategy",
    "Verdict",
    "at_answer",
    "is_well_formed",
    "reasoning_of",
    "verdicts_from_json",
    "verdicts_to_json",
    "written_answer",
    "written_scores",
]

Strategy = Literal["soft", "select", "score"]
STRATEGIES: tuple[Strategy, ...] = ("soft", "select", "score")

_ANSWER = re.compile(r"</think>.*?<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_FORM = re.compile(r"<think>((?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>[^<]*</answer>", re.DOTALL)
_NUMBER = r"(\d+(?:\.\d+)?)"
_SCORES = re.compile(rf"\s*{_NUMBER}[\s,;/]+{_NUMBER}\s*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Verdict:
    """What one completion says: probabilities of the labels, reasoning, written answer; or unreadable.

    `p_label_first` and `p_label_second` are the probabilities of the labels at the answer position, each summed
    over its token variants; both are 0 where the position was not reached. `closed` says that the completion ran
    out of tokens and was read after an appended end of reasoning.
    """

    text: str
    p_label_first: float = 0.0
    p_label_second: float = 0.0
    closed: bool = False
    tokens: int = 0

    @property
    def label_mass(self) -> float:
        """The probability of either label; the rest went to something that is no answer."""
        return self.p_label_first + self.p_label_second

    @property
    def reasoning(self) -> str:
        """What the judge wrote before it answered."""
        return reasoning_of(self.text)

    def p_first(self, strategy: Strategy) -> float | None:
        """The preference for the first image, from 0 to 1, as a strategy reads it; None where it cannot be read."""
        if strategy == "soft":
            return self.p_label_first / self.label_mass if self.label_mass > 0 else None
        if strategy == "select":
            answer = written_answer(self.text)
            return None if answer is None else float(answer == 1)
        scores = written_scores(self.text)
        return None if scores is None else 0.5 * (1 + (scores[0] > scores[1]) - (scores[0] < scores[1]))


def at_answer(text: str) -> bool:
    """Whether a completion stands at its answer position: right after the first <answer> that follows </think>."""
    thought = text.find("</think>")
    if thought < 0:
        return False
    tag = text.find("<answer>", thought)
    return tag >= 0 and tag + len("<answer>") == len(text)


def reasoning_of(text: str) -> str:
    """The words between <think> and </think>, on one line, without control characters."""
    words = text.partition("</think>")[0].partition("<think>")
    return " ".join(_CONTROL.sub(" ", words[2] or words[0]).split())


def is_well_formed(text: str, form: str = "choice", think: bool = True) -> bool:
    """Whether a completion is reasons between the tags of thinking, then an answer of the form between its own.

    The reasons may be empty only where the judge was not asked to `think`.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None or (think and not match.group(1).strip()):
        return False
    return (written_answer(text) if form == "choice" else written_scores(text)) is not None


def written_answer(text: str) -> Literal[1, 2] | None:
    """The label that a completion wrote as its answer, or None."""
    match = _ANSWER.search(text)
    answer = match.group(1).strip() if match else ""
    return 1 if answer == "1" else 2 if answer == "2" else None


def written_scores(text: str) -> tuple[float, float] | None:
    """The two scores from 0 to 10 that a completion wrote, of the first and the second image, or None."""
    match = _ANSWER.search(text)
    numbers = _SCORES.fullmatch(match.group(1)) if match else None
    if numbers is None:
        return None
    first, second = float(numbers.group(1)), float(numbers.group(2))
    return (first, second) if max(first, second) <= 10 and math.isfinite(first + second) else None


def verdicts_to_json(verdicts: Sequence[Verdict]) -> list[list[Any]]:
    """Verdicts as lists, which JSON holds exactly."""
    return [[v.text, v.p_label_first, v.p_label_second, v.closed, v.tokens] for v in verdicts]


def verdicts_from_json(told: Sequence[Sequence[Any]]) -> tuple[Verdict, ...]:
    """What `verdicts_to_json` gave."""
    return tuple(Verdict(*fields) for fields in told)
