"""The pages, README.md of the project and of each package: commands and Python run, links lead somewhere."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.cli.demo import TEST_PAIRS, TEST_SEED
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.demo.preferences import demo_preferences
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("mlxpref/*/README.md")),
    ROOT / "convert/README.md",
    ROOT / "scripts/README.md",
]
TOP = PAGES[0].read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(mlxpref [a-z]+[^`]*)`")
# What stands for the reader's own, and what a test gives instead.
PLACEHOLDERS = {
    "SOURCE": "demo", "OUT": "out", "ADAPTER": "runs/taste", "DIR": "runs/taste",
    "FILE": "preferences.jsonl", "FOLDER": "images",
    "Qwen/Qwen2.5-VL-7B-Instruct": "demo",
}  # fmt: skip
# Options that make a command quick; the command itself stays as the page has it.
QUICK = {
    "train": "--steps 1 --comparisons 1 --group 2 --max-tokens 8 --rank 2",
    "eval": "--limit 2 --max-tokens 8",
    "rank": "--max-tokens 8",
    "compare": "--max-tokens 8",
    "calibrate": "--limit 30 --max-tokens 8",
}
LEFT_OUT = {
    "label": "serves until Ctrl-C",
    "serve": "serves until Ctrl-C",
    "demo": ".ci/run runs it",
    "doctor": "its exit code depends on the machine",
    "data": "downloads",
}


def commands_of(page: Path) -> list[list[str]]:
    """The `mlxpref` command lines in the blocks and in the text of a page, without repeats."""
    text = page.read_text(encoding="utf-8")
    lines = [
        line.split("#")[0] for kind, block in BLOCK.findall(text) if kind != "python" for line in block.splitlines()
    ]
    lines = [line for line in lines if line.startswith("mlxpref ")] + INLINE.findall(BLOCK.sub("", text))
    return [shlex.split(line)[1:] for line in dict.fromkeys(line.strip() for line in lines)]


def options_of(name: str) -> set[str]:
    """Every way to write an option of a command."""
    options = (p for p in main.get_command(click.Context(main), name).params if isinstance(p, click.Option))  # type: ignore[union-attr]
    return {"--help"}.union(*({*option.opts, *option.secondary_opts} for option in options))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' commands take for granted; the default judge is the demo's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    (tmp_path / "images").mkdir()
    for name, quality in (("a", "clean"), ("b", "noisy"), ("c", "blurry")):
        for folder in (tmp_path, tmp_path / "images"):
            render(PictureSpec("red", "green", "blue", "red", quality), np.random.default_rng(0)).save(
                folder / f"{name}.png"
            )
    rows = [{"prompt": "a red circle", "a": "a.png", "b": f"{b}.png", "p_a": 0.9} for b in "bc"]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = [row | {"split": split} for row in rows for split in ("train", "test")]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_command_has_its_options(page: Path) -> None:
    for name, *arguments in commands_of(page):
        assert {argument for argument in arguments if argument.startswith("--")} <= options_of(name), (name, arguments)


def test_the_commands_run(reader: Path) -> None:
    for number, (name, *arguments) in enumerate(commands_of(PAGES[0])):
        line = [PLACEHOLDERS.get(argument, argument) for argument in arguments]
        is_form = any("|" in argument for argument in line)
        if name in LEFT_OUT or not line or is_form or {"imagereward", "mmrb2"} & set(line):
            continue
        if name == "train" and "--resume" not in line:
            line = [
                f"{argument}-{number}" if argument == "runs/taste" and number > 4 else argument for argument in line
            ]
        answer = CliRunner().invoke(main, [name, *line, *("" if "--resume" in line else QUICK.get(name, "")).split()])
        assert answer.exit_code == 0, (name, line, answer.output)


def test_every_command_is_mentioned() -> None:
    for name in main.list_commands(click.Context(main)):
        assert any(f"mlxpref {name}" in page.read_text(encoding="utf-8") for page in PAGES), name


def test_scripts_exist_with_their_options() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("scripts.NAME", "")
        for module, options in re.findall(r"python -m\s+((?:scripts|convert)\.\w+)([^`|#)]*)", text):
            script = ROOT / (module.replace(".", "/") + ".py")
            assert script.is_file(), (page, module)
            for option in re.findall(r"--[a-z-]+", options):
                assert option in script.read_text(encoding="utf-8"), (page, module, option)


def test_links_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TOP, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_page_is_short() -> None:
    assert len(TOP.splitlines()) <= 220


def test_the_python_runs(reader: Path) -> None:
    for page in PAGES:
        for kind, program in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == "python":
                exec(compile(program, str(page), "exec"), {})


def test_accuracy_before_training(demo_judge: Callable[..., Judge]) -> None:
    row = re.search(r"^thinking, before +400 +([\d.]+) %", TOP, re.MULTILINE)
    assert row, "the README shows what `make demo` prints"
    accuracy = evaluate(
        demo_judge(), demo_preferences("test", TEST_PAIRS, TEST_SEED), EvaluationSpec("demo", "test")
    ).metrics.accuracy
    # Another BLAS may decide a close pair otherwise.
    assert 100 * accuracy == pytest.approx(float(row.group(1)), abs=1.0)
