"""`mlxpref distill` as a person starts it, and the commands that it names."""

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.test_commands import run
from tests.conftest import picture

PROMPTS = ("a blue circle, a red square, a purple cross", "a red circle, a blue square, a green cross")
DEMO = ("distill", "--data", "demo", "--model", "demo", "--limit", "6", "--max-tokens", "24", "--output")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of each of two prompts."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(PROMPTS[number % 2])
    return folder


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give either --data, or IMAGES"),
        (("pictures", "--data", "demo"), "give either --data, or IMAGES"),
        (("pictures",), "give either --prompt TEXT or --prompt-from"),
        (("pictures", "--prompt", "a hat", "--split", "train"), "are for --data"),
        (("--data", "demo", "--prompt", "a hat"), "are for IMAGES"),
        (("--data", "demo", "--no-think"), "with thinking is what `distill` writes; leave it out"),
        (("--data", "demo", "--held-out", "1"), "not in the range"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    done = run("distill", *arguments, "--output", tmp_path / "soft.jsonl")
    assert done.exit_code == 2
    assert reason in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_commands_that_it_names_learn_and_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*DEMO, "my own.jsonl", "--held-out", "0.5")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    learn, measure, people = ([*shlex.split(line.partition("mlxpref ")[2])] for line in lines if "mlxpref " in line)
    assert (learn[0], people) == ("train", ["eval", "--data", "demo", "--adapter", learn[-1]])
    trained = run(*learn, "--steps", "1", "--comparisons", "2")
    assert trained.exit_code == 0, trained.output
    measured = run(*measure, "--json")
    assert measured.exit_code == 0, measured.output
    result = json.loads(measured.stdout)
    assert (result["split"], result["think"], result["learned_from"]) == ("test", False, 0)
    splits = [json.loads(line)["split"] for line in Path("my own.jsonl").read_text().splitlines()]
    assert result["pairs"] == splits.count("test")
    # The adapter answers at once: it has nothing to distill, unless it is to think all the same.
    again = ("distill", "--data", "my own.jsonl", "--adapter", learn[-1], "--max-tokens", "24", "--output", "b.jsonl")
    refused = run(*again)
    assert refused.exit_code == 1
    assert "answers at once" in refused.stderr
    assert not Path("b.jsonl").exists()
    count = splits.count("train")
    assert (
        f"{count} of {count} preferences are among those that runs/at-once learned from"
        in run(*again, "--think").stderr
    )


def test_nothing_is_judged_twice(tmp_path: Path) -> None:
    path, store = tmp_path / "soft.jsonl", ("--store", tmp_path / "store.sqlite")
    first = run(*DEMO, path, *store, "--json")
    assert first.exit_code == 0, first.output
    rows, result = path.read_bytes(), json.loads(first.stdout)
    assert (result["pairs"], result["unreadable"], result["left_out"]["pairs"]) == (6, [], 0)
    assert result["train"] + result["test"] == 6
    assert (result["model"], result["adapter"], result["samples"], result["max_tokens"]) == ("demo", None, 1, 24)
    assert result["thinking"]["tokens"] > 0
    assert result["seconds_per_pair"] > 0
    assert result["reading_seconds_per_pair"] == result["agreement"]["seconds_per_pair"] > 0
    again = json.loads(run(*DEMO, path, *store, "--json").stdout)
    assert (again["thinking"]["tokens"], again["seconds_per_pair"], again["reading_seconds_per_pair"]) == (
        0,
        None,
        None,
    )
    assert again["agreement"]["accuracy"] == result["agreement"]["accuracy"]
    assert path.read_bytes() == rows


def test_an_earlier_result_of_more_data_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "soft.jsonl"
    assert run(*DEMO, path).exit_code == 0
    rows = path.read_bytes()
    refused = run(*DEMO, path, "--limit", "3")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"{path}: has 6 pairs of an earlier distillation" in refused.stderr
    assert "give another output (--output), or remove the file" in refused.stderr
    assert path.read_bytes() == rows


def test_images_with_prompts(pictures: Path, tmp_path: Path) -> None:
    arguments = ("distill", pictures, "--prompt-from", "sidecar", "--model", "demo", "--max-tokens", "24")
    done = run(*arguments, "--pairs", "2", "--output", tmp_path / "soft.jsonl")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
    assert sorted((row["prompt"], row["split"]) for row in rows) in (
        [(PROMPTS[0], "test")] * 2 + [(PROMPTS[1], "train")] * 2,
        [(PROMPTS[0], "train")] * 2 + [(PROMPTS[1], "test")] * 2,
    )
    assert all(Path(row["a"]).parts[0] == Path(row["b"]).parts[0] == "pictures" for row in rows)
    assert not any("people" in row for row in rows)
