"""`mlxpref rank` as a person meets it: which pairs, which prompts, what is kept, and where the result goes."""

import csv
import errno
import fcntl
import json
import os
import pty
import re
import signal
import sqlite3
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.judge.store import Store
from tests.cli.test_commands import QUICK, SCRIPT, run
from tests.conftest import picture
from tests.data.test_similar import burst, scene

PROMPT = ("--prompt", "a red circle")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(12):
        picture(i).save(place / f"{i:02}.png")
    return place


def ranked(*arguments: str | Path) -> dict[str, Any]:
    done = run("rank", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_default_budget_is_two_pairs_an_image(folder: Path) -> None:
    assert ranked(folder, *PROMPT, "--no-think", *QUICK)["comparisons"] == 48
    assert ranked(folder, *PROMPT, "--no-think", "--pairs", "13", *QUICK)["comparisons"] == 26
    both = ranked(folder, *PROMPT, "--no-think", "--pairs", "13", "--orders", "both", *QUICK)
    assert {tuple(pair["asked"]) for pair in both["pairs"]} == {("a first", "b first")}
    assert (len(both["pairs"]), both["orders"]) == (13, "both orders, as asked for")
    one = ranked(folder, *PROMPT, "--no-think", "--pairs", "13", "--orders", "one", *QUICK)
    assert {tuple(pair["asked"]) for pair in one["pairs"]} == {("a first",), ("b first",)}
    assert (len(one["pairs"]), one["comparisons"]) == (26, 26)
    assert len(ranked(folder, *PROMPT, "--no-think", "--pairs", "all", *QUICK)["pairs"]) == 66


def test_judged_pairs_are_recalled(folder: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "kept.sqlite")
    first = ranked(folder, *PROMPT, "--no-think", *store, *QUICK)
    assert (first["recalled"], first["vision_runs"]) == (0, 12)
    done = run("rank", folder, *PROMPT, "--no-think", *store, *QUICK)
    assert done.stderr.startswith("48 comparisons without thinking: no time; about 48 of them known\n")
    again = ranked(folder, *PROMPT, "--no-think", *store, *QUICK)
    assert (again["recalled"], again["vision_runs"]) == (48, 0)
    assert again["images"] == first["images"]
    more = ranked(folder, *PROMPT, "--no-think", "--pairs", "30", *store, *QUICK)
    assert 0 < more["recalled"] < 60
    budget = run("rank", folder, *PROMPT, "--no-think", "--pairs", "40", *store, *QUICK).stderr.splitlines()[0]
    assert re.fullmatch(r"80 comparisons without thinking: about .* s; about \d+ of them known", budget)
    assert len(more["pairs"]) == 30


def test_store_is_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "cache"))
    arguments = (folder, *PROMPT, "--no-think", "--pairs", "3", *QUICK)
    assert ranked(*arguments, "--no-store")["recalled"] == 0
    assert not (tmp_path / "cache").exists()
    ranked(*arguments)
    assert [file.name for file in (tmp_path / "cache").glob("*.sqlite")] == ["comparisons.sqlite"]
    assert ranked(*arguments)["recalled"] == 6
    both = run("rank", *arguments, "--no-store", "--store", tmp_path / "x.sqlite")
    assert both.exit_code == 2
    assert "exclude each other" in both.stderr


def test_time_estimate_comes_first(folder: Path) -> None:
    done = run("rank", folder, *PROMPT, *QUICK)
    assert done.exit_code == 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("no answer was found")]
    assert lines[0].startswith("48 comparisons without thinking and 40 comparisons with thinking: about ")
    assert lines[1].startswith("judging without thinking")
    assert re.fullmatch(
        r"without thinking \d+ pairs? in both orders, \d+ in one, as from pair to pair the position bias .*", lines[2]
    )
    assert lines[3].startswith("judging with thinking; leading: ")


