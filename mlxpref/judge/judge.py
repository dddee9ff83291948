"""The judge: soft preferences of pairs and rankings of images, from the verdicts of a model."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from mlxpref.config import JudgeSettings
from mlxpref.data.find_images import Skipped, reasons_of
from mlxpref.data.inputs import ImageInput, ImagesInput, check_pair, check_prompt, find_given, pairs_from
from mlxpref.data.left_out import LeftOut
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.completion import Sampling
from mlxpref.engine.profile import OWN, Form, Profile
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ConfigError, DataError, ImageError
from mlxpref.judge.calibration import CalibrationFile, JudgeConditions
from mlxpref.judge.diagnostics import answer_warnings, demo_warnings
from mlxpref.judge.fingerprint import Fingerprint
from mlxpref.judge.noise_memory import NoiseMemory
from mlxpref.judge.pair_budget import PairBudget, ThinkAbout
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.point import SCORES_ONLY, judge_by_scores, rank_by_scores
from mlxpref.judge.rank import Orders, rank_pairs
from mlxpref.judge.ranking_result import Ranking, interrupt_with
from mlxpref.judge.store import Store
from mlxpref.judge.verdict_source import (
    Judgement,
    JudgingSession,
    Request,
    VerdictSource,
    judge_by_model,
    judge_in_shards,
    judge_unless_stored,
)
from mlxpref.log import logger
from mlxpref.preferences import ImageLike, Pair, Question, shown
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.text import shorten
from mlxpref.verdict import Strategy

_F = TypeVar("_F", bound=Callable[..., Any])

_METHOD = 3
"""The version of the judging code; a new number makes the store's earlier comparisons invalid."""


def _either_order(method: _F) -> _F:
    """Let a method of images and prompt take prompt and images, too, as in earlier versions."""

    @wraps(method)
    def ordered(judge: "Judge", *args: Any, **named: Any) -> Any:
        images = args[1] if len(args) > 1 else named.get("images")
        # Two texts are a folder and a prompt: earlier versions took no folder.
        if args and isinstance(args[0], str) and not isinstance(images, str | None):
            old, new = f"{method.__name__}(prompt, images)", f"{method.__name__}(images, prompt)"
            warnings.warn(f"{old} is the old order: give {new}", DeprecationWarning, stacklevel=2)
            return method(judge, images, args[0])
        return method(judge, *args, **named)

    return cast(_F, ordered)


