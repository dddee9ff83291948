"""The command line: results on stdout, progress and notes on stderr; exit 0, 1 (error), 2 (usage) or 130 (Ctrl-C)."""

import errno
import os
import socket
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mlxpref.errors import ConfigError, MlxprefError
from mlxpref.text import plain

if TYPE_CHECKING:
    from mlxpref.distributed import ProcessGroup

_COMMANDS = {
    "calibrate": ("calibrate:calibrate", "Fit a judge's probabilities to people's preferences."),
    "compare": ("compare:compare", "Predict which of two images people prefer."),
    "convert": ("convert:convert", "Make a quantized folder of a checkpoint."),
    "data": ("data:data", "Download a public data set, or a part of it."),
    "demo": ("demo:demo", "Measure, train and rank with the demo judge, offline."),
    "distill": ("distill:distill", "Write what a judge prefers with thinking, to be learned without."),
    "doctor": ("doctor:doctor", "Find what would fail here, with remedies."),
    "eval": ("eval:evaluate", "Measure the agreement of a judge, or of any scores, with people."),
    "export": ("export:export", "Write an adapter for PEFT, as one fused model, or for transformers."),
    "label": ("label:label", "State your own preferences on a local page."),
    "pairs": ("pairs:pairs", "Write preference pairs for training, from rankings or labels."),
    "rank": ("rank:rank", "Rank images or folders, with reasons."),
    "serve": ("serve:serve", "Serve a judge as a reward, over HTTP."),
    "train": ("train:train", "Teach a judge what people prefer."),
}
"""Each command's place, as `module:function` of this package, and its line in the help."""
_DISTRIBUTED = ("train", "eval", "rank")
"""The commands that several processes can share."""


class _Commands(click.Group):
    """Imports a command only to run it, since MLX and the models' libraries take seconds; `--help` needs none.

    Errors become one line and exit 1, Ctrl-C becomes exit 130.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, function = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"mlxpref.cli.{module}"), function)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names of commands and options, without an import of the commands."""
        names = [CompletionItem(name, help=text) for name, (_, text) in _COMMANDS.items()]
        return [item for item in names if item.value.startswith(incomplete)] or super().shell_complete(ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        from mlxpref.cli.output import show_on_stderr  # rich takes a tenth of a second

        sender = ""
        try:
            processes = ctx.obj = _launched_processes()
            with show_on_stderr(), ExitStack() as stack:
                if processes and not processes.is_main:  # only the main process prints results and progress
                    sender = f"process {processes.rank} of {processes.size} (on {socket.gethostname()}): "
                    nowhere = stack.enter_context(Path(os.devnull).open("w"))
                    stack.enter_context(redirect_stdout(nowhere))
                    stack.enter_context(redirect_stderr(nowhere))
                return super().invoke(ctx)
        except MlxprefError as error:
            raise click.ClickException(_plain_lines(f"{sender}{error}")) from error
        except click.UsageError as error:  # it may quote file names
            raise click.UsageError(_plain_lines(error.format_message()), error.ctx) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` closed the pipe; click ends quietly
                raise
            where, reason = error.filename or "the output", error.strerror or type(error).__name__
            raise click.ClickException(
                _plain_lines(f"{sender}{where}: {reason}; correct that and run it again")
            ) from error
        except (KeyboardInterrupt, click.Abort) as error:
            if not sender:
                click.echo("interrupted", err=True)
            raise click.exceptions.Exit(130) from error


def _launched_processes() -> "ProcessGroup | None":
    """The processes that mlx.launch started with this one, or None, without an import of MLX."""
    if not {"MLX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        return None
    from mlxpref.distributed import process_group

    processes = process_group()
    return processes if processes.size > 1 else None


def _plain_lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.split("\n"))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mlxpref")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A judge of images that thinks before it answers, learns what people prefer, and runs on your own machine."""
    if ctx.obj and ctx.invoked_subcommand not in _DISTRIBUTED:
        raise ConfigError(f"mlxpref {ctx.invoked_subcommand} is the work of one process; run it without mlx.launch")
