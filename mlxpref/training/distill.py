"""Distilling: what a judge prefers with thinking becomes a data set, by which it learns to answer at once."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from mlxpref.data.find_images import reasons_of
from mlxpref.data.image_files import ImageFiles
from mlxpref.data.inputs import ImagesInput, PreferencesInput, check_prompt, find_given, preferences_from
from mlxpref.data.label_file import TEST, TRAIN
from mlxpref.data.learned import count_learned
from mlxpref.data.left_out import LeftOut
from mlxpref.data.load import Preferences, check_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import expand, write_output
from mlxpref.judge.diagnostics import answer_warnings
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluation_of
from mlxpref.judge.functions import judge_from
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import calibrated
from mlxpref.judge.pair_budget import PairBudget
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.ranking_result import Ranking
from mlxpref.judge.verdict_source import Judgement
from mlxpref.log import logger, track
from mlxpref.preferences import ImageLike, Pair, Preference, image_name
from mlxpref.text import counted, few, plain
from mlxpref.training.distilled_file import check_distilled, check_replaced, name_of
from mlxpref.training.sampler import held_out_split

HELD_OUT, MOST_HELD_OUT = 0.2, 0.9
"""The share of the pairs that is held out by default, and the largest."""
JudgedPair = tuple[Pair | Preference, PairVerdict]
"""A pair, with people's preference if that is known, and the judge's verdict on it with thinking."""


@dataclass(frozen=True)
class Distillation:
    """The result of `distill`: a file of a judge's soft preferences, and how it answers at once before learning them.

    `train` and `test` count the pairs of each split; without held-out prompts all are to learn from. `unreadable` names
    the pairs without a readable answer in both orders, which the file lacks. Three evaluations are of the held-out
    pairs, or else of all: `thinking` and `reading` against people, None where these said nothing, and `agreement` of
    reading with thinking, whose `metrics.brier` is the mean squared difference of both preferences. `seconds_per_pair`
    and `reading_seconds_per_pair` leave out decoding and encoding images, and are NaN where a store had some of it.
    """

    path: Path
    train: int
    test: int
    unreadable: tuple[str, ...] = field(default=(), repr=False)
    left_out: LeftOut | None = field(default=None, repr=False)
    thinking: Evaluation | None = None
    reading: Evaluation | None = None
    agreement: Evaluation | None = None
    seconds_per_pair: float = math.nan
    reading_seconds_per_pair: float = math.nan
    warnings: tuple[str, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The JSON of `mlxpref distill`."""
        names = ("thinking", "reading", "agreement")
        evaluations = {name: getattr(self, name) and getattr(self, name).to_json() for name in names}
        seconds = {name: getattr(self, name) for name in ("seconds_per_pair", "reading_seconds_per_pair")}
        return {
            "output": str(self.path),
            "pairs": self.train + self.test,
            "train": self.train,
            "test": self.test,
            "unreadable": list(self.unreadable),
            "left_out": self.left_out.to_json() if self.left_out else None,
            **evaluations,
            **{name: None if math.isnan(value) else value for name, value in seconds.items()},
            "warnings": list(self.warnings),
        }


