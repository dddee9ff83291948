"""Lessons: balanced sides, an order for every epoch, and held-out preferences that share nothing with the others."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.errors import DataError
from mlxpref.preferences import Preference
from mlxpref.training.sampler import ComparisonSampler, TrainingComparison, held_out_split, part_of

SHARES = (0.0, 0.1, 0.3, 0.6, 0.8, 1.0)


def preferences(count: int, prompts: int = 5) -> list[Preference]:
    return [
        Preference(f"prompt {i % prompts}", Path(f"{i} a.png"), Path(f"{i} b.png"), SHARES[i % len(SHARES)])
        for i in range(count)
    ]


def lessons_of(table: ComparisonSampler, steps: int) -> list[list[TrainingComparison]]:
    return [table.of_step(step) for step in range(1, steps + 1)]


def a_first(lesson: TrainingComparison) -> bool:
    return lesson.comparison.first is lesson.preference.a


@pytest.mark.parametrize("count", [12, 13, 7])
@pytest.mark.parametrize("comparisons", [4, 5, 6])
def test_half_of_every_step_shows_a_first_and_every_preference_changes_sides(count: int, comparisons: int) -> None:
    given = preferences(count)
    steps = lessons_of(ComparisonSampler(given, TrainSettings(comparisons=comparisons)), 4 * count)
    for lessons in steps:
        assert abs(2 * sum(map(a_first, lessons)) - comparisons) == comparisons % 2
    every = [lesson for lessons in steps for lesson in lessons]
    epochs = [every[start : start + count] for start in range(0, len(every) - count + 1, count)]
    sides = [{id(lesson.preference): a_first(lesson) for lesson in epoch} for epoch in epochs]
    assert all(len(side) == count for side in sides)
    for before, after in pairwise(sides):
        assert all(after[name] is not side for name, side in before.items())
    assert len({lesson.key for lesson in every}) == len(every)
    for lesson in every:
        assert lesson.y == (lesson.preference.p_a if a_first(lesson) else 1 - lesson.preference.p_a)
        assert {id(lesson.comparison.first), id(lesson.comparison.second)} == {
            id(lesson.preference.a),
            id(lesson.preference.b),
        }


def test_orders_and_sides_differ_from_seed_to_seed_and_epoch_to_epoch() -> None:
    given = preferences(40)
    orders = []
    for seed in (0, 0, 1):
        steps = lessons_of(ComparisonSampler(given, TrainSettings(comparisons=40, seed=seed)), 2)
        orders += [[(given.index(le.preference), a_first(le)) for le in lessons] for lessons in steps]
    assert orders[:2] == orders[2:4]
    firsts = [{number for number, first in order if first} for order in orders]
    assert firsts[0] != firsts[4]
    places = [[number for number, _ in order] for order in orders]
    assert places[0] != places[1]
    assert 5 < sum(number % 2 == 0 for number in firsts[0]) < 15  # what the data call the images decides nothing


def test_any_step_can_be_asked_for_by_itself() -> None:
    given = preferences(10)
    in_turn = lessons_of(ComparisonSampler(given, TrainSettings(comparisons=4)), 20)
    assert ComparisonSampler(given, TrainSettings(comparisons=4)).of_step(20) == in_turn[-1]


def test_spare_preferences_are_those_that_a_step_does_not_show() -> None:
    given = preferences(10)
    table = ComparisonSampler(given, TrainSettings(comparisons=4))
    shown = {given.index(lesson.preference) for lesson in table.of_step(2)}
    spare = list(table.spare(2))
    assert sorted([*shown, *spare]) == list(range(10))
    assert spare == list(table.spare(2))
    for place in range(4):
        other = table.instead(2, place, spare[0], again=1)
        assert a_first(other) == a_first(table.of_step(2)[place])
        assert other.preference is given[spare[0]]
        assert other.key == (2, place, 1)


def test_a_smaller_fraction_is_part_of_a_larger_one() -> None:
    given = preferences(40)
    quarter, half = (part_of(given, fraction, seed=0) for fraction in (0.25, 0.5))
    assert (len(quarter), len(half)) == (10, 20)
    assert {id(p.a) for p in quarter} < {id(p.a) for p in half}
    assert half == [p for p in given if p in half]


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_and_no_group_is_on_both_sides(seed: int) -> None:
    draw = np.random.default_rng(seed)
    given = [
        replace(p, prompt=f"p{draw.integers(30)}", group=f"g{draw.integers(60)}" if draw.random() < 0.3 else "")
        for p in preferences(100)
    ]
    learned, measured = held_out_split(given, 0.2, seed)
    assert Counter(map(id, learned + measured)) == Counter(map(id, given))
    assert measured
    for name in ("prompt", "group"):
        sides = [{getattr(p, name) for p in part} - {""} for part in (learned, measured)]
        assert sides[0].isdisjoint(sides[1]), name
    assert len(measured) <= 20 or len({p.prompt for p in measured}) == 1
    assert (learned, measured) == held_out_split(given, 0.2, seed)


def test_what_groups_connect_only_by_way_of_others_stays_together() -> None:
    names = [("p0", "x"), ("p1", "x"), ("p1", "y"), ("p2", "y"), ("p3", ""), ("p3", "")]
    given = [replace(p, prompt=n, group=g) for p, (n, g) in zip(preferences(6), names, strict=True)]
    assert held_out_split(given, 0.4, 0) == (given[:4], given[4:])
    assert held_out_split(given, 0.1, 0) == (given[:4], given[4:])  # the smallest there is
    assert held_out_split(given, 0.0, 0) == (given, [])
    with pytest.raises(DataError, match="all 4 preferences are of one prompt or group"):
        held_out_split(given[:4], 0.4, 0)


def test_as_many_are_held_out_as_asked_for() -> None:
    given = preferences(200, prompts=40)
    chosen = [held_out_split(given, 0.25, seed)[1] for seed in (0, 1)]
    assert [len(found) for found in chosen] == [50, 50]
    assert chosen[0] != chosen[1]
