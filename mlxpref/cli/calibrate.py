"""The command that calibrates, and the options by which the others say what a judge is calibrated by."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.cli.common import check_output, image_cache, load_from_options, say_what_the_demo_knows, storing
from mlxpref.cli.options import json_option, judge_options, settings_options, store_options
from mlxpref.config import JudgeSettings

if TYPE_CHECKING:
    from mlxpref.judge.calibration import CalibrationFile

__all__ = ["calibrate"]


@click.command(short_help="Make a judge's probabilities mean what they say.")
@click.option("--data", required=True, help="`demo`, a public data set by name, or a file or folder of your own.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with the files of a public data set.")
@click.option(
    "--split", default="test", show_default=True, help="Which part of the data: one that the judge was not trained on."
)
@click.option("--limit", type=click.IntRange(min=1), help="Judge only this many preferences.")
@click.option(
    "--think/--no-think", default=None, help="Calibrate only thinking, or only reading without.  [default: both]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write.  [default: calibration.json in the adapter's folder, else in the user's cache]",
)
@judge_options
@store_options
@settings_options(JudgeSettings, only=("samples", "max_tokens", "max_pixels", "seed", "rows"))
@json_option
def calibrate(
    data: str,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    think: bool | None,
    output: Path | None,
    store: Path | None,
    no_store: bool,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    any_base: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fit a temperature and a position bias to what people prefer; `rank` and `compare` then apply them.

    A calibration is for one judge and its settings. Thinking and reading without are two judges with one each. The
    gain that is shown is that on prompts which were not fitted to.
    """
    from mlxpref.cli.output import print_json
    from mlxpref.data.load import check_preferences, load_preferences
    from mlxpref.judge.calibrate import calibrate as calibration_for
    from mlxpref.judge.calibration import write_calibration
    from mlxpref.judge.loading import calibration_path
    from mlxpref.power import keep_awake

    if output is not None:
        check_output("--output", output)
    preferences = load_preferences(data, split, limit, data_dir=data_dir)
    decoded = image_cache(settings)
    check_preferences(data, preferences, decoded)
    judge = load_from_options(model, adapter, yes, settings, 2 * len(preferences), any_base, decoded)
    say_what_the_demo_knows(judge, [image for p in preferences for image in (p.a, p.b)])
    path = output or calibration_path(judge)
    modes = [False, True] if think is None else [think]
    with keep_awake(), storing(judge, store, no_store) as storing_judge:
        made = [calibration_for(storing_judge, preferences, data, split, mode) for mode in modes]
    written = write_calibration(path, made)
    if as_json:
        print_json({"file": str(path), "calibrations": [each.to_json() for each in made]})
    else:
        _print(written, modes)


def _print(written: "CalibrationFile", modes: list[bool]) -> None:
    """What was fitted, and what it changes on prompts that it was not fitted to."""
    from mlxpref.cli.output import print_table, print_text

    made = [each for each in written.calibrations if each.conditions.think in modes]
    print_table(
        ("calibrated", ">pairs", ">temperature", ">position bias", ">nll", ">brier", ">ece", ">first chosen"),
        (
            (
                each.conditions.mode,
                each.pairs,
                f"{each.rescaling.temperature:.3g}",
                f"{each.rescaling.position_bias:+.2f}",
                *(f"{b:.3f} to {a:.3f}" for b, a in ((each.before.nll, each.after.nll),
                                                     (each.before.brier, each.after.brier),
                                                     (each.before.ece, each.after.ece))),
                f"{100 * each.before.first_choice_rate:.1f} % to {100 * each.after.first_choice_rate:.1f} %",
            )
            for each in made
        ),
    )  # fmt: skip
    for each in made:
        for warning in each.warnings:
            print_text(f"{each.conditions.mode}: {warning}")
    print_text(f"Before and after are measured on prompts that were not fitted to; written to {written.path}")
