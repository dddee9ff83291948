"""A labelling: questions, the file of their answers, and what may be said of both so far."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from threading import Lock
from typing import Any

from mlxpref.config import LabelSettings
from mlxpref.data.label_file import LabelFile, LabelRecord
from mlxpref.judge.metrics import share_interval
from mlxpref.label.pictures import Pictures
from mlxpref.label.prompt_task import Choice, PromptTask
from mlxpref.label.questions import Question, Questions
from mlxpref.label.rater import consistency, enough, explained
from mlxpref.ranking.bradley_terry import PairOutcome, rank_images
from mlxpref.report.html import even_ticks, short_names

__all__ = ["LabelSession"]


class LabelSession:
    """What the page shows and does. An answer is on the disk before it counts.

    Images have one number each over all prompts. Methods may be called from several threads.
    """

    def __init__(self, file: LabelFile, sheets: Sequence[PromptTask], settings: LabelSettings) -> None:
        self.file, self.settings = file, settings
        self.questions = Questions(sheets, file.records, settings)
        self.sheets = self.questions.sheets
        self.pictures = Pictures([image for sheet in self.sheets for image in sheet.images])
        self._first = [0, *accumulate(len(sheet.images) for sheet in self.sheets)]
        self._writing, self._ranking = Lock(), Lock()
        self._ranked: dict[int, tuple[int, dict[str, Any]]] = {}

    @property
    def names(self) -> list[str]:
        """What tells the images apart, by their numbers."""
        return short_names([str(image) for image in self.pictures.images])

    def answer(self, number: int, choice: Choice, seconds: float | None) -> bool:
        """Keep an answer to the question that was shown under this number; False if that is no longer asked.

        DataError where it cannot be kept: then nothing has changed.
        """
        with self._writing:
            now, question = self.questions.current()
            if number != now or question is None:
                return False
            self._keep(self.questions.answer(choice, seconds, _now()))
            return True

    def undo(self, number: int) -> bool:
        """Take back the last answer, if nothing was answered since the page with this number; DataError as above."""
        with self._writing:
            record = self.questions.undo(_now())
            if record is None or number != record.number:
                return False
            self._keep(record)
            return True

    def state(self) -> dict[str, Any]:
        """What the page needs for the next question, and how far the work is."""
        (number, question), upcoming = self.questions.current(), self.questions.upcoming()
        return {
            "number": number,
            "question": self._numbers(question) if question else None,
            "sheet": question.sheet if question else None,
            "upcoming": self._numbers(upcoming) if upcoming else [],
            "undo": bool(self.questions.standing),
            **self.progress(),
        }

    def progress(self) -> dict[str, Any]:
        """How far the work is, what is known of the rater, and whether there is enough to train."""
        said = self.questions.standing
        asked, every = sum(len(sheet.asked) for sheet in self.sheets), sum(sheet.every for sheet in self.sheets)
        chosen = [record.answer == record.shown_first for record in said if record.answer in ("a", "b")]
        repeated, found = consistency(said), enough(said, self.settings.held_out)
        return {
            "asked": asked,
            "planned": sum(sheet.budget for sheet in self.sheets),
            "every": every,
            "answers": sum(record.p_a is not None for record in said),
            "ties": sum(record.answer == "tie" for record in said),
            "skips": sum(record.answer == "skip" for record in said),
            "repeats": _share(repeated.agreed, repeated.repeats),
            "first": _share(sum(chosen), len(chosen)),
            "enough": {
                "reached": found.reached,
                "decided": found.decided,
                "needed": found.needed,
                "held_out": found.held_out,
                "held_out_needed": found.held_out_needed,
                "reliability": found.reliability,
                "error": None if math.isnan(found.error) else found.error,
                "why": explained(found, repeated, every - asked),
            },
        }

    def ranking(self, sheet: int) -> dict[str, Any]:
        """The images of a prompt by the answers so far, with intervals, and round numbers for their axis."""
        with self._ranking:  # of 1,000 images it takes seconds: one at a time
            number, outcomes = self.questions.outcomes(sheet)
            if self._ranked.get(sheet, (-1, {}))[0] != number:
                self._ranked[sheet] = number, self._ranking_of(sheet, outcomes)
            return self._ranked[sheet][1]

    def _ranking_of(self, sheet: int, outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
        images = rank_images(len(self.sheets[sheet].names), outcomes).images
        first = self._first[sheet]
        return {
            "sheet": sheet,
            "ticks": even_ticks(min(image.low for image in images), max(image.high for image in images)),
            "images": [
                {
                    "image": first + image.index,
                    "rank": image.rank,
                    "strength": image.strength,
                    "low": image.low,
                    "high": image.high,
                    "p_best": image.p_best,
                    "wins": image.wins,
                    "pairs": image.pairs,
                    "tied_with": [first + other for other in image.tied_with],
                }
                for image in images
            ],
        }

    def _keep(self, record: LabelRecord) -> None:
        self.file.append(record)
        self.questions.take(record)

    def _numbers(self, question: Question) -> list[int]:
        return [self._first[question.sheet] + place for place in question.shown]

    def to_json(self) -> dict[str, Any]:
        """What `mlxpref label --json` prints at its end."""
        return {
            "output": str(self.file.path),
            **self.progress(),
            "rankings": [
                {"prompt": sheet.prompt, "images": [self._named(image) for image in self.ranking(number)["images"]]}
                for number, sheet in enumerate(self.sheets)
            ],
        }

    def _named(self, image: Mapping[str, Any]) -> dict[str, Any]:
        def path(number: int) -> str:
            return str(self.pictures.images[number])

        rest = {name: value for name, value in image.items() if name not in ("image", "tied_with")}
        return {"path": path(image["image"]), **rest, "tied_with": [path(other) for other in image["tied_with"]]}


def _share(count: int, of: int) -> dict[str, float]:
    low, high = share_interval(count, of)
    return {"count": count, "of": of, "low": low, "high": high}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
