"""A labelling: its questions, pictures, file of answers, and the results so far."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from mlxpref.config import LabelSettings
from mlxpref.data.images import load_image
from mlxpref.data.label_file import LabelFile, LabelRecord
from mlxpref.data.thumbnails import thumbnail
from mlxpref.label.prompt_task import Choice, PromptTask
from mlxpref.label.questions import Question, Questions
from mlxpref.label.rater import consistency, enough, explain
from mlxpref.lru import LRU
from mlxpref.ranking.intervals import share_interval
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report.html import even_ticks
from mlxpref.text import short_names

_SIDE = 2048  # at most: the share of a large screen for one of two pictures
_SMALL_SIDE = 160
_CACHED_BYTES = 128 * 2**20


class Pictures:
    """Images by number for the page: upright pixels on white, without EXIF, name or anything else of the file.

    They are encoded on request; the last ones stay in memory.
    """

    def __init__(self, images: Sequence[Path]) -> None:
        self.images = tuple(images)
        self._encoded: LRU[int, bytes] = LRU(_CACHED_BYTES, len)

    def whole(self, number: int) -> bytes:
        """A picture as PNG, exact to the pixel up to `_SIDE`, because a rater judges noise and blocks, too.

        DataError where the file can no longer be read.
        """
        content = self._encoded.get(number)
        if content is None:
            picture = load_image(self.images[number])
            picture.thumbnail((_SIDE, _SIDE))
            file = io.BytesIO()
            picture.save(file, "PNG", compress_level=1)
            content = file.getvalue()
            self._encoded.put(number, content)
        return content

    def small(self, number: int) -> bytes:
        """A picture for a list, as WebP; DataError as in `whole`."""
        return thumbnail(self.images[number], _SMALL_SIDE).content


class LabelSession:
    """The page's content and actions. An answer is on the disk before it counts.

    Images are numbered over all prompts. Several threads may call the methods.
    """

    def __init__(self, file: LabelFile, tasks: Sequence[PromptTask], settings: LabelSettings) -> None:
        self.file, self.settings = file, settings
        self.questions = Questions(tasks, file.records, settings)
        self.tasks = self.questions.tasks
        self.pictures = Pictures([image for task in self.tasks for image in task.images])
        self._first = [0, *accumulate(len(task.images) for task in self.tasks)]  # number of each task's first image
        self._writing, self._ranking = Lock(), Lock()
        self._rankings: dict[int, tuple[int, dict[str, Any]]] = {}

    @property
    def names(self) -> list[str]:
        """Short names of the images, by their numbers."""
        return short_names([str(image) for image in self.pictures.images])

    def answer(self, number: int, choice: Choice, seconds: float | None) -> bool:
        """Write an answer to the question with this number; False if the question is no longer current.

        DataError if it cannot be written; nothing changes then.
        """
        with self._writing:
            current, question = self.questions.current()
            if number != current or question is None:
                return False
            self._keep(self.questions.answer(choice, seconds, _now()))
            return True

    def undo(self, number: int) -> bool:
        """Undo the last answer, unless another one came after the page with this number; DataError as in `answer`."""
        with self._writing:
            record = self.questions.undo(_now())
            if record is None or number != record.number:
                return False
            self._keep(record)
            return True

    def state(self) -> dict[str, Any]:
        """The page's data for the next question, and the progress."""
        (number, question), upcoming = self.questions.current(), self.questions.upcoming()
        return {
            "number": number,
            "question": self._numbers(question) if question else None,
            "task": question.task if question else None,
            "upcoming": self._numbers(upcoming) if upcoming else [],
            "undo": bool(self.questions.active),
            **self.progress(),
        }

    def progress(self) -> dict[str, Any]:
        """The progress, the rater's consistency, and whether there are enough answers to train."""
        records = self.questions.active
        asked_count, total = sum(len(task.records) for task in self.tasks), sum(task.total for task in self.tasks)
        firsts = [record.answer == record.shown_first for record in records if record.answer in ("a", "b")]
        repeated, target = consistency(records), enough(records, self.settings.held_out)
        return {
            "asked": asked_count,
            "planned": sum(task.budget for task in self.tasks),
            "every": total,
            "answers": sum(record.p_people is not None for record in records),
            "ties": sum(record.answer == "tie" for record in records),
            "skips": sum(record.answer == "skip" for record in records),
            "repeats": _share(repeated.agreed, repeated.repeats),
            "first": _share(sum(firsts), len(firsts)),
            "enough": {
                "reached": target.reached,
                **asdict(target),
                "error": None if math.isnan(target.error) else target.error,
                "why": explain(target, repeated, total - asked_count),
            },
        }

    def ranking(self, task: int) -> dict[str, Any]:
        """The images of a prompt by the answers so far, with intervals, and round numbers for their axis."""
        with self._ranking:  # takes seconds for 1,000 images: one at a time
            number, outcomes = self.questions.outcomes(task)
            if self._rankings.get(task, (-1, {}))[0] != number:
                self._rankings[task] = number, self._rank(task, outcomes)
            return self._rankings[task][1]

    def _rank(self, task: int, outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
        images = rank_images(len(self.tasks[task].names), outcomes).images
        first = self._first[task]
        fields = ("rank", "strength", "low", "high", "p_best", "wins", "pairs")
        return {
            "task": task,
            "ticks": even_ticks(min(image.low for image in images), max(image.high for image in images)),
            "images": [
                {
                    "image": first + image.index,
                    **{name: getattr(image, name) for name in fields},
                    "tied_with": [first + other for other in image.tied_with],
                }
                for image in images
            ],
        }

    def _keep(self, record: LabelRecord) -> None:
        self.file.append(record)
        self.questions.take(record)

    def _numbers(self, question: Question) -> list[int]:
        """The numbers of the two images over all prompts, in the order shown."""
        return [self._first[question.task] + place for place in question.shown]

    def to_json(self) -> dict[str, Any]:
        """The JSON that `mlxpref label --json` prints at its end."""
        paths = [str(image) for image in self.pictures.images]
        rankings = []
        for number, task in enumerate(self.tasks):
            images = [
                {
                    "path": paths[image["image"]],
                    **{name: value for name, value in image.items() if name != "image"},
                    "tied_with": [paths[other] for other in image["tied_with"]],
                }
                for image in self.ranking(number)["images"]
            ]
            rankings.append({"prompt": task.prompt, "images": images})
        return {"output": str(self.file.path), **self.progress(), "rankings": rankings}


def _share(count: int, of: int) -> dict[str, float]:
    low, high = share_interval(count, of)
    return {"count": count, "of": of, "low": low, "high": high}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
