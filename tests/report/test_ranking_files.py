import csv
import os
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlxpref.data.prompts import prompts_of
from mlxpref.errors import ConfigError, DataError, MlxprefError
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import JudgedPair, Ranking
from mlxpref.preferences import ImageLike
from mlxpref.ranking.bradley_terry import all_pairs, rank_images
from mlxpref.report.ranking_files import copy_top, write_ranking_csv
from mlxpref.verdict import Verdict


def ranked(images: Sequence[ImageLike], prompt: str = "a cube", why: str = "it is a cube") -> Ranking:
    """A ranking in which every image beats those after it."""
    said = Verdict(f"<think>{why}</think><answer>1</answer>", 0.9, 0.1), Verdict("", 0.1, 0.9)
    pairs = tuple(JudgedPair(a, b, PairVerdict((said[0],), (said[1],))) for a, b in all_pairs(len(images)))
    ranking = rank_images(len(images), [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    return Ranking(prompt, tuple(images), ranking, pairs, 1.0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def problem(rankings: Sequence[Ranking], count: int, folder: Path, kind: type[Exception] = DataError) -> str:
    """The message, one line, of an error that copies nothing."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind) as caught:
        copy_top(rankings, count, folder)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    best = ranking.ranking.images[0]
    for name in ("strength", "stderr", "low", "high", "p_best"):
        assert float(table[0][name]) == pytest.approx(getattr(best, name), rel=1e-5)
    assert (table[0]["wins"], table[0]["pairs"]) == ("2", "2")
    assert table[0]["reason"] == "as image 1 beside a.png: it is a cube"
    assert table[0]["tied_with"] == " | ".join(str(images[i]) for i in best.tied_with)
    assert any(row["tied_with"] for row in table)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "ranking.csv"}


def test_images_that_were_only_read_have_no_reason(tmp_path: Path, images: list[Path]) -> None:
    write_ranking_csv(tmp_path / "r.csv", [ranked(images, why="")])
    assert {row["reason"] for row in rows(tmp_path / "r.csv")} == {""}
    write_ranking_csv(tmp_path / "r.csv", [])
    assert rows(tmp_path / "r.csv") == []


def test_spreadsheets_run_nothing_and_paths_still_lead_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_the_table(tmp_path: Path, prompt: str, why: str, names: list[str]) -> None:
    path = tmp_path / "r.csv"
    paths = [Path(f"{i}{name}x") for i, name in enumerate(names)]
    write_ranking_csv(path, [ranked(paths, prompt, why)])
    table = rows(path)
    assert [row["image"] for row in table] == [str(p) for p in paths]
    assert {row["prompt"].removeprefix("'") for row in table} == {prompt.removeprefix("'")}


def test_names_that_are_not_utf8_and_images_from_memory_are_written(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"caf\xe9.png"))
    write_ranking_csv(tmp_path / "r.csv", [ranked([odd, Image.new("RGB", (8, 8))])])
    assert [row["image"] for row in rows(tmp_path / "r.csv")] == ["caf\\udce9.png", "image 1"]


def test_the_table_is_a_list_of_prompts(tmp_path: Path, images: list[Path]) -> None:
    write_ranking_csv(tmp_path / "r.csv", [ranked(images[:3], "a cube"), ranked(images[3:], "two\nlines")])
    prompts, skipped = prompts_of(images, str(tmp_path / "r.csv"))
    assert list(prompts.values()) == ["a cube"] * 3 + ["two\nlines"] * 2
    assert skipped == []


def test_a_table_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^.*gone/r\.csv: cannot be written \(No such file or directory\); choose"):
        write_ranking_csv(tmp_path / "gone" / "r.csv", [])


# copies


def test_the_best_images_are_copied_with_their_place(tmp_path: Path, images: list[Path]) -> None:
    os.utime(images[0], (1_000_000_000, 1_000_000_000))
    images[1].chmod(0o400)
    folder = tmp_path / "out" / "best"
    copies = copy_top([ranked(images)], 4, folder)
    assert [copy.name for copy in copies] == ["01_b.png", "02_a.png", "03_é ü.png", "04_a.png"]
    assert sorted(folder.iterdir()) == sorted(copies)
    assert [copy.read_bytes() for copy in copies] == [image.read_bytes() for image in images[:4]]
    assert copies[0].stat().st_mtime == 1_000_000_000
    assert copies[1].stat().st_mode & 0o777 == 0o400
    assert all(image.exists() for image in images)


def test_more_than_there_are_copies_all_and_repeating_is_fine(tmp_path: Path, images: list[Path]) -> None:
    copies = copy_top([ranked(images)], 99, tmp_path / "out")
    assert len(copies) == 5
    times = [copy.stat().st_ctime_ns for copy in copies]
    with patch("shutil.copyfile", side_effect=AssertionError("copied again")):
        assert copy_top([ranked(images)], 99, tmp_path / "out") == copies
        assert copy_top([ranked(images)], 2, tmp_path / "out") == copies[:2]
    assert [copy.stat().st_ctime_ns for copy in copies] == times
    assert copy_top([], 3, tmp_path / "none") == []


def test_places_have_as_many_digits_as_they_need(tmp_path: Path, images: list[Path]) -> None:
    many = [tmp_path / "in" / f"{i}.png" for i in range(100)]
    for path in many:
        shutil.copyfile(images[0], path)
    names = [copy.name for copy in copy_top([ranked(many)], 100, tmp_path / "out")]
    assert (names[0], names[-1]) == ("001_0.png", "100_99.png")
    assert names == sorted(names)


def test_each_of_several_prompts_has_a_folder(tmp_path: Path, images: list[Path]) -> None:
    prompts = [
        "A red cube, /etc/passwd & ../..",
        "A red cube, " + "x" * 200,
        "A red cube, " + "x" * 201,
        "立方体 é",
        "!?\n",
    ]
    rankings = [ranked(images[:2], prompt) for prompt in prompts]
    copies = copy_top(rankings, 1, tmp_path / "out")
    folders = [copy.parent for copy in copies]
    assert len(set(folders)) == 5
    assert {folder.parent for folder in folders} == {tmp_path / "out"}
    starts = [
        "a-red-cube-etc-passwd-",
        "a-red-cube-xxxx",
        "a-red-cube-xxxx",
        unicodedata.normalize("NFC", "立方体-é-"),
        "",
    ]
    assert all(folder.name.startswith(start) for folder, start in zip(folders, starts, strict=True))
    assert all(len(folder.name) <= 49 for folder in folders)
    assert copy_top(rankings[::-1], 1, tmp_path / "out") == copies[::-1]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=2, max_size=4, unique=True))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_prompt_leads_out_of_the_folder(images: list[Path], tmp_path: Path, prompts: list[str]) -> None:
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    copies = copy_top([ranked(images[:2], prompt) for prompt in prompts], 1, folder)
    assert len(copies) == len(prompts) == len(set(folder.iterdir()))
    assert all(copy.resolve().parent.parent == folder.resolve() for copy in copies)


def test_other_files_are_never_overwritten(tmp_path: Path, images: list[Path]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "01_b.png").write_text("mine")
    (folder / "2_old.png").write_text("an earlier order")
    (folder / "03_é ü.png").symlink_to(tmp_path / "gone")
    (folder / "04_a.png").mkdir()
    (folder / "05_d.png").symlink_to(images[4])
    (folder / "notes.txt").touch()
    message = problem([ranked(images)], 5, folder)
    assert message.startswith(f"{folder}: nothing was copied, other files are in the place of 4 of 5 copies (")
    for name in ("01_b.png", "2_old.png", "03_é ü.png", "04_a.png"):
        assert str(folder / name) in message
    assert "05_d.png" not in message
    assert (folder / "01_b.png").read_text() == "mine"


def test_many_clashes_are_counted(tmp_path: Path, images: list[Path]) -> None:
    many = [tmp_path / "in" / f"{i}.png" for i in range(12)]
    (tmp_path / "out").mkdir()
    for number, path in enumerate(many, 1):
        shutil.copyfile(images[0], path)
        (tmp_path / "out" / f"{number:02}_{path.name}").touch()
    assert " and 2 more); choose an empty folder" in problem([ranked(many)], 12, tmp_path / "out")


def test_the_same_name_in_another_unicode_form_is_no_clash(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    shutil.copyfile(images[2], tmp_path / "out" / unicodedata.normalize("NFD", "01_é ü.png"))
    assert len(copy_top([ranked(images[2:])], 1, tmp_path / "out")) == 1


def test_the_folder_of_the_images_is_refused(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "link", tmp_path / "out" / ".." / "in"):
        for rankings in ([ranked(images)], [ranked(images[:2], "a"), ranked(images[2:], "b")]):
            with pytest.raises(ConfigError, match="holds images that are ranked; choose another folder"):
                copy_top(rankings, 1, folder)
    assert len(list((tmp_path / "in").iterdir())) == 5
    assert len(copy_top([ranked(images)], 1, tmp_path / "in" / "best")) == 1


def test_what_cannot_be_copied_is_one_clear_line(tmp_path: Path, images: list[Path]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    assert "at least 1" in problem([ranked(images)], 0, folder, ConfigError)
    memory = ranked([images[0], Image.new("RGB", (8, 8))])
    assert "image 2 came from memory" in problem([memory], 2, folder)
    assert len(copy_top([memory], 1, tmp_path / "memory")) == 1
    gone = ranked([images[0], tmp_path / "in" / "gone.png"])
    assert "gone.png: cannot be copied (No such file or directory)" in problem([gone], 2, folder)
    with patch("shutil.disk_usage", return_value=shutil._ntuple_diskusage(0, 0, 3)):
        assert "MB are free; choose another disk" in problem([ranked(images)], 2, folder, ConfigError)
    with patch("shutil.copyfile", side_effect=OSError(28, "No space left on device")):
        assert "cannot be copied to " in problem([ranked(images)], 2, folder, ConfigError)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(MlxprefError, match=r"file.* \((File exists|Not a directory)\)"):
            copy_top([ranked(images)], 1, place)


def test_an_interrupted_copy_leaves_nothing_under_its_name(tmp_path: Path, images: list[Path]) -> None:
    def half(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with patch("shutil.copyfile", half), pytest.raises(KeyboardInterrupt):
        copy_top([ranked(images)], 2, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_long_names_are_cut(tmp_path: Path) -> None:
    paths = [tmp_path / "in" / ("é" * 125 + f"{i}.png") for i in range(2)]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode())
    copies = copy_top([ranked(paths)], 2, tmp_path / "out")
    assert [copy.name for copy in copies] == [f"0{i}_{'é' * 124}.png" for i in (1, 2)]
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in paths]
