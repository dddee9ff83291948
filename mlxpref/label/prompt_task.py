"""The images of one prompt that a rater is asked about, and the answers so far."""

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
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.pair_selection import pair_budget

Choice = Literal["first", "second", "tie", "skip"]
"""A click: a place on the screen, or neither."""
_MIN_PROMPTS = 5  # fewer prompts hold out single pairs instead of whole prompts


@dataclass
class PromptTask:
    """The images of a prompt, and the active records by pair.

    `names` are the images' paths as in the file, sorted, so that a of a pair is the smaller number. `budget` is the
    planned number of pairs, `held_out` the share of them that measures: 0 or 1 where whole prompts are held out.
    """

    prompt: str
    images: tuple[Path, ...]
    names: tuple[str, ...]
    budget: int
    held_out: float
    records: dict[tuple[int, int], list[LabelRecord]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return pair_budget(len(self.names), "all")

    def split(self, a: int, b: int) -> str:
        """The use of a pair, always the same: to learn from, or to measure with."""
        if records := self.records.get((a, b)):
            return records[0].split  # even if another share is held out now
        return TEST if _hash_share(self.prompt, self.names[a], self.names[b]) < self.held_out else TRAIN

    def outcomes(self) -> list[PairOutcome]:
        """The answers as a ranking needs them: the mean of each order."""
        return [
            PairOutcome(a, b, _mean_share(records, "a"), _mean_share(records, "b"))
            for (a, b), records in self.records.items()
            if any(record.p_people is not None for record in records)
        ]


def prompt_tasks(
    groups: Sequence[PromptGroup],
    folder: Path,
    pairs: int | Literal["all"] | None,
    held_out: float,
    records: Iterable[LabelRecord],
) -> list[PromptTask]:
    """A task for each prompt, still without records; names are relative to `folder`, where the records are.

    `pairs` are planned for each prompt; by default two an image, and for all prompts together at least as many as a
    usual rater needs. A share of `held_out` measures: whole prompts where there are five or more (the split of earlier
    records of a prompt stays), else single pairs.
    """
    shares = _held_out_prompts([group.prompt for group in groups], held_out, records)
    root = os.path.realpath(folder)  # the folder and the pictures may be behind links
    factor = 1.0
    if pairs is None:
        pairs_in_all = enough((), held_out).needed or 0
        factor = max(1.0, pairs_in_all / sum(pair_budget(len(group.images)) for group in groups))
    tasks = []
    for group in groups:
        pairs_of_names = sorted((os.path.relpath(os.path.realpath(image), root), image) for image in group.images)
        names, images = zip(*pairs_of_names, strict=True)
        pairs_of_task = pairs or math.ceil(factor * pair_budget(len(names)))
        share = shares.get(group.prompt, held_out)
        tasks.append(PromptTask(group.prompt, images, names, pair_budget(len(names), pairs_of_task), share))
    return tasks


def answer_for(choice: Choice, a_first: bool) -> Answer:
    """A choice between places as an answer about a and b."""
    if choice == "tie" or choice == "skip":
        return choice
    return "a" if share_for_first(float(choice == "first"), a_first) == 1 else "b"


def _held_out_prompts(prompts: Sequence[str], share: float, records: Iterable[LabelRecord]) -> dict[str, float]:
    """1 for prompts that measure, 0 for those to learn from; empty where single pairs are held out."""
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.prompt, set()).add(record.split)
    count = len({*prompts, *splits})
    if count < _MIN_PROMPTS:
        return {}
    shares = {prompt: share if len(kinds) > 1 else float(TEST in kinds) for prompt, kinds in splits.items()}
    measuring = sum(shares.values())
    new_count = round(share * count - measuring) if measuring or not share else max(1, round(share * count))
    new = sorted((prompt for prompt in prompts if prompt not in shares), key=_hash_share)
    return shares | {prompt: float(number < new_count) for number, prompt in enumerate(new)}


def _hash_share(*texts: str) -> float:
    """A number from 0 to 1 that depends on the texts alone."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _mean_share(records: Sequence[LabelRecord], shown_first: str) -> float | None:
    """The mean share for a over the answers of one order; None without answers."""
    shares = [
        record.p_people for record in records if record.shown_first == shown_first and record.p_people is not None
    ]
    return sum(shares) / len(shares) if shares else None