def distill(
    judge: Judge | str | Path | None,
    data: PreferencesInput | ImagesInput,
    output: str | Path,
    split: str | None = None,
    limit: int | None = None,
    *,
    prompt: str | None = None,
    pairs: int | Literal["all"] | None = None,
    held_out: float = HELD_OUT,
    data_dir: str | Path | None = None,
    adapter: str | Path | None = None,
    **settings: Any,
) -> Distillation:
    """Write what a judge prefers with thinking as preferences, as `mlxpref distill`; `output` ends in .jsonl.

    `train(output, think=False, reward="brier")` then teaches it to answer at once. `judge` is one, or a name as for
    `load`, which `adapter` and `settings` go with. `data` are preferences as for `evaluate`, by default of the split
    train; or, with a `prompt`, images as for `Judge.rank`, which chooses `pairs` of them. `held_out` is the share of
    pairs, by whole prompts, that become the split test. Ctrl-C writes the pairs so far. ConfigError, DataError or
    ModelError for what cannot be distilled, and for an output with pairs of an earlier call that this one lacks.
    """
    path = Path(expand(output))
    check_distilled(path)
    if not (isinstance(held_out, int | float) and 0 <= held_out <= MOST_HELD_OUT):
        raise ConfigError(f"held_out {held_out!r}: give a share from 0 to {MOST_HELD_OUT}")
    if settings.get("think") is False:
        raise ConfigError("think=False: what a judge says with thinking is what `distill` writes; leave it out")
    if prompt is not None and (split, limit, data_dir) != (None, None, None):
        raise ConfigError("split, limit and data_dir are for preferences; pairs says how many for images with a prompt")
    if prompt is None and pairs is not None:
        raise ConfigError("pairs is for images with a prompt; limit says how many of preferences")
    loaded = judge_from(judge, adapter, settings)
    loaded = thinking_judge(loaded if isinstance(judge, Judge) else calibrated(loaded))
    if prompt is not None:
        check_prompt(prompt)
        images, skipped = find_given(data, loaded.vlm.features.images)  # type: ignore[arg-type]  # they have a prompt
        if skipped:
            logger.warning(f"left out, as it cannot be read: {reasons_of(skipped)}")
        return distill_images(loaded, [(prompt, images)], path, held_out, pairs)
    folder = Path(expand(data_dir)) if data_dir else None
    name, preferences = preferences_from(data, split, limit, folder, TRAIN)  # type: ignore[arg-type]
    left_out = check_preferences(name, preferences, loaded.vlm.features.images)
    count_learned(loaded.folders, preferences)
    return distill_preferences(loaded, name, preferences, path, held_out, left_out)


def thinking_judge(judge: Judge) -> Judge:
    """The judge for distilling, with a calibration that holds for thinking; ConfigError for one that does not think.

    So it is for a criterion of the user's, which training does not ask by, and for a judge of single images.
    """
    if judge.profile.is_point:
        raise ConfigError(
            f"the profile {judge.profile.name} shows one image at a time, and training, to answer at once too, learns "
            "from pairs: give a judge of pairs"
        )
    if not judge.settings.think:
        who = f"{judge.adapter}: this adapter" if judge.adapter else f"{judge.name}: this judge"
        raise ConfigError(f"{who} answers at once, so it has no thinking to learn from; give one that thinks")
    if judge.settings.criterion:
        raise ConfigError("criterion: training asks for what people prefer, so no other one is learned; leave it out")
    return judge.calibrated_for([True])


@dataclass(frozen=True)
class _TimedJudge(Judge):
    """A judge that counts the seconds of its answers, without those for images and for a ranking's fits."""

    spent: list[float] = field(default_factory=list, repr=False, compare=False)

    def judgements(self, *args: Any, **named: Any) -> Iterator[Judgement]:
        work, features = super().judgements(*args, **named), self.vlm.features
        while True:
            start = time.perf_counter() - features.seconds
            each = next(work, None)
            self.spent.append(time.perf_counter() - features.seconds - start)
            if each is None:
                return
            yield each

    @classmethod
    def of(cls, judge: Judge) -> Self:
        """A judge with a clock at 0."""
        return cls(**{each.name: getattr(judge, each.name) for each in fields(Judge)})


def distill_preferences(
    judge: Judge, name: str, preferences: Preferences, path: Path, held_out: float, left_out: LeftOut
) -> Distillation:
    """Judge the pairs of preferences with thinking, in both orders, and write them; `left_out` gets unreadable images.

    What people prefer is kept in the file's column `people`, and used only to measure.
    """
    check_replaced(judge, path, preferences, len(preferences))
    tests, judge = _held_out_prompts(preferences, held_out), _TimedJudge.of(judge)
    verdicts = judge.pairs(map(_pair, preferences), think=True, left_out=left_out)
    work = zip(preferences, track(verdicts, len(preferences), "judging with thinking"), strict=True)
    return _distill(judge, name, work, tests, path, left_out)


