"""Brackets join only what is tied, leave out no two tied neighbours, and fit on two lines."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlxpref.report.tie_brackets import Bracket, tie_brackets


def images(count: int, tied: set[tuple[int, int]]) -> Any:
    """Images in order of which these pairs of places are tied; their numbers are not their places."""
    return [
        SimpleNamespace(
            index=7 * place % 101, tied_with=tuple(7 * b % 101 for b in range(count) if {(place, b), (b, place)} & tied)
        )
        for place in range(count)
    ]


def test_overlapping_runs_have_two_lines() -> None:
    within_two = {(a, b) for a in range(7) for b in range(a + 1, min(a + 3, 7))}
    assert tie_brackets(images(7, within_two)) == [Bracket(0, 2, 0), Bracket(2, 4, 1), Bracket(4, 6, 0)]
    assert tie_brackets(images(7, within_two - {(2, 3)})) == [Bracket(0, 2, 0), Bracket(3, 5, 0), Bracket(4, 6, 1)]


def test_all_and_none() -> None:
    assert tie_brackets(images(5, {(a, b) for b in range(5) for a in range(b)})) == [Bracket(0, 4, 0)]
    assert tie_brackets(images(5, set())) == []
    assert tie_brackets(images(5, {(0, 4)})) == []  # no neighbours; an opened picture names this tie


def by_definition(count: int, tied: set[tuple[int, int]]) -> list[Bracket]:
    """The longest runs that begin with the best image, and then with each two tied neighbours under no bracket yet."""
    runs = [
        (a, b) for b in range(count) for a in range(b) if {(i, j) for j in range(a, b + 1) for i in range(a, j)} <= tied
    ]
    brackets: list[Bracket] = []
    place = 0
    while place < count - 1:
        last = max((b for a, b in runs if a <= place < b), default=place)
        if last > place:
            first = min(a for a, b in runs if b == last)
            overlaps = bool(brackets) and brackets[-1].last >= first
            brackets.append(Bracket(first, last, 1 - brackets[-1].line if overlaps else 0))
        place = max(last, place + 1)
    return brackets


@given(st.integers(2, 14), st.data())
def test_brackets_are_right(count: int, data: st.DataObject) -> None:
    pairs = [(a, b) for b in range(count) for a in range(b)]
    tied = {(a, b) for a, b in pairs if data.draw(st.integers(0, 3)) or (b - a == 1 and data.draw(st.booleans()))}
    assert tie_brackets(images(count, tied)) == by_definition(count, tied)
    brackets = tie_brackets(images(count, tied))
    for each in brackets:
        inside = range(each.first, each.last + 1)
        assert len(inside) > 1
        assert {(a, b) for b in inside for a in inside if a < b} <= tied
    for place in range(count - 1):
        assert ((place, place + 1) in tied) == any(b.first <= place < b.last for b in brackets)
    used = [(place, each.line) for each in brackets for place in range(each.first, each.last + 1)]
    assert len(used) == len({*used})
    assert {line for _, line in used} <= {0, 1}
    if (0, 1) in tied:
        assert brackets[0].first == 0
        assert not all((a, brackets[0].last + 1) in tied for a in range(brackets[0].last + 1))
