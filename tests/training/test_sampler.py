"""The comparisons of a step: balanced sides, an order for every epoch; held-out preferences share nothing."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.errors import DataError
from mlxpref.preferences import Preference
from mlxpref.training.sampler import ComparisonSampler, TrainingComparison, held_out_split, random_subset

SHARES = (0.0, 0.1, 0.3, 0.6, 0.8, 1.0)


def preferences(count: int, prompts: int = 5) -> list[Preference]:
    return [
        Preference(f"prompt {i % prompts}", Path(f"{i} a.png"), Path(f"{i} b.png"), SHARES[i % len(SHARES)])
        for i in range(count)
    ]


def sampler(data: list[Preference], comparisons: int, seed: int = 0) -> ComparisonSampler:
    return ComparisonSampler(data, TrainSettings(comparisons=comparisons, seed=seed))


def steps_of(sampler: ComparisonSampler, count: int) -> list[list[TrainingComparison]]:
    return [sampler.for_step(step) for step in range(1, count + 1)]


def a_first(comparison: TrainingComparison) -> bool:
    return comparison.first is comparison.preference.a


@pytest.mark.parametrize("count", [12, 13, 7])
@pytest.mark.parametrize("size", [4, 5, 6])
def test_sides_alternate(count: int, size: int) -> None:
    """Half of every step shows a first, and every preference changes sides from epoch to epoch."""
    steps = steps_of(sampler(preferences(count), size), 4 * count)
    for step in steps:
        assert abs(2 * sum(map(a_first, step)) - size) == size % 2
    comparisons = [comparison for step in steps for comparison in step]
    epochs = [comparisons[start : start + count] for start in range(0, len(comparisons) - count + 1, count)]
    sides = [{id(c.preference): a_first(c) for c in epoch} for epoch in epochs]
    assert all(len(side) == count for side in sides)
    for before, after in pairwise(sides):
        assert all(after[name] is not side for name, side in before.items())
    assert len({c.key for c in comparisons}) == len(comparisons)
    for c in comparisons:
        assert c.y == (c.preference.p_people if a_first(c) else 1 - c.preference.p_people)
        assert {id(c.first), id(c.second)} == {id(c.preference.a), id(c.preference.b)}


def test_orders_differ_by_seed_and_epoch() -> None:
    data = preferences(40)
    orders = []
    for seed in (0, 0, 1):
        orders += [
            [(data.index(c.preference), a_first(c)) for c in step] for step in steps_of(sampler(data, 40, seed), 2)
        ]
    assert orders[:2] == orders[2:4]
    firsts = [{index for index, first in order if first} for order in orders]
    assert firsts[0] != firsts[4]
    assert [index for index, _ in orders[0]] != [index for index, _ in orders[1]]
    assert 5 < sum(index % 2 == 0 for index in firsts[0]) < 15  # what the data call the images decides nothing


def test_steps_in_any_order() -> None:
    data = preferences(10)
    assert sampler(data, 4).for_step(20) == steps_of(sampler(data, 4), 20)[-1]


def test_replacements_are_unused_preferences() -> None:
    data, step = preferences(10), 2
    table = sampler(data, 4)
    unused = list(table.unused(step))
    assert sorted([*unused, *(data.index(c.preference) for c in table.for_step(step))]) == list(range(10))
    assert unused == list(table.unused(step))
    for place in range(4):
        other = table.replacement(step, place, unused[0], attempt=1)
        assert a_first(other) == a_first(table.for_step(step)[place])
        assert other.preference is data[unused[0]]
        assert other.key == (step, place, 1)


def test_smaller_subsets_are_part_of_larger_ones() -> None:
    data = preferences(40)
    quarter, half = (random_subset(data, count, 0, "fraction") for count in (10, 20))
    assert (len(quarter), len(half)) == (10, 20)
    assert {id(p.a) for p in quarter} < {id(p.a) for p in half}
    assert half == [p for p in data if p in half]


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_prompt_and_no_group(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = [
        replace(p, prompt=f"p{rng.integers(30)}", group=f"g{rng.integers(60)}" if rng.random() < 0.3 else "")
        for p in preferences(100)
    ]
    learned, held_out = held_out_split(data, 0.2, seed)
    assert Counter(map(id, learned + held_out)) == Counter(map(id, data))
    assert held_out
    for name in ("prompt", "group"):
        sides = [{getattr(p, name) for p in part} - {""} for part in (learned, held_out)]
        assert sides[0].isdisjoint(sides[1]), name
    assert len(held_out) <= 20 or len({p.prompt for p in held_out}) == 1
    assert (learned, held_out) == held_out_split(data, 0.2, seed)


def test_connected_groups_stay_together() -> None:
    names = [("p0", "x"), ("p1", "x"), ("p1", "y"), ("p2", "y"), ("p3", ""), ("p3", "")]
    data = [replace(p, prompt=n, group=g) for p, (n, g) in zip(preferences(6), names, strict=True)]
    assert held_out_split(data, 0.4, 0) == (data[:4], data[4:])
    assert held_out_split(data, 0.1, 0) == (data[:4], data[4:])  # the smallest there is
    assert held_out_split(data, 0.0, 0) == (data, [])
    with pytest.raises(DataError, match="all 4 preferences are of one prompt or group"):
        held_out_split(data[:4], 0.4, 0)


def test_held_out_share() -> None:
    data = preferences(200, prompts=40)
    parts = [held_out_split(data, 0.25, seed)[1] for seed in (0, 1)]
    assert [len(part) for part in parts] == [50, 50]
    assert parts[0] != parts[1]
