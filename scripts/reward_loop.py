"""What a generator learns from a position-biased judge, by reward: `python -m scripts.reward_loop --output FOLDER`.

A stand-in generator makes the demo's pictures for a brief. It is told a picture that meets the whole brief; how far the
colour of each shape is from that one's, in the demo's list, and the quality are five independent draws with logits that
it learns, all equal at first. It learns by policy gradient: 2 groups of 12 pictures a step, each for one of twelve
briefs, with a group's rewards less their mean and divided by their deviation; 30 steps at a rate of 2, chosen with the
true order as the reward. The rewards, all of one judge that thinks, as answering at once it would guess:

- served: `POST /compute` of the reward server over HTTP, as it is by default;
- hard wins: all pairs in one order, the lower index first; the share of those in which its label is the likelier one;
- written scores: the same pairs and order; the share of those in which the judge writes the higher score for it;
- biased scores: these with points for the image shown first, see below;
- true order: the places of the demo's rule, for comparison.

The judge is the demo's, taught to write scores and then to choose (60 steps each), the latter by `brier` and shares of
votes: a judge that is sure of what it knows hides a bias of a few nats. The bias is added to the logit of the first
image's label, in the model's head. Scores have no such label; but it is a digit, and in the reasons the number of an
image, so the bias changes them, too: how many, the table says. Biased scores give the first image as many points as the
bias is worth, by the judge's own log-odds a point of difference.

It writes `reward_loop.json` and `reward_loop.png` beside this file, or where `--output` says, after every run, and
prints the tables; `--table` and `--figure FILE` make them from the file. Runs that the file has are not made again.
"""

import io
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mlxpref.cli.output import note, print_text
from mlxpref.files import replacing
from mlxpref.report.curves import COLOURS
from scripts.kept_runs import make_runs, markdown, read_runs, run_options, spread

__all__ = ["BIASES", "REWARDS", "SEEDS", "draw", "main", "plans", "tables_of"]

BIASES = (0.0, 3.0)
"""What the judge favours the first image by, in nats."""
REWARDS = ("served", "hard wins", "written scores", "biased scores", "true order")
SEEDS = (0, 1, 2)
_COLUMNS = (
    "bias", "reward", "tau before", "true preference, mean over steps", "at the end", "right in everything",
    "comparisons", "judge seconds",
)  # fmt: skip
_INSTRUMENTS = (
    "bias", "right, both orders", "one order", "by scores with the points", "log-odds, median", "points",
    "scores that the head changes",
)  # fmt: skip


def plans() -> list[dict[str, Any]]:
    """Every run."""
    return [{"bias": bias, "seed": seed} for seed, bias in product(SEEDS, BIASES)]


def make_run(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run, in a process of its own."""
    from scripts.reward_loop_runs import Plan, run

    return run(Plan(**plan))


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each bias and reward, means over seeds; in brackets the least and the largest."""
    rows = []
    for bias, name in product(BIASES, REWARDS):
        found = [each for run in _of(runs, bias) for each in run["learned"] if each["reward"] == name]
        if not found:
            continue
        means = [statistics.fmean(each["curve"]) for each in found]
        ends = [each["curve"][-1] for each in found]
        spans = map(_span, ([each["tau"] for each in found], means, ends, [each["right"] for each in found]))
        work = (f"{statistics.fmean(each[key] for each in found):,.0f}" for key in ("comparisons", "seconds"))
        rows.append([f"{bias:g}", name, *spans, *work])
    return rows


def instrument_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each bias: what the judge is as an instrument."""
    rows = []
    for bias in BIASES:
        found = [run["instruments"] for run in _of(runs, bias)]
        if found:
            rows.append([f"{bias:g}", *(_span([each[key] for each in found]) for key in found[0])])
    return rows


def _of(runs: Sequence[Mapping[str, Any]], bias: float) -> list[Mapping[str, Any]]:
    return [run for run in runs if run["bias"] == bias]


def _span(values: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*spread(values))


def tables_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """What generators learned, and the judges as instruments, as two tables in Markdown."""
    instruments = instrument_rows(runs)
    return f"{markdown(_COLUMNS, rows_of(runs))}\n\n{markdown(_INSTRUMENTS, instruments)}"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the true preference over steps, for every bias: the mean of the seeds, and their span."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, len(BIASES), sharey=True)
    lines: dict[str, Any] = {}
    for axes, bias in zip(panels, BIASES, strict=True):
        for name, colour in zip(REWARDS, (*COLOURS[:4], "#888888"), strict=True):
            found = [x["curve"] for run in _of(runs, bias) for x in run["learned"] if x["reward"] == name]
            if not found:
                continue
            values = np.array(found)  # (seeds, steps + 1)
            style, steps = "--" if name == REWARDS[-1] else "-", range(values.shape[1])
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            (lines[name],) = axes.plot(steps, values.mean(axis=0), style, color=colour, linewidth=2.2)
        axes.set_title(f"a bias of {bias:g} nats" if bias else "no bias", fontsize=13)
        axes.set_xlabel("steps of 24 pictures", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("true preference (share)", fontsize=13)
    shown = [name for name in REWARDS if name in lines]
    figure.legend([lines[name] for name in shown], shown, fontsize=12, loc="outside upper center", ncols=3)
    with io.BytesIO() as file, replacing(path) as temporary:
        figure.savefig(file, dpi=90)
        Image.open(file).convert("RGB").quantize(128).save(temporary, "PNG", optimize=True)  # a third of the bytes


@click.command()
@run_options
def main(output: Path | None, processes: int, table: bool, figure: Path | None) -> None:
    """Train generators with every reward, and write how they learned."""
    folder = output or Path(__file__).parent
    file = folder / "reward_loop.json"
    runs = read_runs(file)
    if figure:
        draw(runs, figure)
    elif not table:
        for done, run in make_runs(plans(), make_run, runs, file, processes, itemgetter("bias", "seed")):
            draw(runs, folder / "reward_loop.png")
            note(f"{done}: bias {run['bias']:g}, seed {run['seed']}")
    for line in tables_of(runs).splitlines():
        print_text(line)


if __name__ == "__main__":
    main()
