"""Runs that take long: made in processes of their own, kept in a file after each, and told as means over seeds."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from mlxpref.files import write_file

__all__ = ["make_runs", "markdown", "read_runs", "run_options", "spread"]

Record = dict[str, Any]
Command = Callable[..., Any]


def run_options(command: Command) -> Command:
    """Give a command the options of runs with a figure: `output`, `processes`, `table` and `figure`."""
    for decorate in (
        click.option("--figure", type=click.Path(path_type=Path), help="Train nothing: draw the file as this PNG."),
        click.option("--table", is_flag=True, help="Train nothing: print the tables from the file."),
        click.option(
            "--processes", default=2, show_default=True, help="Runs at a time, each with its share of the cores."
        ),
        click.option(
            "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder of the files; beside the script."
        ),
    ):
        command = decorate(command)
    return command


def read_runs(file: Path) -> list[Record]:
    """The runs that a file has; none where there is no file."""
    return list(json.loads(file.read_text(encoding="utf-8"))["runs"]) if file.exists() else []


def make_runs(
    plans: Iterable[Mapping[str, Any]],
    make: Callable[[Mapping[str, Any]], Record],
    runs: list[Record],
    file: Path,
    processes: int,
    key: Callable[[Record], Any],
) -> Iterator[tuple[str, Record]]:
    """Make the runs that are planned and missing, add each to `runs` and to the file, in the order of `key`.

    Yields how far the work is, in words, and the run.
    """
    missing = [plan for plan in plans if not any(plan.items() <= run.items() for run in runs)]
    file.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    started = time.perf_counter()
    # A process for each run: what one leaves in memory must not help or hinder the next.
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for number, future in enumerate(as_completed(pool.submit(make, plan) for plan in missing), 1):
            try:
                run = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is done is in the file; the rest is not waited for
                raise
            runs.append(run)
            runs.sort(key=key)
            _write(runs, file)
            yield f"{number} of {len(missing)} after {time.perf_counter() - started:.0f} s", run


def _write(runs: Iterable[Record], file: Path) -> None:
    from scripts.bench_common import environment

    lines = ",\n".join(map(json.dumps, runs))  # a run a line, so that a difference can be read
    write_file(file, f'{json.dumps(environment())[:-1]}, "runs": [\n{lines}\n]}}\n')


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, least and largest."""
    return statistics.fmean(values), min(values), max(values)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
