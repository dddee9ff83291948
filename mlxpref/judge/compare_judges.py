"""Several judges, and tools that score images, on the same pairs: what each reaches, and how far it is from the first.

Judges come one after the other, so that only one is in memory. A pair that one of them left out counts for none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import mlx.core as mx

from mlxpref.errors import ConfigError
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluation_of_scores, to_judge
from mlxpref.judge.external_scores import prefer_by_score
from mlxpref.judge.strategies import Difference, StrategyComparison, StrategyRow, difference
from mlxpref.preferences import Preference
from mlxpref.text import short_names

T = TypeVar("T")
_NOBODY: dict[str, Any] = {"model": None, "adapter": None, "profile": None, "learned_from": None, "warnings": []}
"""What the JSON of scores says of a judge."""
ImageScores = Mapping[Path, Mapping[str, float]]
"""The scores of images by `image_name`, for each tool by the file that they are from."""


@dataclass(frozen=True)
class JudgeResult:
    """What one judge made of the pairs, by each of its variants.

    `about` is what the JSON says of the judge and its settings, `about_rows` what it says of each variant besides.
    """

    model: str
    adapter: Path | None
    comparison: StrategyComparison
    about: Mapping[str, Any] = field(default_factory=dict)
    about_rows: Sequence[Mapping[str, Any]] = ()

    @property
    def names(self) -> dict[str, str | None]:
        """Model and adapter in JSON."""
        return {"model": self.model, "adapter": str(self.adapter) if self.adapter else None}


@dataclass(frozen=True)
class JudgeRow:
    """A judge by one of its variants, or a tool's scores, where `judged` is None.

    `p_a` are its preferences for a in the order of the comparison's pairs. `minus_first` is its accuracy minus that of
    the first row; None for that one. `name` is the judge's or the tool's, `title` has the variant, too.
    """

    name: str
    evaluation: Evaluation
    p_a: Sequence[float] = field(repr=False)
    judged: StrategyRow | None = field(default=None, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)
    minus_first: Difference | None = None

    @property
    def title(self) -> str:
        return f"{self.name}: {self.judged.variant}" if self.judged else self.name

    def to_json(self) -> dict[str, Any]:
        """The JSON of a row of `eval`; without a judge what only judges have is null."""
        values = self.judged.to_json() if self.judged else self.evaluation.to_json() | {"think": None, "samples": None}
        return values | dict(self.about) | {"minus_first": asdict(self.minus_first) if self.minus_first else None}


@dataclass(frozen=True)
class JudgeComparison(Sequence[JudgeRow]):
    """The rows, judges before scores, and the pairs that count for all of them."""

    rows: tuple[JudgeRow, ...]
    preferences: tuple[Preference, ...] = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> JudgeRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[JudgeRow]: ...
    def __getitem__(self, index: int | slice) -> JudgeRow | Sequence[JudgeRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def compare_judges(
    judges: Iterable[T],
    measure: Callable[[T, Sequence[Preference]], JudgeResult],
    preferences: Sequence[Preference],
    spec: EvaluationSpec,
    scores: ImageScores | None = None,
) -> JudgeComparison:
    """Let each judge judge the preferences that those before it did not leave out, and put all of them side by side.

    `measure` judges by one of `judges`, which are taken one by one and freed. `scores` are those of every image that
    counts. ConfigError without any judge or scores.
    """
    results = []
    for judge in judges:
        results.append(measure(judge, preferences))
        preferences = results[-1].comparison.without_left_out(preferences)
        del judge  # before the next one is taken, as taking it may load it
        mx.clear_cache()
    if not results and not scores:
        raise ConfigError("no judge to measure: the list of judges is empty; the order is (judge, data)")
    pairs = to_judge(preferences, spec)
    names = iter(_names(results, [*(scores or ())]))
    rows = [row for result in results for row in _rows(result, preferences, next(names))]
    left_out = rows[0].evaluation.left_out if rows else None
    for path, of_images in (scores or {}).items():
        p_a = prefer_by_score(of_images, pairs)
        evaluation = replace(evaluation_of_scores(preferences, p_a, spec), left_out=left_out)
        about = {**_NOBODY, "scores": str(path)}
        rows.append(JudgeRow(next(names), evaluation, p_a.tolist(), about=about))
    first, *others = rows
    compared = [replace(row, minus_first=difference(row.p_a, first.p_a, pairs)) for row in others]
    return JudgeComparison((first, *compared), tuple(pairs))


def _rows(result: JudgeResult, preferences: Sequence[Preference], name: str) -> Iterator[JudgeRow]:
    """The rows of one judge, on preferences that no other one left out."""
    rows = result.comparison.on(preferences).rows
    about = {**result.names, "scores": None, **result.about}
    for row, of_row in zip(rows, result.about_rows or [{}] * len(rows), strict=True):
        p_a = [verdict.p_a for verdict in row.evaluation.verdicts]
        yield JudgeRow(name, row.evaluation, p_a, row, about | dict(of_row))


def _names(results: Sequence[JudgeResult], scores: Sequence[Path]) -> list[str]:
    """A short name for each judge, and then for each file of scores; equal ones have numbers."""
    models = _short([result.model for result in results])
    adapters = _short([str(result.adapter) for result in results if result.adapter])
    names = [
        f"{models[result.model]} + {adapters[str(result.adapter)]}" if result.adapter else models[result.model]
        for result in results
    ] + list(_short(list(map(str, scores))).values())
    counts, seen = Counter(names), Counter[str]()
    for place, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[place] = f"{name} ({seen[name]})"
    return names


def _short(names: Sequence[str]) -> dict[str, str]:
    """The short names of different names."""
    unique = list(dict.fromkeys(names))
    return dict(zip(unique, short_names(unique), strict=True))
