"""`mlxpref rank`: rank images; the order is a table, JSON, a page, a spreadsheet or copies."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import click

from mlxpref.cli.common import INTERRUPTED, check_apart, check_output, check_writable, image_cache, load_image_groups
from mlxpref.cli.judges import announce_rankings, open_judge
from mlxpref.cli.options import (
    FILE,
    GroupOptions,
    ImageOptions,
    JudgeOptions,
    OldSpellings,
    flag,
    json_option,
    option,
    option_group,
    pairs_option,
    settings_options,
)
from mlxpref.cli.output import note, print_json, print_text
from mlxpref.cli.tables import print_best, print_ranking
from mlxpref.config import JudgeSettings
from mlxpref.data.find_images import Skipped
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.prompts import METADATA, PromptGroup, group_title
from mlxpref.data.similar import HashedImageCache, split_by_similarity
from mlxpref.engine.profile import OWN
from mlxpref.errors import MlxprefError
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_budget import PairBudget, ThinkAbout
from mlxpref.judge.rank import Orders
from mlxpref.judge.ranking_result import Ranking
from mlxpref.report.ranking_files import check_copy_folder, copy_top, write_ranking_csv
from mlxpref.report.ranking_page import write_ranking_page
from mlxpref.report.xmp import ratings_in_words, write_ratings
from mlxpref.text import counted, few, short_names

Pairs = int | Literal["all"] | None
_SHOWN = 10
"""The number of best images that a terminal shows; a file, a pipe and JSON get all."""


@dataclass(frozen=True)
class OutputOptions:
    """The outputs of a ranking besides stdout."""

    html: Path | None = option("--html", type=FILE, help="Write a page with pictures and reasons.")
    csv: Path | None = option("--csv", type=FILE, help="Write a table for a spreadsheet.")
    copy_top: tuple[int, Path] | None = option(
        "--copy-top",
        nargs=2,
        type=(click.IntRange(min=1), FILE),
        metavar="K FOLDER",
        help="Copy the K best into a folder.",
    )
    captions: bool = flag("--captions", "With --copy-top: the prompt beside each copy, in a text file of its name.")
    xmp: bool = flag("--xmp", "Rate each image with 1 to 5 stars in an XMP sidecar beside it.")

    def check(self, has_prompts: bool) -> None:
        """Raise errors, before the work, for outputs that could not be written after it."""
        if self.captions and self.copy_top is None:
            raise click.UsageError("--captions goes with --copy-top K FOLDER")
        if self.captions and not has_prompts:
            raise click.UsageError("--captions writes the prompts of the images: give --prompt or --prompt-from, too")
        if self.html is not None:
            check_output("--html", self.html, (".html", ".htm"))
        if self.csv is not None:
            check_output("--csv", self.csv, (".csv",))
        if self.copy_top is not None:
            check_copy_folder(self.copy_top[1])
            check_writable("--copy-top", self.copy_top[1])

    def check_sidecars(self, images: Sequence[Path]) -> None:
        """ConfigError, before the work, for a folder of images in which no sidecar could be written after it."""
        for folder in sorted({image.parent for image in images}) if self.xmp else ():
            check_writable("--xmp", folder, "correct its permissions, or leave out --xmp")

    def write(
        self, rankings: Sequence[Ranking], alone: Sequence[PromptGroup], notes: Sequence[str], cache: ImageCache
    ) -> bool:
        """Write the outputs and print their places; `alone` are images that are similar to no other.

        False if no sidecar could be rated.
        """
        if self.html is not None:
            write_ranking_page(self.html, rankings, notes, cache.load)
            note(f"page: {self.html}")
        if self.csv is not None:
            write_ranking_csv(self.csv, rankings, alone)
            note(f"table: {self.csv}")
        if self.copy_top is not None:
            copies = copy_top(rankings, *self.copy_top, captions=self.captions)
            left = f"; {counted(len(alone), 'image')} alone not copied" if alone else ""
            texts = " with their prompts" if self.captions else ""
            note(f"{counted(len(copies), 'image')} copied to {self.copy_top[1]}{texts}{left}")
        if self.xmp:
            ratings = [rating for ranking in rankings for rating in write_ratings(ranking)]
            for line in ratings_in_words(ratings):
                note(line)
            return not all(rating.error for rating in ratings)
        return True


_OLD_THINK = {
    ("--think", "top"): ("--think-about", "top"),
    ("--think", "all"): ("--think-about", "all"),
    ("--think", "none"): ("--no-think",),
}


@click.command(
    cls=OldSpellings,
    old=_OLD_THINK,
    examples=(
        'mlxpref rank ./images --prompt "a red fox in the snow"',
        'mlxpref rank ./images -p "a red fox" --adapter runs/taste --html page.html --copy-top 10 ./best',
        "mlxpref rank ./images --prompt-from png --no-think --csv ranking.csv",
        'mlxpref rank ./photos --criterion "the sharper eyes" --group-by similar --copy-top 1 ./best',
    ),
)
@click.argument("images", nargs=-1, required=True, type=FILE)
@option_group(ImageOptions, "source")
@option_group(GroupOptions, "grouping")
@pairs_option
@click.option(
    "--orders",
    type=click.Choice(get_args(Orders)),
    default="auto",
    show_default=True,
    help="Show each pair in both orders, or spend the same comparisons on up to twice as many pairs in one; auto does "
    "what the judge's position bias speaks for.",
)
@click.option(
    "--top", type=click.IntRange(min=1), help="End as soon as asking the rest would leave the K best the same."
)
@click.option(
    "--think-about",
    type=click.Choice(["top", "all"]),
    help="With thinking: about pairs of the ten best, or about all.  [default: top]",
)
@click.option("--all", "show_all", is_flag=True, help="Print all images on a terminal, not only the ten best.")
@option_group(OutputOptions, "outputs")
@option_group(JudgeOptions, "judge")
@settings_options(JudgeSettings)
@json_option
def rank(
    images: tuple[Path, ...],
    source: ImageOptions,
    grouping: GroupOptions,
    pairs: Pairs,
    orders: Orders,
    top: int | None,
    think_about: ThinkAbout | None,
    show_all: bool,
    outputs: OutputOptions,
    judge: JudgeOptions,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Rank images, or folders of images, best first and with reasons, by pairs.

    Ctrl-C ranks by the pairs so far. Finished comparisons are stored: the same command, with more images or more pairs,
    judges only new ones.
    """
    if think_about and settings.setdefault("think", True) is False:
        raise click.UsageError("--think-about and --no-think exclude each other")
    source.check("criterion" in settings)
    outputs.check(bool(source.prompt or source.prompt_from))
    cache = image_cache(settings, judge, HashedImageCache if grouping.group_by else ImageCache)
    groups, skipped, notes = load_image_groups(images, source, cache)
    groups, alone = _grouped(groups, grouping, cache, notes)
    everything = [image for group in groups for image in group.images]
    lists = {path.parent / name for path in everything for name in METADATA}
    inputs = (*everything, *lists, source.prompt_from, judge.store, judge.calibration)
    check_apart({"--html": outputs.html, "--csv": outputs.csv}, inputs)
    outputs.check_sidecars(everything)
    with open_judge(everything, judge, settings, cache, max(len(group.images) for group in groups)) as loaded:
        loaded.processes.check_same({"digest of the images": _digest(groups)})
        about = think_about or loaded.think_about
        budgets = [PairBudget.of(len(group.images), about, pairs) for group in groups]
        loaded = loaded.calibrated_for({think for budget in budgets for think in budget.modes})
        rankings, stopped = _rank_all(loaded, groups, about, pairs, orders, top, skipped)
    calibration = loaded.calibration
    if calibration:
        notes.append(f"calibrated by {calibration}")
    if loaded.profile.name != OWN:
        notes.append(f"asked by the profile {loaded.profile.name}")
    if len(rankings) < len(groups):
        notes.append(f"{len(rankings)} of {len(groups)} {'groups' if grouping.group_by else 'prompts'} were ranked")
        note(notes[-1])
    written = outputs.write(rankings, alone, notes, cache) if loaded.processes.is_main else True
    if as_json:
        summary = {"calibration": calibration.summary() if calibration else None, "profile": loaded.profile.name}
        results = [ranking.lazy_json() | summary for ranking in rankings]
        singles = [{"prompt": each.prompt, "path": str(each.images[0])} for each in alone]
        several = {"rankings": results, "singles": singles} if grouping.group_by else results
        print_json(several if grouping.group_by or source.prompt_from else results[0])
    else:
        _print(rankings, alone, None if show_all or not sys.stdout.isatty() else max(_SHOWN, top or 0))
    if stopped:
        raise stopped
    if rankings[-1].ending == "interrupted":
        raise SystemExit(INTERRUPTED)
    if not written:
        raise SystemExit(1)


