"""`mlxpref calibrate`: a temperature and a position bias that fit a judge to people's preferences."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlxpref.cli.common import check_output, image_cache, load_data
from mlxpref.cli.judges import open_judge
from mlxpref.cli.options import FILE, DataOptions, JudgeOptions, json_option, option_group, settings_options
from mlxpref.cli.output import print_json, print_table, print_text
from mlxpref.config import JudgeSettings
from mlxpref.data.learned import count_learned
from mlxpref.data.load import check_preferences
from mlxpref.judge import calibrate as fitting
from mlxpref.judge.calibration import Calibration, write_calibration
from mlxpref.judge.loading import calibration_path


@click.command()
@option_group(DataOptions, "source")
@click.option(
    "--think/--no-think", default=None, help="Calibrate judging with thinking only, or without only.  [default: both]"
)
@click.option(
    "--output",
    type=FILE,
    help="File to write.  [default: calibration.json in the adapter's folder, else in the user's cache]",
)
@option_group(JudgeOptions, "judge", only=("model", "adapter", "any_base", "yes", "store", "no_store"))
@settings_options(JudgeSettings, only=("samples", "max_tokens", "max_pixels", "seed", "rows"))
@json_option
def calibrate(
    source: DataOptions,
    think: bool | None,
    output: Path | None,
    judge: JudgeOptions,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Fit a temperature and a position bias to what people prefer; `rank` and `compare` then apply them.

    Use a split that the judge was not trained on. A calibration holds for one judge and its settings, separately with
    thinking and without. The table shows the gain on prompts outside the fit.
    """
    if think is not None:
        settings["think"] = think
    if output is not None:
        check_output("--output", output)
    preferences = load_data(source, judge.yes)
    cache = image_cache(settings)
    check_preferences(source.data, preferences, cache)
    images = [image for p in preferences for image in (p.a, p.b)]
    with open_judge(images, replace(judge, no_calibration=True), settings, cache) as loaded:
        if loaded.adapter is not None:
            count_learned(loaded.adapter, preferences)
        path = output or calibration_path(loaded)
        modes = [False, True] if think is None else [think]
        calibrations = [fitting.calibrate(loaded, preferences, source.data, preferences.split, mode) for mode in modes]
    write_calibration(path, calibrations)
    if as_json:
        print_json({"file": str(path), "calibrations": [each.to_json() for each in calibrations]})
    else:
        _print(calibrations, path)


def _print(calibrations: list[Calibration], path: Path) -> None:
    """Print the fit, and its effect on prompts outside the fit."""
    print_table(
        ("calibrated", ">pairs", ">temperature", ">position bias", ">nll", ">brier", ">ece", ">first chosen"),
        (
            (
                each.conditions.mode,
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
            print_text(f"{each.conditions.mode}: {warning}")
    print_text(f"Before and after are measured on prompts that were not fitted to; written to {path}")
