"""The commands that judge: compare, eval."""

from pathlib import Path
from typing import Any

import click

from mlxpref.config import JudgeSettings
from mlxpref.options import json_option, judge_options, prompt_option, settings_options, store_options
from mlxpref.session import check_images_of, load_from_options, say_what_the_demo_knows, storing

__all__ = ["compare", "evaluate_command"]


@click.command(short_help="Which of two images people would prefer.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@prompt_option
@judge_options
@settings_options(JudgeSettings)
@json_option
def compare(
    a: Path, b: Path, prompt: str, model: str | None, adapter: Path | None, yes: bool, as_json: bool, **settings: Any
) -> None:
    """Which of two images people would prefer, and why; judged in both orders."""
    from mlxpref.console import print_json
    from mlxpref.images import load_image
    from mlxpref.tables import pair_to_json, print_pair

    images = [load_image(path) for path in (a, b)]
    judge = load_from_options(model, adapter, yes, settings, 2)
    say_what_the_demo_knows(judge, images)
    verdict = judge.compare(a, b, prompt)
    if as_json:
        judged_by = {"prompt": prompt, "model": judge.name, "adapter": str(adapter) if adapter else None}
        print_json(judged_by | pair_to_json(a, b, verdict))
    else:
        print_pair(a, b, verdict)


@click.command("eval", short_help="How often the judge agrees with people.")
@click.option("--data", required=True, help="`demo`, or a .jsonl file of rows with prompt, a, b and p_a.")
@click.option("--split", default="test", show_default=True, help="Which part of the data.")
@click.option("--limit", type=click.IntRange(min=1), help="Judge only this many preferences.")
@click.option("--strategy", default="soft", show_default=True, help="soft, select or score; several with commas.")
@judge_options
@store_options
@settings_options(JudgeSettings)
@json_option
def evaluate_command(
    data: str,
    split: str,
    limit: int | None,
    strategy: str,
    store: Path | None,
    no_store: bool,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How often the judge agrees with people; ties are dropped, every pair is judged in both orders."""
    from mlxpref.console import print_json, track
    from mlxpref.datasets import load_preferences
    from mlxpref.evaluation import evaluate
    from mlxpref.tables import print_evaluations
    from mlxpref.verdict import STRATEGIES

    asked = [name.strip() for name in strategy.split(",")]
    strategies = [name for name in STRATEGIES if name in asked]
    if unknown := sorted(set(asked) - set(STRATEGIES)):
        raise click.BadParameter(
            f"{', '.join(map(repr, unknown))}; known are {', '.join(STRATEGIES)}", param_hint="--strategy"
        )
    preferences = load_preferences(data, split, limit)
    check_images_of(data, preferences)
    judge = load_from_options(model, adapter, yes, settings, 2 * len(preferences))
    say_what_the_demo_knows(judge, [image for p in preferences for image in (p.a, p.b)])
    with storing(judge, store, no_store):
        evaluations = [evaluate(judge, preferences, data, split, each, track) for each in strategies]
    if not as_json:
        print_evaluations(evaluations)
    elif len(evaluations) == 1:
        print_json(evaluations[0].to_json())
    else:
        print_json([evaluation.to_json() for evaluation in evaluations])