def _grouped(
    groups: list[PromptGroup], options: GroupOptions, cache: ImageCache, notes: list[str]
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """The groups of near-duplicates and the images without any, with a note of them; else the groups as they are."""
    if not isinstance(cache, HashedImageCache):
        return groups, []
    similar, alone = split_by_similarity(groups, options.distance, cache)
    note(f"{counted(len(similar), 'group')} of similar images, {counted(len(alone), 'image')} alone")
    if alone:
        notes.append(_alone_in_words(alone, _SHOWN))
    return similar, alone


def _print(rankings: Sequence[Ranking], alone: Sequence[PromptGroup], most: int | None) -> None:
    """Print rankings, with `most` that many images of each, the best of several, and images without a group."""
    for ranking in rankings:
        print_ranking(ranking, most)
    if len(rankings) > 1:
        print_best(rankings)
    if alone:
        print_text(_alone_in_words(alone, most))


def _alone_in_words(alone: Sequence[PromptGroup], most: int | None) -> str:
    names = short_names([str(each.images[0]) for each in alone])
    verb = "is" if len(alone) == 1 else "are"
    return (
        f"{counted(len(alone), 'image')} {verb} similar to no other, and not judged: {few(names, most or len(names))}"
    )


def _rank_all(
    judge: Judge,
    groups: Sequence[PromptGroup],
    think_about: ThinkAbout,
    pairs: Pairs,
    orders: Orders,
    top: int | None,
    skipped: Sequence[Skipped],
) -> tuple[list[Ranking], BaseException | None]:
    """The rankings of each prompt, the first with the images that were left out; and what ended the work early.

    An interrupt or an error before the first ranking is raised.
    """
    encoded_before = judge.vlm.features.runs
    announce_rankings(judge, groups, think_about, pairs)
    trial_runs = judge.vlm.features.runs - encoded_before  # by the trial for the time estimate
    rankings: list[Ranking] = []
    stopped: BaseException | None = None
    try:
        for group in groups:
            if len(groups) > 1:
                note(f"{group_title(group.prompt, similar_to=group.similar_to)}: {counted(len(group.images), 'image')}")
            left_out = () if rankings else skipped
            ranking = judge.rank(group.images, group.prompt, think_about, left_out, pairs, top, orders)
            rankings.append(replace(ranking, similar_to=group.similar_to))
    except (KeyboardInterrupt, MlxprefError) as error:
        if partial := getattr(error, "ranking", None):
            rankings.append(replace(partial, similar_to=group.similar_to))
        elif rankings:
            stopped = error
        else:
            raise
    rankings[0] = replace(rankings[0], vision_runs=rankings[0].vision_runs + trial_runs)
    return rankings, stopped


def _digest(groups: Sequence[PromptGroup]) -> str:
    """A digest of the prompts and of the names and sizes of their images."""
    names = [(group.prompt, [(path.name, path.stat().st_size) for path in group.images]) for group in groups]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]
