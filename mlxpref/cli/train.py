"""`mlxpref train`: teach a judge what people prefer."""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

from mlxpref.cli.common import Consent, exit_on_sigterm
from mlxpref.cli.options import FILE, HelpCommand, json_option, settings_options
from mlxpref.cli.output import note, print_json, print_text, track_steps
from mlxpref.cli.tables import percent
from mlxpref.config import TrainSettings, read_settings, settings_from
from mlxpref.distributed import process_group
from mlxpref.log import logger
from mlxpref.power import keep_awake
from mlxpref.report.run_log import RunLog
from mlxpref.report.run_page import RUN_PAGE
from mlxpref.text import counted
from mlxpref.training.run import resume_run, start_run
from mlxpref.training.run_folder import Run, held_out_change, read_log
from mlxpref.training.run_record import chosen_settings
from mlxpref.training.step_report import StepReport


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref train --data preferences.jsonl --output runs/taste",
        "mlxpref train -d imagereward -n 2000 --held-out 0.1 --patience 3 -o runs/people",
        "mlxpref train --resume --output runs/taste --steps 400",
        "mlxpref train --data more.jsonl --adapter runs/taste --output runs/taste2",
        "mlxpref train --config settings.toml --learning-rate 2e-5",
    ),
)
@click.option("--output", type=FILE, help="Folder of the run.  [default: runs/<time>]")
@click.option("--config", type=FILE, help="TOML file of settings, or a run.json; options go first.")
@click.option("--resume", is_flag=True, help="Continue the run in --output, with its own settings.")
@click.option("--yes", is_flag=True, help="Agree to download the recommended judge, or the data.")
@settings_options(TrainSettings)
@json_option
def train(
    output: Path | None, config: Path | None, resume: bool, yes: bool, settings: dict[str, Any], as_json: bool
) -> None:
    """Train an adapter by GRPO with soft rewards; use it with --adapter in compare, rank and eval.

    The folder gets the adapter in mlx-vlm's format, run.json, log.jsonl, rollouts.jsonl, report.html and checkpoints.
    An interrupted or killed run continues with `mlxpref train --resume --output FOLDER`, with its own settings. There
    --steps N makes it longer; only --save-every, --log-every, --report-to, --rows, --micro-batch and --recompute may
    differ, too.
    """
    values = (read_settings(config) if config else {}) | settings
    # A run that is resumed names its judge itself.
    consent = Consent(yes, "demo" if resume else values.get("model"), values.get("adapter"), "training")
    processes = process_group()
    if resume:
        run = resume_run(output, values, consent, processes)
    else:
        chosen = chosen_settings(values, str(config) if config else "")
        of_run = settings_from(TrainSettings, chosen)
        run = start_run(of_run, output, consent, processes=processes, chosen=chosen)
    if run:
        _train(run)
    if not processes.is_main:
        return
    folder = run.folder if run else output
    assert folder is not None
    steps = read_log(folder)
    if not RunLog(steps).total("updated"):
        note(f"no step updated the adapter: the judge answers as before; see {folder / 'log.jsonl'}")
    held_out, page = held_out_change(folder), folder / RUN_PAGE
    if as_json:
        last_step = steps[-1] if steps else {}
        print_json({"adapter": str(folder), "last_step": last_step, "held_out": held_out, "report": str(page)})
        return
    print_text(f"adapter in {folder}; use it with --adapter {folder}")
    print_text(f"{_change(held_out)}; report: {page}" if held_out else f"report: {page}")


def _train(run: Run) -> None:
    """Train to the end; if the run ends early, print how to continue."""
    count = run.trainer.step_count
    progress = f", {run.done} of them done" if run.done else ""
    note(
        f"{counted(len(run.trainer.preferences), 'preference')}, {counted(count, 'step')}{progress}, into {run.folder}"
    )
    try:
        with exit_on_sigterm(), keep_awake():
            for _ in track_steps(warn_of_slowdown(run.reports()), count - run.done):
                pass
    except BaseException:
        if run.done:
            note(
                f"the adapter of step {run.done} of {count} is in {run.folder}; continue with: "
                f"mlxpref train --resume --output {shlex.quote(str(run.folder.absolute()))}"
            )
        raise


def _change(held_out: dict[str, Any]) -> str:
    """The held-out accuracy before and after training, in words."""
    before = "" if held_out["before"] is None else f"{percent(held_out['before'])} -> "
    best = f", the best of {held_out['best_of']} measurements" if held_out["best_of"] else ""
    return f"held-out {before}{percent(held_out['after'])} ({held_out['pairs']} pairs{best})"


def warn_of_slowdown(reports: Iterable[StepReport]) -> Iterator[StepReport]:
    """Pass on the reports of steps, and warn once if the run becomes much slower.

    It compares medians of ten steps, without the first two, which warm up. Short completions are slower a token on a
    cool machine, too: no warning if the latest steps wrote fewer tokens than the early ones.
    """
    steps: list[tuple[float, int]] = []  # tokens a second and tokens of each step that wrote any
    has_warned = False
    for report in reports:
        if report.tokens:
            steps.append((report.tokens_per_second, report.tokens))
        if not has_warned and len(steps) >= 22:
            (fast, many), (slow, few) = (map(median, zip(*part, strict=True)) for part in (steps[2:12], steps[-10:]))
            if slow < 0.7 * fast and few >= 0.8 * many:
                has_warned = True
                logger.warning(
                    f"{slow:.0f} tokens/s, {fast:.0f} at first: the machine is hot, on battery, short of memory or "
                    "shared; the result is the same"
                )
        yield report
