"""The contest: how many pairs, of which images, when it ends, and what is left of work that was interrupted."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import ConfigError
from mlxpref.judge.pair_budget import TOP, PairBudget
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.rank import rank_pairs
from mlxpref.judge.ranking_result import JudgedPair
from mlxpref.log import showing
from mlxpref.preferences import Pair
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.text import counted
from mlxpref.verdict import Verdict
from tests.conftest import picture, read_verdict
from tests.messages import Tracked


class Rater:
    """A judge whose strengths are known; it notes what it is asked, and can be interrupted."""

    def __init__(self, count: int, scale: float = 2.0, stop_after: int | None = None, bias: float = 0.0) -> None:
        self.images = [picture(i, (28, 28)) for i in range(count)]
        self.place = {id(image): i for i, image in enumerate(self.images)}
        self.strengths = np.random.default_rng(3).normal(0, scale, count)
        self.asked: list[tuple[int, int, bool]] = []
        self.stop_after, self.bias = stop_after, bias

    def __call__(self, pairs: Iterable[Pair], thinks: bool, orders: int) -> Iterator[PairVerdict]:
        for pair in pairs:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            a, b = self.place[id(pair.a)], self.place[id(pair.b)]
            self.asked.append((a, b, thinks))
            difference = self.strengths[a] - self.strengths[b]
            text = "<think>because</think><answer>" if thinks else "<think></think><answer>"
            second = (self.verdict(-difference + self.bias, text, thinks),) if orders == 2 else ()
            yield PairVerdict((self.verdict(difference + self.bias, text, thinks),), second)

    @staticmethod
    def verdict(log_odds: float, text: str, thinks: bool) -> Verdict:
        p = float(1 / (1 + np.exp(-log_odds)))
        return read_verdict(text, p, 1 - p, tokens=3 if thinks else 0)

    @property
    def order(self) -> list[int]:
        return np.argsort(-self.strengths).tolist()


@pytest.mark.parametrize(
    ("count", "think", "pairs", "expected"),
    [
        (8, "top", None, PairBudget(0, 16)),
        (8, "none", None, PairBudget(16, 0)),
        (4, "all", None, PairBudget(0, 6)),
        (100, "top", None, PairBudget(200, 20)),
        (100, "all", None, PairBudget(0, 200)),
        (100, "none", 77, PairBudget(77, 0)),
        (100, "top", "all", PairBudget(4950, 45)),
        (12, "none", 10**6, PairBudget(66, 0)),
        (2, "top", None, PairBudget(0, 1)),
    ],
)
def test_the_budget(count: int, think: str, pairs: int | None, expected: PairBudget) -> None:
    assert PairBudget.of(count, think, pairs) == expected  # type: ignore[arg-type]


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 pairs"):
        PairBudget.of(5, "none", 0)
    rater = Rater(3)
    for top in (0, "1", True):
        with pytest.raises(ConfigError, match=r"top ('?[01]|True)"):
            rank_pairs(rater.images, "a hat", rater, top=top)  # type: ignore[arg-type]
    for wrong in ({"pairs": "many"}, {"pairs": 2.5}, {"think_about": True}, {"think_about": "some"}):
        with pytest.raises(ConfigError, match=r"give 'all'|give 'top', 'all', 'none'"):
            rank_pairs(rater.images, "a hat", rater, **wrong)  # type: ignore[arg-type]


def test_budget_is_spent_without_repeats() -> None:
    rater = Rater(30)
    ranking = rank_pairs(rater.images, "a hat", rater, "none", orders="both")
    questions = [(a, b) for a, b, _ in rater.asked]
    assert len(questions) == len(set(questions)) == len(ranking.pairs) == 60
    assert ranking.planned == ranking.comparisons == 120
    assert not any(thinks for *_, thinks in rater.asked)
    assert ranking.ending == "done"
    assert [image.index for image in ranking.strengths.images][:3] == rater.order[:3]


def test_all_pairs() -> None:
    rater = Rater(9)
    rank_pairs(rater.images, "a hat", rater, "all", pairs="all")
    assert sorted((a, b) for a, b, _ in rater.asked) == list(all_pairs(9))


def test_thinking_replaces_judging_without() -> None:
    rater = Rater(25)
    ranking = rank_pairs(rater.images, "a hat", rater, "top", orders="both")
    thinking_pairs = [(a, b) for a, b, thinks in rater.asked if thinks]
    assert [thinks for *_, thinks in rater.asked] == [False] * 50 + [True] * 20
    about = {image for pair in thinking_pairs for image in pair}
    assert len(about) <= TOP
    assert set(rater.order[:5]) <= about
    after_thinking = {(p.a, p.b) for p in ranking.pairs if p.verdict.verdicts[0].tokens}
    assert after_thinking == set(thinking_pairs), "what was thought about stands before what was read"
    read_before = {(a, b) for a, b, thinks in rater.asked if not thinks} & after_thinking
    assert {(p.a, p.b) for p in ranking.replaced} == read_before


def test_ends_when_the_top_is_settled() -> None:
    rater = Rater(20, scale=4.0)
    ranking = rank_pairs(rater.images, "a hat", rater, "none", pairs="all", top=1)
    assert ranking.ending == "settled"
    assert len(rater.asked) < 190
    assert ranking.strengths.images[0].index == rater.order[0]
    assert any("settled" in remark for remark in ranking.warnings)


@pytest.mark.parametrize(("top", "think"), [(6, "none"), (99, "none"), (6, "top")])
def test_all_images_are_no_top(top: int, think: Any) -> None:
    rater = Rater(6, scale=4.0)
    ranking = rank_pairs(rater.images, "a hat", rater, think, top=top)
    assert (len(rater.asked), ranking.ending) == (12, "done")
    assert f"no early end: a top {top} of 6 images leaves none out" in ranking.warnings


def test_same_seed_same_pairs() -> None:
    questions = []
    for seed in (1, 1, 2):
        rater = Rater(16)
        rank_pairs(rater.images, "a hat", rater, "none", seed=seed)
        questions.append(rater.asked)
    assert questions[0] == questions[1] != questions[2]


@pytest.mark.parametrize("after", [1, 7, 40])
def test_interrupted_work_is_ranked(after: int) -> None:
    rater = Rater(20, stop_after=after)
    ranking = rank_pairs(rater.images, "a hat", rater, "top", orders="both")
    assert ranking.ending == "interrupted"
    assert len(ranking.pairs) == after
    assert len(ranking.strengths.images) == 20
    assert ranking.warnings[0].startswith(
        f"interrupted: the order is that of {counted(2 * after, 'comparison')}, 120 were"
    )


def test_interrupted_before_the_first_verdict() -> None:
    rater = Rater(5, stop_after=0)
    with pytest.raises(KeyboardInterrupt):
        rank_pairs(rater.images, "a hat", rater)


def test_progress_names_the_leader() -> None:
    rater, names = Rater(12, scale=4.0), []

    def track(work: Iterable[PairVerdict], count: int, what: object) -> Iterator[PairVerdict]:
        for verdict in work:
            names.append(what())  # type: ignore[operator]
            yield verdict

    with showing(Tracked(track)):
        rank_pairs(rater.images, "a hat", rater, "none")
    assert names[0] == "judging without thinking"
    assert names[-1].startswith("judging without thinking; leading: image ")
    assert f"image {rater.order[0]}" in names[-1]


def test_third_of_all_comparisons_finds_the_top() -> None:
    """Of 32 images, by a judge whose answers depend on place as much as on the picture."""
    for seed in range(6):
        rater = Rater(32, bias=1.0)
        rater.strengths = np.random.default_rng([5, seed]).normal(0, 1, 32)
        ranking = rank_pairs(rater.images, "a hat", rater, "none", pairs=160, seed=seed)
        assert ranking.comparisons <= 320 < 0.35 * 32 * 31
        assert {image.index for image in ranking.strengths.images[:5]} == set(rater.order[:5])


class Biased(Rater):
    """A judge whose position bias varies from pair to pair, beside noise of the pair."""

    def __init__(self, count: int, spread: float, noise: float) -> None:
        super().__init__(count, scale=1.0, bias=0.5)
        random = np.random.default_rng(4)
        self.bias_of = random.normal(0, spread, (count, count))
        self.noise_of = random.normal(0, noise, (count, count))
        self.bias_of += self.bias_of.T
        self.noise_of -= self.noise_of.T

    def __call__(self, pairs: Iterable[Pair], thinks: bool, orders: int) -> Iterator[PairVerdict]:
        for pair in pairs:
            a, b = self.place[id(pair.a)], self.place[id(pair.b)]
            self.asked.append((a, b, thinks))
            lead = self.strengths[a] - self.strengths[b] + self.noise_of[a, b]
            shown = [sign * lead + self.bias + self.bias_of[a, b] for sign in (1, -1)][:orders]
            verdicts = [(self.verdict(x, "<think></think><answer>", thinks),) for x in shown]
            yield PairVerdict(verdicts[0], verdicts[1] if orders == 2 else ())


def both_orders(pair: JudgedPair) -> bool:
    return bool(pair.verdict.a_shown_first and pair.verdict.a_shown_second)


def test_orders_follow_the_judge(caplog: pytest.LogCaptureFixture) -> None:
    """A bias that hardly varies: after the trial one order. A bias that varies: both. Few images: both."""
    caplog.set_level(logging.INFO)
    for spread, one in ((0.0, True), (2.0, False)):
        caplog.clear()
        rater = Biased(20, spread, 0.3)
        ranking = rank_pairs(rater.images, "a hat", rater, "none")
        shown_once = sum(not both_orders(pair) for pair in ranking.pairs)
        assert (shown_once > 40) == one
        assert ranking.comparisons == sum(1 + both_orders(pair) for pair in ranking.pairs) <= ranking.planned == 80
        assert (
            f"pairs in both orders, {shown_once} in one, as from pair to pair the position bias varies" in caplog.text
        )
    few = Biased(8, 0.0, 0.3)
    assert all(map(both_orders, rank_pairs(few.images, "a hat", few, "none").pairs))


def test_one_order_asks_each_pair_once() -> None:
    rater = Biased(9, 0.0, 0.3)
    ranking = rank_pairs(rater.images, "a hat", rater, "none", pairs="all", orders="one")
    assert (len(ranking.pairs), ranking.comparisons, ranking.planned, ranking.ending) == (36, 36, 36, "done")
    assert not any(map(both_orders, ranking.pairs))
    first = [sum(a == image for a, _, _ in rater.asked) for image in range(9)]
    assert max(first) - min(first) <= 3  # each image is first about as often as second
    again = Biased(9, 0.0, 0.3)
    both = rank_pairs(again.images, "a hat", again, "none", pairs="all")
    assert (len(both.pairs), both.comparisons) == (36, 72)


def test_a_known_judge_needs_no_trial() -> None:
    """What is known is tried on a first round in both orders: where it does not hold, both orders go on."""
    known = {False: Noise(0.1, 0.001, 8, 8)}
    for spread, one in ((0.0, True), (3.0, False)):
        rater = Biased(20, spread, 0.3)
        ranking = rank_pairs(rater.images, "a hat", rater, "none", known=known)
        assert 0 < sum(map(both_orders, ranking.pairs[:6])) <= 6
        assert (sum(map(both_orders, ranking.pairs)) < 10) == one
        assert ranking.known == (known[False],)


def test_what_was_thought_about_has_a_reason() -> None:
    """In one order a place may have no comparison that speaks for it: then another one explains it."""
    for seed in range(4):
        rater = Rater(24, bias=2.0)
        ranking = rank_pairs(rater.images, "a hat", rater, "top", seed=seed)
        about = {image for a, b, thinks in rater.asked if thinks for image in (a, b)}
        assert {entry.index for entry in ranking if entry.reason} == about


@pytest.mark.parametrize("pairs", [1, 3, 6, 10])
def test_a_small_budget_is_not_spent_on_the_trial(pairs: int) -> None:
    rater = Biased(20, 0.0, 0.3)
    ranking = rank_pairs(rater.images, "a hat", rater, "none", pairs=pairs)
    assert ranking.comparisons == ranking.planned == 2 * pairs
    judged = {image for pair in ranking.pairs for image in (pair.a, pair.b)}
    assert len(judged) >= min(20, 2 * len(ranking.pairs) * 0.8)


@pytest.mark.parametrize("after", [30, 52])
def test_work_is_ranked_that_ends_before_thinking(after: int) -> None:
    """Of both ways of judging only one has answers: the ranking, its JSON and its page's numbers are of that one."""
    rater = Rater(24, stop_after=after)
    ranking = rank_pairs(rater.images, "a hat", rater, "top", orders="both")
    assert (ranking.ending, ranking.modes) == ("interrupted", (False,) if after < 48 else (False, True))
    assert len(ranking.to_json()["instruments"]) == len(ranking.modes)
    assert all(0 <= ranking.preference(pair) <= 1 for pair in ranking.pairs)


