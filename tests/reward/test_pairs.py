"""Which pairs are chosen: of rankings, of the JSON of `rank`, of stores, and of files of preferences."""

import json
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.image_stamp import absolute_name, stamp_of
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.errors import DataError, UnknownSplitError
from mlxpref.judge.judge import Judge
from mlxpref.judge.ranking_result import Ranking
from mlxpref.judge.store import Store
from mlxpref.preferences import Preference
from mlxpref.reward.pair_sources import read_source
from mlxpref.reward.pairs import BELOW, NO_PROMPT, TIE, UNRESOLVED, Choose, RankedImages, choose_pairs
from tests.conftest import picture
from tests.data.own_rows import write_rows

PROMPT = "a red circle, a blue square, a green triangle"
LOOKS = (
    ("red", "clean"),
    ("red", "noisy"),
    ("red", "blurry"),
    ("blue", "clean"),
    ("blue", "noisy"),
    ("blue", "blurry"),
)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six pictures of the demo, in no order."""
    rng, paths = np.random.default_rng(5), [tmp_path / f"{number}.png" for number in range(len(LOOKS))]
    for path, (colour, quality) in zip(paths, LOOKS, strict=True):
        render(PictureSpec(colour, "blue", "green", "yellow", quality), rng).save(path)
    return paths


def three(
    strengths: Sequence[float] = (2.0, 1.0, -3.0), tied: Sequence[tuple[int, int]] = (), prompt: str = "p"
) -> RankedImages:
    return RankedImages(prompt, (Path("a"), Path("b"), Path("c")), tuple(strengths), frozenset(tied))


def chosen(
    item: RankedImages | Preference, choose: Choose = "best-worst", margin: float | None = None, ties: bool = False
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    pairs, left_out = choose_pairs([item], choose, margin, ties)
    return [(str(p.a), str(p.b)) for p in pairs], dict(left_out)


def test_choices_of_a_ranking() -> None:
    assert chosen(three()) == ([("a", "c")], {})
    assert chosen(three(), "resolved") == ([("a", "b"), ("a", "c"), ("b", "c")], {})
    assert chosen(three(tied=[(0, 1)]), "resolved") == ([("a", "c"), ("b", "c")], {UNRESOLVED: 1})
    assert chosen(three(), "margin", 4.0) == ([("a", "c"), ("b", "c")], {BELOW: 1})
    assert chosen(three(tied=[(0, 2)]), "margin", 5.0) == ([("a", "c")], {BELOW: 2})


def test_what_cannot_be_told_apart_is_no_pair() -> None:
    assert chosen(three(tied=[(0, 2)])) == ([], {UNRESOLVED: 1})
    assert chosen(three((0.0, 0.0, 0.0)), "margin", 0.0) == ([], {UNRESOLVED: 3})
    assert chosen(replace(three(), images=(Path("a"), Path("b"), Path("a")))) == ([], {UNRESOLVED: 1})
    assert chosen(three(prompt="")) == ([], {NO_PROMPT: 1})
    assert chosen(RankedImages("p", (Path("a"),), (0.0,), frozenset())) == ([], {})


def test_soft_label_is_the_logistic_of_the_lead() -> None:
    (pair,), _ = choose_pairs([three()], "best-worst", None, False)
    assert pair.p_people == pytest.approx(1 / (1 + math.exp(-5.0)), rel=1e-12)
    assert (pair.prompt, pair.group) == ("p", "p")


@pytest.mark.parametrize(
    ("p", "margin", "ties", "reason"),
    [
        (0.5, None, False, TIE),
        (0.5, None, True, ""),
        (0.5, 0.1, True, TIE),
        (0.7, None, False, ""),
        (0.7, 1.0, False, BELOW),
        (0.2, 1.0, False, ""),
        (1.0, 99.0, False, ""),
        (0.0, 99.0, False, ""),
    ],
)
def test_preferences_of_people(p: float, margin: float | None, ties: bool, reason: str) -> None:
    item = Preference("p", Path("a"), Path("b"), p)
    expected = ([], {reason: 1}) if reason else ([("a", "b")], {})
    assert chosen(item, "margin" if margin else "resolved", margin, ties) == expected


def test_json_of_a_ranking_is_that_ranking(
    demo_judge: Callable[..., Judge], images: list[Path], tmp_path: Path
) -> None:
    ranking = demo_judge(think=False).rank(images, PROMPT)
    direct = RankedImages.of_ranking(ranking)
    path = tmp_path / "r.json"
    for value in (ranking.to_json(), [ranking.to_json()], {"rankings": [ranking.to_json()], "singles": []}):
        path.write_text(json.dumps(value, indent=2))
        (read,) = read_source(path)
        assert isinstance(read, RankedImages)
        assert vars(read) == vars(direct)
    assert [str(image) for image in direct.images] == [entry.name for entry in ranking]


def test_ties_that_a_long_ranking_does_not_name_are_no_pairs() -> None:
    """Of many images only the nearest ties are named: the standard errors say that 0 and 1 are tied, 0 and 2 not."""
    ranking = RankedImages("p", ("a", "b", "c"), (3.0, 2.0, 0.0), frozenset({(1, 2)}), errors=(0.5, 0.5, 0.5))
    pairs, left_out = choose_pairs([ranking], "resolved", None, ties=False)
    assert [(pair.a, pair.b) for pair in pairs] == [("a", "c")]
    assert left_out == {UNRESOLVED: 2}


def ranking_json(folder: Path, images: dict[str, Path]) -> dict[str, Any]:
    """The JSON of a ranking of images by the names that the user gave, each image a little weaker than the last."""
    entries = [
        {"path": name, "file": absolute_name(image), "stamp": stamp_of(image), "strength": -float(i), "tied_with": []}
        for i, (name, image) in enumerate(images.items())
    ]
    value = {"prompt": "p", "images": entries, "pairs": [], "position_bias": 0.0, "group": None}
    (folder / "r.json").write_text(json.dumps(value))
    return value


def test_images_of_a_json_are_those_that_were_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, first in ((here, 0), (there, 10)):
        folder.mkdir()
        for number, name in enumerate("abc"):
            picture(first + number).save(folder / f"{name}.png")
    names = {
        "a.png": here / "a.png",
        "b.png": here / "b.png",
        "b.png (image 2)": here / "b.png",
        "c.png": here / "c.png",
    }
    ranking_json(here, names)
    monkeypatch.chdir(there)  # where other pictures have these names
    (read,) = read_source(here / "r.json")
    assert isinstance(read, RankedImages)
    assert list(read.images) == list(names.values())
    picture(20, (50, 50)).save(here / "a.png")
    (read,) = read_source(here / "r.json")
    assert isinstance(read, RankedImages)
    assert list(read.images) == [here / "b.png", here / "b.png", here / "c.png"]
    assert "1 image left out: gone, or changed since they were judged, such as a.png" in caplog.text


def test_images_of_a_json_may_move_with_it(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    picture(0).save(old / "a.png")
    picture(1).save(old / "b.png")
    ranking_json(old, {"a.png": old / "a.png", "b.png": old / "b.png"})
    new = old.rename(tmp_path / "new")
    os.utime(new / "a.png", (1, 1))
    (read,) = read_source(new / "r.json")
    assert isinstance(read, RankedImages)
    assert list(read.images) == [new / "a.png", new / "b.png"]


def test_json_of_another_version(tmp_path: Path) -> None:
    value = ranking_json(tmp_path, {"a.png": tmp_path / "a.png"})
    del value["group"]
    (tmp_path / "r.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"r\.json: is no JSON of this version's `mlxpref rank`; rank again"):
        list(read_source(tmp_path / "r.json"))


def test_the_table_of_a_ranking_is_no_source(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "r.csv").write_text("prompt,rank,image,strength,stderr\np,1,a.png,1.0,0.1\n")
    with pytest.raises(DataError, match="give the JSON of --json"):
        read_source(tmp_path / "r.csv")


def test_a_file_that_is_no_source(tmp_path: Path) -> None:
    for name, content in (("x.txt", "words"), ("y.txt", '{"a": 1}'), ("z.txt", "[1, 2]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r": is no JSON of `mlxpref rank --json`, no store, and no file of pref"):
            read_source(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.json: cannot be opened \(No such file"):
        read_source(tmp_path / "gone.json")
    with pytest.raises(DataError, match="is a folder"):
        read_source(tmp_path)


def test_rows_of_the_split_train(tmp_path: Path) -> None:
    rows = [{"prompt": split, "a": "1.png", "b": "2.png", "p_a": 1, "split": split} for split in ("train", "test")]
    path = write_rows(tmp_path, *rows)
    assert [item.prompt for item in read_source(path)] == ["train"]
    assert [item.prompt for item in read_source(path, "test")] == ["test"]
    with pytest.raises(UnknownSplitError):
        read_source(path, "other")
    for row in rows:
        del row["split"]
    path = write_rows(tmp_path, *rows)
    assert len(list(read_source(path))) == 2
    with pytest.raises(DataError, match="no splits"):
        read_source(path, "train")


# stores


def ranked_with_store(judge: Judge, path: Path, images: Sequence[Path], prompt: str = PROMPT) -> Ranking:
    with Store(path) as store:
        return replace(judge, store=store).rank(images, prompt, orders="both", pairs="all")


def test_store_gives_the_same_ranking(demo_judge: Callable[..., Judge], images: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    ranking = ranked_with_store(demo_judge(think=False), path, images)
    (read,) = read_source(path)
    assert isinstance(read, RankedImages)
    direct = RankedImages.of_ranking(ranking)
    assert (read.prompt, read.images, read.tied) == (PROMPT, direct.images, direct.tied)
    assert read.strengths == pytest.approx(direct.strengths, abs=1e-6)


def test_earlier_store_gains_names(demo_judge: Callable[..., Judge], images: list[Path], tmp_path: Path) -> None:
    path, judge = tmp_path / "s.sqlite", demo_judge(think=False)
    ranked_with_store(judge, path, images)
    (before,) = read_source(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("DROP TABLE names; DROP TABLE texts")
    with pytest.raises(DataError, match=r"names no images: an earlier version made it.*Run the same `mlxpref rank`"):
        list(read_source(path))
    assert ranked_with_store(judge, path, images).recalled == 30
    (after,) = read_source(path)
    assert vars(after) == vars(before)


def test_pictures_in_memory_have_no_names(demo_judge: Callable[..., Judge], tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        replace(demo_judge(think=False), store=store).rank([picture(i) for i in range(3)], PROMPT)
    with pytest.raises(DataError, match="names no images"):
        list(read_source(path))


def test_changed_and_moved_images(
    demo_judge: Callable[..., Judge], images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed file is another image than the one that was judged; a moved one is found after the next ranking."""
    path, judge = tmp_path / "s.sqlite", demo_judge(think=False)
    ranked_with_store(judge, path, images)
    picture(1, (84, 85)).save(images[3])
    moved = images[0].rename(tmp_path / "moved.png")
    (read,) = read_source(path)
    assert isinstance(read, RankedImages)
    assert set(read.images) == {*images} - {images[0], images[3]}
    assert "2 images left out: gone, or changed since they were judged" in caplog.text
    assert ranked_with_store(judge, path, [moved, *images[1:]]).recalled > 0
    (again,) = read_source(path)
    assert isinstance(again, RankedImages)
    assert set(again.images) == {moved, *images[1:]}


