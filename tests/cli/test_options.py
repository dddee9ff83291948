"""Options that several commands share: earlier spellings, and what their help says."""

import click
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.cli.options import OldSpellings
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


@pytest.mark.parametrize("command", ["compare", "rank", "eval", "calibrate", "train"])
def test_think_is_a_switch_everywhere(command: str) -> None:
    think = next(p for p in main.get_command(click.Context(main), command).params if p.name == "think")  # type: ignore[union-attr]
    assert isinstance(think, click.Option)
    assert (think.opts, think.secondary_opts, think.is_flag) == (["--think"], ["--no-think"], True)
