"""Command line options made from settings: one field gives the option, its type, its default and its help."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import click

__all__ = ["chosen", "settings_options"]

F = TypeVar("F", bound=Callable[..., Any])


def settings_options(kind: type, only: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A decorator that adds an option for every field of a settings dataclass (or for those named)."""

    def decorate(command: F) -> F:
        for f in reversed(fields(kind)):
            if only and f.name not in only:
                continue
            flag = f.name.replace("_", "-")
            text, minimum = f.metadata["help"], f.metadata.get("minimum")
            if isinstance(f.default, bool):
                option = click.option(f"--{flag}/--no-{flag}", f.name, default=None, help=_help(text, f.default))
            else:
                number = click.IntRange(min=minimum) if isinstance(f.default, int) else click.FloatRange(min=minimum)
                option = click.option(f"--{flag}", f.name, type=number, default=None, help=_help(text, f.default))
            command = option(command)
        return command

    return decorate


def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line; the others keep their settings' defaults."""
    return {name: value for name, value in values.items() if value is not None}


def _help(text: str, default: Any) -> str:
    shown = ("yes" if default else "no") if isinstance(default, bool) else default
    return f"{text}  [default: {shown}]"
