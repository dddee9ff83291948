"""Command line options that several commands share, and those made from settings: one field, one option."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

__all__ = [
    "calibration_options",
    "check_prompt_source",
    "chosen",
    "json_option",
    "judge_options",
    "pairs_option",
    "prompt_option",
    "prompt_source_options",
    "settings_options",
    "store_options",
]

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


class _Pairs(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """A number of pairs, or `all`."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["all"]:
        """The number, at least 1, or "all"."""
        if value == "all":
            return "all"
        try:
            count = int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor `all`", param, ctx)
        if count < 1:
            self.fail("at least 1 pair has to be judged", param, ctx)
        return count


pairs_option = click.option(
    "--pairs", type=_Pairs(), metavar="N|all", help="Pairs of a prompt's images.  [default: two an image]"
)


def _checked_prompt(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A prompt that a judge can read: there is one, and the shell passed it on as text."""
    if value is None:
        return None
    if not value.strip():
        raise click.BadParameter("it is empty; say what the images were made for")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("it is not UTF-8 text; check the terminal's encoding")
    return value


prompt_option = click.option("--prompt", required=True, callback=_checked_prompt, help="What the images were made for.")


def prompt_source_options(command: F) -> F:
    """The options that say what images were made for: all for one prompt, or each for its own."""
    for option in (
        click.option(
            "--prompt-from",
            metavar="sidecar|png|FILE",
            help="Each image's own prompt: a text file beside it, its metadata, or a CSV, JSON or JSONL file of all; "
            "images are ranked among those of the same prompt.",
        ),
        click.option("--prompt", callback=_checked_prompt, help="What all images were made for."),
    ):
        command = option(command)
    return command


def check_prompt_source(prompt: str | None, prompt_from: str | None) -> None:
    """Refuse both of the options above, and none of them."""
    if (prompt is None) == (prompt_from is None):
        raise click.UsageError("give either --prompt TEXT or --prompt-from sidecar|png|FILE")


def judge_options(command: F) -> F:
    """The options that say which judge, common to all commands that use one."""
    for option in (
        click.option("--yes", is_flag=True, help="Agree to download the recommended judge."),
        click.option("--any-base", is_flag=True, help="Take an adapter that was trained on another model, too."),
        click.option(
            "--adapter",
            type=click.Path(path_type=Path),
            help="Folder of a trained adapter, mlx-vlm's format or PEFT's.",
        ),
        click.option(
            "--model", help="Folder, Hugging Face id, or `demo`.  [default: $MLXPREF_MODEL, else recommended]"
        ),
    ):
        command = option(command)
    return command


def calibration_options(command: F) -> F:
    """The options that say what a judge is calibrated by."""
    for option in (
        click.option("--no-calibration", is_flag=True, help="Take the judge's answers as they are."),
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            help="File of `mlxpref calibrate`.  [default: the judge's own, if it was calibrated]",
        ),
    ):
        command = option(command)
    return command


def store_options(command: F) -> F:
    """The options that say where finished comparisons are kept."""
    for option in (
        click.option("--no-store", is_flag=True, help="Keep no comparisons, and recall none."),
        click.option(
            "--store",
            type=click.Path(path_type=Path),
            help="File of finished comparisons, which are not judged again.  [default: in the user's cache]",
        ),
    ):
        command = option(command)
    return command


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
            elif isinstance(f.default, str):
                choices = f.metadata.get("choices")
                kind_of = click.Choice(choices) if choices else click.STRING
                option = click.option(f"--{flag}", f.name, type=kind_of, default=None, help=_help(text, f.default))
            else:
                maximum = f.metadata.get("maximum")
                number = (click.IntRange if isinstance(f.default, int) else click.FloatRange)(minimum, maximum)
                option = click.option(f"--{flag}", f.name, type=number, default=None, help=_help(text, f.default))
            command = option(command)
        return command

    return decorate


def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line; the others keep their settings' defaults."""
    return {name: value for name, value in values.items() if value is not None}


def _help(text: str, default: Any) -> str:
    shown = ("yes" if default else "no") if isinstance(default, bool) else default
    return text if default == "" else f"{text}  [default: {shown}]"