@dataclass(frozen=True)
class Judge:
    """A model that compares images. It remembers nothing between calls; results carry their own counts.

    An image is a file's name, a PIL image, an array or the bytes of a file; see `mlxpref.data.inputs.ImageInput`.

    A `store` keeps the verdicts of comparisons and recalls them. A `calibration` rescales soft preferences, never
    verdicts or the store's content; ConfigError for one of other conditions. Several `processes`, which must make the
    same calls, share the comparisons and all get every verdict. `reads` is False for an adapter that learned to answer
    with thinking alone, and for the demo judge.
    """

    vlm: VLM
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    name: str = ""
    adapter: Path | None = None
    calibration: CalibrationFile | None = None
    store: Store | None = None
    processes: ProcessGroup = SINGLE_PROCESS
    reads: bool = True
    fingerprint: Fingerprint = field(default=None, repr=False)  # type: ignore[assignment]  # made from the model

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self.fingerprint or Fingerprint(self.vlm))

    def __repr__(self) -> str:
        adapter = f", adapter {shorten(self.adapter)!r}" if self.adapter else ""
        think = f"up to {self.settings.max_tokens} tokens of reasons" if self.settings.think else "without thinking"
        profile = f", profile {self.profile.name}" if self.profile.name != OWN else ""
        criterion = f", criterion {shorten(self.settings.criterion)!r}" if self.settings.criterion else ""
        calibrated = ", calibrated" if self.calibration else ""
        return f"Judge({shorten(self.name)!r}{adapter}, {think}{profile}{criterion}{calibrated})"

    @property
    def profile(self) -> Profile:
        """How it is asked, and how its answers are read."""
        return self.vlm.profile

    @property
    def folders(self) -> tuple[Path | None, Path]:
        """The folders of its adapter, if any, and of its model."""
        return self.adapter, self.vlm.checkpoint.folder

    @property
    def think_about(self) -> ThinkAbout:
        """The pairs of a ranking to think about by default, so that nothing is judged in a way that was not learned."""
        return ("top" if self.reads and not self.profile.is_point else "all") if self.settings.think else "none"

    def compare(self, a: ImageInput, b: ImageInput, prompt: str = "") -> PairVerdict:
        """Judge one pair in both orders; `p_a` of the result is the preference for a, from 0 to 1.

        With a criterion in the settings the prompt may be left out, here and in `rank` and `score`. DataError for what
        is no readable image.
        """
        check_prompt(prompt, self.settings.criterion)
        pair = Pair(*check_pair(a, b, self.vlm.features.images), prompt)
        return replace(next(self.pairs([pair])), pair=pair)

    def rank(
        self,
        images: ImagesInput,
        prompt: str = "",
        think_about: ThinkAbout | None = None,
        skipped: Sequence[Skipped] = (),
        pairs: int | Literal["all"] | None = None,
        top: int | None = None,
        orders: Orders = "auto",
    ) -> Ranking:
        """Rank at least two images, a list or a folder, best first; see `rank_pairs` for `pairs`, `top` and `orders`.

        `think_about` is by default the judge's own (see the property). `skipped` are images that were left out;
        the result lists them, and the unreadable ones of a folder. DataError names other images that cannot be read.
        A judge of single images reads each once, and `pairs`, `top` and `orders` have nothing to say.
        Ctrl-C is raised; the KeyboardInterrupt then has the ranking by the pairs so far as its `ranking`.
        """
        check_prompt(prompt, self.settings.criterion)
        given, left_out = find_given(images, self.vlm.features.images)
        if left_out:
            logger.warning(f"left out, as it cannot be read: {reasons_of(left_out)}")
        think_about = think_about or self.think_about
        if self.profile.is_point and think_about == "top":
            think_about = "all"
        encoded_before = self.vlm.features.runs
        budget = PairBudget.of(len(given), think_about, pairs)
        session = self.session()
        judge = self.calibrated_for(budget.modes, session)

        def compare(pairs: Iterable[Pair], think: bool, orders: int) -> Iterator[PairVerdict]:
            return judge.pairs(pairs, think=think, session=session, both_orders=orders == 2, by_scores=True)

        self._encode_ahead(given, session)
        if self.profile.is_point:  # each image once, in one way
            think = think_about != "none"
            ranking = rank_by_scores(given, prompt, lambda some: compare(some, think, 2), think, session.scores)
        else:
            memory = NoiseMemory(judge, given, prompt, session)
            known = {think: noise for think in budget.modes if (noise := memory.recall(think))}
            ranking = rank_pairs(
                given, prompt, compare, think_about, pairs, top, self.settings.seed, self.processes, orders, known
            )
            memory.keep(ranking)
        runs = self.vlm.features.runs - encoded_before
        ranking = replace(
            ranking,
            model=self.name,
            adapter=self.adapter,
            criterion=self.settings.criterion.strip(),
            vision_runs=runs if ranking.ending == "interrupted" else int(self.processes.all_sum_numbers(runs)[0]),
            skipped=(*skipped, *left_out),
            warnings=(*demo_warnings(self.name, given, self.vlm.features.images), *ranking.warnings),
        )
        if ranking.ending == "interrupted":
            raise interrupt_with(ranking)
        return ranking

    @_either_order
    def score(self, images: ImagesInput, prompt: str = "") -> list[float]:
        """The share of wins of each of two or more images against the others of this call, by soft preferences.

        Comparable within one call only: the shares of N images average 0.5. It judges all N (N - 1) / 2 pairs.
        DataError names images that cannot be read.
        """
        check_prompt(prompt, self.settings.criterion)
        given, left_out = find_given(images, self.vlm.features.images)
        if left_out:
            raise DataError(f"no score, as it cannot be read: {reasons_of(left_out)}; remove it, or use rank")
        session = self.session()
        self._encode_ahead(given, session)
        wins = [0.0] * len(given)
        every = list(all_pairs(len(given)))
        verdicts = list(self.pairs((Pair(given[a], given[b], prompt) for a, b in every), session=session))
        for line in answer_warnings(verdicts):
            logger.warning(line)
        for (a, b), verdict in zip(every, verdicts, strict=True):
            wins[a] += verdict.p_a
            wins[b] += 1.0 - verdict.p_a
        return [win / (len(given) - 1) for win in wins]

    def pairs(
        self,
        pairs: Iterable[Pair],
        strategy: Strategy = "soft",
        think: bool | None = None,
        session: JudgingSession | None = None,
        left_out: LeftOut | None = None,
        both_orders: bool = True,
        by_scores: bool = False,
    ) -> Iterator[PairVerdict]:
        """Judge pairs in their order; lazily, a batch at a time. Each is shown in both orders, or only with a first.

        Of a judge of single images without a fitted temperature, `soft` is only the higher score, unless `by_scores`
        takes the difference as log-odds.

        `think` overrides the setting of the same name. `session` shares work among calls. Images are as for `compare`.
        One that cannot be read is an ImageError; with `left_out` it is added there, and its pairs have no verdicts.
        """
        session = session or self.session()
        rescaling = self._rescaling(think, session) if strategy == "soft" else None
        asked, strategy = strategy, strategy if by_scores else self.strategy_of(strategy, rescaling)
        if asked != strategy and not session.is_told:
            session.is_told = True
            logger.warning(SCORES_ONLY)
        form: Form = "scores" if strategy == "score" else "choice"
        self.profile.check_form(form)
        given = pairs_from(pairs, self.settings.criterion)
        if self.profile.is_point:
            read = partial(self.judgements, think=think, session=session)
            digest = repr((self.settings, think)).encode()
            both = judge_by_scores(given, read, session.scores, digest, self.settings.rows, both_orders)
        else:
            orders = 2 if both_orders else 1
            comparisons = (comparison for pair in given for comparison in shown(pair)[:orders])
            judgements = self.judgements(comparisons, form, asked != "soft", think, session)
            both = ((first, next(judgements) if both_orders else Judgement(())) for first in judgements)
        for first, second in both:
            unreadable = {**first.unreadable, **second.unreadable}
            if left_out is not None:
                left_out.add(unreadable)
            elif unreadable:
                raise ImageError(*next(iter(unreadable.items())))
            recalled = first.recalled, second.recalled
            yield PairVerdict(first.verdicts, second.verdicts, strategy, rescaling, recalled)

    def strategy_of(self, strategy: Strategy, rescaling: TemperatureScaling | None) -> Strategy:
        """The strategy that holds for a pair: scores of single images say how sure they are only by a temperature."""
        return "select" if strategy == "soft" and self.profile.is_point and not rescaling else strategy

    def judgements(
        self,
        comparisons: Iterable[Question],
        form: Form = "choice",
        write_answer: bool = False,
        think: bool | None = None,
        session: JudgingSession | None = None,
    ) -> Iterator[Judgement]:
        """The verdicts on comparisons, `settings.samples` on each, in their order; lazily, a batch at a time.

        With `write_answer` completions end after the answer, otherwise at the answer position.
        """
        session = session or self.session()
        request = self._request(form, write_answer, self.settings.think if think is None else think, session)
        source: VerdictSource = partial(judge_by_model, self.vlm, request, session)
        if self.processes.size > 1:
            source = partial(judge_in_shards, source, self.processes, request.batch_size)
        if self.store is not None:
            criterion = f" by {shorten(self.settings.criterion)!r}" if self.settings.criterion else ""
            name = f"{self.name}{f' with {self.adapter}' if self.adapter else ''}{criterion}"
            source = partial(judge_unless_stored, source, self.store, self.vlm, request, session, name)
        for batch in source(comparisons):
            yield from batch

    def count_known(self, pairs: Sequence[Pair], think: bool, session: JudgingSession) -> int:
        """The number of comparisons of pairs, each in both orders, that the store has."""
        if self.store is None:
            return 0
        contents = iter(self.vlm.features.contents([x for pair in pairs for x in (pair.a, pair.b)], session.seen))
        request = self._request("choice", False, think, session)
        keys = []
        for pair in pairs:
            a, b = next(contents) or "", next(contents) or ""
            orders = ([a], [b]) if self.profile.is_point else ([a, b], [b, a])
            keys += [request.key(order, pair.prompt) for order in orders]
        known = self.store.get_many(keys)
        return sum(key in known for key in keys)

    def noise_key(self, think: bool, session: JudgingSession) -> bytes:
        """The key in the store of what rankings show of the judge's noise: all that its probabilities depend on."""
        digest = self._request("choice", False, think, session).digest
        return hashlib.sha256(digest + repr(self._rescaling(think, session)).encode()).digest()

    def session(self) -> JudgingSession:
        """A session for calls between which neither the model nor the images change."""
        return JudgingSession(self.vlm)

    def conditions(self, think: bool | None = None, session: JudgingSession | None = None) -> JudgeConditions:
        """The conditions of soft preferences by the settings, with or without thinking."""
        think = self.settings.think if think is None else think
        return JudgeConditions(
            judge=self._fingerprint_in(session or self.session()),
            profile=self.profile.version(self.settings.criterion),
            method=_METHOD,
            max_pixels=self.vlm.features.max_pixels,
            think=think,
            samples=self.settings.samples if think else 1,
            max_tokens=self.settings.max_tokens if think else 0,
        )

    def calibrated_for(self, modes: Iterable[bool], session: JudgingSession | None = None) -> "Judge":
        """This judge for work in all these modes, with thinking or without, before the work begins.

        A calibration that was only found is left off with a warning unless it holds for each: one scale for all pairs.
        ConfigError for one that was given.
        """
        try:
            for think in modes if self.calibration else ():
                self.calibration.rescaling(self.conditions(think, session))  # type: ignore[union-attr]
        except ConfigError as error:
            if self.calibration and self.calibration.given:
                raise
            logger.warning(f"left off the calibration: {error}")
            return replace(self, calibration=None)
        return self

    def _rescaling(self, think: bool | None, session: JudgingSession) -> TemperatureScaling | None:
        try:
            return self.calibration.rescaling(self.conditions(think, session)) if self.calibration else None
        except ConfigError:
            if self.calibration and self.calibration.given:
                raise
            return None

    def _request(self, form: Form, write_answer: bool, think: bool, session: JudgingSession) -> Request:
        """The request for comparisons by the settings, in a form, with or without thinking."""
        if think and not self.profile.thinks:
            raise ConfigError(f"the profile {self.profile.name} answers at once: it does not think about pairs")
        # Without thinking all samples would be equal.
        samples = self.settings.samples if think else 1
        sampling = Sampling(
            samples=samples,
            temperature=0.0 if samples == 1 else 1.0,
            max_tokens=self.settings.max_tokens,
            seed=self.settings.seed,
            until="end" if write_answer else "answer",
        )
        batch_size = max(1, self.settings.rows // samples) * self.processes.size
        digest = b"" if self.store is None else self._digest(sampling, form, think, session)
        return Request(sampling, form, think, batch_size, digest, self.settings.criterion)

    def _digest(self, sampling: Sampling, form: Form, think: bool, session: JudgingSession) -> bytes:
        """A digest of everything that verdicts depend on, apart from the comparison."""
        settings = asdict(sampling)
        # Settings without effect are left out: greedy completions draw nothing, and without thinking none is written.
        if sampling.temperature == 0:
            del settings["seed"]
        if not think and sampling.until == "answer":
            del settings["max_tokens"]
        settings |= {"form": form, "think": think, "max_pixels": self.vlm.features.max_pixels, "method": _METHOD}
        settings |= {"profile": self.profile.version(self.settings.criterion), "judge": self._fingerprint_in(session)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()

    def _fingerprint_in(self, session: JudgingSession) -> str:
        """The judge's fingerprint, computed once a session."""
        session.fingerprint = session.fingerprint or self.fingerprint.now()
        return session.fingerprint

    def _encode_ahead(self, images: Sequence[ImageLike], session: JudgingSession) -> None:
        """Encode images together, unless a store may have the comparisons or other processes share them."""
        if self.store is None and self.processes.size == 1:
            self.vlm.features.get_all(images, session.seen)
