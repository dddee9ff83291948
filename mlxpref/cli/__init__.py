"""The command line: results on stdout, progress and notes on stderr; exit 0, 1 (error), 2 (usage) or 130 (Ctrl-C)."""

import errno
import os
import socket
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.cli.calibrate import calibrate
from mlxpref.cli.convert import convert, export
from mlxpref.cli.data import data
from mlxpref.cli.doctor import doctor
from mlxpref.cli.eval import compare, evaluate_command
from mlxpref.cli.label import label
from mlxpref.cli.output import show_on_stderr
from mlxpref.cli.rank import rank
from mlxpref.cli.train import demo, train
from mlxpref.errors import ConfigError, MlxprefError

if TYPE_CHECKING:
    from mlxpref.distributed import ProcessGroup

__all__ = ["main"]

_DISTRIBUTED = ("train", "eval", "rank")
"""The commands that several processes can share."""


class _Translating(click.Group):
    """A group that turns errors into one line and exit 1, and Ctrl-C into exit 130."""

    def invoke(self, ctx: click.Context) -> Any:
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
        except click.UsageError as error:  # it may quote file names, too
            raise click.UsageError(_plain_lines(error.format_message()), error.ctx) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` has read enough; click ends quietly
                raise
            where, why = error.filename or "the output", error.strerror or type(error).__name__
            raise click.ClickException(
                _plain_lines(f"{sender}{where}: {why}; correct that and run it again")
            ) from error
        except (KeyboardInterrupt, click.Abort) as error:
            if not sender:
                click.echo("interrupted", err=True)
            raise click.exceptions.Exit(130) from error


def _launched_processes() -> "ProcessGroup | None":
    """The processes that mlx.launch started with this one; None, without importing MLX, where there are none."""
    if not {"MLX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        return None
    from mlxpref.distributed import process_group

    processes = process_group()
    return processes if processes.size > 1 else None


def _plain_lines(text: str) -> str:
    from mlxpref.text import plain

    return "\n".join(plain(line) for line in text.split("\n"))


@click.group(cls=_Translating, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mlxpref")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A judge of images that thinks before it answers, learns what people prefer, and runs on your own machine."""
    if ctx.obj and ctx.invoked_subcommand not in _DISTRIBUTED:
        raise ConfigError(f"mlxpref {ctx.invoked_subcommand} is the work of one process; run it without mlx.launch")


for command in (demo, compare, rank, label, evaluate_command, train, calibrate, data, convert, export, doctor):
    main.add_command(command)
