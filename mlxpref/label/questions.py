"""The next questions for a rater: the most informative pairs, and some earlier ones in swapped order.

Everything follows from the active records: a rater who opens the file again continues where it ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import NamedTuple

import numpy as np

from mlxpref.config import LabelSettings
from mlxpref.data.label_file import LabelRecord
from mlxpref.label.prompt_task import Choice, PromptTask, answer_for
from mlxpref.preferences import placed
from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.pair_selection import next_round

_IMAGES_PER_PAIR = 16  # a round has one pair for this many images: answers are costly, but a large fit takes seconds
_MIN_STRETCH = 4  # pairs of a prompt before another prompt's turn comes: reading prompts takes time
_REPEAT_DISTANCE = 8  # answers between a question and its repeat, so that the rater has forgotten it


class Question(NamedTuple):
    """A pair of a task's images by number, in the order shown."""

    task: int
    a: int
    b: int
    a_first: bool

    @property
    def shown(self) -> tuple[int, int]:
        """The first image and the second one, as shown."""
        return placed(self.a, self.b, self.a_first)


class Questions:
    """The questions of a labelling, one after the other, and the record that each answer becomes.

    A question stays current until it is answered, so two tabs show the same. Several threads may call the methods; only
    `refill` takes long, for many images.
    """

    def __init__(self, tasks: Sequence[PromptTask], records: Sequence[LabelRecord], settings: LabelSettings) -> None:
        self.tasks, self._settings = list(tasks), settings
        self._place = {
            (task.prompt, name): (number, place)
            for number, task in enumerate(self.tasks)
            for place, name in enumerate(task.names)
        }
        self._lock, self._refilling = Lock(), Lock()
        self._ahead: list[Question] = []
        self._current: Question | None = None
        self.active: list[LabelRecord] = []
        """The answers and skips for these images, without undone ones."""
        self._number = 1
        for record in records:
            self._count(record)

    def current(self) -> tuple[int, Question | None]:
        """The number that the next record will have, and the current question, None after all pairs.

        An answer under another number came too late.
        """
        while True:
            with self._lock:
                if self._current is None:
                    self._current = self._repeat() or (self._ahead.pop(0) if self._ahead else None)
                if self._current is not None or self._most_open() is None:
                    return self._number, self._current
            self.refill()  # another thread may take the new questions: then repeat

    def upcoming(self) -> Question | None:
        """The probable next question, so that the page can fetch its pictures."""
        with self._lock:
            return self._ahead[0] if self._ahead else None

    def outcomes(self, number: int) -> tuple[int, list[PairOutcome]]:
        """The number that the next record will have, and a task's answers so far."""
        with self._lock:
            return self._number, self.tasks[number].outcomes()

    def answer(self, choice: Choice, seconds: float | None, time: str) -> LabelRecord:
        """The record that an answer to the current question becomes; it counts once `take` gets it."""
        assert self._current is not None
        number, a, b, a_first = self._current
        task = self.tasks[number]
        return LabelRecord(
            number=self._number,
            prompt=task.prompt,
            a=task.names[a],
            b=task.names[b],
            answer=answer_for(choice, a_first),
            shown_first="a" if a_first else "b",
            split=task.split(a, b),
            seconds=seconds,
            time=time,
        )

    def undo(self, time: str) -> LabelRecord | None:
        """The record that undoes the last active one, if any."""
        if not self.active:
            return None
        last = self.active[-1]
        return replace(last, number=self._number, answer="undo", seconds=None, time=time, undoes=last.number)

    def take(self, record: LabelRecord) -> None:
        """Count a record that is in the file; an undo makes its question the current one again."""
        with self._lock:
            self._count(record)
            before, self._current = self._current, None
            if record.undoes is not None:
                if before and (before.a, before.b) not in self.tasks[before.task].records:
                    self._ahead.insert(0, before)
                places = self._places(record)
                assert places is not None, "only records of these images can be undone"
                (number, a), (_, b) = places
                self._current = Question(number, a, b, record.shown_first == "a")

    def is_low(self) -> bool:
        """Whether to choose the next round in the background, while there are questions left."""
        with self._lock:
            return 0 < len(self._ahead) <= self._reserve(self._most_open())

    def refill(self) -> None:
        """Choose the next round of pairs from the answers so far, unless another thread did."""
        with self._refilling:
            with self._lock:
                number = self._most_open()
                if number is None or len(self._ahead) > self._reserve(number):
                    return
                task = self.tasks[number]
                outcomes, past_pairs = task.outcomes(), self._asked_or_ahead(number)
            count = len(task.names)
            size = max(_MIN_STRETCH if len(self.tasks) > 1 else 1, count // _IMAGES_PER_PAIR)
            fit = fit_strengths(count, outcomes) if outcomes else None
            pairs = next_round(count, past_pairs, fit, size, self._settings.seed)
            with self._lock:
                self._ahead += [Question(number, a, b, self._draw_order(number, a, b)) for a, b in pairs]

    def _count(self, record: LabelRecord) -> None:
        """Add a record to its task, or remove from it the record that an undo names."""
        self._number = max(self._number, record.number + 1)
        places = self._places(record)
        if places is None:
            return
        (number, a), (_, b) = places
        records = self.tasks[number].records
        if record.undoes is None:
            self.active.append(record)
            records.setdefault((a, b), []).append(record)
            return
        undone = next((each for each in reversed(self.active) if each.number == record.undoes), None)
        if undone:
            self.active = [each for each in self.active if each is not undone]
            records[a, b] = [each for each in records[a, b] if each is not undone]
            if not records[a, b]:
                del records[a, b]

    def _places(self, record: LabelRecord) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Task and number of a record's images; None for other images."""
        a, b = (self._place.get((record.prompt, name)) for name in (record.a, record.b))
        return (a, b) if a and b else None

    def _most_open(self) -> int | None:
        """The task furthest from its budget that has pairs left."""
        ahead = np.bincount([question.task for question in self._ahead], minlength=len(self.tasks)).tolist()
        counts = [len(task.records) + more for task, more in zip(self.tasks, ahead, strict=True)]
        open_tasks = [i for i, task in enumerate(self.tasks) if counts[i] < task.total]
        return min(open_tasks, key=lambda i: counts[i] / self.tasks[i].budget, default=None)

    def _reserve(self, number: int | None) -> int:
        """The number of questions left that starts the next round: a quarter of a round, 0 where a fit is quick."""
        return 0 if number is None else len(self.tasks[number].names) // _IMAGES_PER_PAIR // 4

    def _asked_or_ahead(self, number: int) -> set[tuple[int, int]]:
        """The pairs of a task that were asked or are about to be."""
        ahead = [*self._ahead, *([self._current] if self._current else [])]
        return set(self.tasks[number].records) | {(each.a, each.b) for each in ahead if each.task == number}

    def _draw_order(self, number: int, a: int, b: int) -> bool:
        """Whether a is shown first: random, but always the same for a pair."""
        return bool(np.random.default_rng([self._settings.seed, number, a, b]).random() < 0.5)

    def _repeat(self) -> Question | None:
        """A pair with one answer, given long enough ago, in swapped order, if it is time for a repeat."""
        share = self._settings.repeats
        counts = [len(records) for task in self.tasks for records in task.records.values()]
        if sum(counts) - len(counts) >= int(len(counts) * share / (1 - share)):
            return None
        candidates = list(self._repeatable())
        if not candidates:
            return None
        draw = np.random.default_rng([self._settings.seed, len(self.active)])
        number, a, b = candidates[int(draw.integers(len(candidates)))]
        return Question(number, a, b, self.tasks[number].records[a, b][0].shown_first == "b")

    def _repeatable(self) -> Iterator[tuple[int, int, int]]:
        """Task and images of the pairs with one answer that is not recent."""
        recent = {id(record) for record in self.active[-_REPEAT_DISTANCE:]}
        for number, task in enumerate(self.tasks):
            for (a, b), records in task.records.items():
                if len(records) == 1 and records[0].p_people is not None and id(records[0]) not in recent:
                    yield number, a, b