def test_one_judge_of_several(
    demo_judge: Callable[..., Judge], images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlxpref")
    path = tmp_path / "s.sqlite"
    ranked_with_store(demo_judge(think=False), path, images)
    ranked_with_store(demo_judge(think=False, criterion="the redder one"), path, images[:3])
    ranked_with_store(demo_judge(max_tokens=4), path, images[:2])  # with thinking: another way of the same judge
    ranked_with_store(demo_judge(think=False), path, images[:2], "a blue circle")
    items = list(read_source(path))
    assert [item.prompt for item in items] == [PROMPT, "a blue circle"]
    assert "34 comparisons by demo, 2 of them with thinking" in caplog.text
    assert "not used: demo by 'the redder one' (6)" in caplog.text


def test_groups_that_were_never_compared(demo_judge: Callable[..., Judge], images: list[Path], tmp_path: Path) -> None:
    path, judge = tmp_path / "s.sqlite", demo_judge(think=False)
    ranked_with_store(judge, path, images[:3])
    ranked_with_store(judge, path, images[3:])
    items = list(read_source(path))
    assert {frozenset(item.images) for item in items if isinstance(item, RankedImages)} == {
        frozenset(images[:3]),
        frozenset(images[3:]),
    }


def test_another_program_s_file(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE own (x)")
    with pytest.raises(DataError, match=r"an SQLite file of another program, not a store$"):
        list(read_source(path))
