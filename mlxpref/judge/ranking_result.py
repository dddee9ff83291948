"""The ranking of images for one prompt: every judged pair with its verdict, the reasons, and its JSON."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from mlxpref.data.find_images import Skipped
from mlxpref.data.image_stamp import absolute_name, stamp_of
from mlxpref.data.images import load_image
from mlxpref.data.prompts import group_title
from mlxpref.judge.notebook import ranking_html
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.preferences import ImageLike
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.strength_ranking import (
    ALL_ASKED,
    INTERVAL_MEANING,
    RankedImage,
    StrengthRanking,
    unbiased_preference,
)
from mlxpref.text import short_names, shorten
from mlxpref.verdict import Verdict

Ending = Literal["done", "settled", "interrupted"]
"""The reason for the end: the budget was spent, the top was settled, or the user interrupted."""
BY_SCORES = "each image by itself, once"
_ONE_SCORE = (
    "Each image has one score of this judge, so there are no intervals; a score does not say what people think."
)
"""The orders of a judge of single images, which has none."""

_ORDERS = (("a first", "a_shown_first"), ("b first", "a_shown_second"))


@dataclass(frozen=True)
class JudgedPair:
    """Two images by number, and the judge's verdict, with thinking or without."""

    a: int
    b: int
    verdict: PairVerdict
    think: bool = False


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
    def score(self) -> float | None:
        """The score of a judge of single images; None of any other, and where none could be read."""
        return self.ranking.scores[self.index] if self.ranking.scores else None

    @property
    def reason(self) -> str | None:
        """The reason for this place, with the image's position and its opponent; None without reasoning."""
        return self.reason_beside(self.ranking.short_names.__getitem__)

    def reason_beside(self, name_of: Callable[[int], str]) -> str | None:
        """The same with the opponent's name by its number."""
        reason = self.ranking.reason(self)
        if reason is None:
            return None
        if self.ranking.is_by_scores:  # what was said of this image alone
            return reason.text
        place, other = (1, reason.second) if reason.first == self.index else (2, reason.first)
        return f"as image {place} beside {name_of(other)}: {reason.text}"

    def to_json(self) -> dict[str, Any]:
        """The image's part of the JSON of `rank`."""
        numbers = [f.name for f in fields(RankedImage) if f.name not in ("index", "tied_with")]
        image = self.ranking.images[self.index]
        # `mlxpref pairs` may read this in another folder, or when another picture has the name.
        is_file = not isinstance(image, Image.Image)
        file = {"file": absolute_name(image), "stamp": stamp_of(image)} if is_file else {}  # type: ignore[arg-type]
        return {
            "path": self.name,
            **file,
            **{name: getattr(self, name) for name in numbers},
            "tied_with": [self.ranking.name(other) for other in self.tied_with],
            **({"score": self.score} if self.ranking.is_by_scores else {}),
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)  # it holds arrays and pictures
class Ranking(Sequence[RankingEntry]):
    """The images of one prompt in order, with every judged pair: a sequence of its entries, best first.

    The i-th image of `images` is number i in `pairs` and in `strengths`. `pairs` are those with thinking where a pair
    was judged in both ways, `replaced` these pairs' answers without thinking: the strengths come from all of them.
    `modes` says of every instrument of the fit whether it is with thinking, `known` what earlier rankings showed of its
    noise, `orders` in which orders pairs were shown and why; `planned` and `comparisons` count what was to be asked and
    what was. `scores` are those of a judge of single images. What an interval means: `INTERVAL_MEANING`.
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
    replaced: tuple[JudgedPair, ...] = ()
    modes: tuple[bool, ...] = (False,)
    orders: str = ""
    known: tuple[Noise | None, ...] = (None,)
    planned: int = 0
    comparisons: int = 0
    ending: Ending = "done"
    recalled: int = 0
    warnings: tuple[str, ...] = ()
    criterion: str = ""
    similar_to: str = ""
    scores: tuple[float | None, ...] = ()

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

    @property
    def is_by_scores(self) -> bool:
        """Whether a judge of single images made it."""
        return self.orders == BY_SCORES

    def name(self, index: int) -> str:
        """The name of an image: its path, or its number where it came from memory."""
        return self._names[index]

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of each image by its number."""
        return [image.rank for image in sorted(self.strengths.images, key=lambda image: image.index)]

    @cached_property
    def pairs_of(self) -> list[list[JudgedPair]]:
        """The judged pairs of each image by its number."""
        pairs: list[list[JudgedPair]] = [[] for _ in self.images]
        for pair in self.pairs:
            pairs[pair.a].append(pair)
            pairs[pair.b].append(pair)
        return pairs

    @cached_property
    def short_names(self) -> list[str]:
        """The names of the images for people: the last parts of their paths, as few as tell them apart."""
        return short_names(self._names)

    def preference(self, pair: JudgedPair) -> float:
        """The soft preference for a; of one order without the judge's position bias."""
        if self.is_by_scores:
            return pair.verdict.p_a
        bias = self._biases.get(pair.think, 0.0)  # none where nothing was readable
        return unbiased_preference(pair.verdict.outcome(pair.a, pair.b), bias)

    @property
    def meaning(self) -> str:
        """What the intervals mean, and whether the judge has said all that it can say."""
        if self.is_by_scores:
            return _ONE_SCORE
        orders = [order for p in self.pairs for order in (p.verdict.a_shown_first, p.verdict.a_shown_second)]
        count = len(self)
        is_all = count > 2 and len(self.pairs) == count * (count - 1) // 2 and not self.replaced
        # One completion is greedy: asked again, the judge would say the same.
        return f"{INTERVAL_MEANING} {ALL_ASKED}" if is_all and {len(o) for o in orders} == {1} else INTERVAL_MEANING

    def reason(self, image: RankedImage) -> Reason | None:
        """The reasoning that most clearly explains an image's place.

        For the upper half from a comparison that it won, for the others from a lost one; where there is none of these,
        from another one. None without reasoning.
        """
        upper = image.rank <= (len(self.images) + 1) // 2
        return self._reason(image, won=upper) or self._reason(image, won=not upper)

    def _reason(self, image: RankedImage, won: bool) -> Reason | None:
        """The clearest reasoning of a comparison that an image won, or lost."""
        clearest, reason = 0.0, None
        for pair in self.pairs_of[image.index]:
            p_a = self.preference(pair)
            p_win = p_a if pair.a == image.index else 1 - p_a
            clearness = p_win if won else 1 - p_win
            for first, second, verdicts in _orders(pair):
                is_first = first == image.index
                text = _clearest(verdicts, is_first == won, is_first)
                if text and clearness > clearest:
                    clearest, reason = clearness, Reason(first, second, text)
        return reason

    def _pair_to_json(self, pair: JudgedPair) -> dict[str, Any]:
        orders = [name for name, order in _ORDERS if getattr(pair.verdict, order)]
        return {
            "a": self.name(pair.a),
            "b": self.name(pair.b),
            **pair.verdict.to_json(),
            "p_a": self.preference(pair),
            "think": pair.think,
            "asked": orders,
        }

    @cached_property
    def _biases(self) -> dict[bool, float]:
        return {think: fit.position_bias for think, fit in zip(self.modes, self.strengths.fit.instruments, strict=True)}

    @cached_property
    def _names(self) -> list[str]:
        return image_names(self.images)

    @cached_property
    def _entries(self) -> list[RankingEntry]:
        return [RankingEntry(**vars(image), ranking=self) for image in self.strengths.images]

    def to_json(self) -> dict[str, Any]:
        """The ranking as JSON of `rank`."""
        return {name: list(value) if isinstance(value, Iterator) else value for name, value in self.lazy_json().items()}

    def lazy_json(self) -> dict[str, Any]:
        """The same, but images and pairs are iterators, which make each as it is written."""
        return {
            "prompt": self.prompt,
            "criterion": self.criterion or None,
            "group": self.similar_to or None,
            "model": self.model,
            "adapter": str(self.adapter) if self.adapter else None,
            "images": (entry.to_json() for entry in self),
            "pairs": map(self._pair_to_json, self.pairs),
            "replaced": map(self._pair_to_json, self.replaced),
            "position_bias": self.strengths.position_bias,
            "position_bias_stderr": self.strengths.position_bias_stderr,
            "warnings": list(self.warnings),
            "remarks": list(self.warnings),  # their earlier name
            "instruments": [
                {"think": think, **asdict(instrument), "known": asdict(known) if known else None}
                for think, instrument, known in zip(self.modes, self.strengths.fit.instruments, self.known, strict=True)
            ],
            "orders": self.orders,
            "intervals": self.meaning,
            "planned_comparisons": self.planned,
            "comparisons": self.comparisons,
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
    done = f"interrupted after {ranking.comparisons} of {ranking.planned} comparisons"
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


def _clearest(verdicts: Sequence[Verdict], first_wins: bool, of_first: bool) -> str | None:
    """The reasoning of the clearest verdict that the first image wins, or loses; None if there is none.

    A judge of single images gives reasons for each alone: those of the first image, or of the second one.
    """
    reasons = [
        (p if first_wins else 1 - p, said.reasoning)
        for verdict in verdicts
        for said in [verdict.readings[0 if of_first else 1] if verdict.readings else verdict]
        if (p := verdict.p_first("soft")) is not None and said.reasoning
    ]
    clearness, text = max(reasons, key=lambda item: item[0], default=(0.0, None))
    return text if clearness > 0.5 else None