def test_files_are_written(folder: Path, tmp_path: Path) -> None:
    page, table, best = tmp_path / "page.html", tmp_path / "table.csv", tmp_path / "best"
    outputs = ("--html", page, "--csv", table, "--copy-top", "3", best)
    result = ranked(folder, *PROMPT, "--no-think", *outputs, *QUICK)
    order = [Path(image["path"]).name for image in result["images"]]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == order
    assert sorted(path.name for path in best.iterdir()) == [f"{i:02}_{name}" for i, name in enumerate(order[:3], 1)]
    assert len(list(folder.iterdir())) == 12
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in order)
    assert text.count("data:image/") == 12


def test_captions_are_beside_the_copies(folder: Path, tmp_path: Path) -> None:
    done = run("rank", folder, *PROMPT, "--no-think", "--copy-top", "3", tmp_path / "best", "--captions", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert f"3 images copied to {tmp_path / 'best'} with their prompts" in done.stderr
    texts = sorted((tmp_path / "best").glob("*.txt"))
    assert [text.read_text() for text in texts] == [PROMPT[1]] * 3
    assert all(text.with_suffix(".png").exists() for text in texts)


def test_captions_need_copies_and_prompts(folder: Path, tmp_path: Path) -> None:
    done = run("rank", folder, *PROMPT, "--captions", *QUICK)
    assert done.exit_code == 2
    assert "--captions goes with --copy-top K FOLDER" in done.stderr
    copies = ("--copy-top", "3", tmp_path / "best", "--captions")
    done = run("rank", folder, "--criterion", "the redder one", *copies, *QUICK)
    assert done.exit_code == 2
    assert "--captions writes the prompts of the images: give --prompt or --prompt-from, too" in done.stderr


def test_stars_are_beside_the_images(folder: Path) -> None:
    images = sorted(folder.iterdir())
    images[0].with_suffix(".xmp").write_text("broken")
    done = run("rank", folder, *PROMPT, "--no-think", "--xmp", *QUICK)
    assert done.exit_code == 0
    assert f"1 sidecar not rated: {images[0].with_suffix('.xmp')}: is no XML" in done.stderr
    assert "11 sidecars rated; stars by the share" in done.stderr
    assert all("xmp:Rating=" in image.with_suffix(".xmp").read_text() for image in images[1:])


def test_no_sidecar_could_be_rated(folder: Path) -> None:
    for image in sorted(folder.iterdir()):
        image.with_suffix(".xmp").write_text("broken")
    done = run("rank", folder, *PROMPT, "--no-think", "--xmp", *QUICK, "--json")
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["images"]) == 12
    (line,) = [line for line in done.stderr.splitlines() if "is no XML" in line]
    assert line.startswith("12 sidecars not rated: ")
    assert line.endswith(" | and 9 more")
    assert "stars by" not in done.stderr


def test_a_folder_for_no_sidecars_is_refused_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # root, who may run the tests, can write into any folder
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr("mlxpref.cli.common.tempfile.TemporaryFile", refuse)
    done = run("rank", folder, *PROMPT, "--no-think", "--xmp", *QUICK)
    assert done.exit_code == 1
    assert done.stderr.endswith(
        f"--xmp {folder}: cannot be written (Permission denied); correct its permissions, or leave out --xmp\n"
    )
    assert "comparisons without thinking" not in done.stderr


@pytest.mark.parametrize(
    ("option", "place"), [("--html", "missing/page.html"), ("--csv", "missing/table.csv"), ("--html", "")]
)
def test_unwritable_outputs_are_refused_first(folder: Path, tmp_path: Path, option: str, place: str) -> None:
    done = run("rank", folder, *PROMPT, option, tmp_path / place, *QUICK)
    assert done.exit_code == 1
    assert "folder" in done.stderr
    assert "comparisons without thinking" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--html {0}/00.png", "ends with .html"),
        ("--csv {0}/table.xlsx", "ends with .csv"),
        ("--csv {0}/list.csv --prompt-from {0}/../pictures/list.csv", "an input of this command"),
        ("--csv {0}/metadata.csv --prompt-from sidecar", "an input of this command"),
        ("--html {0}/link.html", "an input of this command"),
        ("--csv {0}/new.csv --store {0}/new.csv", "an input of this command"),
    ],
)
def test_no_output_takes_the_place_of_an_input(folder: Path, arguments: str, problem: str) -> None:
    for name in ("list.csv", "metadata.csv"):
        (folder / name).write_text("file_name,prompt\n00.png,x\n01.png,x\n")
    (folder / "link.html").symlink_to(folder / "00.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prompt = () if "--prompt-from" in arguments else PROMPT
    done = run("rank", folder, *prompt, "--no-think", *arguments.format(folder).split(), *QUICK)
    assert done.exit_code == 1
    assert problem in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="root can write anywhere else")
