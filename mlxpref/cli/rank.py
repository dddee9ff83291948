"""The command that ranks: images in, an order out, as a table, JSON, a page, a spreadsheet or copies."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mlxpref.cli.common import (
    calibrated,
    check_output,
    image_cache,
    load_from_options,
    say_what_the_demo_knows,
    storing,
)
from mlxpref.cli.options import (
    calibration_options,
    check_prompt_source,
    json_option,
    judge_options,
    pairs_option,
    prompt_source_options,
    settings_options,
    store_options,
)
from mlxpref.config import JudgeSettings
from mlxpref.text import format_duration

if TYPE_CHECKING:
    from mlxpref.data.find_images import Skipped
    from mlxpref.data.image_cache import ImageCache
    from mlxpref.data.prompts import PromptGroup
    from mlxpref.judge.judge import Judge
    from mlxpref.judge.rank import ThinkAbout
    from mlxpref.judge.ranking_result import Ranking

__all__ = ["rank"]

_INTERRUPTED = 130


@dataclass(frozen=True)
class _Outputs:
    """Where a ranking goes beside stdout."""

    html: Path | None
    csv: Path | None
    copies: tuple[int, Path] | None

    def check(self) -> None:
        """Refuse now what could not be written when the work is done."""
        for option, path in (("--html", self.html), ("--csv", self.csv)):
            if path is not None:
                check_output(option, path)
        if self.copies is not None:
            from mlxpref.report.ranking_files import check_copy_folder

            check_copy_folder(self.copies[1])

    def write(self, rankings: Sequence["Ranking"], notes: Sequence[str], decoded: "ImageCache") -> None:
        """Write what was asked for and say where it is."""
        from mlxpref.cli.output import note

        if self.html is not None:
            from mlxpref.report.ranking_page import write_ranking_page

            write_ranking_page(self.html, rankings, notes, decoded.load)
            note(f"page: {self.html}")
        if self.csv is not None:
            from mlxpref.report.ranking_files import write_ranking_csv

            write_ranking_csv(self.csv, rankings)
            note(f"table: {self.csv}")
        if self.copies is not None:
            from mlxpref.report.ranking_files import copy_top

            note(f"{len(copy_top(rankings, *self.copies))} images copied to {self.copies[1]}")


@click.command(short_help="Rank images or folders, with reasons.")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@prompt_source_options
@pairs_option
@click.option("--top", type=click.IntRange(min=1), help="End as soon as it is settled which images are the K best.")
@click.option(
    "--think",
    type=click.Choice(["top", "all", "none"]),
    default="top",
    show_default=True,
    help="Think about pairs of the ten best, about all, or about none.",
)
@click.option("--recursive", is_flag=True, help="Look into the folders' folders too.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures and reasons.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write a table for a spreadsheet.")
@click.option(
    "--copy-top",
    nargs=2,
    type=(click.IntRange(min=1), click.Path(path_type=Path)),
    metavar="K FOLDER",
    help="Copy the K best into a folder.",
)
@store_options
@calibration_options
@judge_options
@settings_options(JudgeSettings, only=("samples", "max_tokens", "max_pixels", "seed", "rows"))
@json_option
def rank(
    images: tuple[Path, ...],
    prompt: str | None,
    prompt_from: str | None,
    pairs: int | Literal["all"] | None,
    top: int | None,
    think: Any,
    recursive: bool,
    html: Path | None,
    csv: Path | None,
    copy_top: tuple[int, Path] | None,
    store: Path | None,
    no_store: bool,
    calibration: Path | None,
    no_calibration: bool,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    any_base: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Rank images, or folders of images, best first and with reasons; every pair is judged in both orders.

    Ctrl-C ranks what was judged until then. Finished comparisons are kept: the same command, with more images or more
    pairs, judges only what is new.
    """
    from mlxpref.cli.output import note, print_json
    from mlxpref.cli.tables import print_ranking
    from mlxpref.data.prompts import find_groups
    from mlxpref.power import keep_awake

    check_prompt_source(prompt, prompt_from)
    outputs = _Outputs(html, csv, copy_top)
    outputs.check()
    decoded = image_cache(settings)
    groups, skipped, notes = find_groups(images, recursive, prompt, prompt_from, decoded)
    for line in [*(f"skipped: {each.path}: {each.error}" for each in skipped), *notes]:
        note(line)
    largest = max(len(group.images) for group in groups)
    judge = load_from_options(model, adapter, yes, settings, largest, any_base, decoded)
    judge = calibrated(judge, calibration, no_calibration)
    say_what_the_demo_knows(judge, [image for group in groups for image in group.images])
    asked = [(group.prompt, [(path.name, path.stat().st_size) for path in group.images]) for group in groups]
    judge.processes.check_same({"digest of the images": hashlib.sha256(repr(asked).encode()).hexdigest()[:16]})
    with keep_awake(), storing(judge, store, no_store) as storing_judge:
        rankings = _rank_all(storing_judge, groups, think, pairs, top, skipped)
    by = judge.calibration
    if judge.processes.is_main:
        outputs.write(rankings, [*notes, f"calibrated by {by}"] if by else notes, decoded)
    if as_json:
        shown = [ranking.to_json() | {"calibration": by.summary() if by else None} for ranking in rankings]
        print_json(shown if prompt_from else shown[0])
    else:
        for ranking in rankings:
            print_ranking(ranking)
    if rankings[-1].ending == "interrupted":
        raise SystemExit(_INTERRUPTED)


def _rank_all(
    judge: "Judge",
    groups: Sequence["PromptGroup"],
    think: "ThinkAbout",
    pairs: int | Literal["all"] | None,
    top: int | None,
    skipped: Sequence["Skipped"],
) -> list["Ranking"]:
    """Rank the images of each prompt; what was left out stands with the first one."""
    from mlxpref.cli.output import note

    before = judge.vlm.features.runs
    note(_expected(judge, groups, think, pairs))
    trial_runs = judge.vlm.features.runs - before
    rankings: list[Ranking] = []
    for group in groups:
        if len(groups) > 1:
            note(f"“{group.prompt}”: {len(group.images)} images")
        rankings.append(judge.rank(group.images, group.prompt, think, () if rankings else skipped, pairs, top))
        if rankings[-1].ending == "interrupted":
            break
    rankings[0] = replace(rankings[0], vision_runs=rankings[0].vision_runs + trial_runs)
    return rankings


def _expected(
    judge: "Judge", groups: Sequence["PromptGroup"], think: "ThinkAbout", pairs: int | Literal["all"] | None
) -> str:
    """What is to be done, and how long it may take."""
    from mlxpref.judge.rank import PairBudget
    from mlxpref.judge.time_estimate import estimate_seconds

    budgets = [PairBudget.of(len(group.images), think, pairs) for group in groups]
    whole = PairBudget(
        sum(budget.without_thinking for budget in budgets), sum(budget.with_thinking for budget in budgets)
    )
    images = [image for group in groups for image in group.images]
    seconds = estimate_seconds(judge, images, groups[0].prompt, whole)
    work = [f"{whole.without_thinking} pairs without thinking"] if whole.without_thinking else []
    work += [f"{whole.with_thinking} pairs with thinking"] if whole.with_thinking else []
    expected = "some are known" if seconds is None else f"about {format_duration(seconds)}"
    return f"{' and '.join(work)}, in both orders: {expected}"
