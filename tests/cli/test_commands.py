"""The command line as a person meets it: results, JSON, streams, exit codes, and one clear line for what is wrong."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from PIL import Image

from mlxpref.checkpoints.recommended import choose_judge
from mlxpref.cli import main
from mlxpref.config import TrainSettings
from mlxpref.demo.pictures import COLOURS, SHAPES, PictureSpec, render
from mlxpref.demo.preferences import SPLITS
from mlxpref.engine.adapters import ADAPTER_WEIGHTS
from mlxpref.judge.judge import Judge
from mlxpref.judge.store import Store
from tests.conftest import GOLDEN, tiny_model, write_adapter

COMMANDS = (
    "calibrate", "compare", "convert", "data", "demo", "distill", "doctor", "eval", "export", "label", "pairs", "rank",
    "serve", "train",
)  # fmt: skip
TINY = str(GOLDEN / "qwen2_5_vl")
SCRIPT = [sys.executable, "-c", "from mlxpref.cli import main; main()"]
QUICK = ("--model", TINY, "--max-tokens", "6")
MARKUP = "[red]x[bold] :smile:.png"
ESCAPE = "esc\x1b[31m\u202egnp.png"
UNDECODED = os.fsdecode(b"undecoded\xff.png")

COMPARE_KEYS = {
    "prompt", "model", "adapter", "a", "b", "p_a", "p_a_shown_first", "p_a_shown_second", "reasons", "samples",
    "calibration", "warnings", "criterion", "profile",
}  # fmt: skip
RANK_KEYS = {
    "prompt", "model", "adapter", "images", "pairs", "position_bias", "position_bias_stderr", "warnings", "remarks",
    "planned_comparisons", "comparisons", "instruments", "intervals", "orders", "replaced",
    "ending", "recalled", "skipped", "seconds", "vision_runs", "tokens",
    "calibration", "criterion", "group", "profile",
}  # fmt: skip
IMAGE_KEYS = {
    "path", "file", "stamp", "rank", "strength", "stderr", "low", "high", "p_best", "wins", "pairs", "tied_with",
    "reason",
}  # fmt: skip
PAIR_KEYS = {"a", "b", "p_a", "p_a_shown_first", "p_a_shown_second", "reasons", "think", "asked"}
EVAL_KEYS = {
    "data", "split", "protocol", "strategy", "pairs", "ties_dropped", "accuracy", "accuracy_low", "accuracy_high",
    "accuracy_macro", "both_orders_accuracy", "position_consistency", "first_choice_rate", "first_image_baseline",
    "brier", "ece", "unreadable", "tokens", "seconds", "official", "human_ceiling", "tokens_per_pair",
    "seconds_per_pair", "calibration", "learned_from", "left_out", "think", "samples", "max_tokens",
}  # fmt: skip
JUDGED_KEYS = {
    "model", "adapter", "max_tokens", "max_pixels", "seed", "limit", "versions", "warnings", "results", "criterion",
    "profile", "vision_runs",
}  # fmt: skip


def run(*arguments: str | Path, input: str | None = None) -> Result:
    """The command line in this process; what it prints must do nothing to a terminal."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    for text in (result.stdout, result.stderr):
        assert all(character.isprintable() or character == "\n" for character in text), repr(text)
    return result


def report(*arguments: str | Path) -> Any:
    """The JSON of a command that works: all of stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal_of(*arguments: str | Path) -> str:
    """The one line of a command that cannot work."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: "), result.stderr
    assert "Traceback" not in result.stderr
    return lines[-1]


def in_a_process(*arguments: str | Path | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*SCRIPT, *arguments],
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
    )


@pytest.fixture(autouse=True)
def without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no hub"))
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)


