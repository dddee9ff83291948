"""What the demo judge writes about a pair, and how much of it is true: the content of its pictures is known."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mlxpref.demo.briefs import Brief, Requirement
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec
from mlxpref.demo.preferences import PairSpec, place_of

COUNTS = ("none", "one", "two", "three", "four")
"""The words for how many requirements a picture meets."""
VERDICTS = ("fails", "fits")
_IMAGE = re.compile(rf"Image [12]: ([^:]*): ({'|'.join(COUNTS)}) met, ({'|'.join(QUALITIES)})\.")
_SHAPE, _COLOUR = "|".join(SHAPES), "|".join(COLOURS)
_CHECK = re.compile(rf"({_SHAPE}) ({_COLOUR}) (?:for|with ({_SHAPE})) ({_COLOUR}) ({'|'.join(VERDICTS)})")


class Check(NamedTuple):
    """What is written of one requirement: the colour of its shape, the one it is to have, and whether they agree."""

    requirement: Requirement
    colour: str
    wanted: str
    fits: bool

    def __str__(self) -> str:
        shape, other = self.requirement
        link = f"with {other}" if self.requirement.is_like else "for"
        return f"{shape} {self.colour} {link} {self.wanted} {VERDICTS[self.fits]}"


class Account(NamedTuple):
    """What is written of one image: its checks, how many of them fit, and its quality."""

    checks: tuple[Check, ...]
    met: int
    quality: str

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.checks))}: {COUNTS[self.met]} met, {self.quality}."

    @property
    def value(self) -> int:
        """What the answer goes by: the place of the written sum and quality."""
        return place_of(self.met, self.quality)


def true_account(brief: Brief, picture: PictureSpec) -> Account:
    """What there is to write about a picture."""
    checks = tuple(
        Check(each, picture.colour(each.shape), each.colour_in(picture), each.is_met(picture)) for each in brief
    )
    return Account(checks, sum(check.fits for check in checks), picture.quality)


def reasons_text(first: Account, second: Account) -> str:
    """The reasons for an answer: both images, one after the other."""
    return f"Image 1: {first} Image 2: {second}"


def read_reasons(text: str) -> list[Account]:
    """The accounts of images in what a judge wrote, as many as are whole."""
    return [_read_account(*found) for found in _IMAGE.findall(text)]


def _read_account(checks: str, count: str, quality: str) -> Account:
    read = [
        Check(Requirement(shape, other or wanted), colour, wanted, verdict == VERDICTS[True])
        for shape, colour, other, wanted, verdict in _CHECK.findall(checks)
    ]
    return Account(tuple(read), COUNTS.index(count), quality)


@dataclass(frozen=True)
class Truth:
    """How much of what was written is so, as shares.

    `complete`: the requirements that were checked, of those asked in both images. Of what was written: `facts`, the
    colours that the pictures show; `verdicts`, those that are right for the picture; `sums`, those that count the
    written verdicts. `follows`: the answers that go by the written sums and qualities, of those where these differ. A
    share of nothing is None.
    """

    complete: float | None
    facts: float | None
    verdicts: float | None
    sums: float | None
    follows: float | None


def truth_of(judgements: Iterable[tuple[PairSpec, str, bool | None]]) -> Truth:
    """The truth of reasons for pairs with a shown first; with each, whether the answer prefers that one."""
    marks: dict[str, list[bool]] = {name: [] for name in Truth.__dataclass_fields__}
    for pair, text, prefers_first in judgements:
        accounts = read_reasons(text)
        for picture, account in zip((pair.a, pair.b), [*accounts, None, None], strict=False):
            checked = {check.requirement for check in account.checks} if account else set()
            marks["complete"] += [requirement in checked for requirement in pair.brief]
            if account is not None:
                _mark(marks, account, picture)
        if len(accounts) == 2 and accounts[0].value != accounts[1].value and prefers_first is not None:
            marks["follows"].append((accounts[0].value > accounts[1].value) == prefers_first)
    return Truth(**{name: sum(each) / len(each) if each else None for name, each in marks.items()})


def _mark(marks: dict[str, list[bool]], account: Account, picture: PictureSpec) -> None:
    """Mark what is written of one picture."""
    for check in account.checks:
        marks["facts"].append(check.colour == picture.colour(check.requirement.shape))
        if check.requirement.is_like:
            marks["facts"].append(check.wanted == picture.colour(check.requirement.wanted))
        marks["verdicts"].append(check.fits == check.requirement.is_met(picture))
    marks["sums"].append(account.met == sum(check.fits for check in account.checks))
