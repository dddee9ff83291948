"""`mlxpref pairs` as a person meets it, from a ranking to the evaluation of its pairs."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from mlxpref.demo.pictures import PictureSpec, render
from tests.cli.test_commands import run

RANK = ("--prompt-from", "sidecar", "--model", "demo", "--orders", "both", "--pairs", "all", "--json")


@pytest.fixture
def ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `rank` says of three pictures of each of two prompts, and its store."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for colour in ("red", "blue"):
        best = PictureSpec(colour, "purple", "yellow", "green")
        for picture in (best, best._replace(quality="blurry"), best._replace(circle="orange", quality="noisy")):
            path = tmp_path / "pictures" / f"{colour} {picture.quality}.png"
            render(picture, rng).save(path)
            path.with_suffix(".txt").write_text(f"a {colour} circle, a purple square, a yellow triangle")
    done = run("rank", "pictures", *RANK, "--store", "kept.sqlite")
    assert done.exit_code == 0, done.stderr
    (tmp_path / "r.json").write_text(done.stdout)
    return tmp_path / "r.json"


@pytest.mark.parametrize("to", ["diffusion-dpo", "hpsv3", "trl", "jsonl"])
def test_pairs_are_measured_by_the_named_command(ranking: Path, to: str) -> None:
    """The judge agrees with its own ranking, also of JPEGs."""
    done = run("pairs", "r.json", "--output", "my pairs", "--to", to, "--margin", "0")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("6 pairs in my pairs: 1 file, ")
    assert done.stderr.splitlines()[-1] == "6 pairs written"
    command = shlex.split(done.stdout.splitlines()[1].partition("mlxpref ")[2])
    measured = run(*command, "--model", "demo", "--no-store", "--json")
    assert measured.exit_code == 0, measured.stderr
    result = json.loads(measured.stdout)
    assert (result["pairs"], result["accuracy"]) == (6, 1)


def test_summary_as_json(ranking: Path, tmp_path: Path) -> None:
    done = run("pairs", "r.json", "kept.sqlite", "--output", "out", "--to", "jsonl", "--margin", "0.01", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"output", "pairs", "left_out", "unreadable", "files"}
    assert result["pairs"] + sum(result["left_out"].values()) == 12
    assert [file["path"] for file in result["files"]] == ["pairs.jsonl"]
    assert "kept.sqlite: 12 comparisons by demo, 12 of them with thinking" in done.stderr
    better = {}
    for each in json.loads(ranking.read_text()):
        better |= {(each["prompt"], str(tmp_path / i["path"])): i["strength"] for i in each["images"]}
    for row in map(json.loads, (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()):
        a, b = (better[row["prompt"], str((tmp_path / "out" / row[side]).resolve())] for side in ("a", "b"))
        assert (a > b) == (row["p_a"] > 0.5)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("r.json", "--to", "jsonl"), 2, "/ '--output'"),
        (("--to", "jsonl", "--output", "out"), 2, "Missing argument 'RANKING"),
        (("r.json", "--to", "csv", "--output", "out"), 2, "'csv' is not one of"),
        (("r.json", "--to", "trl", "--output", "out", "--choose", "margin"), 2, "--choose margin goes with --margin X"),
        (
            ("r.json", "--to", "trl", "--output", "out", "--choose", "resolved", "--margin", "1"),
            2,
            "goes with --margin",
        ),
        (("gone.json", "--to", "trl", "--output", "out"), 1, "gone.json: cannot be opened (No such file or directory)"),
        (
            ("r.json", "--to", "trl", "--output", "pictures", "--margin", "0"),
            1,
            "pictures: is not an empty folder; give a new one",
        ),
        (
            ("r.json", "--to", "trl", "--output", "out", "--margin", "99"),
            1,
            "no pairs: 6 pairs left out, as their lead",
        ),
    ],
)
def test_what_cannot_be_done(ranking: Path, arguments: tuple[str, ...], code: int, reason: str) -> None:
    done = run("pairs", *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert reason in done.stderr
    assert not Path("out").exists()
