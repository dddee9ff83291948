"""Strategies compared, as a person reads them: a table, what `soft` gains, and a drawing of how reliable each is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.cli.output import print_json, print_table, print_text
from mlxpref.cli.tables import percent
from mlxpref.judge.strategies import StrategyComparison, StrategyRow
from mlxpref.report.reliability import Panel, draw_reliability

__all__ = ["draw_strategies", "report_strategies"]

_MOST_COLUMNS = 4


def report_strategies(found: StrategyComparison, as_json: bool, calibration: dict[str, Any] | None) -> None:
    """Print every row, as a table or as a list in JSON; a calibration is that of `soft`."""
    if as_json:
        print_json(
            [
                row.to_json() | {"calibration": calibration if row.variant.strategy == "soft" else None}
                for row in found.rows
            ]
        )
    else:
        _print_table(found)


def _print_table(found: StrategyComparison) -> None:
    """A line for each way, what `soft` gains over the others, and what was shared."""
    first = found.rows[0].evaluation
    official = any(row.evaluation.spec.protocol != "pairs" for row in found.rows)
    print_table(
        ("strategy", "thinking", ">samples", *((">official",) if official else ()), ">accuracy", ">95 % interval",
         ">ece", ">unreadable", ">tokens a pair", ">seconds a pair"),
        ((*_way(row), *((percent(row.evaluation.official.value),) if official else ()), *_cells(row))
         for row in found.rows),
        title=f"{first.spec.data} {first.spec.split}: {first.metrics.pairs} pairs, each in both orders",
    )  # fmt: skip
    gains = [(row, other, minus) for row in found.rows for other, minus in row.minus.items()]
    if gains:
        print_table(
            ("difference", "thinking", ">samples", ">points of accuracy", ">95 % interval"),
            (
                (f"soft - {other}", *_way(row)[1:], f"{100 * minus.accuracy:+.1f}",
                 f"{100 * minus.low:+.1f} to {100 * minus.high:+.1f}")
                for row, other, minus in gains
            ),
        )  # fmt: skip
    for line in _footnotes(found, official):
        print_text(line)


def _footnotes(found: StrategyComparison, official: bool) -> list[str]:
    first = found.rows[0].evaluation
    lines = [f"official: {first.official.definition}"] if official else []
    if found.counts.tokens:
        lines.append(
            "tokens are what a row needs by itself; its seconds are those of all completions that it is read from, "
            "which other rows may share"
        )
    return [
        *lines,
        f"all rows together: {found.counts.tokens} tokens in {found.seconds:.1f} s; always the first image of the "
        f"file: {percent(first.metrics.first_image_baseline)}; {first.metrics.ties_dropped} ties dropped",
    ]


def draw_strategies(found: StrategyComparison, path: Path) -> None:
    """Draw how reliable the probabilities of every row are, a column for each of several strategies."""

    decided = [p.better != "tie" for p in found.preferences]
    people = np.array([p.p_people for p in found.preferences])[decided]
    panels = [
        Panel(str(row.variant), np.array([verdict.p_a for verdict in row.evaluation.verdicts])[decided], people)
        for row in found.rows
    ]
    strategies = len({row.variant.strategy for row in found.rows})
    draw_reliability(panels, strategies if strategies > 1 else min(_MOST_COLUMNS, len(panels)), path)


def _way(row: StrategyRow) -> Sequence[object]:
    return row.variant.strategy, "yes" if row.variant.think else "no", row.variant.samples


def _cells(row: StrategyRow) -> Sequence[str]:
    found, metrics = row.evaluation, row.evaluation.metrics
    return (
        percent(metrics.accuracy),
        f"{percent(metrics.accuracy_low)} to {percent(metrics.accuracy_high)}",
        f"{metrics.ece:.3f}",
        percent(found.unreadable),
        f"{found.tokens_per_pair:.1f}",
        # Of nothing that was judged now, no seconds are known.
        "recalled" if found.seconds_per_pair != found.seconds_per_pair else f"{found.seconds_per_pair:.3f}",
    )
