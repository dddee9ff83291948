"""Digests of what an adapter learned from hold whatever files are called, and for no other images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxpref.data.learned import count_changed, count_learned, digests_of, write_learned
from mlxpref.preferences import PackedImage, Preference
from tests.conftest import picture
from tests.messages import messages


@pytest.fixture
def preferences(tmp_path: Path) -> list[Preference]:
    """Five pairs of image files, with one prompt."""
    for i in range(10):
        picture(i).save(tmp_path / f"{i}.png")
    return [Preference("a hat", tmp_path / f"{2 * i}.png", tmp_path / f"{2 * i + 1}.png", 1.0) for i in range(5)]


def count(folder: Path, preferences: list[Preference]) -> int | None:
    with messages() as lines:
        found = count_learned([folder, None], preferences)
    expected = (
        [f"{found} of {len(preferences)} preferences are among those that {folder} learned from"] if found else []
    )
    assert [line.partition(":")[0] for line in lines] == expected
    return found


def test_learned_pairs_are_counted(preferences: list[Preference], tmp_path: Path) -> None:
    """Also renamed, swapped, labelled otherwise, with unreadable ones between, and a part of them."""
    run = tmp_path / "run"
    run.mkdir()
    assert count(run, preferences) is None  # it does not say what it learned from
    learned = preferences[:3]
    write_learned(run, digests_of(preferences), digests_of(learned), [])
    assert count(run, preferences) == 3
    assert count(run, preferences[2:4]) == 1
    assert count(run, [Preference("a hat", p.b, p.a, 0.3, votes=7, group="other") for p in learned]) == 3
    assert count(run, [replace(p, prompt="a shoe") for p in learned]) == 0
    assert count(run, [Preference("a hat", learned[0].a, learned[1].b, 1.0)]) == 0
    moved = tmp_path / "elsewhere" / "x.png"
    moved.parent.mkdir()
    assert isinstance(learned[0].a, Path)
    learned[0].a.rename(moved)
    assert count(run, preferences) == 2  # an image is missing
    assert count(run, [replace(learned[0], a=moved)]) == 1


def test_earlier_adapters_count(preferences: list[Preference], tmp_path: Path) -> None:
    for name, learned, earlier in (("one", preferences[:2], []), ("two", preferences[2:3], [tmp_path / "one"])):
        (tmp_path / name).mkdir()
        write_learned(tmp_path / name, digests_of(preferences), digests_of(learned), earlier)
    assert count(tmp_path / "two", preferences) == 3


def test_images_in_memory_and_in_archives(tmp_path: Path) -> None:
    archive = tmp_path / "images.tar"
    archive.write_bytes(b"content")
    preferences = [
        Preference("a hat", picture(1), picture(2), 1.0),
        Preference("a hat", PackedImage(archive, "1.png"), PackedImage(archive, "2.png"), 1.0),
    ]
    digests = digests_of(preferences)
    assert digests.all()
    assert len(np.unique(digests[:, 2:])) == 4
    archive.rename(tmp_path / "renamed.tar")
    packed = [PackedImage(tmp_path / "renamed.tar", f"{i}.png") for i in (1, 2)]
    again = digests_of([Preference("a hat", picture(1), picture(2), 1.0), Preference("a hat", *packed, 1.0)])
    assert (digests == again).all()


def test_large_files_differ_in_the_middle(tmp_path: Path) -> None:
    content = bytearray(1 << 20)
    for name in "ab":
        (tmp_path / name).write_bytes(content)
        content[1 << 19] = 1
    digests = digests_of([Preference("a hat", tmp_path / "a", tmp_path / "b", 1.0)])
    assert digests[0, 2] != digests[0, 3]


def test_changed_preferences_are_counted(preferences: list[Preference]) -> None:
    before = digests_of(preferences)
    assert count_changed(before, digests_of(preferences)) == 0
    assert count_changed(before, digests_of(preferences[1:])) == 5
    assert count_changed(before, digests_of([*preferences[:4], replace(preferences[4], p_people=0.9)])) == 1
    assert isinstance(preferences[0].a, Path)
    picture(99).save(preferences[0].a)
    assert count_changed(before, digests_of(preferences)) == 1
    preferences[0].a.write_bytes(b"")  # no picture, but another content all the same
    assert count_changed(before, digests_of(preferences)) == 1
    preferences[0].a.unlink()
    assert count_changed(before, digests_of(preferences)) == 0