@pytest.mark.parametrize("arguments", ["--html /proc/page.html", "--csv /proc/a.csv", "--copy-top 2 /proc/best"])
def test_folders_without_room_are_refused_first(folder: Path, arguments: str) -> None:
    done = run("rank", folder, *PROMPT, *arguments.split(), *QUICK)
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
    assert "comparisons without thinking" not in done.stderr


def test_a_device_is_not_replaced(folder: Path) -> None:
    assert "is no file, or in a folder" in run("rank", folder, *PROMPT, "--csv", "/dev/null", *QUICK).stderr
    assert Path("/dev/null").is_char_device()


def test_a_cache_that_cannot_be_written_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "file" / "cache"))
    done = run("rank", folder, *PROMPT, "--no-think", "--pairs", "3", *QUICK)
    assert done.exit_code == 0
    assert "comparisons are not kept: " in done.stderr
    assert run("eval", "--data", "demo", "--limit", "2", "--no-think", *QUICK).exit_code == 0
    asked_for = ("--store", tmp_path / "file" / "kept.sqlite")
    assert run("rank", folder, *PROMPT, "--no-think", "--pairs", "3", *QUICK, *asked_for).exit_code == 1


def test_copies_need_an_empty_folder(folder: Path) -> None:
    done = run("rank", folder, *PROMPT, "--copy-top", "2", folder, *QUICK)
    assert done.exit_code == 1
    assert "is not an empty folder" in done.stderr
    assert "comparisons without thinking" not in done.stderr


def test_each_prompt_has_its_own_ranking(folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text("a red circle" if number % 2 else "a blue square", encoding="utf-8")
    (folder / "11.txt").unlink()
    page = tmp_path / "page.html"
    done = run("rank", folder, "--prompt-from", "sidecar", "--no-think", "--html", page, *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    rankings = json.loads(done.stdout)
    assert [(ranking["prompt"], len(ranking["images"])) for ranking in rankings] == [
        ("a blue square", 6),
        ("a red circle", 5),
    ]
    assert [Path(each["path"]).name for each in rankings[0]["skipped"]] == ["11.png"]
    assert "“a red circle”: 5 images" in done.stderr
    assert page.read_text(encoding="utf-8").count("data:image/") == 11


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt(), 130, "interrupted"), (DataError("b.png: is gone"), 1, "Error: b.png: is gone")],
)
def test_finished_prompts_are_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text(f"prompt {number % 3}", encoding="utf-8")
    judge_rank, ranked_prompts = Judge.rank, []

    def rank(judge: Judge, images: Sequence[Path], prompt: str, *arguments: Any, **options: Any) -> Any:
        ranked_prompts.append(prompt)
        if len(ranked_prompts) == 3:
            raise error
        return judge_rank(judge, images, prompt, *arguments, **options)

    monkeypatch.setattr(Judge, "rank", rank)
    page = tmp_path / "page.html"
    done = run("rank", folder, "--prompt-from", "sidecar", "--no-think", "--html", page, *QUICK, "--json")
    assert [each["prompt"] for each in json.loads(done.stdout)] == ["prompt 0", "prompt 1"]
    assert done.exit_code == code
    assert done.stderr.splitlines()[-1] == line
    assert "2 of 3 prompts were ranked" in done.stderr
    assert "2 of 3 prompts were ranked" in page.read_text(encoding="utf-8")


