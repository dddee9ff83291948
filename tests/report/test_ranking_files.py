import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlxpref.data.prompts import prompts_of
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import JudgedPair, Ranking
from mlxpref.preferences import ImageLike
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report.ranking_files import check_copy_folder, copy_top, write_ranking_csv
from mlxpref.verdict import Verdict
from tests.conftest import read_verdict


def ranked(images: Sequence[ImageLike], prompt: str = "a cube", why: str = "it is a cube") -> Ranking:
    """A ranking in which every image beats those after it."""
    verdicts = read_verdict(f"<think>{why}</think><answer>1</answer>", 0.9, 0.1), Verdict("", 0.1, 0.9)
    pairs = tuple(JudgedPair(a, b, PairVerdict((verdicts[0],), (verdicts[1],))) for a, b in all_pairs(len(images)))
    ranking = rank_images(len(images), [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    return Ranking(prompt, tuple(images), ranking, pairs, 1.0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Five different images, best first."""
    paths = [tmp_path / "in" / name for name in ("b.png", "a.png", "é ü.png", "x/a.png", "d.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return paths


# the table


def test_a_ranking_is_a_table(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "ranking.csv"
    ranking = ranked(images[:3], 'a red,\n"big" cube')
    write_ranking_csv(path, [ranking, ranked(images[3:], "Würfel")])
    table = rows(path)
    assert [(row["prompt"], row["rank"], row["image"]) for row in table] == [
        *(('a red,\n"big" cube', str(i + 1), str(images[i])) for i in range(3)),
        *(("Würfel", str(i - 2), str(images[i])) for i in (3, 4)),
    ]
    best = ranking.strengths.images[0]
    for name in ("strength", "stderr", "low", "high", "p_best"):
        assert float(table[0][name]) == pytest.approx(getattr(best, name), rel=1e-5)
    assert (table[0]["wins"], table[0]["pairs"]) == ("2", "2")
    assert table[0]["reason"] == "as image 1 beside a.png: it is a cube"
    assert table[0]["tied_with"] == " | ".join(str(images[i]) for i in best.tied_with)
    assert any(row["tied_with"] for row in table)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "ranking.csv"}


def test_a_reason_names_its_opponent_clearly(images: list[Path]) -> None:
    """x/a.png is beside another a.png, so its name alone would be that of both."""
    ranking = ranked([images[0], images[3], images[1]])
    reason = ranking[0].reason
    assert reason == ranking.to_json()["images"][0]["reason"]
    assert reason in ("as image 1 beside x/a.png: it is a cube", "as image 1 beside in/a.png: it is a cube")


def test_unthought_images_have_no_reason(tmp_path: Path, images: list[Path]) -> None:
    write_ranking_csv(tmp_path / "r.csv", [ranked(images, why="")])
    assert {row["reason"] for row in rows(tmp_path / "r.csv")} == {""}
    write_ranking_csv(tmp_path / "r.csv", [])
    assert rows(tmp_path / "r.csv") == []


def test_spreadsheets_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Path("=1+2.png"), Path("-a.png"), Path("@b.png"), Path("+c.png"), Path("d.png")]
    for name in names:
        name.touch()
    for prompt in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1"):
        write_ranking_csv(Path("r.csv"), [ranked(names, prompt)])
        with Path("r.csv").open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert f"'{prompt}" in cells
        for cell in cells:
            assert cell[:1] not in ("=", "+", "@", "\t", "\r")
            assert not cell.startswith("-") or float(cell)
        for row, name in zip(rows(Path("r.csv")), names, strict=True):
            assert Path(row["image"]).samefile(name)


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(prompt=cells, why=cells, names=st.lists(cells.filter(lambda n: "/" not in n), min_size=2, max_size=3))
@settings(max_examples=40, deadline=None)
def test_any_text_survives_the_table(tmp_path: Path, prompt: str, why: str, names: list[str]) -> None:
    path = tmp_path / "r.csv"
    paths = [Path(f"{i}{name}x") for i, name in enumerate(names)]
    write_ranking_csv(path, [ranked(paths, prompt, why)])
    table = rows(path)
    assert [row["image"] for row in table] == [str(p) for p in paths]
    assert {row["prompt"].removeprefix("'") for row in table} == {prompt.removeprefix("'")}


def test_odd_names_and_images_from_memory(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"caf\xe9.png"))
    write_ranking_csv(tmp_path / "r.csv", [ranked([odd, Image.new("RGB", (8, 8))])])
    assert [row["image"] for row in rows(tmp_path / "r.csv")] == ["caf\\udce9.png", "image 1"]


def test_the_table_is_a_list_of_prompts(tmp_path: Path, images: list[Path]) -> None:
    write_ranking_csv(tmp_path / "r.csv", [ranked(images[:3], "a cube"), ranked(images[3:], "two\nlines")])
    prompts, skipped, _ = prompts_of(images, str(tmp_path / "r.csv"))
    assert list(prompts.values()) == ["a cube"] * 3 + ["two\nlines"] * 2
    assert skipped == []


def test_unwritable_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^.*gone/r\.csv: cannot be written \(No such file or directory\); choose"):
        write_ranking_csv(tmp_path / "gone" / "r.csv", [])


# copies


def test_copies_are_named_by_rank(tmp_path: Path, images: list[Path]) -> None:
    os.utime(images[0], (1_000_000_000, 1_000_000_000))
    folder = tmp_path / "out" / "best"
    copies = copy_top([ranked(images)], 4, folder)
    assert [copy.name for copy in copies] == ["01_b.png", "02_a.png", "03_é ü.png", "04_a.png"]
    assert sorted(folder.iterdir()) == sorted(copies)
    assert [copy.read_bytes() for copy in copies] == [image.read_bytes() for image in images[:4]]
    assert copies[0].stat().st_mtime == 1_000_000_000
    assert len(copy_top([ranked(images)], 99, tmp_path / "all")) == 5


def test_each_of_several_prompts_has_a_folder(tmp_path: Path, images: list[Path]) -> None:
    prompts = ["A red cube, /etc/passwd & ../..", "A red cube, " + "x" * 200, "立方体 é", "!?\n"]
    copies = copy_top([ranked(images[:2], prompt) for prompt in prompts], 1, tmp_path / "out")
    names = [copy.parent.name for copy in copies]
    assert names[:1] == ["01-a-red-cube-etc-passwd"]
    assert len(set(names)) == 4
    assert all(copy.resolve().parent.parent == (tmp_path / "out").resolve() for copy in copies)


def test_a_folder_with_files_is_refused(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "in", tmp_path / "file"):
        for check in (check_copy_folder, lambda place: copy_top([ranked(images)], 2, place)):
            with pytest.raises(ConfigError, match="is not an empty folder; choose a new one"):
                check(folder)
    assert len(list((tmp_path / "in").iterdir())) == 5
    check_copy_folder(tmp_path / "new")


def test_failing_copy(tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(DataError, match="image 1 has no file"):
        copy_top([ranked([images[0], Image.new("RGB", (8, 8))])], 2, tmp_path / "memory")
    missing = ranked([images[0], tmp_path / "in" / "gone.png"])
    with pytest.raises(ConfigError, match=r"cannot be copied there \(.*gone\.png"):
        copy_top([missing], 2, tmp_path / "out")


def test_captions_are_beside_the_copies(tmp_path: Path, images: list[Path]) -> None:
    twins = [images[1], images[1].with_suffix(".webp"), images[4]]  # a.png, a.webp
    twins[1].write_bytes(images[0].read_bytes())
    copies = copy_top([ranked(twins, " a red cube,\nbig é \n")], 2, tmp_path / "out", captions=True)
    assert [copy.name for copy in copies] == ["01_a.png", "02_a.webp"]
    texts = sorted((tmp_path / "out").glob("*.txt"))
    assert [text.name for text in texts] == ["01_a.txt", "02_a.txt"]
    assert {text.read_bytes() for text in texts} == {"a red cube,\nbig é".encode()}
    assert len(list((tmp_path / "out").iterdir())) == 4
    prompts, skipped, _ = prompts_of(copies, "sidecar")
    assert (set(prompts.values()), skipped) == ({"a red cube,\nbig é"}, [])


def test_captions_of_several_prompts(tmp_path: Path, images: list[Path]) -> None:
    groups = [replace(ranked(images[i : i + 2], prompt), similar_to="x") for i, prompt in ((0, "one"), (2, "two"))]
    copies = copy_top(groups, 2, tmp_path / "groups", captions=True)
    assert [copy.with_suffix(".txt").read_text() for copy in copies] == ["one", "one", "two", "two"]
    copies = copy_top([replace(group, similar_to="") for group in groups], 1, tmp_path / "prompts", captions=True)
    assert [copy.with_suffix(".txt").read_text() for copy in copies] == ["one", "two"]
    assert [copy.parent for copy in copies] == [tmp_path / "prompts"] * 2  # trainers look into one folder
    assert [copy.name[:6] for copy in copies] == ["01_01_", "02_01_"]


def test_captions_that_cannot_be(tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(DataError, match="captions are the prompts of the images, and some have none"):
        copy_top([ranked(images, "")], 2, tmp_path / "out", captions=True)
    odd = images[0].rename(tmp_path / "in" / "odd.txt")
    with pytest.raises(DataError, match=r"odd\.txt: its copy has the name of the text beside it; rename it"):
        copy_top([ranked([odd, *images[1:]])], 2, tmp_path / "out", captions=True)
    assert not (tmp_path / "out").exists()
