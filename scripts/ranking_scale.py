"""What ranking costs as images become more, and whether its intervals hold: `python -m scripts.ranking_scale`.

Simulated log-odds (`ranking_judges.Judge`) of two pairs an image, chosen by `next_round` in rounds of the default size;
each number of images in a process of its own. Seconds of the processor for the last fit with its variances, the next
round, whether a top of 20 is settled, and the rest of a ranking: intervals, ties and `p_best`. `rounds_s`: all rounds
and fits before. `mb`: the peak of memory above what the imports take. `strengths` and `differences`: the share of 95 %
intervals that hold the truth, of differences 100,000 at random; `repeats` judges each.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence

import click
import numpy as np

from mlxpref.cli.output import note, show_on_stderr
from mlxpref.ranking.bradley_terry import Z95, fit_strengths
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, pair_budget
from mlxpref.ranking.strength_ranking import ranking_of
from scripts.conversion_memory import memory
from scripts.ranking_judges import Array, Judge, Row, print_results, table

DRAWN = 100_000


def ranked(count: int, seed: int) -> tuple[Row, tuple[Array, Array]]:
    """The costs of a ranking, and which intervals hold the truth: of strengths and of differences."""
    baseline, clock = memory("VmHWM"), time.process_time
    rng, judge = np.random.default_rng([count, seed]), Judge(bias_deviation=0.3)
    truth = judge.strengths(count, rng)
    asked: list[tuple[int, int]] = []
    outcomes: list[PairOutcome] = []
    fit, started = None, clock()
    while len(asked) < pair_budget(count):
        if outcomes:
            fit = fit_strengths(count, outcomes)
        pairs = next_round(count, asked, fit, min(default_round(count), pair_budget(count) - len(asked)), seed)
        asked += pairs
        outcomes += judge.of_pairs(truth, pairs, rng)
    times = [clock()]
    fit = fit_strengths(count, outcomes)
    fit.covariance.variances()
    times.append(clock())
    next_round(count, asked, fit, default_round(count))
    times.append(clock())
    is_settled(fit, min(20, count - 1), outcomes)
    times.append(clock())
    ranking_of(fit, outcomes)
    times.append(clock())
    names = ("rounds_s", "fit_s", "round_s", "settled_s", "rest_s")
    seconds = {name: round(float(each), 3) for name, each in zip(names, np.diff([started, *times]), strict=True)}
    row = {"images": count, **seconds, "mb": round((memory("VmHWM") - baseline) / 1e6, 1)}
    error = fit.strengths - (truth - truth.mean())
    a, b = rng.integers(count, size=(2, DRAWN))
    a, b = a[a != b], b[a != b]
    of_differences = np.abs(error[a] - error[b]) <= Z95 * np.sqrt(fit.covariance.of_differences(a, b))
    return row, (np.abs(error) <= Z95 * np.sqrt(fit.covariance.variances()), of_differences)


def of_images(count: int, repeats: int) -> Row:
    """The row of the table for a number of images, its costs those of the first judge."""
    runs = [ranked(count, repeat) for repeat in range(repeats)]
    held = [float(np.mean([run[1][which].mean() for run in runs])) for which in (0, 1)]
    return runs[0][0] | {"strengths": round(held[0], 4), "differences": round(held[1], 4)}


@click.command(help=__doc__)
@click.option("--images", default="135,500,501,1000,2000,5000,10000", show_default=True, help="Numbers of images.")
@click.option("--repeats", default=1, show_default=True, help="Judges for each.")
@click.option("--alone", is_flag=True, hidden=True, help="In this process.")
@show_on_stderr()
def main(images: str, repeats: int, alone: bool) -> None:
    counts = [int(count) for count in images.split(",")]
    if alone:
        print_results({"scale": [of_images(count, repeats) for count in counts]})
        return
    rows = list[Row]()
    for count in counts:
        note(f"{count} images")
        rows += in_a_process(["--images", str(count), "--repeats", str(repeats), "--alone"])
    table(rows, "Cost and coverage of rankings")
    print_results({"scale": rows})


def in_a_process(options: Sequence[str]) -> list[Row]:
    """What this script prints with some options, in a process of its own."""
    command = [sys.executable, "-m", "scripts.ranking_scale", *options]
    rows: list[Row] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["scale"]
    return rows


if __name__ == "__main__":
    main()