def test_a_criterion_needs_no_prompt(folder: Path, tmp_path: Path) -> None:
    page, table, criterion = tmp_path / "page.html", tmp_path / "table.csv", ("--criterion", "=the sharper eyes")
    outputs = ("--html", page, "--csv", table)
    quick = ("--no-think", "--pairs", "3", "--store", tmp_path / "kept.sqlite", *QUICK)
    result = ranked(folder, *criterion, *outputs, *quick)
    assert (result["prompt"], result["criterion"], result["recalled"]) == ("", "=the sharper eyes", 0)
    assert not any("prompt" in warning for warning in result["warnings"])
    assert '<h1 dir="auto">by “=the sharper eyes”</h1>' in page.read_text(encoding="utf-8")
    with table.open(newline="") as file:
        assert {(row["prompt"], row["criterion"]) for row in csv.DictReader(file)} == {("", "'=the sharper eyes")}
    done = run("rank", folder, *criterion, *quick)
    assert "by “=the sharper eyes”: 12 images, 5 pairs" in done.stdout
    assert "about 6 of them known" in done.stderr
    both = ranked(folder, *PROMPT, *criterion, *quick)
    assert (both["prompt"], both["criterion"], both["recalled"]) == ("a red circle", "=the sharper eyes", 0)
    assert ranked(folder, *PROMPT, *quick)["criterion"] is None


def test_processes_have_one_criterion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = list[dict[str, str]]()

    def check_same(values: dict[str, str]) -> None:
        digests.append(values)
        raise DataError("seen")

    monkeypatch.setattr("mlxpref.cli.judges.process_group", lambda: SimpleNamespace(size=2, check_same=check_same))
    for criterion in ("the sharper eyes", "the brighter one"):
        assert "seen" in run("rank", folder, "--criterion", criterion, *QUICK).stderr
    assert digests[0]["fingerprint of the judge"] == digests[1]["fingerprint of the judge"]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("command", ["rank", "compare", "eval", "calibrate"])
def test_a_criterion_says_something(command: str) -> None:
    done = run(command, "--criterion", " ")
    assert done.exit_code == 2
    assert "'--criterion': it is empty; say what makes an image the better one" in done.stderr


@pytest.fixture
def bursts(tmp_path: Path) -> Path:
    """Bursts of three and of two, two other pictures, and a broken file."""
    place = tmp_path / "bursts"
    place.mkdir()
    pictures = [*burst(1, 3), scene(2), *burst(3, 2), scene(4)]
    for i, each in enumerate(pictures):
        each.save(place / f"{i}.png")
    (place / "7.png").touch()
    return place


CRITERION = ("--criterion", "the sharper eyes")


def test_each_burst_is_ranked_by_itself(bursts: Path, tmp_path: Path) -> None:
    page, table, best = tmp_path / "page.html", tmp_path / "table.csv", tmp_path / "best"
    arguments = (bursts, *CRITERION, "--group-by", "similar", "--no-think", *QUICK)
    done = run("rank", *arguments, "--html", page, "--csv", table, "--copy-top", "1", best, "--json")
    assert done.exit_code == 0, done.stderr
    assert "2 groups of similar images, 2 images alone\n" in done.stderr
    assert f"2 images copied to {best}; 2 images alone not copied\n" in done.stderr
    result = json.loads(done.stdout)
    rankings = result["rankings"]
    names = [sorted(Path(image["path"]).name for image in ranking["images"]) for ranking in rankings]
    assert names == [["0.png", "1.png", "2.png"], ["4.png", "5.png"]]
    assert [ranking["group"] for ranking in rankings] == ["0.png", "4.png"]
    assert [len(ranking["pairs"]) for ranking in rankings] == [3, 1]
    assert [Path(each["path"]).name for each in result["singles"]] == ["3.png", "6.png"]
    assert [Path(each["path"]).name for each in rankings[0]["skipped"]] == ["7.png"]
    firsts = [Path(ranking["images"][0]["path"]).name for ranking in rankings]
    copies = sorted(path.relative_to(best).as_posix() for path in best.rglob("*.png"))
    assert copies == [f"01_01_{firsts[0]}", f"02_01_{firsts[1]}"]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["0.png"] * 3 + ["4.png"] * 2 + [""] * 2
    assert [(Path(row["image"]).name, row["rank"], row["prompt"]) for row in rows[5:]] == [
        ("3.png", "", ""), ("6.png", "", "")
    ]  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert "Images ranked for 2 groups" in text
    assert "by “the sharper eyes”, similar to 4.png" in text
    assert "2 images are similar to no other, and not judged: 3.png, 6.png" in text
    assert text.count("data:image/") == 5
    lines = run("rank", *arguments).stdout.splitlines()
    start = lines.index("The best of each:")
    assert [line.split()[:3] for line in lines[start + 2 : -1]] == [
        ["0.png", "3", firsts[0]],
        ["4.png", "2", firsts[1]],
    ]
    assert lines[-1] == "2 images are similar to no other, and not judged: 3.png, 6.png"


