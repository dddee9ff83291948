"""What a judge predicted for each pair of an evaluation, as a file to look for its mistakes in: CSV, or JSON lines."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxpref.errors import ConfigError
from mlxpref.files import replacing
from mlxpref.judge.compare_judges import JudgeComparison
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.strategies import StrategyComparison, StrategyRow
from mlxpref.preferences import Preference, image_name
from mlxpref.report.ranking_files import text_cell

FORMATS = (".csv", ".jsonl")
"""The endings of such a file."""


def comparison_rows(comparison: StrategyComparison | JudgeComparison) -> Iterator[dict[str, Any]]:
    """A row for each pair of each variant: the pair, people's and the judge's preference for a, both orders, reasons.

    `correct` says whether the better image was preferred; None for a tie in the data. Rows of several judges begin with
    the name of theirs, and those of scores end with `correct`. `max_tokens` is there where these are several.
    """
    pairs = comparison.preferences
    if isinstance(comparison, StrategyComparison):
        limits = any(row.variant.max_tokens for row in comparison.rows)
        for row in comparison.rows:
            yield from _judged_rows(pairs, row, limits)
        return
    limits = any(each.judged.variant.max_tokens for each in comparison if each.judged)
    for each in comparison:
        rows = _judged_rows(pairs, each.judged, limits) if each.judged else score_rows(pairs, each.p_a)
        yield from ({"judge": each.name, **row} for row in rows)


def score_rows(preferences: Sequence[Preference], p_a: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The same rows for a tool's scores, without orders, reasons and variants."""
    return (_row(preference, p) for preference, p in zip(preferences, p_a, strict=True))


def write_predictions(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as CSV or as JSON lines, by the file's ending, one at a time; ConfigError where that fails."""
    try:
        with (
            replacing(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            writer: csv.DictWriter[str] | None = None
            for row in rows:
                if path.suffix.lower() != ".csv":
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    continue
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow({name: _cell(value) for name, value in row.items()})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _judged_rows(preferences: Sequence[Preference], row: StrategyRow, limits: bool) -> Iterator[dict[str, Any]]:
    names = ("strategy", "think", "samples", *(("max_tokens",) if limits else ()))
    variant = {name: getattr(row.variant, name) for name in names}
    for preference, verdict in zip(preferences, row.evaluation.verdicts, strict=True):
        yield _row(preference, verdict.p_a) | _orders(verdict) | variant


def _row(preference: Preference, p_a: float) -> dict[str, Any]:
    better = preference.better
    return {
        "prompt": preference.prompt,
        "a": image_name(preference.a),
        "b": image_name(preference.b),
        "group": preference.group,
        "p_people": preference.p_people,
        "p_judge": None if math.isnan(p_a) else p_a,
        "correct": None if better == "tie" else (p_a > 0.5 if better == "a" else p_a < 0.5),
    }


def _orders(verdict: PairVerdict) -> dict[str, Any]:
    return {
        "p_judge_shown_first": verdict.p_a_shown_first,
        "p_judge_shown_second": verdict.p_a_shown_second,
        "reasons_shown_first": [each.reasoning for each in verdict.a_shown_first],
        "reasons_shown_second": [each.reasoning for each in verdict.a_shown_second],
    }


def _cell(value: Any) -> Any:
    """A value of JSON in a spreadsheet, where text is never a formula."""
    if isinstance(value, list):
        value = " | ".join(value)
    return text_cell(value) if isinstance(value, str) else value
