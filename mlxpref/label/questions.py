"""What a rater is asked next: pairs that tell most, now and then an earlier one in swapped order.

Everything follows from the records that stand: who opens the file again goes on where it ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import NamedTuple

import numpy as np

from mlxpref.config import LabelSettings
from mlxpref.data.label_file import LabelRecord
from mlxpref.label.prompt_task import Choice, PromptTask, answered
from mlxpref.preferences import placed
from mlxpref.ranking.bradley_terry import PairOutcome, fit_strengths
from mlxpref.ranking.pair_selection import next_round

__all__ = ["Question", "Questions"]

_IMAGES_A_PAIR = 16
"""A round has one pair for so many images: answers are dear, but a fit of 1,000 images takes seconds."""
_STRETCH = 4
"""The fewest pairs of a prompt before another one's turn comes: reading prompts takes time."""
_APART = 8
"""How many answers lie between a question and its repeat, so that it is not answered from memory."""


class Question(NamedTuple):
    """A pair of a sheet's images, by their numbers there, as it is shown."""

    sheet: int
    a: int
    b: int
    a_first: bool

    @property
    def shown(self) -> tuple[int, int]:
        """The image that stands first, and the second one."""
        return placed(self.a, self.b, self.a_first)


class Questions:
    """What is asked next, and what an answer becomes.

    One question is the current one until it is answered, whoever looks at it, so that two tabs show the same. Methods
    may be called from several threads; only `refill` takes long, for many images.
    """

    def __init__(self, sheets: Sequence[PromptTask], records: Sequence[LabelRecord], settings: LabelSettings) -> None:
        self.sheets, self._settings = list(sheets), settings
        self._place = {
            (sheet.prompt, name): (number, place)
            for number, sheet in enumerate(self.sheets)
            for place, name in enumerate(sheet.names)
        }
        self._lock, self._filling = Lock(), Lock()
        self._ahead: list[Question] = []
        self._current: Question | None = None
        self.standing: list[LabelRecord] = []
        """The answers and skips that were not taken back, of images that are here."""
        self._number = 1
        for record in records:
            self._count(record)

    def current(self) -> tuple[int, Question | None]:
        """The number that the next record will have, and the question to be answered now.

        An answer to what was shown under another number came too late. None where all pairs were asked.
        """
        while True:
            with self._lock:
                if self._current is None:
                    self._current = self._repeat() or (self._ahead.pop(0) if self._ahead else None)
                if self._current is not None or self._most_open() is None:
                    return self._number, self._current
            self.refill()  # what it finds may be taken by another thread: then once more

    def upcoming(self) -> Question | None:
        """What may well be asked next, so that its pictures can be fetched."""
        with self._lock:
            return self._ahead[0] if self._ahead else None

    def outcomes(self, number: int) -> tuple[int, list[PairOutcome]]:
        """The number that the next record will have, and what was answered about a sheet until then."""
        with self._lock:
            return self._number, self.sheets[number].outcomes()

    def answer(self, choice: Choice, seconds: float | None, time: str) -> LabelRecord:
        """The record that an answer to the current question becomes; nothing has changed until `take`."""
        assert self._current is not None
        number, a, b, a_first = self._current
        sheet = self.sheets[number]
        return LabelRecord(
            number=self._number,
            prompt=sheet.prompt,
            a=sheet.names[a],
            b=sheet.names[b],
            answer=answered(choice, a_first),
            shown_first="a" if a_first else "b",
            split=sheet.split(a, b),
            seconds=seconds,
            time=time,
        )

    def undo(self, time: str) -> LabelRecord | None:
        """The record that takes back the last answer that stands; None where there is none."""
        if not self.standing:
            return None
        last = self.standing[-1]
        return replace(last, number=self._number, answer="undo", seconds=None, time=time, undoes=last.number)

    def take(self, record: LabelRecord) -> None:
        """Count a record that was written; after an undo, its question is asked again."""
        with self._lock:
            self._count(record)
            before, self._current = self._current, None
            if record.undoes is not None:
                if before and (before.a, before.b) not in self.sheets[before.sheet].asked:
                    self._ahead.insert(0, before)
                places = self._places(record)
                assert places is not None, "only what is here can be taken back here"
                (number, a), (_, b) = places
                self._current = Question(number, a, b, record.shown_first == "a")

    def is_low(self) -> bool:
        """Whether the next round should be chosen in the background, while there is still something to ask."""
        with self._lock:
            return 0 < len(self._ahead) <= self._reserve(self._most_open())

    def refill(self) -> None:
        """Choose the next round of pairs from the answers so far, unless that was done meanwhile."""
        with self._filling:
            with self._lock:
                number = self._most_open()
                if number is None or len(self._ahead) > self._reserve(number):
                    return
                sheet = self.sheets[number]
                outcomes, met = sheet.outcomes(), self._met(number)
            fit = fit_strengths(len(sheet.names), outcomes) if outcomes else None
            pairs = next_round(len(sheet.names), met, fit, self._round(number), self._settings.seed)
            with self._lock:
                self._ahead += [Question(number, a, b, self._draw(number, a, b)) for a, b in pairs]

    def _count(self, record: LabelRecord) -> None:
        self._number = max(self._number, record.number + 1)
        places = self._places(record)
        if places is None:
            return
        (number, a), (_, b) = places
        asked = self.sheets[number].asked
        if record.undoes is None:
            self.standing.append(record)
            asked.setdefault((a, b), []).append(record)
            return
        undone = next((kept for kept in reversed(self.standing) if kept.number == record.undoes), None)
        if undone:
            self.standing = [kept for kept in self.standing if kept is not undone]
            asked[a, b] = [kept for kept in asked[a, b] if kept is not undone]
            if not asked[a, b]:
                del asked[a, b]

    def _places(self, record: LabelRecord) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Sheet and number of a record's images; None where one is not here."""
        a, b = (self._place.get((record.prompt, name)) for name in (record.a, record.b))
        return (a, b) if a and b else None

    def _most_open(self) -> int | None:
        """The sheet that is furthest from its budget and has a pair left to ask."""
        waiting = np.bincount([question.sheet for question in self._ahead], minlength=len(self.sheets)).tolist()
        done = [len(sheet.asked) + more for sheet, more in zip(self.sheets, waiting, strict=True)]
        left = [i for i, sheet in enumerate(self.sheets) if done[i] < sheet.every]
        return min(left, key=lambda i: done[i] / self.sheets[i].budget, default=None)

    def _round(self, number: int) -> int:
        return max(_STRETCH if len(self.sheets) > 1 else 1, len(self.sheets[number].names) // _IMAGES_A_PAIR)

    def _reserve(self, number: int | None) -> int:
        """So few pairs are left that the next round should be chosen: a quarter of one, none where a fit is quick."""
        return 0 if number is None else len(self.sheets[number].names) // _IMAGES_A_PAIR // 4

    def _met(self, number: int) -> set[tuple[int, int]]:
        """The pairs of a sheet that were asked or are about to be."""
        about = [*self._ahead, *([self._current] if self._current else [])]
        return set(self.sheets[number].asked) | {(each.a, each.b) for each in about if each.sheet == number}

    def _draw(self, number: int, a: int, b: int) -> bool:
        """Whether a is shown first: drawn, but always the same for a pair."""
        return bool(np.random.default_rng([self._settings.seed, number, a, b]).random() < 0.5)

    def _repeat(self) -> Question | None:
        """A pair that was answered once and long enough ago, in swapped order, if it is time for one."""
        share = self._settings.repeats
        every = [said for sheet in self.sheets for said in sheet.asked.values()]
        if sum(len(said) - 1 for said in every) >= int(len(every) * share / (1 - share)):
            return None
        candidates = list(self._repeatable())
        if not candidates:
            return None
        draw = np.random.default_rng([self._settings.seed, len(self.standing)])
        number, a, b = candidates[int(draw.integers(len(candidates)))]
        return Question(number, a, b, self.sheets[number].asked[a, b][0].shown_first == "b")

    def _repeatable(self) -> Iterator[tuple[int, int, int]]:
        recent = {id(record) for record in self.standing[-_APART:]}
        for number, sheet in enumerate(self.sheets):
            for (a, b), said in sheet.asked.items():
                if len(said) == 1 and said[0].p_a is not None and id(said[0]) not in recent:
                    yield number, a, b