def distill_images(
    judge: Judge,
    groups: Sequence[tuple[str, Sequence[ImageLike]]],
    path: Path,
    held_out: float,
    pairs: int | Literal["all"] | None = None,
) -> Distillation:
    """Judge pairs of each prompt's images with thinking, which a ranking chooses, in both orders, and write them."""
    every = (Pair(a, b, prompt) for prompt, images in groups for a, b in combinations(images, 2))
    most = sum(PairBudget.of(len(images), "all", pairs).total for _, images in groups)
    check_replaced(judge, path, every, most)
    prompts = [Preference(prompt, images[0], images[1], 0.5) for prompt, images in groups]
    tests, judge = _held_out_prompts(prompts, held_out), _TimedJudge.of(judge)
    return _distill(judge, "images", _ranked(judge, groups, pairs), tests, path, None)


def _pair(judged: Pair | Preference) -> Pair:
    return Pair(judged.a, judged.b, judged.prompt)


def _ranked(
    judge: Judge, groups: Sequence[tuple[str, Sequence[ImageLike]]], pairs: int | Literal["all"] | None
) -> Iterator[JudgedPair]:
    """The pairs of rankings, also of an interrupted one."""
    for prompt, images in groups:
        interrupt: KeyboardInterrupt | None = None
        try:
            ranking: Ranking | None = judge.rank(list(images), prompt, "all", pairs=pairs, orders="both")
        except KeyboardInterrupt as error:
            interrupt, ranking = error, getattr(error, "ranking", None)
        for each in ranking.pairs if ranking else ():
            yield Pair(images[each.a], images[each.b], prompt), each.verdict
        if interrupt:
            raise interrupt


def _held_out_prompts(preferences: Sequence[Preference], share: float) -> set[str]:
    """The prompts of the split test; none, with a warning, where all pairs are of one."""
    try:
        return {preference.prompt for preference in held_out_split(preferences, share, seed=0)[1]}
    except DataError:
        logger.warning("all pairs are of one prompt or group, so none are held out: measure with other data")
        return set()


def _distill(
    judge: _TimedJudge, name: str, work: Iterable[JudgedPair], tests: set[str], path: Path, left_out: LeftOut | None
) -> Distillation:
    """Judge, write, and measure reading beside thinking; an interrupt writes the pairs so far and is raised."""
    judged = list[JudgedPair]()
    try:
        for each in work:
            judged.append(each)
    except KeyboardInterrupt:
        earlier = path.read_bytes().count(b"\n") if path.exists() else 0
        # The same command judges the rest: it must not lose what is there until then.
        if earlier < len(judged) and (result := _write(judge, judged, tests, path)):
            logger.warning(f"interrupted: {counted(result.train + result.test, 'pair')} so far are in {path}")
        elif path.exists():
            logger.warning(f"interrupted: {path} stays as it was, with {counted(earlier, 'pair')}")
        else:
            logger.warning(f"interrupted: no pair has an answer in both orders yet, so {path} is not written")
        raise
    seconds = sum(judge.spent)
    result = _write(judge, judged, tests, path)
    warnings = tuple(answer_warnings(verdict for _, verdict in judged))
    for line in warnings:
        logger.warning(line)
    if result is None:
        raise DataError(f"{name}: no pair has a readable answer in both orders, so nothing is written")
    result = replace(result, left_out=left_out, warnings=warnings)
    result = replace(result, seconds_per_pair=_seconds_per_pair(seconds, [verdict for _, verdict in judged]))
    measured = [each for each in judged if _is_read(each[1]) and (not result.test or each[0].prompt in tests)]
    spec = EvaluationSpec(name, TEST if result.test else "all pairs")
    return _measured(result, judge, measured, spec, seconds * len(measured) / len(judged))


