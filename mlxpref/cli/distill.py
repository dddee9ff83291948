"""`mlxpref distill`: what a judge prefers with thinking, as a data set by which it learns to answer at once."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click

from mlxpref.cli.common import Consent, check_apart, check_output, image_cache, load_data, load_image_groups
from mlxpref.cli.judges import announce_rankings, announce_time, open_judge
from mlxpref.cli.options import (
    FILE,
    DataOptions,
    HelpCommand,
    ImageOptions,
    JudgeOptions,
    json_option,
    option,
    option_group,
    pairs_option,
    settings_options,
)
from mlxpref.cli.output import print_json, print_text
from mlxpref.cli.tables import print_evaluations
from mlxpref.config import DATA_HELP, JudgeSettings
from mlxpref.data.find_images import Skipped
from mlxpref.data.label_file import TRAIN
from mlxpref.data.learned import count_learned
from mlxpref.data.load import check_preferences
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_budget import PairBudget
from mlxpref.preferences import ImageLike, Pair, images_of
from mlxpref.text import counted
from mlxpref.training.distill import (
    HELD_OUT,
    MOST_HELD_OUT,
    Distillation,
    distill_images,
    distill_preferences,
    thinking_judge,
)
from mlxpref.training.distilled_file import check_distilled


@dataclass(frozen=True)
class _DataOptions(DataOptions):
    """The preferences whose pairs are judged, if it is not images."""

    data: str = option("--data", default="", help=f"Pairs to judge, instead of IMAGES: {DATA_HELP}")
    split: str | None = option("--split", help="Which part of the data.  [default: train; all rows without splits]")
    limit: int | None = option("--limit", type=click.IntRange(min=1), help="Judge only this many pairs.")


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref distill --data imagereward --limit 2000 --adapter runs/taste --output taste.jsonl",
        "mlxpref distill ./images --prompt-from png --pairs all --samples 4 --output own.jsonl",
    ),
)
@click.argument("images", nargs=-1, type=FILE)
@option_group(_DataOptions, "source")
@option_group(ImageOptions, "prompts")
@pairs_option
@click.option("--output", type=FILE, required=True, help="File of preferences to write, .jsonl.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, MOST_HELD_OUT),
    default=HELD_OUT,
    show_default=True,
    help="Share of the pairs, by whole prompts, that become split test; the others are train.",
)
@option_group(JudgeOptions, "options")
@settings_options(JudgeSettings, only=("think", "samples", "max_tokens", "max_pixels", "seed", "rows", "profile"))
@json_option
def distill(
    images: tuple[Path, ...],
    source: _DataOptions,
    prompts: ImageOptions,
    pairs: int | Literal["all"] | None,
    output: Path,
    held_out: float,
    options: JudgeOptions,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Write what a judge prefers with thinking as a data set, from which `train --no-think` learns to answer at once.

    Pairs are those of --data, whose labels are only compared, or of IMAGES and folders, chosen as by `rank
    --think-about all`. Each is judged in both orders; p_a is the soft preference. Whole prompts are held out, on which
    the judge that answers at once is measured, before and, by `eval`, after training. Ctrl-C writes the pairs so far;
    the same command goes on from there.
    """
    _check_usage(images, source, prompts, pairs, settings)
    check_distilled(output)
    check_output("--output", output)
    skipped: Sequence[Skipped] = ()
    cache, consent = image_cache(settings, options), Consent(options.yes, options.model, options.adapter)
    if images:
        groups, skipped, _ = load_image_groups(images, prompts, cache)
        everything: list[ImageLike] = [image for group in groups for image in group.images]
        inputs = (*images, prompts.prompt_from, *everything)
    else:
        preferences = load_data(source, consent, TRAIN)
        left_out = check_preferences(source.data, preferences, cache)
        everything, inputs = images_of(preferences), (source.data,)
    check_apart({"--output": output}, (*inputs, options.store, options.calibration))
    learned_from: int | None = None
    with open_judge(everything, replace(options, yes=consent.agreed), settings, cache) as judge:
        judge = thinking_judge(judge)
        if images:
            announce_rankings(judge, groups, "all", pairs)
            by_prompt = [(group.prompt, group.images) for group in groups]
            result = distill_images(judge, by_prompt, output, held_out, pairs)
        else:
            learned_from = count_learned(judge.folders, preferences)
            announce_time(judge, [Pair(p.a, p.b, p.prompt) for p in preferences], PairBudget(0, len(preferences)))
            result = distill_preferences(judge, source.data, preferences, output, held_out, left_out)
    if as_json:
        calibration = judge.calibration.summary() if judge.calibration else None
        judged: dict[str, Any] = {"model": judge.name, "adapter": str(judge.adapter) if judge.adapter else None}
        judged |= {"profile": judge.profile.name}
        judged |= {name: getattr(judge.settings, name) for name in ("samples", "max_tokens", "seed")}
        judged |= {"calibration": calibration, "learned_from": learned_from}
        judged |= {"skipped": [{"path": str(each.path), "error": each.error} for each in skipped]}
        print_json(result.to_json() | judged)
        return
    # Of data with splits, those that nothing learned from say how right the judge is then.
    people = [source.data, *(["--data-dir", str(source.data_dir)] if source.data_dir else [])]
    _print(result, judge, people if source.data and preferences.split == TRAIN else [])


