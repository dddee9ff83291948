"""What `eval` does where one way to judge is compared with others: its options, its table and its drawing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlxpref.strategies import StrategyComparison, StrategyRow, Way
    from mlxpref.verdict import Strategy

__all__ = ["ALIKE", "Choice", "choice_of", "draw_strategies", "report_strategies", "strategy_options"]

F = TypeVar("F", bound=Callable[..., Any])

ALIKE = ("max_tokens", "max_pixels", "seed", "rows")
"""The settings of a judge that every row has in common."""
_MOST_COLUMNS = 4


@dataclass(frozen=True)
class Choice:
    """The ways to judge that the command line asks for, and where they are drawn."""

    strategies: tuple["Strategy", ...]
    samples: tuple[int, ...] | None
    thinks: tuple[bool, ...] | None
    plot: Path | None

    @property
    def settings(self) -> dict[str, Any]:
        """The judge's settings that were given: those of the row that takes the most memory."""
        samples = {"samples": max(self.samples)} if self.samples else {}
        return samples | ({"think": any(self.thinks)} if self.thinks else {})

    @property
    def ways(self) -> list["Way"]:
        """Every way that is asked for: a greedy sample with thinking where nothing else is."""
        from mlxpref.strategies import ways

        return ways(self.strategies, self.samples or (1,), self.thinks or (True,))


def strategy_options(command: F) -> F:
    """The options that say which ways to judge are compared."""
    for option in (
        click.option(
            "--plot", type=click.Path(path_type=Path), help="Draw how reliable probabilities are: .svg, .png."
        ),
        click.option("--no-think", is_flag=True, help="Read the answer at once, without reasons."),
        click.option(
            "--think",
            type=click.Choice(["yes", "both"]),
            is_flag=False,
            flag_value="yes",
            help="Write reasons before answering; `--think both` compares that with --no-think.  [default: yes]",
        ),
        click.option(
            "--samples",
            help="Completions an order: one is greedy, several are sampled; several numbers with commas.  [default: 1]",
        ),
        click.option(
            "--strategy", default="soft", show_default=True, help="soft, select or score; several with commas."
        ),
    ):
        command = option(command)
    return command


def choice_of(strategy: str, samples: str | None, think: str | None, no_think: bool, plot: Path | None) -> Choice:
    """The ways that the values of `strategy_options` ask for; wrong ones are a usage error."""
    from mlxpref.reliability import FORMATS
    from mlxpref.verdict import STRATEGIES

    asked = [name.strip() for name in strategy.split(",")]
    if unknown := sorted(set(asked) - set(STRATEGIES)):
        raise click.BadParameter(
            f"{', '.join(map(repr, unknown))}; known are {', '.join(STRATEGIES)}", param_hint="--strategy"
        )
    if think and no_think:
        raise click.UsageError("--think and --no-think exclude each other; --think both compares them")
    if plot and (plot.suffix.lower() not in FORMATS or not plot.absolute().parent.is_dir()):
        raise click.BadParameter(
            f"{plot}: give a name that ends with {' or '.join(FORMATS)}, in a folder that exists", param_hint="--plot"
        )
    thinks = None if not (think or no_think) else (True, False) if think == "both" else (not no_think,)
    return Choice(
        tuple(name for name in STRATEGIES if name in asked), _counts(samples) if samples else None, thinks, plot
    )


def _counts(samples: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(count) for count in samples.split(",")}))
    except ValueError:
        counts = (0,)
    if counts[0] < 1:
        raise click.BadParameter(f"{samples!r}: give numbers from 1, such as 1,2,4,8", param_hint="--samples")
    return counts


def report_strategies(found: "StrategyComparison", as_json: bool, calibration: dict[str, Any] | None) -> None:
    """Print every row, as a table or as a list in JSON; a calibration is that of `soft`."""
    from mlxpref.console import print_json

    if as_json:
        print_json(
            [row.to_json() | {"calibration": calibration if row.way.strategy == "soft" else None} for row in found.rows]
        )
    else:
        _print_table(found)


def _print_table(found: "StrategyComparison") -> None:
    """A line for each way, what `soft` gains over the others, and what was shared."""
    from mlxpref.console import print_table, print_text

    first = found.rows[0].evaluation
    official = any(row.evaluation.protocol != "pairs" for row in found.rows)
    print_table(
        ("strategy", "thinking", ">samples", *((">official",) if official else ()), ">accuracy", ">95 % interval",
         ">ece", ">unreadable", ">tokens a pair", ">seconds a pair"),
        ((*_way(row), *((_percent(row.evaluation.official.value),) if official else ()), *_cells(row))
         for row in found.rows),
        title=f"{first.data} {first.split}: {first.metrics.pairs} pairs, each in both orders",
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
    for line in _remarks(found, official):
        print_text(line)


def _remarks(found: "StrategyComparison", official: bool) -> list[str]:
    first = found.rows[0].evaluation
    lines = [f"official: {first.official.definition}"] if official else []
    together = f"all rows together: {found.tokens} tokens in {found.seconds:.1f} s"
    if found.tokens:
        lines.append(
            "tokens and seconds are what a row needs by itself, where rows share completions by its tokens; "
            "several samples are the first of the largest number"
        )
        apart = sum(row.evaluation.seconds for row in found.rows)
        together += (
            f" ({found.reading_seconds:.1f} s of it for images and prompts), where one by one they would take about "
            f"{apart:.1f} s"
        )
    return [
        *lines,
        f"{together}; always the first image of the file: {_percent(first.metrics.first_image_baseline)}; "
        f"{first.metrics.ties_dropped} ties dropped",
    ]


def draw_strategies(found: "StrategyComparison", path: Path) -> None:
    """Draw how reliable the probabilities of every row are, a column for each of several strategies."""
    import numpy as np

    from mlxpref.reliability import Panel, draw_reliability

    decided = [p.better != "tie" for p in found.preferences]
    people = np.array([p.p_a for p in found.preferences])[decided]
    panels = [
        Panel(_title(row), np.array([verdict.p_a for verdict in row.evaluation.verdicts])[decided], people)
        for row in found.rows
    ]
    strategies = len({row.way.strategy for row in found.rows})
    draw_reliability(panels, strategies if strategies > 1 else min(_MOST_COLUMNS, len(panels)), path)


def _title(row: "StrategyRow") -> str:
    if not row.way.think:
        return f"{row.way.strategy}, without thinking"
    return f"{row.way.strategy}, {row.way.samples} sample{'s' if row.way.samples > 1 else ''}"


def _way(row: "StrategyRow") -> Sequence[object]:
    return row.way.strategy, "yes" if row.way.think else "no", row.way.samples


def _cells(row: "StrategyRow") -> Sequence[str]:
    found, metrics = row.evaluation, row.evaluation.metrics
    return (
        _percent(metrics.accuracy),
        f"{_percent(metrics.accuracy_low)} to {_percent(metrics.accuracy_high)}",
        f"{metrics.ece:.3f}",
        _percent(found.unreadable),
        f"{found.tokens_per_pair:.1f}",
        # Of nothing that was judged now, no seconds are known.
        "recalled" if found.seconds_per_pair != found.seconds_per_pair else f"{found.seconds_per_pair:.3f}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
