"""The command line: results on stdout, progress and notes on stderr; exit 0, 1 (error), 2 (usage) or 130 (Ctrl-C)."""

import errno
from typing import Any

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
from mlxpref.company import are_several, process_group
from mlxpref.errors import ConfigError, MlxprefError

__all__ = ["main"]

_IN_COMPANY = ("train", "eval", "rank")
"""The commands that several processes can share."""


class _Translating(click.Group):
    """A group that turns errors into one line and exit 1, and Ctrl-C into exit 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with show_on_stderr(), process_group():
                return super().invoke(ctx)
        except MlxprefError as error:
            raise click.ClickException(_plain_lines(str(error))) from error
        except click.UsageError as error:  # it may quote file names, too
            raise click.UsageError(_plain_lines(error.format_message()), error.ctx) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` has read enough; click ends quietly
                raise
            where, why = error.filename or "the output", error.strerror or type(error).__name__
            raise click.ClickException(_plain_lines(f"{where}: {why}; correct that and run it again")) from error
        except (KeyboardInterrupt, click.Abort) as error:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(130) from error


def _plain_lines(text: str) -> str:
    from mlxpref.text import plain

    return "\n".join(plain(line) for line in text.split("\n"))


@click.group(cls=_Translating, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mlxpref")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A judge of images that thinks before it answers, learns what people prefer, and runs on your own machine."""
    if are_several() and ctx.invoked_subcommand not in _IN_COMPANY:
        raise ConfigError(f"mlxpref {ctx.invoked_subcommand} is the work of one process; run it without mlx.launch")


for command in (demo, compare, rank, label, evaluate_command, train, calibrate, data, convert, export, doctor):
    main.add_command(command)