def _check_usage(
    images: tuple[Path, ...],
    source: DataOptions,
    prompts: ImageOptions,
    pairs: int | Literal["all"] | None,
    settings: dict[str, Any],
) -> None:
    """Raise errors for options that exclude each other, and for images without prompts."""
    if bool(images) == bool(source.data):
        raise click.UsageError("give either --data, or IMAGES with their prompts")
    if settings.get("think") is False:
        raise click.UsageError("--no-think: what a judge says with thinking is what `distill` writes; leave it out")
    if source.data and (pairs or prompts != ImageOptions()):
        raise click.UsageError("--prompt, --prompt-from, --recursive and --pairs are for IMAGES; --data has its own")
    if images and (source.data_dir or source.split or source.limit):
        raise click.UsageError("--data-dir, --split and --limit are for --data; --pairs says how many for IMAGES")
    if images:
        prompts.check()


def _print(result: Distillation, judge: Judge, people: Sequence[str]) -> None:
    """Print how the judge answers at once beside its thinking, what was written, and the next commands.

    `people` are the words of `eval` for the data that measure with people, if there are any.
    """
    named = {
        "thinking, beside people": result.thinking,
        "read at once, beside people": result.reading,
        "read at once, beside thinking": result.agreement,
    }
    evaluations = {name: each for name, each in named.items() if each}
    if evaluations:
        print_evaluations(list(evaluations.values()), list(evaluations))
    thinking, reading = result.seconds_per_pair, result.reading_seconds_per_pair
    if not math.isnan(thinking + reading):  # else some of it was judged before
        print_text(
            f"a pair takes {thinking:.3g} s with thinking, {reading:.3g} s read at once, without encoding its images: "
            f"{thinking / reading:.1f} times as fast"
        )
    held_out = f" and {counted(result.test, 'pair')} of other prompts to measure" if result.test else ""
    print_text(f"{counted(result.train, 'pair')} to learn from{held_out}, in {result.path}")
    path, model = shlex.quote(str(result.path)), f" --model {shlex.quote(judge.name)}"
    model += f" --profile {shlex.quote(judge.settings.profile)}" if judge.settings.profile else ""
    base = f" --adapter {shlex.quote(str(judge.adapter))}" if judge.adapter else model
    print_text(f"learn them: mlxpref train --data {path}{base} --no-think --reward brier --output runs/at-once")
    if result.test:
        print_text(f"beside thinking: mlxpref eval --data {path} --adapter runs/at-once")
    if people:
        print_text(f"beside people: mlxpref eval --data {shlex.join(people)} --adapter runs/at-once")