def draw(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    look = PictureSpec(*np.random.default_rng(number).permutation(list(COLOURS))[: len(SHAPES)].tolist())
    with path.open("wb") as file:
        render(look, np.random.default_rng(number)).save(file, format="PNG")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three pictures."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        draw(tmp_path / "pictures" / name, number)
    return tmp_path / "pictures"


@pytest.fixture
def two(pictures: Path) -> tuple[Path, Path]:
    return pictures / "a.png", pictures / "b.png"


@pytest.fixture
def rows(pictures: Path) -> Callable[..., Path]:
    """A JSONL file beside the pictures."""

    def write(*rows: dict[str, Any] | str) -> Path:
        path = pictures.parent / "preferences.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


def row(a: str = "a", b: str = "b", p_a: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"prompt": "a shape", "a": f"pictures/{a}.png", "b": f"pictures/{b}.png", "p_a": p_a, **more}


# Help and start


def test_help_imports_no_heavy_library() -> None:
    program = """
import sys
from mlxpref.cli import main
for arguments in (["--help"], ["--version"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
heavy = {"mlx", "mlx_vlm", "mlx_lm", "rich", "transformers", "numpy", "PIL", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: main {command} ")


def test_help_of_train_is_in_groups() -> None:
    """Every setting is in a group; examples are whole lines, so that they can be copied."""
    assert all(field.metadata["group"] for field in fields(TrainSettings))
    output = CliRunner().invoke(main, ["train", "--help"], terminal_width=80).output
    groups = {block.splitlines()[0]: block for block in output.split("\n\n")}
    assert "-d, --data" in groups["Data:"]
    assert "--rank" in groups["Judge and adapter:"]
    assert "--resume" in groups["Options:"]
    assert "--rank" not in groups["Options:"]
    assert groups["Examples:"].splitlines()[1] == "  mlxpref train --data preferences.jsonl --output runs/taste"


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_help_are_right_usage(command: str) -> None:
    group = click.Context(main)
    each = main.get_command(group, command)
    assert each is not None
    for example in getattr(each, "examples", ()):
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("mlxpref", command)
        each.make_context(name, arguments, parent=group)


def test_help_names_every_command_in_full() -> None:
    output = run("--help").output
    listed = [line.split(maxsplit=1) for line in output.partition("Commands:")[2].splitlines() if line.strip()]
    assert tuple(name for name, _ in listed) == COMMANDS
    assert not any("..." in text for _, text in listed), "cut off"
    assert run("-h").output == output


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["rank"],
        ["rank", "somewhere"],
        ["compare", "a", "--prompt", "x"],
        ["compare", "a", "b", "c\x1b[31m", "--prompt", "x"],
        ["compare", "a", "b", "--prompt", "x", "--samples", "0"],
        ["rank", "a", "--prompt", "x", "--think-about", "perhaps"],
        ["rank", "a", "--prompt", "x", "--think-about", "none"],
        ["rank", "a", "--prompt", "x", "--think-about", "all", "--no-think"],
        ["eval", "--data", "demo", "--compare-thinking", "--think"],
        ["rank", "a", "--prompt", " "],
        ["compare", "a", "b", "--prompt", "not text \udcff"],
        ["eval"],
        ["eval", "--data", "demo", "--strategy", "soft,hard"],
        ["eval", "--data", "demo", "--limit", "0"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr.splitlines()[-1]


# Results


def test_compare(two: tuple[Path, Path]) -> None:
    a, b = two
    result = report("compare", a, b, "--prompt", "a shape", *QUICK)
    assert set(result) == COMPARE_KEYS
    assert (result["a"], result["b"], result["model"], result["adapter"]) == (str(a), str(b), TINY, None)
    assert [sample["first"] for sample in result["samples"]] == ["a", "b"]
    assert len(result["reasons"]) == 2
    assert all(0 < sample["tokens"] <= 6 + 8 for sample in result["samples"])
    assert result["p_a_shown_first"] == result["samples"][0]["p_first"]
    assert result["p_a_shown_second"] == 1 - result["samples"][1]["p_first"]
    orders = [result["p_a_shown_first"], result["p_a_shown_second"]]
    winner, loser, shares = (a, b, orders) if result["p_a"] > 0.5 else (b, a, [1 - p for p in reversed(orders)])
    lines = run("compare", a, b, "--prompt", "a shape", *QUICK).stdout.splitlines()
    assert lines[0] == f"{winner} is preferred to {loser}, {100 * max(result['p_a'], 1 - result['p_a']):.1f} %"
    places = [line for line in lines if line.startswith("  as image")]
    assert places == [f"  as image {place}: {100 * share:.1f} %" for place, share in enumerate(shares, 1)]
    assert all("\n".join(lines).count(str(image)) == 1 for image in two)
    assert [line.removeprefix("note: ") for line in lines if line.startswith("note: ")] == result["warnings"]
    assert any("of its probability to an answer at all" in line for line in result["warnings"])


def test_long_names_leave_reasons_their_room(tmp_path: Path) -> None:
    for number in range(2):
        draw(tmp_path / f"{200 * 'x'}{number}.png", number)
    text = run("rank", tmp_path, "--prompt", "a shape", "--model", "demo").stdout
    for name, other in (("0", "1"), ("1", "0")):
        assert re.search(rf"^x+…x+{name}\.png, as image [12] beside x+…x+{other}\.png: Image 1: .*\.$", text, re.M)


def test_equal_pictures_have_no_winner(two: tuple[Path, Path]) -> None:
    copy = two[0].with_name("copy.png")
    copy.write_bytes(two[0].read_bytes())
    for other in (two[0], copy):
        text = run("compare", two[0], other, "--prompt", "a shape", "--no-think", *QUICK).stdout
        assert text.startswith(f"undecided between {two[0]} and {other}: 50 % for either")
        assert "have the same content" in text
    assert "same content" not in run("compare", *two, "--prompt", "a shape", "--no-think", *QUICK).stdout


def test_compare_without_thinking_and_with_samples(two: tuple[Path, Path]) -> None:
    done = run("compare", *two, "--prompt", "a shape", *QUICK, "--no-think", "--samples", "3", "--json")
    assert "--samples 3 is left off" in done.stderr
    result = json.loads(done.stdout)
    assert [sample["tokens"] for sample in result["samples"]] == [0, 0]
    assert result["reasons"] == ["", ""]
    arguments = ("compare", *two, "--prompt", "a shape", *QUICK, "--samples", "2")
    result = report(*arguments)
    assert [sample["first"] for sample in result["samples"]] == ["a", "a", "b", "b"]
    texts = [sample["text"] for sample in result["samples"]]
    assert len(set(texts)) > 1
    read = [sample["p_first"] for sample in result["samples"][:2] if sample["p_first"] is not None]
    assert result["p_a_shown_first"] == pytest.approx(np.mean(read))
    assert [sample["text"] for sample in report(*arguments)["samples"]] == texts
    assert [sample["text"] for sample in report(*arguments, "--seed", "1")["samples"]] != texts


@pytest.mark.parametrize("think", ["--think", "--think-about all", "--no-think"])
def test_rank(pictures: Path, think: str) -> None:
    result = report("rank", pictures, "--prompt", "a shape", *think.split(), *QUICK)
    assert set(result) == RANK_KEYS
    assert (result["prompt"], result["model"], result["adapter"], result["skipped"]) == ("a shape", TINY, None, [])
    assert {frozenset(image) for image in result["images"]} == {frozenset(IMAGE_KEYS)}
    assert {frozenset(pair) for pair in result["pairs"]} == {frozenset(PAIR_KEYS)}
    assert sorted(image["path"] for image in result["images"]) == [str(pictures / f"{name}.png") for name in "abc"]
    assert [image["rank"] for image in result["images"]] == sorted(image["rank"] for image in result["images"])
    assert sum(image["p_best"] for image in result["images"]) == pytest.approx(1, abs=1e-6)
    assert len(result["pairs"]) == 3
    assert result["vision_runs"] == 3
    assert (result["tokens"] == 0) == (think == "--no-think")
    assert all(len(pair["reasons"]) == 2 for pair in result["pairs"])
    output = run("rank", pictures, "--prompt", "a shape", *think.split(), *QUICK).stdout.splitlines()
    assert output[0] == "“a shape”: 3 images, 3 pairs, each in both orders"
    assert [line.split()[1] for line in output[2:5]] == [Path(image["path"]).name for image in result["images"]]
    assert "does not say what people think" in output[-2]
    assert output[-1].startswith(
        ("No image is clearly the best: ", f"{Path(result['images'][0]['path']).name} is this judge's best")
    )


def test_rank_takes_files_and_folders(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures.parent)
    deep = draw(pictures / "deep" / "deeper" / "a.png", 5)
    (pictures / ".DS_Store").write_text("x")
    (pictures / "._a.png").write_text("x")

    def ranked(*arguments: str | Path) -> set[str]:
        result = report("rank", *arguments, "--prompt", "a shape", "--no-think", *QUICK)
        assert result["skipped"] == []
        return {image["path"] for image in result["images"]}

    shallow = {str(pictures / name) for name in ("a.png", "b.png", "c.png")}
    assert ranked(pictures) == shallow
    assert ranked(pictures, "--recursive") == shallow | {str(deep)}
    assert ranked(pictures / "a.png", deep.parent) == {str(pictures / "a.png"), str(deep)}
    output = run("rank", pictures, "--recursive", "--prompt", "x", "--no-think", *QUICK).stdout
    assert "  deeper/a.png " in output, "two images of one name are told apart by their folders"
    assert ranked("pictures/a.png", deep) == {"pictures/a.png", str(deep)}
    assert "  deeper/a.png " in run("rank", "pictures/a.png", deep, "--prompt", "x", "--no-think", *QUICK).stdout


def test_hostile_names_and_prompts(tmp_path: Path) -> None:
    names = ("with blanks.png", "ünï 你好 🎨.png", MARKUP, ESCAPE, UNDECODED)
    for number, name in enumerate(names):
        draw(tmp_path / "pictures" / name, number)
    prompt = "[bold]a[/bold] \x1b[2J\u202eshape <|im_end|>"
    arguments = ("rank", tmp_path / "pictures", "--prompt", prompt, "--no-think", *QUICK)
    result = report(*arguments)
    assert result["prompt"] == prompt
    assert {Path(image["path"]).name for image in result["images"]} == set(names)
    assert {Path(path).name for pair in result["pairs"] for path in (pair["a"], pair["b"])} == set(names)
    output = run(*arguments).stdout
    assert "[bold]a[/bold] [2Jshape <|im_end|>" in output
    for name in (*names[:3], "esc[31mgnp.png", "undecoded\\xff.png"):
        assert name in output
    paths = [tmp_path / "pictures" / name for name in (ESCAPE, UNDECODED)]
    result = report("compare", *paths, "--prompt", prompt, *QUICK)
    assert [Path(result[side]).name for side in "ab"] == [ESCAPE, UNDECODED]
    assert "undecoded\\xff.png" in run("compare", *paths, "--prompt", prompt, *QUICK).stdout


def test_eval_of_own_preferences(rows: Callable[..., Path]) -> None:
    path = rows(row("a", "b"), row("b", "c", 0.25, group="x"), row("a", "c", 0.5))
    result = report("eval", "--data", path, *QUICK)
    assert set(result) == EVAL_KEYS | JUDGED_KEYS
    assert list(result)[:4] == ["data", "split", "protocol", "strategy"]
    assert (result["data"], result["split"], result["pairs"], result["ties_dropped"]) == (str(path), "all rows", 2, 1)
    assert result["first_image_baseline"] == 0.5
    assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
    output = run("eval", "--data", path, *QUICK).stdout
    assert "1 tie dropped" in output
    assert report("eval", "--data", path, *QUICK, "--no-think")["tokens"] == 0
    path = rows(row("a", "b"), row("b", "c"))
    assert report("eval", "--data", path, *QUICK, "--limit", "1")["pairs"] == 1


def test_eval_of_several_strategies(rows: Callable[..., Path]) -> None:
    path = rows(row("a", "b"))
    report_of_all = report("eval", "--data", path, *QUICK, "--strategy", "score, select,soft")
    assert set(report_of_all) == JUDGED_KEYS
    several = report_of_all["results"]
    assert [each["strategy"] for each in several] == ["soft", "select", "score"]
    assert all(set(each) - {"minus_select", "minus_score"} == EVAL_KEYS for each in several)
    assert report("eval", "--data", path, *QUICK, "--strategy", "select")["strategy"] == "select"
    lines = run("eval", "--data", path, *QUICK, "--strategy", "soft,select").stdout.splitlines()
    assert lines[1].split()[:4] == ["strategy", "thinking", "samples", "accuracy"]
    assert len(lines) == 7  # what select wrote before is recalled


def test_eval_of_the_demo() -> None:
    for split in SPLITS:
        result = report("eval", "--data", "demo", "--split", split, "--limit", "3", "--model", "demo", "--no-think")
        assert (result["data"], result["split"], result["pairs"]) == ("demo", split, 3)


def test_verdict_of_the_demo_judge(two: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("--prompt", "a shape", "--model", "demo", "--no-think")
    Image.new("RGB", (50, 60)).save(tmp_path / "other.png")
    assert "knows only its own coloured shapes" in run("compare", two[0], tmp_path / "other.png", *arguments).stderr
    warning = "the demo judge knows only its own coloured shapes: its answers about other pictures mean nothing"
    assert report("compare", two[0], tmp_path / "other.png", *arguments)["warnings"] == [warning]
    table = tmp_path / "table.csv"
    result = report("rank", two[0], tmp_path / "other.png", *arguments, "--csv", table)
    assert result["warnings"] == result["remarks"]
    assert result["warnings"][0] == warning
    with table.open(newline="") as file:
        assert [row["warnings"] for row in csv.DictReader(file)] == [" | ".join(result["warnings"]), ""]
    assert warning not in report("rank", *two, *arguments)["warnings"]
    assert "coloured shapes" not in run("compare", *two, *arguments).stderr
    other = ("compare", two[0], tmp_path / "other.png", "--prompt", "x", "--no-think", "--model", TINY)
    assert "coloured shapes" not in run(*other).stderr


def test_the_environment_names_the_judge(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", TINY)
    assert report("compare", *two, "--prompt", "x", "--no-think")["model"] == TINY
    assert report("compare", *two, "--prompt", "x", "--no-think", "--model", "demo")["model"] == "demo"


def test_an_adapter_changes_the_answer(two: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    arguments = ("compare", *two, "--prompt", "x", "--no-think", "--model", TINY)
    without, result = report(*arguments), report(*arguments, "--adapter", adapter)
    assert result["adapter"] == str(adapter)
    assert abs(result["p_a_shown_first"] - without["p_a_shown_first"]) > 1e-4


# Streams and exit codes, in processes of their own


def test_json_alone_on_stdout(pictures: Path) -> None:
    for number, name in enumerate((ESCAPE, UNDECODED)):
        draw(pictures / name, number)
    (pictures / "text.png").write_text("x")
    done = in_a_process("rank", str(pictures), "--prompt", "x", "--json", *QUICK)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    assert set(result) == RANK_KEYS
    assert {os.fsencode(image["path"]) for image in result["images"]} >= {os.fsencode(pictures / UNDECODED)}
    assert b"\x1b" not in done.stdout + done.stderr
    lines = done.stderr.decode().splitlines()
    assert lines[0].startswith(f"skipped: {pictures / 'text.png'}: ")
    assert all(line.startswith("the same file: ") for line in lines[1:3])
    assert lines[3].startswith("20 comparisons with thinking: about ")
    assert re.match(r"no answer was found in the first \d+ completions \(\d+ ran out of tokens", lines[4])
    assert re.match(r"judging with thinking; leading: .*: 20 of 20 in ", lines[5])
    assert len(lines) == 6


def test_output_in_any_encoding(two: tuple[Path, Path]) -> None:
    arguments = ("compare", *two, "--prompt", "“你好” 🎨", "--no-think", "--model", TINY)
    done = in_a_process(*arguments, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["prompt"] == "“你好” 🎨"
    done = in_a_process("rank", *two, *arguments[3:5], "--no-think", *QUICK, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def without_unreadable(stderr: bytes) -> list[bytes]:
    """The lines, but for that about the answers of random weights."""
    return [line for line in stderr.splitlines() if not line.startswith(b"no answer was found in the first ")]


def test_system_errors_are_one_line(two: tuple[Path, Path]) -> None:
    command = [*SCRIPT, "compare", *map(str, two), "--prompt", "x", "--no-think", "--model", TINY, "--json"]
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=300)
        assert done.returncode == 1
        assert without_unreadable(done.stderr) == [
            b"Error: the output: No space left on device; correct that and run it again"
        ]
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does when it has read enough
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=300)
    os.close(writing)
    assert done.returncode == 1
    assert without_unreadable(done.stderr) == []


def test_ctrl_c_ends_with_130(two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "pairs", interrupt)
        for arguments in (
            ["compare", *two, "--prompt", "x"],
            ["rank", *two, "--prompt", "x"],
            ["eval", "--data", "demo"],
        ):
            result = run(*arguments, "--model", TINY)
            assert (result.exit_code, result.stdout) == (130, "")
            assert result.stderr.splitlines()[-1] == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


def test_an_interrupt_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, put, batches = tmp_path / "kept.sqlite", Store.put_many, list[int]()

    def interrupt(self: Store, items: Any, names: Any) -> None:
        put(self, items, names)
        batches.append(len(items))
        raise KeyboardInterrupt

    command = ("eval", "--data", "demo", "--limit", "14", "--model", "demo", "--no-think", "--rows", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_many", interrupt)
        result = run(*command, "--store", store)
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"finished comparisons are kept in {store}" in result.stderr
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_many", interrupt)
        assert "are kept in" not in run(*command).stderr
    again = run(*command, "--store", store).stderr
    assert f"{batches[0]} of 28 comparisons were judged before" in again


# Bad input


def test_missing_images(pictures: Path, tmp_path: Path) -> None:
    a = pictures / "a.png"
    assert "nowhere: no such file or folder" in refusal_of("rank", tmp_path / "nowhere", "--prompt", "x", *QUICK)
    (tmp_path / "empty").mkdir()
    assert "empty: this folder holds no images" in refusal_of("rank", tmp_path / "empty", "--prompt", "x", *QUICK)
    draw(tmp_path / "outer" / "inner" / "x.png")
    assert "add --recursive" in refusal_of("rank", tmp_path / "outer", "--prompt", "x", *QUICK)
    assert "nowhere.png: cannot be opened" in refusal_of("compare", a, "nowhere.png", "--prompt", "x", *QUICK)
    assert "is a folder" in refusal_of("compare", a, pictures, "--prompt", "x", *QUICK)
    assert "two images are needed, 1 of 1" in refusal_of("rank", a, "--prompt", "x", *QUICK)
    assert "two images are needed, 1 of 1" in refusal_of("rank", a, a, "--prompt", "x", *QUICK)


def test_many_damaged_images_are_counted(pictures: Path) -> None:
    for i in range(13):
        (pictures / f"text {i:02}.png").touch()
    ranking = run("rank", pictures, "--prompt", "x", "--no-think", "--json", *QUICK)
    notes = [line for line in ranking.stderr.splitlines() if line.startswith("skipped: ")]
    assert [f"text {i:02}.png: is empty" in notes[i] for i in range(10)] == [True] * 10
    assert notes[10:] == ["skipped: 3 more"]
    assert len(json.loads(ranking.stdout)["skipped"]) == 13


def test_damaged_images_are_skipped(pictures: Path) -> None:
    whole = draw(pictures / "whole.png", 4).read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / f"text {MARKUP}").write_text("a red circle")
    (pictures / UNDECODED).write_bytes(b"")
    result = run("rank", pictures, "--prompt", "x", "--no-think", *QUICK)
    assert result.exit_code == 0
    notes = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(notes) == 3
    assert "cut.png: is damaged" in notes[0]
    assert f"text {MARKUP}: is damaged or not an image" in notes[1]
    assert "undecoded\\xff.png: is empty" in notes[2]
    assert "3 skipped: cut.png, " in result.stdout
    ranking = report("rank", pictures, "--prompt", "x", "--no-think", *QUICK)
    assert [Path(each["path"]).name for each in ranking["skipped"]] == [
        "cut.png", f"text {MARKUP}", UNDECODED,
    ]  # fmt: skip
    assert len(ranking["images"]) == 4
    for name in ("a.png", "b.png", "c.png"):
        (pictures / name).unlink()
    line = refusal_of("rank", pictures, "--prompt", "x", *QUICK)
    assert "two images are needed, 1 of 4 can be read: " in line
    for name in ("cut.png", f"text {MARKUP}", "undecoded\\xff.png"):
        assert name in line
    for name in ("cut.png", f"text {MARKUP}", UNDECODED):
        assert name[:4] in refusal_of("compare", pictures / "whole.png", pictures / name, "--prompt", "x", *QUICK)


def test_bad_rows_are_gathered(rows: Callable[..., Path]) -> None:
    path = rows(row(), row(a="missing"), row(p_a=1.5), "not json", row(b="a\x1b[31m"))
    result = run("eval", "--data", path, *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0] == f"Error: {path}: 4 of 5 rows cannot be used; correct or remove them:"
    assert [line.split(":")[0] for line in lines[1:5]] == [f"  line {number}" for number in (2, 3, 4, 5)]
    assert "pictures/missing.png" in lines[1]
    assert "1.5" in lines[2]


def test_unreadable_images_are_named_first(
    rows: Callable[..., Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "b.png").write_bytes(b"")
    (pictures / "c.png").write_text("no image")
    draw(pictures / "d.png", 3)
    monkeypatch.setattr(Judge, "pairs", None)
    result = run("eval", "--data", rows(row("a", "d"), row("a", "b"), row("d", "c"), row("b", "d")), *QUICK)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0].endswith("preferences.jsonl: 2 of 4 images cannot be read; correct them or remove their rows:")
    assert [line.split(": ")[0] for line in lines[1:]] == [f"  {pictures / name}" for name in ("b.png", "c.png")]


def test_missing_data(tmp_path: Path, rows: Callable[..., Path]) -> None:
    assert "unknown --data nothing: known are demo, imagereward" in refusal_of("eval", "--data", "nothing", *QUICK)
    assert "no such file" in refusal_of("eval", "--data", tmp_path / "nothing.jsonl", *QUICK)
    line = refusal_of("eval", "--data", "imagereward", *QUICK)
    assert "its files are not here; download them with `mlxpref data imagereward --split test`" in line
    assert "the demo has train, test, heldout, four" in refusal_of("eval", "--data", "demo", "--split", "dev", *QUICK)
    assert "no rows of split" in refusal_of("eval", "--data", rows(row(split="train")), *QUICK)
    assert "no preference to judge (1 ties)" in refusal_of("eval", "--data", rows(row(p_a=0.5)), *QUICK)
    assert "no preferences in this file" in refusal_of("eval", "--data", rows(), *QUICK)


def test_unusable_models(two: tuple[Path, Path], tmp_path: Path) -> None:
    def judged_by(model: str | Path) -> str:
        return refusal_of("compare", *two, "--prompt", "x", "--model", model)

    assert "nowhere: no such model folder" in judged_by(tmp_path / "nowhere")
    assert "nowhere: no such model folder" in judged_by("nowhere")
    assert "some/where: no such folder, not in the local cache" in judged_by("some/where")
    assert "the model's name is empty" in judged_by("")
    assert "no config.json there" in judged_by(two[0].parent)
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "preprocessor_config.json").unlink()
    assert f"{folder}: no preprocessor_config.json there" in judged_by(folder)
    assert "no preprocessor_config.json there" in refusal_of("convert", folder, tmp_path / "out")
    shutil.copy(Path(TINY) / "preprocessor_config.json", folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors: not readable as weights: " in judged_by(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert "'llava' is not supported; give one of Qwen2-VL, Qwen2.5-VL, Qwen3-VL" in judged_by(folder)


def test_no_judge(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a hub to download it from; `test_default_judge.py` has one."""
    monkeypatch.setattr("mlxpref.checkpoints.resolve.device_working_set", lambda: 20 * 10**9)
    judge = choose_judge(20 * 10**9)
    line = refusal_of("compare", *two, "--prompt", "x", "--yes")
    assert f"{judge.id}: no such folder, not in the local cache, and it cannot be downloaded" in line
    assert "no --model was given, and this is the recommended judge: give --model MODEL" in line
    monkeypatch.setattr("mlxpref.checkpoints.resolve.device_working_set", lambda: 10**9)
    assert "no recommended judge fits this device (1.0 GB" in refusal_of("compare", *two, "--prompt", "x", "--yes")


def test_adapters_of_another_model_are_refused(
    two: tuple[Path, Path], tmp_path: Path, demo_judge: Callable[..., Judge]
) -> None:
    arguments = ("compare", *two, "--prompt", "x", "--model", TINY, "--adapter")
    other = write_adapter(tmp_path / "demo", demo_judge().vlm)
    assert f"{other}: adapter of another model: " in refusal_of(*arguments, other)
    renamed = write_adapter(tmp_path / "renamed", tiny_model("qwen2_5_vl"))
    weights = (renamed / ADAPTER_WEIGHTS).read_bytes().replace(b"q_proj", b"query_")
    (renamed / ADAPTER_WEIGHTS).write_bytes(weights)
    assert f"{renamed}: adapter of another model: the judge has no place for " in refusal_of(*arguments, renamed)
    assert "nowhere: no such adapter folder" in refusal_of(*arguments, tmp_path / "nowhere")
    assert "no adapter_config.json there" in refusal_of(*arguments, two[0].parent)


SMALL_RUN = ("--data", "demo", "--limit", "6", "--comparisons", "2", "--group", "2", "--max-tokens", "4")


def test_train_can_be_repeated(two: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = report("train", *SMALL_RUN, "--model", TINY, "--steps", "2", "--no-think", "--output", folder)
    assert result["adapter"] == str(folder)
    assert result["last_step"]["step"] == 2
    assert report("compare", *two, "--prompt", "x", *QUICK, "--adapter", folder)["adapter"] == str(folder)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    again = run("train", "--config", folder / "run.json", "--output", tmp_path / "again")
    assert again.exit_code == 0
    adapters = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("run", "again")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("reward", ["soft", "score"])
def test_train_takes_a_reward(reward: str, tmp_path: Path) -> None:
    arguments = (*SMALL_RUN, "--model", TINY, "--steps", "1", "--reward", reward, "--output", tmp_path / "run")
    done = run("train", *arguments)
    assert done.exit_code == 0
    if reward == "score":  # a random model never answers, so nothing can be learned from
        assert "no step updated the adapter" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no --data"),
        (("--data", "nowhere"), "unknown --data nowhere"),
        (("--data", "imagereward"), "its files are not here; download them with"),
        (("--data", "demo", "--reward", "nice"), "neither soft, brier, hard or score"),
        (("--data", "demo", "--kl", "inf"), "not a finite number"),
        (("--data", "demo", "--max-tokens", "9999999"), "--max-tokens"),
    ],
)
def test_train_refuses_in_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = run("train", *arguments, "--model", TINY, "--limit", "4", "--output", tmp_path / "run")
    assert done.exit_code == 1
    assert words in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_the_adapter(number: int, code: int, tmp_path: Path) -> None:
    arguments = [*SMALL_RUN, "--model", TINY, "--steps", "5000", "--no-think", "--output", str(tmp_path / "run")]
    process = subprocess.Popen([*SCRIPT, "train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    until = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert b"the adapter of step" in errors
    assert b"Traceback" not in errors
    assert (tmp_path / "run" / "adapters.safetensors").is_file()
    assert not list((tmp_path / "run").glob(".*"))
