"""Loads the judge of a command by its options, with its calibration, its store and its image features on disk."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from mlxpref.cli.common import agree
from mlxpref.cli.options import JudgeOptions
from mlxpref.cli.output import note
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.prompts import PromptGroup
from mlxpref.distributed import process_group
from mlxpref.errors import DataError
from mlxpref.judge.diagnostics import demo_warnings
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import FoundJudge, calibrated, find_judge
from mlxpref.judge.pair_budget import PairBudget, ThinkAbout
from mlxpref.judge.store import Store, default_store_path
from mlxpref.judge.time_estimate import estimate_seconds, unknown_part
from mlxpref.power import keep_awake
from mlxpref.preferences import ImageLike, Pair, images_of
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.text import counted, format_duration

_CANDIDATES = 20_000
"""The most pairs to look for in the store for an estimate."""


def find_judge_for(images: int, options: JudgeOptions, settings: Mapping[str, Any]) -> FoundJudge:
    """The judge of the options, before it is loaded, for a ranking or pairs of up to so many images."""
    consent = (lambda question: True) if options.yes else agree
    return find_judge(options.model, options.adapter, settings, consent, images, options.any_base)


def load_judge_for(
    images: Sequence[ImageLike],
    options: JudgeOptions,
    settings: Mapping[str, Any],
    cache: ImageCache,
    together: int | None = None,
    found: FoundJudge | None = None,
) -> Judge:
    """The calibrated judge of the options for `images`, with up to `together` (default all) in one ranking.

    `found` is the judge of these options if it was looked for before.
    """
    judge = (found or find_judge_for(together or len(images), options, settings)).load()
    if not judge.settings.think and (samples := settings.get("samples", 1)) > 1:
        note(f"--samples {samples} is left off: without thinking every completion of a comparison is the same")
    judge = replace(judge, processes=process_group())
    judge.vlm.features.images = cache
    if judge.processes.size > 1:
        conditions = judge.conditions()
        judge.processes.check_same(
            {"fingerprint of the judge": conditions.judge, "digest of profile and criterion": conditions.profile}
        )
    judge = calibrated(judge, options.calibration or not options.no_calibration)
    for warning in demo_warnings(judge.name, images, cache):
        note(warning)
    return judge


def announce_time(judge: Judge, candidates: Iterable[Pair], budget: PairBudget) -> None:
    """Note the number of pairs to judge, some of these, and an estimate of the time from a trial with the first one."""
    pairs = list(islice(candidates, _CANDIDATES))
    counts = {"without thinking": budget.without_thinking, "with thinking": budget.with_thinking}
    what = "score" if judge.profile.is_point else "comparison"
    most = len(images_of(pairs)) if judge.profile.is_point else 2 * budget.total  # it reads each image once
    work = [f"{counted(min(2 * count, most), what)} {how}" for how, count in counts.items() if count]
    with suppress(DataError):  # the work itself says what is wrong with an image
        rest = unknown_part(judge, pairs, budget)
        known = f"; about {min(2 * (budget.total - rest.total), most)} of them known" if rest != budget else ""
        time = "no time"
        if rest.total:
            time = f"about {format_duration(estimate_seconds(judge, images_of(pairs), pairs[0].prompt, rest))}"
        note(f"{' and '.join(work)}: {time}{known}")


def announce_rankings(
    judge: Judge, groups: Sequence[PromptGroup], think_about: ThinkAbout, pairs: int | Literal["all"] | None
) -> None:
    """The same of the rankings of each prompt's images."""
    budgets = [PairBudget.of(len(group.images), think_about, pairs) for group in groups]
    total = PairBudget(sum(each.without_thinking for each in budgets), sum(each.with_thinking for each in budgets))
    every = (Pair(g.images[a], g.images[b], g.prompt) for g in groups for a, b in all_pairs(len(g.images)))
    announce_time(judge, every, total)


@contextmanager
def open_judge(
    images: Sequence[ImageLike],
    options: JudgeOptions,
    settings: Mapping[str, Any],
    cache: ImageCache,
    together: int | None = None,
    found: FoundJudge | None = None,
) -> Iterator[Judge]:
    """The same judge with its store open, and its image features on disk beside it; keeps the machine awake."""
    judge = load_judge_for(images, options, settings, cache, together, found)
    store = None if options.no_store else _store(options, judge)
    if cache.disk and store and (store.is_open or not judge.processes.is_main):
        cache.disk.start()
        judge.vlm.features.keep_in(cache.disk, judge.fingerprint.tower())
    with keep_awake(), store or nullcontext():
        try:
            yield replace(judge, store=store)
        except KeyboardInterrupt:
            if store and store.is_open:
                note(f"finished comparisons are kept in {store.path}: the same command judges only the others")
            raise


def _store(options: JudgeOptions, judge: Judge) -> Store | None:
    """The store of the options; that of the cache, which nobody asked for, is left off where there can be none."""
    if options.store:
        return Store(options.store, processes=judge.processes)
    try:
        return Store(default_store_path(), processes=judge.processes, required=False)
    except DataError as error:  # the user has no home
        note(f"comparisons are not kept: {error}")
        return None
