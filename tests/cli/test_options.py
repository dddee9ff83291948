"""Options that several commands share: earlier spellings, and what their help says."""

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.cli.options import HelpCommand, OldSpellings
from mlxpref.cli.output import note

OLD = {("--think", "all"): ("--about", "all"), ("--think", "none"): ("--no-think",), ("--think", "yes"): ("--think",)}


@click.command(cls=OldSpellings, old=OLD)
@click.argument("images", nargs=-1)
@click.option("--think/--no-think", default=None)
@click.option("--about")
def shown(images: tuple[str, ...], think: bool | None, about: str | None) -> None:
    """Prints what it is given."""
    note(f"got {think} {about} {images}")


@pytest.mark.parametrize(
    ("arguments", "expected", "notes"),
    [
        ("--think all x", "got None all ('x',)", ["`--think all` is now spelled `--about all`"]),
        ("x --think=none y", "got False None ('x', 'y')", ["`--think none` is now spelled `--no-think`"]),
        ("--think=yes all", "got True None ('all',)", ["`--think yes` is now spelled `--think`"]),
        ("--think x", "got True None ('x',)", []),
        ("--no-think all", "got False None ('all',)", []),
        ("x -- --think all", "got None None ('x', '--think', 'all')", []),
    ],
)
def test_earlier_spellings(arguments: str, expected: str, notes: list[str]) -> None:
    done = CliRunner().invoke(shown, arguments.split())
    assert done.stderr.splitlines() == [*notes, expected]


def options_of(command: click.Command) -> dict[str, click.Parameter]:
    return {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("name", main.list_commands(click.Context(main)))
def test_every_command_has_examples_that_it_takes(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert isinstance(command, HelpCommand)
    listed, _, shown = CliRunner().invoke(main, [name, "--help"]).output.partition("Examples:")
    assert not re.search(r"^  [A-Z]+(\.{3})?$", listed, re.MULTILINE)  # an argument without words
    examples = [shlex.split(line) for line in shown.split("\n") if line.strip()]
    assert len(examples) == len(command.examples) > 1
    for program, own_name, *arguments in examples:
        assert (program, own_name) == ("mlxpref", name)
        command.make_context(name, list(arguments), parent=click.Context(main))
        assert {each for each in arguments if each.startswith("-")} <= options_of(command).keys()


def test_short_names_are_the_same_everywhere() -> None:
    long_names: dict[str, set[str]] = {}
    for name in main.list_commands(click.Context(main)):
        for parameter in main.get_command(click.Context(main), name).params:  # type: ignore[union-attr]
            for short in (each for each in parameter.opts if re.fullmatch("-[a-z]", each)):
                long_names.setdefault(short, set()).update(each for each in parameter.opts if each != short)
    assert {"-d": {"--data"}, "-m": {"--model"}, "-p": {"--prompt"}, "-o": {"--output"}}.items() <= long_names.items()
    assert all(len(names) == 1 for names in long_names.values()), long_names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mlxpref c", {"calibrate", "compare", "convert"}),
        ("mlxpref rank --model de", {"demo"}),
        ("mlxpref eval -d pick", {"pickapic", "pickapic_v1"}),
        ("mlxpref train --data imag", {"imagereward"}),
        ("mlxpref rank --think-", {"--think-about"}),
        ("mlxpref rank --profile uni", {"unifiedreward-flex", "unifiedreward-pair", "unifiedreward-think"}),
        ("mlxpref convert --profile pla", {"plain"}),
    ],
)
def test_names_are_completed(words: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    done = CliRunner().invoke(main, prog_name="mlxpref", env={"_MLXPREF_COMPLETE": "bash_complete"})
    items = [line.split(",", 1) for line in done.stdout.splitlines()]
    assert {value for kind, value in items if kind == "plain"} == expected


@pytest.mark.parametrize("command", ["compare", "rank", "eval", "calibrate", "train"])
def test_think_is_a_switch_everywhere(command: str) -> None:
    think = next(p for p in main.get_command(click.Context(main), command).params if p.name == "think")  # type: ignore[union-attr]
    assert isinstance(think, click.Option)
    assert (think.opts, think.secondary_opts, think.is_flag) == (["--think"], ["--no-think"], True)
