"""The images of one prompt that a rater is asked about, and what was answered."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlxpref.data.label_file import TEST, TRAIN, Answer, LabelRecord
from mlxpref.data.prompts import PromptGroup
from mlxpref.label.rater import enough
from mlxpref.preferences import share_for_first
from mlxpref.ranking.bradley_terry import PairOutcome
from mlxpref.ranking.pair_selection import pair_budget

__all__ = ["Choice", "PromptTask", "answered", "prompt_tasks"]

Choice = Literal["first", "second", "tie", "skip"]
"""What is clicked: a place on the screen, or neither."""
_PROMPTS_TO_HOLD_OUT = 5
"""From so many prompts on whole ones are held out, of fewer single pairs."""


@dataclass
class PromptTask:
    """The images of a prompt, and the records about each pair of them that was asked, those that stand.

    `names` are the images' paths as they stand in the file, sorted, so that a of a pair is the smaller number. `budget`
    is how many pairs are planned, `held_out` the share of them that measures: 0 or 1 where prompts are held out.
    """

    prompt: str
    images: tuple[Path, ...]
    names: tuple[str, ...]
    budget: int
    held_out: float
    asked: dict[tuple[int, int], list[LabelRecord]] = field(default_factory=dict)

    @property
    def every(self) -> int:
        """How many pairs there are."""
        return pair_budget(len(self.names), "all")

    def split(self, a: int, b: int) -> str:
        """What a pair is for, always the same: to learn from, or to measure with."""
        if said := self.asked.get((a, b)):
            return said[0].split  # whatever share is held out now
        return TEST if _drawn(self.prompt, self.names[a], self.names[b]) < self.held_out else TRAIN

    def outcomes(self) -> list[PairOutcome]:
        """What was answered, as a ranking needs it: the mean of each order."""
        return [
            PairOutcome(a, b, _mean(said, "a"), _mean(said, "b"))
            for (a, b), said in self.asked.items()
            if any(record.p_a is not None for record in said)
        ]


def prompt_tasks(
    groups: Sequence[PromptGroup],
    folder: Path,
    pairs: int | Literal["all"] | None,
    held_out: float,
    records: Iterable[LabelRecord],
) -> list[PromptTask]:
    """A sheet for each prompt, with nothing asked yet; names are relative to `folder`, where the records are kept.

    `pairs` are planned of each, by default two an image, and of all together what is wanted of a usual rater. A share
    of `held_out` measures: whole prompts where there are five or more (what earlier records say of a prompt holds),
    else single pairs.
    """
    shares = _held_out_prompts([group.prompt for group in groups], held_out, records)
    place = os.path.realpath(folder)  # of both: a folder and a picture may be reached through links
    more = 1.0
    if pairs is None:
        wanted = enough((), held_out).needed or 0
        more = max(1.0, wanted / sum(pair_budget(len(group.images)) for group in groups))
    sheets = []
    for group in groups:
        named = sorted((os.path.relpath(os.path.realpath(image), place), image) for image in group.images)
        names, images = zip(*named, strict=True)
        share = shares.get(group.prompt, held_out)
        planned = pairs or math.ceil(more * pair_budget(len(names)))
        sheets.append(PromptTask(group.prompt, images, names, pair_budget(len(names), planned), share))
    return sheets


def answered(choice: Choice, a_first: bool) -> Answer:
    """What a choice says of a and b."""
    if choice == "tie" or choice == "skip":
        return choice
    return "a" if share_for_first(float(choice == "first"), a_first) == 1 else "b"


def _held_out_prompts(prompts: Sequence[str], share: float, records: Iterable[LabelRecord]) -> dict[str, float]:
    """Of each prompt 1 if it measures, 0 if it is learned from; nothing where single pairs are held out."""
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.prompt, set()).add(record.split)
    every = {*prompts, *splits}
    if len(every) < _PROMPTS_TO_HOLD_OUT:
        return {}
    known = {prompt: share if len(found) > 1 else float(TEST in found) for prompt, found in splits.items()}
    measuring = sum(known.values())
    wanted = round(share * len(every) - measuring) if measuring or not share else max(1, round(share * len(every)))
    fresh = sorted((prompt for prompt in prompts if prompt not in known), key=_drawn)
    return known | {prompt: float(number < wanted) for number, prompt in enumerate(fresh)}


def _drawn(*texts: str) -> float:
    """A number from 0 to 1 that texts always draw."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _mean(said: Sequence[LabelRecord], shown_first: str) -> float | None:
    shares = [record.p_a for record in said if record.shown_first == shown_first and record.p_a is not None]
    return sum(shares) / len(shares) if shares else None