def test_bursts_of_a_prompt_are_groups_within_it(bursts: Path) -> None:
    for i in range(7):
        (bursts / f"{i}.txt").write_text("a cat" if i % 2 else "a dog", encoding="utf-8")
    done = run("rank", bursts, "--prompt-from", "sidecar", "--group-by", "similar", "--no-think", *QUICK, "--json")
    (ranking,), singles = (json.loads(done.stdout)[name] for name in ("rankings", "singles"))
    assert (ranking["prompt"], ranking["group"]) == ("a dog", "0.png")
    assert [Path(image["path"]).name for image in ranking["images"]] in (["0.png", "2.png"], ["2.png", "0.png"])
    assert sorted((Path(each["path"]).name, each["prompt"]) for each in singles) == [
        ("1.png", "a cat"), ("3.png", "a cat"), ("4.png", "a dog"), ("5.png", "a cat"), ("6.png", "a dog")
    ]  # fmt: skip


def test_one_group_or_none(bursts: Path) -> None:
    arguments = (bursts, *CRITERION, "--group-by", "similar", "--no-think", *QUICK)
    done = run("rank", *arguments, "--similar", "32", "--json")
    assert [len(ranking["images"]) for ranking in json.loads(done.stdout)["rankings"]] == [7]
    assert json.loads(done.stdout)["singles"] == []
    for i in (1, 2, 5):
        (bursts / f"{i}.png").unlink()
    done = run("rank", *arguments)
    assert done.exit_code == 1
    assert "Error: no two of 4 images are similar: the nearest differ in " in done.stderr
    assert "more than --similar 10; give more, or leave out --group-by" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--similar", "10"), "--similar is for --group-by similar"),
        (("--group-by", "similar", "--similar", "33"), "33 is not in the range 0<=x<=32"),
        (("--group-by", "similar", "--similar", "-1"), "-1 is not in the range 0<=x<=32"),
        (("--group-by", "colour"), "'colour' is not 'similar'"),
    ],
)
def test_groups_that_there_are_not(bursts: Path, arguments: tuple[str, ...], problem: str) -> None:
    done = run("rank", bursts, *CRITERION, *arguments, *QUICK)
    assert done.exit_code == 2
    assert problem in done.stderr


def test_a_prompt_in_the_picture(tmp_path: Path) -> None:
    for i in range(3):
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", f"a red circle\nNegative prompt: blur\nSteps: 20, Seed: {i}")
        picture(i).save(tmp_path / f"{i}.png", pnginfo=text)
    (ranking,) = json.loads(run("rank", tmp_path, "--prompt-from", "png", *QUICK, "--json").stdout)
    assert ranking["prompt"] == "a red circle"


@pytest.mark.parametrize("arguments", [(), (*PROMPT, "--prompt-from", "sidecar")])
def test_one_source_of_prompts_is_needed(folder: Path, arguments: tuple[str, ...]) -> None:
    done = run("rank", folder, *arguments, *QUICK)
    assert done.exit_code == 2
    assert "give either --prompt TEXT or --prompt-from" in done.stderr
    assert "with --criterion TEXT both may be left out" in done.stderr


@pytest.mark.parametrize("pairs", ["0", "-3", "many", "1.5"])
def test_impossible_pairs(folder: Path, pairs: str) -> None:
    done = run("rank", folder, *PROMPT, "--pairs", pairs, *QUICK)
    assert done.exit_code == 2
    assert "--pairs" in done.stderr