def test_thinking_that_cannot_be_read_leaves_what_was_read() -> None:
    class Mute(Rater):
        def __call__(self, pairs: Iterable[Pair], thinks: bool, orders: int) -> Iterator[PairVerdict]:
            for verdict in super().__call__(pairs, thinks, orders):
                silent = (Verdict("hm", 0.0, 0.0, tokens=3),)
                yield replace(verdict, a_shown_first=silent, a_shown_second=silent[: orders - 1]) if thinks else verdict

    rater = Mute(24)
    ranking = rank_pairs(rater.images, "a hat", rater, "top")
    assert ranking.modes == (False,)
    assert [image.index for image in ranking.strengths.images][:3] == rater.order[:3]
    assert any("could not be read" in warning for warning in ranking.warnings)
    assert len(ranking.to_json()["instruments"]) == 1


def test_reading_of_another_scale_stays_behind_thinking() -> None:
    """Reading says the same as thinking at a hundredth of its sureness: the order is that of one scale."""

    class Unsure(Rater):
        def __call__(self, pairs: Iterable[Pair], thinks: bool, orders: int) -> Iterator[PairVerdict]:
            for verdict in super().__call__(pairs, thinks, orders):
                yield verdict if thinks else replace(verdict, rescaling=TemperatureScaling(100.0))

    sure, unsure = Rater(24), Unsure(24)
    orders = [
        [image.index for image in rank_pairs(rater.images, "a hat", rater, "top").strengths.images]
        for rater in (sure, unsure)
    ]
    assert orders[0] == orders[1] == sure.order
