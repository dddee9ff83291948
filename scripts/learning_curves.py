"""How the demo judge learns, by reward: `python scripts/learning_curves.py`.

Every reward trains with and without thinking, with three seeds, for 30 and for 80 steps, each with its own schedule of
the learning rate, 16 comparisons x 8 rollouts a step, otherwise as `mlxpref demo` does. `hard`, `naive soft` and `soft`
learn from the demo's labels, `brier` and `soft, votes` from shares of ten votes (`scripts/learning_runs.py`).

It writes `learning_curves.json` and `learning_curves.png` beside this file, or where `--output` says, after every run
and prints the table; `--table` prints it from the file, `--figure FILE` draws it anew. Runs that the file has are not
made again: to measure anew, give an empty folder. Two run at a time, each with one thread, so seconds are of one core
of two that are busy.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
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

__all__ = ["REWARDS", "SEEDS", "STEPS", "main", "rows_of", "table_of"]

REWARDS = {"hard": "labels", "naive soft": "labels", "soft": "labels", "soft, votes": "votes", "brier": "votes"}
"""What is compared: a name for every reward, and what it learns from."""
STEPS = (30, 80)
SEEDS = (0, 1, 2)
_COLUMNS = (
    "reward", "thinking", "steps", "accuracy", "held-out prompts", "both orders agree", "calibration error", "seconds",
)  # fmt: skip
_AS_SHARE = ("accuracy", "held_out_prompts", "position_consistency")


def plans() -> list[dict[str, Any]]:
    """Every run, the longest first, so that the processes end together."""
    every = product(STEPS[::-1], (True, False), REWARDS.items(), SEEDS)
    return [
        {"reward": reward, "labels": labels, "think": think, "seed": seed, "steps": steps}
        for steps, think, (reward, labels), seed in every
    ]


def make_run(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run, in a process of its own."""
    from scripts.learning_runs import Plan, run

    return asdict(run(Plan(**plan)))


def rows_of(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and largest over the seeds, a row for each reward, with thinking or without, and number of steps."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault((run["reward"], run["think"], run["steps"]), []).append(run)
    order = {name: place for place, name in enumerate(REWARDS)}
    rows = []
    for (reward, think, steps), group in sorted(found.items(), key=lambda x: (not x[0][1], order[x[0][0]], x[0][2])):
        row: dict[str, Any] = {"reward": reward, "think": think, "steps": steps, "seeds": len(group)}
        for key in (*_AS_SHARE, "ece", "seconds"):
            row[key] = spread([run[key] for run in group])
        rows.append(row)
    return rows


def table_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown; in brackets the least and the largest of the seeds."""
    lines = []
    for row in rows:
        cells = [row["reward"], "yes" if row["think"] else "no", str(row["steps"])]
        cells += ["{:.3f} ({:.3f} to {:.3f})".format(*row[key]) for key in _AS_SHARE[:2]]
        cells += [f"{row[_AS_SHARE[2]][0]:.3f}", "{:.3f} ({:.3f} to {:.3f})".format(*row["ece"])]
        lines.append([*cells, f"{row['seconds'][0]:.0f}"])
    return markdown(_COLUMNS, lines)


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against steps and seconds, with thinking and without: the longest runs, mean and span of seeds."""
    longest = max(run["steps"] for run in runs)
    figure = Figure(figsize=(9, 6), layout="tight")
    panels = figure.subplots(2, 2, sharey=True)
    for (row, think), (column, over) in product(enumerate((True, False)), enumerate(("step", "seconds"))):
        axes = panels[row][column]
        for name, colour in zip(REWARDS, COLOURS, strict=False):
            kept = [r for r in runs if (r["reward"], r["think"], r["steps"]) == (name, think, longest)]
            if kept:
                _draw_runs(axes, kept, over, name, colour)
        axes.set_title(f"{'thinking' if think else 'without thinking'}, {longest} steps", fontsize=9)
        axes.set_xlabel("steps" if over == "step" else "seconds of training")
        axes.set_ylabel("accuracy" if column == 0 else "")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8, loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90)


def _draw_runs(axes: Any, runs: Sequence[Mapping[str, Any]], over: str, name: str, colour: str) -> None:
    points = list(zip(*(run["curve"] for run in runs), strict=True))
    at = [statistics.fmean(point[over] for point in same) for same in points]
    values = [[point["accuracy"] for point in same] for same in points]
    axes.fill_between(at, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)
    axes.plot(at, list(map(statistics.fmean, values)), color=colour, label=name, linewidth=1.8)


@click.command()
@run_options
def main(output: Path | None, processes: int, table: bool, figure: Path | None) -> None:
    """Train the demo judge with every reward, and write how it learned."""
    folder = output or Path(__file__).parent
    file = folder / "learning_curves.json"
    runs = read_runs(file)
    if figure:
        draw(runs, figure)
    elif not table:
        order = [json.dumps(plan) for plan in plans()]

        def place(run: Mapping[str, Any]) -> int:
            return order.index(json.dumps({key: run[key] for key in plans()[0]}))

        for done, run in make_runs(plans(), make_run, runs, file, processes, place):
            draw(runs, folder / "learning_curves.png")
            kind = f"{run['reward']}, {'thinking' if run['think'] else 'not thinking'}, seed {run['seed']}"
            measured = f"{run['accuracy']:.3f}, {run['seconds']:.0f} s of training"
            note(f"{done}: {kind}, {run['steps']} steps: {measured}")
    for line in table_of(rows_of(runs)).splitlines():
        print_text(line)


if __name__ == "__main__":
    main()
