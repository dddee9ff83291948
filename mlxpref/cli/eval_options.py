"""The options of `mlxpref eval`: which judges and scores, in which ways, and the files to write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from mlxpref.cli.common import check_output
from mlxpref.cli.options import FILE, JudgeOptions, OldSpellings, flag, option
from mlxpref.cli.output import note
from mlxpref.judge.compare_judges import JudgeComparison
from mlxpref.judge.compute_curve import varies_compute
from mlxpref.judge.strategies import StrategyComparison, StrategyVariant, strategy_variants
from mlxpref.report.compute_curve import draw_compute
from mlxpref.report.drawing import FORMATS
from mlxpref.report.predictions import FORMATS as PREDICTION_FORMATS
from mlxpref.report.predictions import comparison_rows, write_predictions
from mlxpref.report.reliability import draw_strategies
from mlxpref.verdict import STRATEGIES, Strategy

_ORDER = f"{__name__}.order"
"""Where a command's context has the order of what an adapter's place matters to."""


class EvalCommand(OldSpellings):
    """A command that knows in which order its --model and --adapter stand, several of each."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse twice, as click tells the order of options to nobody else."""
        order = self.make_parser(ctx).parse_args(list(args))[2]
        ctx.meta[_ORDER] = [each.name for each in order if each.name in ("model", "adapter")]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class MeasuredOptions:
    """The judges, with their adapters, and the files of scores."""

    model: tuple[str, ...] = option(
        "--model",
        multiple=True,
        help="Folder, Hugging Face id, or `demo`; several are compared with the first.  [default: the adapter's, else "
        "$MLXPREF_MODEL, else recommended]",
    )
    adapter: tuple[Path, ...] = option(
        "--adapter",
        type=FILE,
        multiple=True,
        help="Folder of a trained adapter, in the format of mlx-vlm or PEFT. Of several judges it belongs to the "
        "--model right before it; without any --model each adapter is on its own base.",
    )
    scores: tuple[Path, ...] = option(
        "--scores",
        type=FILE,
        multiple=True,
        help="Table (image,score) of any tool, such as a CSV file, measured beside judges, or alone.",
    )

    def judges(self, shared: JudgeOptions, order: Sequence[str]) -> list[JudgeOptions]:
        """The options of each judge, in their order; UsageError for an adapter that may be of several models.

        `order` has "model" and "adapter" in the order of the command line. Without any, a single judge is the default
        one, unless there are scores.
        """
        if len(self.model) == len(self.adapter) == 1:  # in either order
            order = ("model", "adapter")
        models, adapters, judges = iter(self.model), iter(self.adapter), list[JudgeOptions]()
        for kind, before in zip(order, ("", *order), strict=False):
            if kind == "model":
                judges.append(replace(shared, model=next(models)))
            elif before == "model":
                judges[-1] = replace(judges[-1], adapter=next(adapters))
            elif not self.model:
                judges.append(replace(shared, adapter=next(adapters)))
            else:
                adapter = next(adapters)
                raise click.UsageError(
                    f"--adapter {adapter} does not stand right after a --model: write `--model M --adapter {adapter}` "
                    "for each judge, `--model M` for one without, or no --model, for each on its own base"
                )
        if not judges and not self.scores:
            return [shared]
        if len({(judge.model, judge.adapter) for judge in judges}) < len(judges):
            raise click.UsageError("the same judge is given twice: each needs a model or an --adapter of its own")
        if len(set(self.scores)) < len(self.scores):
            raise click.UsageError("the same file of --scores is given twice")
        if len(judges) > 1 and shared.calibration:
            raise click.UsageError("--calibration is of one judge: leave it out where there are several")
        return judges


def order_of_judges() -> Sequence[str]:
    """The order of --model and --adapter in the command that runs now."""
    order: Sequence[str] = click.get_current_context().meta[_ORDER]
    return order