def _seconds_per_pair(seconds: float, verdicts: Sequence[PairVerdict]) -> float:
    """NaN where some are recalled, as the time is then not that of judging."""
    return math.nan if JudgingCounts.of(verdicts).recalled else seconds / len(verdicts)


def _is_read(verdict: PairVerdict) -> bool:
    """Whether both orders have a readable answer: without, 0.5 would only say that nothing is known."""
    return verdict.p_a_shown_first is not None and verdict.p_a_shown_second is not None


def _write(judge: Judge, judged: Sequence[JudgedPair], tests: set[str], path: Path) -> Distillation | None:
    """Write the pairs that can be read as a file of preferences; None, without a file, if there are none."""
    read = [each for each in judged if _is_read(each[1])]
    unreadable = [
        f"{image_name(pair.a)} beside {image_name(pair.b)}"
        for pair, verdict in judged
        if not (verdict.is_left_out or _is_read(verdict))
    ]
    if unreadable:
        logger.warning(
            f"{len(unreadable)} of {counted(len(judged), 'pair')} had no readable answer in both orders and are left "
            f"out: {plain(few(unreadable, 3, '; '))}"
        )
    if not read:
        return None
    names = ImageFiles(path, judge.vlm.features.images)
    has_test = len({pair.prompt in tests for pair, _ in read}) == 2  # an interrupt may leave only one of both
    rows = []
    for pair, verdict in read:
        row: dict[str, Any] = {"prompt": pair.prompt, "a": names.of(pair.a), "b": names.of(pair.b)}
        row |= {name: getattr(verdict, name) for name in ("p_a", "p_a_shown_first", "p_a_shown_second")}
        if isinstance(pair, Preference):
            row |= {"people": pair.p_people} | ({"group": pair.group} if pair.group not in ("", pair.prompt) else {})
        split = {"split": TEST if pair.prompt in tests else TRAIN} if has_test else {}
        rows.append(row | split | {"judge": name_of(judge)})
    if names.copies:
        logger.info(f"{counted(len(names.copies), 'image')} of archives or memory: copied into {names.folder}")
    write_output(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    test = sum(row.get("split") == TEST for row in rows)
    return Distillation(path, len(rows) - test, test, tuple(unreadable))


def _measured(
    result: Distillation, judge: Judge, judged: Sequence[JudgedPair], spec: EvaluationSpec, thinking_seconds: float
) -> Distillation:
    """The result with thinking and reading beside people, and reading beside thinking, on these pairs."""
    uncalibrated = replace(_TimedJudge.of(judge), calibration=None)  # one of thinking does not hold for reading
    work = uncalibrated.pairs((_pair(pair) for pair, _ in judged), think=False)
    reading = list(track(work, len(judged), "reading at once, to compare"))
    seconds = sum(uncalibrated.spent)
    per_pair = _seconds_per_pair(seconds, reading)
    thinking = [verdict for _, verdict in judged]
    ways = {True: (thinking, thinking_seconds, result.seconds_per_pair), False: (reading, seconds, per_pair)}

    def evaluated(think: bool, shares: Sequence[float]) -> Evaluation | None:
        """A way of judging against shares of whoever prefers a; None where there are none, or all are even."""
        preferences = [
            Preference(pair.prompt, pair.a, pair.b, share, group=pair.prompt)
            for (pair, _), share in zip(judged, shares, strict=True)
        ]
        verdicts, seconds, per_pair = ways[think]
        decided = [verdict for p, verdict in zip(preferences, verdicts, strict=True) if not p.is_tie]
        if not decided:
            return None
        evaluation = evaluation_of(preferences, decided, spec, seconds * len(decided) / len(verdicts))
        return replace(evaluation, seconds_per_pair=per_pair)

    people = [pair.p_people if isinstance(pair, Preference) else 0.5 for pair, _ in judged]
    return replace(
        result,
        thinking=evaluated(True, people),
        reading=evaluated(False, people),
        agreement=evaluated(False, [verdict.p_a for verdict in thinking]),
        reading_seconds_per_pair=per_pair,
    )
