"""How the demo judge learns, by method: `python -m scripts.learning_curves`.

Every method trains with three seeds, for as many steps of as many completions as `mlxpref demo`, otherwise with its
settings (`scripts/learning_runs.py`). Some of them train a judge that leans to the first image, too.

It writes `learning_curves.json` and `learning_curves.png` beside this file, or where `--output` says, after every run,
and prints the tables; `--table` prints them from the file, `--figure FILE` draws it anew. Runs that the file has are
not made again: to measure anew, give an empty folder. Two run at a time, each with one thread, so seconds are of one
core of two that are busy.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from mlxpref.cli.output import note, print_text
from mlxpref.files import replacing
from mlxpref.report.curves import COLOURS
from scripts.kept_runs import make_runs, markdown, read_runs, run_options, spread

__all__ = ["BIAS", "FAIR", "LEANING", "SEEDS", "STEPS", "main", "plans", "rows_of", "tables_of"]

FAIR = (
    "hard", "naive soft", "soft", "brier", "soft, without thinking", "soft, read too", "soft, agreement",
    "soft, listener", "rejection", "rejection, then soft",
)  # fmt: skip
LEANING = ("soft", "soft, agreement")
"""The methods that are also tried on a judge that leans to the first image."""
BIAS = 2.0
STEPS = 60
SEEDS = (0, 1, 2)
Run = Mapping[str, Any]
_SHARES: dict[str, Callable[[Run], float]] = {
    "accuracy": lambda run: run["accuracy"],
    "mean over the steps": lambda run: statistics.fmean(point["accuracy"] for point in run["curve"][1:]),
    "by the answer": lambda run: run["select"],
    "sampled": lambda run: run["sampled"]["right"],
    "held-out": lambda run: run["held_out"],
    "four": lambda run: run["four"],
    "at once": lambda run: run["at_once"],
    "consistent": lambda run: run["position_consistency"],
    "calibration error": lambda run: run["ece"],
}
_WRITTEN = {"checked": "complete", "colours true": "facts", "verdicts true": "verdicts", "answer follows": "follows"}
_COLOURS = (*COLOURS, "#5b6770", "#00a0b0", "#7a5230", "#111111")


def plans() -> list[dict[str, Any]]:
    """Every run."""
    judges = [(method, 0.0) for method in FAIR] + [(method, BIAS) for method in LEANING]
    return [
        {"method": method, "bias": bias, "seed": seed, "steps": STEPS}
        for seed, (method, bias) in product(SEEDS, judges)
    ]


def make_run(plan: Run) -> dict[str, Any]:
    """Make one run, in a process of its own."""
    from scripts.learning_runs import Plan, run

    return asdict(run(Plan(**plan)))


def rows_of(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Mean, least and largest over the seeds, a row for each method and bias."""
    found: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run["bias"], run["method"]), []).append(run)
    rows = []
    for (bias, method), group in sorted(found.items(), key=lambda item: (item[0][0], FAIR.index(item[0][1]))):
        row: dict[str, Any] = {"method": method, "bias": bias, "seeds": len(group)}
        row |= {name: spread([value(run) for run in group]) for name, value in _SHARES.items()}
        row |= {"seconds": spread([run["seconds"] for run in group])}
        row |= {"tokens": spread([run["written"]["tokens"] for run in group])}
        for name, key in _WRITTEN.items():
            values = [value for run in group if run["written"]["tokens"] and (value := run["written"][key]) is not None]
            row[name] = spread(values) if values else None
        rows.append(row)
    return rows


def tables_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is right, and what is written, as two tables in Markdown; in brackets the least and the largest."""
    names = [row["method"] + (f", bias {row['bias']:g}" if row["bias"] else "") for row in rows]
    right = [
        [name, *("{:.3f} ({:.3f} to {:.3f})".format(*row[key]) for key in _SHARES)]
        for name, row in zip(names, rows, strict=True)
    ]
    written = [
        [name, f"{row['tokens'][0]:.0f}", *("-" if row[key] is None else f"{row[key][0]:.3f}" for key in _WRITTEN),
         f"{row['seconds'][0]:.0f}"]
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    tables = markdown(("method", *_SHARES), right), markdown(("method", "tokens", *_WRITTEN, "seconds"), written)
    return "\n\n".join(tables)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw reward, length, truth and accuracy over steps, of judges without bias: the mean of the seeds."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    titles = {
        "accuracy": "accuracy, greedy, both orders", "sampled": "rollouts that agree with the labels",
        "reward": "reward (each method has its own)", "tokens": "tokens a rollout",
        "complete": "requirements that are checked", "verdicts": "verdicts that are true",
    }  # fmt: skip
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for method, colour in zip(FAIR, _COLOURS, strict=True):
            own = [run for run in runs if (run["method"], run["bias"]) == (method, 0.0)]
            # Whoever writes nothing has no share of what is written.
            curves = [run["curve"] for run in own if run["written"]["tokens"] or key in ("accuracy", "reward")]
            at = [
                (points[0]["step"], statistics.fmean(point[key] for point in points))
                for points in zip(*curves, strict=True)
                if None not in [point[key] for point in points]
            ]
            if at:
                axes.plot(*zip(*at, strict=True), color=colour, label=method, linewidth=1.6)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)


@click.command()
@run_options
def main(output: Path | None, processes: int, table: bool, figure: Path | None) -> None:
    """Train the demo judge by every method, and write how it learned."""
    folder = output or Path(__file__).parent
    file = folder / "learning_curves.json"
    runs = read_runs(file)
    if figure:
        draw(runs, figure)
    elif not table:
        order = [json.dumps(plan) for plan in plans()]

        def place(run: Run) -> int:
            return order.index(json.dumps({key: run[key] for key in plans()[0]}))

        for done, run in make_runs(plans(), make_run, runs, file, processes, place):
            draw(runs, folder / "learning_curves.png")
            lean = f", bias {run['bias']:g}" if run["bias"] else ""
            measured = f"{run['accuracy']:.3f}, {run['seconds']:.0f} s of training"
            note(f"{done}: {run['method']}{lean}, seed {run['seed']}: {measured}")
    for line in tables_of(rows_of(runs)).splitlines():
        print_text(line)


if __name__ == "__main__":
    main()