def test_duplicates_are_named(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    done = run("rank", folder, *PROMPT, "--no-think", *QUICK)
    assert done.exit_code == 0
    assert f"the same file: {folder / '03.png'}, {folder / 'copy.png'}; each is ranked" in done.stderr


def test_a_top_of_all_ends_nothing_early(folder: Path) -> None:
    result = ranked(folder, *PROMPT, "--no-think", "--top", "12", *QUICK)
    assert (result["ending"], result["comparisons"]) == ("done", result["planned_comparisons"])
    assert "no early end: a top 12 of 12 images leaves none out" in result["warnings"]


def count_stored(path: Path) -> int:
    """How many comparisons a store holds that another process writes."""
    if not path.exists():
        return 0
    with Store(path), closing(sqlite3.connect(path)) as connection:  # the store makes the table
        return int(connection.execute("SELECT COUNT(*) FROM comparisons").fetchone()[0])


@pytest.mark.slow
def test_interrupted_ranking(tmp_path: Path) -> None:
    for i in range(40):
        picture(i, (112, 112)).save(tmp_path / f"{i:02}.png")
    store = tmp_path / "kept.sqlite"
    command = [*SCRIPT, "rank", str(tmp_path), *PROMPT, "--think-about", "all", "--pairs", "all", "--max-tokens", "64"]
    command += ["--model", QUICK[1], "--store", str(store), "--json", "--rows", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        deadline = time.monotonic() + 300
        while count_stored(store) < 20 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    result = json.loads(out)
    assert result["ending"] == "interrupted"
    assert 0 < len(result["pairs"]) < 780
    assert len(result["images"]) == 40
    assert b"Traceback" not in err


@pytest.mark.slow
def test_a_killed_ranking_goes_on(tmp_path: Path) -> None:
    """Finished comparisons are in the store when the process is killed; the same command judges the others only."""
    for i in range(200):
        picture(i, (56, 56)).save(tmp_path / f"{i:03}.png")
    store = tmp_path / "kept.sqlite"
    arguments = [str(tmp_path), *PROMPT, "--no-think", "--pairs", "300", *QUICK, "--rows", "8"]
    command = [*SCRIPT, "rank", *arguments, "--store", str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        deadline = time.monotonic() + 300
        while count_stored(store) < 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    finished = count_stored(store)
    assert 100 <= finished < 600
    result = ranked(*arguments, "--store", store)
    assert (result["recalled"], result["comparisons"]) == (finished, 600)
    assert count_stored(store) == 600
    without = ranked(*arguments, "--no-store")
    assert [image["path"] for image in result["images"]] == [image["path"] for image in without["images"]]


@pytest.mark.slow
def test_a_terminal_shows_the_best_and_what_is_settled(folder: Path) -> None:
    arguments = ["rank", str(folder), *PROMPT, "--no-think", *QUICK]
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    environment = os.environ | {"TERM": "xterm"}
    streams: Any = {"stdin": terminal, "stdout": terminal, "stderr": subprocess.PIPE}
    with subprocess.Popen([*SCRIPT, *arguments], env=environment, **streams):
        os.close(terminal)
        output = b""
        with suppress(OSError):  # the terminal's other end is closed
            while part := os.read(main, 1 << 16):
                output += part
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode()).splitlines()
    ranks = [line.split()[0] for line in lines if re.match(r" +\d+  ", line)]
    assert len(ranks) == 10
    assert "and 2 more images; --all shows them" in lines
    assert max(map(len, lines)) <= 70
    assert re.search(r"(is this judge's best, |No image is clearly the best: )", " ".join(lines[-3:]))
    piped = run("rank", folder, *PROMPT, "--no-think", *QUICK).stdout.splitlines()
    assert len([line for line in piped if re.match(r" +\d+  ", line)]) == 12


def test_broken_images_are_named(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (8, 8)).save(folder / "fine.png")
    result = ranked(folder, *PROMPT, "--no-think", "--pairs", "3", *QUICK)
    assert [Path(each["path"]).name for each in result["skipped"]] == ["broken.png"]
