"""`mlxpref calibrate`: a temperature and a position bias that fit a judge to people's preferences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from mlxpref.cli.common import Consent, check_apart, check_output, check_writable, image_cache, load_data
from mlxpref.cli.judges import announce_time, open_judge
from mlxpref.cli.options import (
    FILE,
    DataOptions,
    HelpCommand,
    JudgeOptions,
    json_option,
    option,
    option_group,
    settings_options,
)
from mlxpref.cli.output import note, print_json, print_table, print_text
from mlxpref.config import DATA_HELP, JudgeSettings
from mlxpref.data.learned import count_learned, has_learned
from mlxpref.data.load import ALL_ROWS, check_preferences, load_outside_test
from mlxpref.judge import calibrate as fitting
from mlxpref.judge.calibration import Calibration, CalibrationFile, read_calibrations, write_calibration
from mlxpref.judge.loading import calibration_path, known_calibrations
from mlxpref.judge.pair_budget import PairBudget
from mlxpref.preferences import Pair, images_of


@dataclass(frozen=True)
class CalibrationData(DataOptions):
    """The preferences to fit to; none are needed to list or remove calibrations."""

    data: str = option("--data", default="", help=DATA_HELP)
    split: str | None = option(
        "--split",
        help="Which part of the data.  [default: one that `eval` does not use, of validation, heldout and train; test "
        "if the data have no other, or only one that the adapter learned from]",
    )


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref calibrate --data preferences.jsonl --adapter runs/taste",
        "mlxpref calibrate --data imagereward --split validation --limit 200",
        "mlxpref calibrate --list",
    ),
)
@option_group(CalibrationData, "source")
@click.option(
    "--think/--no-think",
    default=None,
    help="Calibrate judging with thinking only, or without only.  [default: the ways that the judge uses]",
)
@click.option(
    "--output",
    type=FILE,
    help="File to write.  [default: calibration.json in the adapter's folder, else in the user's cache]",
)
@click.option("--list", "show_list", is_flag=True, help="List the calibrations in the cache, and the adapter's.")
@click.option("--remove", type=FILE, help="Remove a calibration by its file, as in the list.")
@option_group(JudgeOptions, "judge", only=("model", "adapter", "any_base", "yes", "store", "no_store"))
@settings_options(JudgeSettings, only=("samples", "max_tokens", "max_pixels", "seed", "rows", "criterion", "profile"))
@json_option
def calibrate(
    source: DataOptions,
    think: bool | None,
    output: Path | None,
    show_list: bool,
    remove: Path | None,
    judge: JudgeOptions,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Fit a temperature and a position bias to what people prefer; `rank` and `compare` then apply them.

    Use a split that the judge was not trained on. A calibration holds for one judge and its settings, separately with
    thinking and without. The table shows the gain on prompts outside the fit.
    """
    if remove:
        for each in read_calibrations(remove).calibrations:  # no other file is removed
            note(f"removed: {each.name}, {each}")
        remove.unlink()
    if show_list or remove:
        _list(known_calibrations(judge.adapter), as_json)
        return
    if not source.data:
        raise click.UsageError("Missing option '--data'")
    if think is not None:
        settings["think"] = think
    if output is not None:
        check_output("--output", output)
        check_apart({"--output": output}, (source.data, judge.store))
    consent = Consent(judge.yes, judge.model, judge.adapter)
    if source.split:
        preferences = load_data(source, consent)
    else:
        learned = judge.adapter is not None or has_learned([Path(judge.model)] if judge.model else [])
        preferences = load_outside_test(lambda split: load_data(source, consent, split), learned)
    if preferences.split in ("test", ALL_ROWS):
        note(f"{preferences.split} of {source.data}: `eval` measures on these, too; there it will look too good")
    fitting.decided(preferences, source.data, preferences.split)
    cache = image_cache(settings, judge)
    left_out = check_preferences(source.data, preferences, cache)
    images = images_of(preferences)
    options = replace(judge, no_calibration=True, yes=consent.agreed)
    with open_judge(images, options, settings, cache) as loaded:
        count_learned(loaded.folders, preferences)
        path = output or calibration_path(loaded)
        check_writable("the calibration's place", path.parent)
        if path.exists():
            read_calibrations(path)
        modes = fitting.modes_of(loaded, think)
        counts = [len(preferences) if mode in modes else 0 for mode in (False, True)]
        announce_time(loaded, [Pair(p.a, p.b, p.prompt) for p in preferences], PairBudget(*counts))
        calibrations = [
            fitting.calibrate(loaded, preferences, source.data, preferences.split, mode, left_out) for mode in modes
        ]
    write_calibration(path, calibrations)
    if as_json:
        print_json(_to_json(path, calibrations))
    else:
        _print(calibrations, path)


def _to_json(path: Path, calibrations: Sequence[Calibration]) -> dict[str, Any]:
    return {"file": str(path), "calibrations": [each.to_json() for each in calibrations]}


def _list(files: list[CalibrationFile], as_json: bool) -> None:
    """Print calibrations in files."""
    if as_json:
        print_json({"files": [_to_json(file.path, file.calibrations) for file in files]})
        return
    if not files:
        print_text("no calibrations")
        return
    print_table(
        ("judge", "calibrated", ">temperature", ">position bias", ">pairs", "data", "file"),
        [
            (
                each.name or "unknown",
                each.mode,
                f"{each.rescaling.temperature:.3g}",
                f"{each.rescaling.position_bias:+.2f}",
                each.pairs,
                f"{each.data} {each.split}",
                file.path,
            )
            for file in files
            for each in file.calibrations
        ],
    )


def _print(calibrations: list[Calibration], path: Path) -> None:
    """Print the fit, and its effect on prompts outside the fit."""
    print_table(
        ("calibrated", ">pairs", ">temperature", ">position bias", ">nll", ">brier", ">ece", ">first chosen"),
        (
            (
                each.mode,
                each.pairs,
                f"{each.rescaling.temperature:.3g}",
                f"{each.rescaling.position_bias:+.2f}",
                *(f"{getattr(each.before, name):.3f} to {getattr(each.after, name):.3f}"
                  for name in ("nll", "brier", "ece")),
                f"{100 * each.before.first_choice_rate:.1f} % to {100 * each.after.first_choice_rate:.1f} %",
            )
            for each in calibrations
        ),
        shorten="calibrated",
        drop=("first chosen", "brier", "nll"),
    )  # fmt: skip
    for each in calibrations:
        for warning in each.warnings:
            print_text(f"{each.mode}: {warning}")
    print_text(f"Before and after are measured on prompts that were not fitted to; written to {path}")
