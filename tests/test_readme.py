"""The README: its commands exist, its Python runs, its figures are what its command prints."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest

from mlxpref.cli import main
from mlxpref.cli.demo import TEST_PAIRS, TEST_SEED
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.demo.preferences import demo_preferences
from mlxpref.judge.evaluation import evaluate
from mlxpref.judge.judge import Judge

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for kind, block in BLOCKS
    if kind != "python"
    for line in block.splitlines()
    if line.removeprefix("$ ").startswith("mlxpref ")
]
INLINE = re.findall(r"`(mlxpref [a-z]+[^`]*)`", TEXT)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 6
    assert len(INLINE) >= 3


@pytest.mark.parametrize("line", sorted({*COMMANDS, *INLINE}))
def test_every_command_exists_with_its_options(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    known = {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
    known |= {o for p in command.params if isinstance(p, click.Option) for o in p.secondary_opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known | {"--help"}


def test_every_command_is_mentioned() -> None:
    for name in main.commands:
        assert f"mlxpref {name}" in TEXT, name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, quality in (("a", "clean"), ("b", "noisy"), ("c", "blurry")):
        render(PictureSpec("red", "circle", quality), np.random.default_rng(0)).save(tmp_path / f"{name}.png")
    programs = [block for kind, block in BLOCKS if kind == "python"]
    assert programs
    for program in programs:
        exec(compile(program, "README.md", "exec"), {})


def test_the_figure_before_training_is_what_the_demo_prints(demo_judge: Callable[..., Judge]) -> None:
    row = re.search(r"^test pictures, before +400 +([\d.]+) %", TEXT, re.MULTILINE)
    assert row, "the README shows what `make demo` prints"
    found = evaluate(demo_judge(), demo_preferences("test", TEST_PAIRS, TEST_SEED), "demo", "test").metrics.accuracy
    # Another BLAS may decide a close pair otherwise.
    assert 100 * found == pytest.approx(float(row.group(1)), abs=1.0)