def _strategies(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[Strategy]:
    """Strategies separated by commas, in the order of a table; none for the protocol's own."""
    names = [] if value is None else [name.strip() for name in value.split(",")]
    if unknown := sorted(set(names) - set(STRATEGIES)):
        raise click.BadParameter(f"{', '.join(map(repr, unknown))}; known are {', '.join(STRATEGIES)}")
    return [name for name in STRATEGIES if name in names]


def _counts(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[int] | None:
    """Numbers from 1, separated by commas or given one by one."""
    value = ",".join(values)
    counts = value.split(",") if values else []
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise click.BadParameter(f"{value!r}: give numbers from 1, such as 1,2,4,8")
    return [int(count) for count in counts] or None


@dataclass(frozen=True)
class StrategyOptions:
    """The strategies, numbers of samples, bounds on their tokens, and ways of thinking to compare."""

    strategies: Sequence[Strategy] = option(
        "--strategy",
        callback=_strategies,
        help="soft, select or score; several with commas.  [default: soft, of mmrb2 select]",
    )
    samples: Sequence[int] | None = option(
        "--samples",
        multiple=True,
        callback=_counts,
        help="Completions per order: one is greedy, several are sampled; several numbers with commas.  [default: 1]",
    )
    compare_thinking: bool = flag("--compare-thinking", "Compare judging with thinking and without.")
    max_tokens: Sequence[int] | None = option(
        "--max-tokens",
        metavar="N",
        multiple=True,
        callback=_counts,
        help="Tokens of reasoning at most; a longer one is ended there; several numbers with commas.  [default: 256, "
        "or as profile or adapter say]",
    )

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The judge's settings in these options and in others, for the variant with the most memory."""
        if self.compare_thinking and "think" in given:
            raise click.UsageError("--compare-thinking takes the place of --think and --no-think")
        most = {"samples": self.samples, "max_tokens": self.max_tokens}
        largest = {name: max(counts) for name, counts in most.items() if counts}
        return {**given, **largest, **({"think": True} if self.compare_thinking else {})}

    def variants(self, think: bool) -> list[StrategyVariant]:
        """The variants in the options; `think` says whether the judge thinks, if they do not compare both."""
        modes = [True, False] if self.compare_thinking else [think]
        if self.several_max_tokens and not any(modes):
            note("several --max-tokens are left off: without thinking there are no reasons to end")
        return strategy_variants(self.strategies, self.samples or [1], modes, self.several_max_tokens)

    @property
    def several_max_tokens(self) -> list[int]:
        """The bounds on tokens, if these are several; a single one is the judge's setting."""
        limits = sorted(set(self.max_tokens or ()))
        return limits if len(limits) > 1 else []


@dataclass(frozen=True)
class OutputOptions:
    """The outputs of an evaluation besides stdout."""

    plot: Path | None = option(
        "--plot",
        type=FILE,
        help="Draw how reliable probabilities are, or, of several --samples or --max-tokens, accuracy by the tokens of "
        "a pair: .svg, .png.",
    )
    predictions: Path | None = option(
        "--predictions", type=FILE, help="Write what was predicted for each pair, with reasons: .csv, .jsonl."
    )

    def check(self) -> None:
        """Raise errors, before the work, for outputs that could not be written after it."""
        if self.plot is not None:
            if self.plot.suffix.lower() not in FORMATS or not self.plot.absolute().parent.is_dir():
                endings = " or ".join(FORMATS)
                problem = f"{self.plot}: give a name that ends with {endings}, in a folder that exists"
                raise click.BadParameter(problem, param_hint="--plot")
            check_output("--plot", self.plot)
        if self.predictions is not None:
            check_output("--predictions", self.predictions, PREDICTION_FORMATS)

    def write(self, comparison: StrategyComparison | JudgeComparison) -> None:
        """Write the outputs and print their places."""
        if self.plot is not None:
            rows = comparison.rows if isinstance(comparison, StrategyComparison) else [row.judged for row in comparison]
            draw = draw_compute if varies_compute(row.variant for row in rows if row) else draw_strategies
            draw(comparison, self.plot)
            note(f"drawing: {self.plot}")
        if self.predictions is not None:
            write_predictions(self.predictions, comparison_rows(comparison))
            note(f"predictions: {self.predictions}")
