"""The ranking of images for one prompt: every judged pair with its verdict, the reasons, and its JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from mlxpref.data.find_images import Skipped
from mlxpref.data.images import load_image
from mlxpref.data.prompts import group_title
from mlxpref.judge.notebook import ranking_html
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.preferences import ImageLike
from mlxpref.ranking.bradley_terry import RankedImage, StrengthRanking
from mlxpref.text import short_names, shorten
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
class RankingEntry(RankedImage):
    """An image's place in a ranking, with the image itself."""

    ranking: "Ranking" = field(compare=False)

    def __repr__(self) -> str:
        return f"RankingEntry(rank={self.rank}, name={shorten(self.short_name)!r}, strength={self.strength:+.2f})"

    @property
    def path(self) -> Path | None:
        """The image's file; None for an image from memory or from an archive."""
        image = self.ranking.images[self.index]
        return image if isinstance(image, Path) else None

    @property
    def image(self) -> Image.Image:
        """The picture: the one from memory, or read from the file; DataError where that is gone."""
        image = self.ranking.images[self.index]
        return image if isinstance(image, Image.Image) else load_image(image)

    @property
    def name(self) -> str:
        """The image's path, or its number among the images that were given."""
        return self.ranking.name(self.index)

    @property
    def short_name(self) -> str:
        """The last parts of the path, as few as tell the images apart."""
        return self.ranking.short_names[self.index]

    @property
    def reason(self) -> str | None:
        """The reason for this place, with the image's position and its opponent; None without reasoning."""
        reason = self.ranking.reason(self)
        if reason is None:
            return None
        place, other = (1, reason.second) if reason.first == self.index else (2, reason.first)
        return f"as image {place} beside {self.ranking.short_names[other]}: {reason.text}"

    def to_json(self) -> dict[str, Any]:
        """The image's part of the JSON of `rank`."""
        numbers = [f.name for f in fields(RankedImage) if f.name not in ("index", "tied_with")]
        return {
            "path": self.name,
            **{name: getattr(self, name) for name in numbers},
            "tied_with": [self.ranking.name(other) for other in self.tied_with],
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)  # it holds arrays and pictures
class Ranking(Sequence[RankingEntry]):
    """The images of one prompt in order, with every judged pair: a sequence of its entries, best first.

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
    criterion: str = ""
    similar_to: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, place: int) -> RankingEntry: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[RankingEntry]: ...

    def __getitem__(self, place: int | slice) -> RankingEntry | Sequence[RankingEntry]:
        return self._entries[place]

    def __repr__(self) -> str:
        best = ", ".join(f"{shorten(entry.short_name, 24)} {entry.strength:+.2f}" for entry in self[:3])
        ending = ", interrupted" if self.ending == "interrupted" else ""
        return f"Ranking({shorten(self.title)}, {len(self)} images{ending}, best first: {best})"

    def _repr_html_(self) -> str:
        return ranking_html(self)

    @property
    def title(self) -> str:
        """What the images were ranked for; see `group_title`."""
        return group_title(self.prompt, self.criterion, self.similar_to)

    def name(self, index: int) -> str:
        """The name of an image: its path, or its number where it came from memory."""
        return self._names[index]

    @cached_property
    def short_names(self) -> list[str]:
        """The names of the images for people: the last parts of their paths, as few as tell them apart."""
        return short_names(self._names)

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

    @cached_property
    def _names(self) -> list[str]:
        return image_names(self.images)

    @cached_property
    def _entries(self) -> list[RankingEntry]:
        return [RankingEntry(**vars(image), ranking=self) for image in self.strengths.images]

    def to_json(self) -> dict[str, Any]:
        """The ranking as JSON of `rank`."""
        return {
            "prompt": self.prompt,
            "criterion": self.criterion or None,
            "group": self.similar_to or None,
            "model": self.model,
            "adapter": str(self.adapter) if self.adapter else None,
            "images": [entry.to_json() for entry in self],
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


def interrupt_with(ranking: Ranking) -> KeyboardInterrupt:
    """An interrupt that has the ranking until then as its `ranking`.

    It is of no class of its own: a program that a subclass ends does not end as one that Ctrl-C ends, and shells go on.
    """
    done = f"interrupted after {len(ranking.pairs)} of {ranking.planned} pairs"
    interrupt = KeyboardInterrupt(f"{done}; this exception's `ranking` is the one by these")
    vars(interrupt)["ranking"] = ranking
    return interrupt


def image_names(images: Sequence[ImageLike]) -> list[str]:
    """The names of images: their paths, the number after one that is given twice, the number alone in memory."""
    counts = Counter(image for image in images if not isinstance(image, Image.Image))
    names = []
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            names.append(f"image {number}")
        else:
            names.append(f"{image} (image {number})" if counts[image] > 1 else str(image))
    return names


def _orders(pair: JudgedPair) -> tuple[tuple[int, int, tuple[Verdict, ...]], ...]:
    """For each order of a pair: the first image's number, the second's, and the verdicts."""
    return ((pair.a, pair.b, pair.verdict.a_shown_first), (pair.b, pair.a, pair.verdict.a_shown_second))


def _clearest(verdicts: Sequence[Verdict], first_wins: bool) -> str | None:
    """The reasoning of the clearest verdict that the first image wins, or loses; None if there is none."""
    reasons = [
        (p if first_wins else 1 - p, verdict.reasoning)
        for verdict in verdicts
        if (p := verdict.p_first("soft")) is not None and verdict.reasoning
    ]
    clearness, text = max(reasons, key=lambda item: item[0], default=(0.0, None))
    return text if clearness > 0.5 else None
