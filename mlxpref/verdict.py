"""A verdict: one completion's answer about the images that it was shown."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from mlxpref.text import shorten

Strategy = Literal["soft", "select", "score"]
STRATEGIES: tuple[Strategy, ...] = ("soft", "select", "score")


@dataclass(frozen=True)
class Verdict:
    """One completion's answer: its text, and the probabilities of the labels at its answer position.

    A label's probability is the sum over its token variants. All are 0 if the completion did not reach the position;
    the verdict is then unreadable. `closed` means that the completion ran out of tokens and got an appended end of
    reasoning. `tokens` is the number of written tokens. `reasoning` are the words before the answer, `written` is the
    preference for the first image in the written answer, from 0 to 1, None if there is none, and `well_formed` says
    whether the completion has the form of the judge's profile. The answer begins at the character `answer_start`, after
    `answer_tokens` written tokens; None if there is none. `score` is that of a judge of single images, whose
    `p_label_first` is the probability of all its levels; `readings` are two such verdicts that stand for a comparison.
    """

    text: str
    p_label_first: float = 0.0
    p_label_second: float = 0.0
    closed: bool = False
    tokens: int = 0
    p_label_tie: float = 0.0
    reasoning: str = ""
    written: float | None = None
    well_formed: bool = False
    answer_start: int | None = None
    answer_tokens: int = 0
    score: float | None = None
    readings: "tuple[Verdict, Verdict] | None" = None

    def __repr__(self) -> str:
        p_first = f"{p:.4f}" if (p := self.p_first("soft")) is not None else "unreadable"
        answer = f"p_first={p_first}" if self.score is None else f"score={self.score:.4f}"
        return f"Verdict({answer}, reasoning={shorten(self.reasoning, 80)!r}, tokens={self.tokens})"

    @property
    def scores(self) -> tuple[float, float] | None:
        """The scores of both images by a judge of single images; None for any other judge, and where one is missing."""
        if self.readings is None:
            return None
        first, second = (reading.score for reading in self.readings)
        return None if first is None or second is None else (first, second)

    @property
    def label_mass(self) -> float:
        """The probability of all labels together; the rest is on tokens that are no answer."""
        return self.p_label_first + self.p_label_second + self.p_label_tie

    def p_first(self, strategy: Strategy) -> float | None:
        """The preference for the first image, from 0 to 1, by a strategy; None for an unreadable verdict.

        The probability of a tie counts half for each image.
        """
        if strategy != "soft":
            return self.written
        if self.label_mass <= 0 or self.score is not None:
            return None
        return (self.p_label_first + self.p_label_tie / 2) / self.label_mass


def verdicts_to_json(verdicts: Sequence[Verdict]) -> list[list[Any]]:
    """Verdicts as lists, exact in JSON."""
    return [list(astuple(verdict)) for verdict in verdicts]


def verdicts_from_json(rows: Sequence[Sequence[Any]]) -> tuple[Verdict, ...]:
    """The verdicts in lists of `verdicts_to_json`."""
    return tuple(Verdict(*row) for row in rows)
