"""The options of `eval` that say which ways to judge are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlxpref.judge.strategies import StrategyVariant
    from mlxpref.verdict import Strategy

__all__ = ["ALIKE", "Choice", "choice_of", "strategy_options"]

F = TypeVar("F", bound=Callable[..., Any])

ALIKE = ("max_tokens", "max_pixels", "seed", "rows")
"""The settings of a judge that every row has in common."""


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
    def variants(self) -> list["StrategyVariant"]:
        """Every way that is asked for: a greedy sample with thinking where nothing else is."""
        from mlxpref.judge.strategies import strategy_variants

        return strategy_variants(self.strategies, self.samples or (1,), self.thinks or (True,))


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
    from mlxpref.report.reliability import FORMATS
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
