"""The ranking of images for one prompt: every judged pair with its verdict, the reasons, and its JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mlxpref.data.find_images import Skipped
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.preferences import ImageLike
from mlxpref.ranking.bradley_terry import RankedImage, StrengthRanking
from mlxpref.text import short_names
from mlxpref.verdict import Verdict

Ending = Literal["done", "settled", "interrupted"]
"""The reason for the end: the budget was spent, the top was settled, or the user interrupted."""


@dataclass(frozen=True)
class JudgedPair:
    """Two images by number, and the judge's verdict."""

    a: int
    b: int
    verdict: PairVerdict


@dataclass(frozen=True)
class Reason:
    """The reasoning about two images by number, in the order shown."""

    first: int
    second: int
    text: str


@dataclass(frozen=True)
class Ranking:
    """The images of one prompt in order, with every judged pair.

    The i-th image of `images` is number i in `pairs` and in `strengths`. An interval says how precisely the pairs tell
    this judge's own full ranking, not what people think.
    """

    prompt: str
    images: tuple[ImageLike, ...]
    strengths: StrengthRanking
    pairs: tuple[JudgedPair, ...]
    seconds: float
    model: str = ""
    adapter: Path | None = None
    vision_runs: int = 0
    tokens: int = 0
    skipped: tuple[Skipped, ...] = ()
    planned: int = 0
    ending: Ending = "done"
    recalled: int = 0
    warnings: tuple[str, ...] = ()

    def name(self, index: int) -> str:
        """The name of an image: its path, or its number where it came from memory."""
        return name_of(self.images, index)

    @cached_property
    def short_names(self) -> list[str]:
        """The names of the images for people: the last parts of their paths, as few as tell them apart."""
        return short_names([self.name(i) for i in range(len(self.images))])

    def reason(self, image: RankedImage) -> Reason | None:
        """The reasoning that most clearly explains an image's place.

        For the upper half from a comparison that it won, for the others from a lost one; None without reasoning.
        """
        upper = image.rank <= (len(self.images) + 1) // 2
        clearest, reason = 0.0, None
        for pair in self.pairs:
            if image.index not in (pair.a, pair.b):
                continue
            p_win = pair.verdict.p_a if pair.a == image.index else 1 - pair.verdict.p_a
            clearness = p_win if upper else 1 - p_win
            for first, second, verdicts in _orders(pair):
                text = _clearest(verdicts, first_wins=(first == image.index) == upper)
                if text and clearness > clearest:
                    clearest, reason = clearness, Reason(first, second, text)
        return reason

    def reason_text(self, image: RankedImage) -> str | None:
        """The reason for an image's place, with its position and its opponent."""
        reason = self.reason(image)
        if reason is None:
            return None
        place, other = (1, reason.second) if reason.first == image.index else (2, reason.first)
        return f"as image {place} beside {self.short_names[other]}: {reason.text}"

    def to_json(self) -> dict[str, Any]:
        """The ranking as JSON of `rank`."""
        return {
            "prompt": self.prompt,
            "model": self.model,
            "adapter": str(self.adapter) if self.adapter else None,
            "images": [
                {
                    "path": self.name(image.index),
                    **{key: value for key, value in asdict(image).items() if key not in ("index", "tied_with")},
                    "tied_with": [self.name(other) for other in image.tied_with],
                    "reason": self.reason_text(image),
                }
                for image in self.strengths.images
            ],
            "pairs": [{"a": self.name(p.a), "b": self.name(p.b), **p.verdict.to_json()} for p in self.pairs],
            "position_bias": self.strengths.position_bias,
            "position_bias_stderr": self.strengths.position_bias_stderr,
            "warnings": list(self.warnings),
            "remarks": list(self.warnings),  # their earlier name
            "planned_pairs": self.planned,
            "ending": self.ending,
            "recalled": self.recalled,
            "skipped": [{"path": str(s.path), "error": s.error} for s in self.skipped],
            "seconds": round(self.seconds, 3),
            "vision_runs": self.vision_runs,
            "tokens": self.tokens,
        }


def name_of(images: Sequence[ImageLike], index: int) -> str:
    """The name of one of several images: its path, or its number where it came from memory."""
    image = images[index]
    return f"image {index}" if isinstance(image, Image.Image) else str(image)


def _orders(pair: JudgedPair) -> tuple[tuple[int, int, tuple[Verdict, ...]], ...]:
    """For each order of a pair: the first image's number, the second's, and the verdicts."""
    return (
        (pair.a, pair.b, pair.verdict.a_shown_first),
        (pair.b, pair.a, pair.verdict.a_shown_second),
    )


def _clearest(verdicts: Sequence[Verdict], first_wins: bool) -> str | None:
    """The reasoning of the clearest verdict that the first image wins, or loses; None if there is none."""
    reasons = [
        (p if first_wins else 1 - p, verdict.reasoning)
        for verdict in verdicts
        if (p := verdict.p_first("soft")) is not None and verdict.reasoning
    ]
    clearness, text = max(reasons, key=lambda item: item[0], default=(0.0, None))
    return text if clearness > 0.5 else None
