"""`mlxpref compare`: which of two images people would prefer."""

from pathlib import Path
from typing import Any

import click

from mlxpref.cli.common import image_cache
from mlxpref.cli.judges import load_judge_for
from mlxpref.cli.options import (
    CRITERION_ALONE,
    FILE,
    HelpCommand,
    JudgeOptions,
    check_prompt,
    json_option,
    option_group,
    settings_options,
)
from mlxpref.cli.output import print_json
from mlxpref.cli.pair_table import pair_to_json, print_pair
from mlxpref.config import JudgeSettings
from mlxpref.data.find_images import find_duplicates
from mlxpref.judge.diagnostics import answer_warnings, demo_warnings
from mlxpref.judge.point import SCORES_ONLY


@click.command(
    cls=HelpCommand,
    examples=(
        'mlxpref compare a.png b.png --prompt "a red fox in the snow"',
        'mlxpref compare a.png b.png -p "a red fox" --samples 4 --json',
        'mlxpref compare a.jpg b.jpg --criterion "the sharper eyes"',
        'mlxpref compare a.png b.png -p "a red fox" --model ./own-judge --profile unifiedreward-flex',
    ),
)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--prompt", callback=check_prompt, help=f"What the images were made for; {CRITERION_ALONE}.")
@option_group(JudgeOptions, "judge", only=("model", "adapter", "any_base", "yes", "calibration", "no_calibration"))
@settings_options(JudgeSettings)
@json_option
def compare(a: Path, b: Path, prompt: str | None, judge: JudgeOptions, settings: dict[str, Any], as_json: bool) -> None:
    """Which of two images people would prefer, and why; judged in both orders."""
    if prompt is None and "criterion" not in settings:
        raise click.UsageError("give --prompt TEXT, --criterion TEXT, or both")
    cache = image_cache(settings)
    for path in (a, b):
        cache.check(path)
    loaded = load_judge_for((a, b), judge, settings, cache)
    loaded = loaded.calibrated_for([loaded.settings.think])
    verdict = loaded.compare(a, b, prompt or "")
    warnings = list(answer_warnings([verdict]))
    if a == b or find_duplicates((a, b)):
        warnings.append(f"{a} and {b} have the same content: a preference between them is chance")
    if as_json:
        if verdict.scores and verdict.strategy == "select":  # else it was said on stderr
            warnings.append(SCORES_ONLY)
        judged = {
            "prompt": prompt or "",
            "profile": loaded.profile.name,
            "criterion": loaded.settings.criterion.strip() or None,
            "model": loaded.name,
            "adapter": str(judge.adapter) if judge.adapter else None,
            "calibration": loaded.calibration.summary() if loaded.calibration else None,
            "warnings": [*demo_warnings(loaded.name, (a, b), cache), *warnings],
        }
        print_json(judged | pair_to_json(a, b, verdict))
    else:
        print_pair(a, b, verdict, warnings)
