"""Work in company: a command or a training among the processes of a launcher, from their meeting to how each ends."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxpref.errors import MlxprefError
from mlxpref.heartbeat import Ending

if TYPE_CHECKING:
    from mlxpref.distributed import ProcessGroup

__all__ = ["are_several", "here", "process_group"]

_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
"""What launchers call the number of a process."""
_EXPECTED = (MlxprefError, OSError, SystemExit, KeyboardInterrupt, click.Abort, click.ClickException)
_here: "ProcessGroup | None" = None


def are_several() -> bool:
    """Whether a launcher started this process as one of several."""
    if not any(name in os.environ for name in _RANKS):
        return False
    hosts = os.environ.get("MLX_HOSTFILE")
    # Where the launcher was asked for one process, its file is empty.
    return hosts is None or not Path(hosts).is_file() or bool(Path(hosts).read_text(encoding="utf-8").strip())


def here() -> "ProcessGroup":
    """The processes that this one works with now."""
    from mlxpref.distributed import SINGLE_PROCESS

    return _here or SINGLE_PROCESS


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other processes of a launcher for some work; all but process 0 are silent, and tell it what went wrong.

    However the work ends here, the others are told, and end with it. An error of a silent process is raised again where
    process 0 says it: here it becomes SystemExit, after its traceback where it is a mistake of ours. Within such work,
    or without a launcher, this does nothing.
    """
    global _here
    if _here is not None or not are_several():
        yield
        return
    from mlxpref.distributed import join

    _here = machines = join()
    stderr = sys.stderr
    try:
        with ExitStack() as stack:
            if not machines.leads:
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
        machines.leave("done")
    except GeneratorExit:
        machines.leave("done")
        raise
    except BaseException as error:
        ending, code, why = _told(error)
        speaks = machines.heartbeat is None or machines.heartbeat.speaks
        machines.leave(ending, why)
        if speaks or ending == "done":
            raise
        if not isinstance(error, _EXPECTED):
            traceback.print_exception(error, file=stderr)
        raise SystemExit(code) from error
    finally:
        _here = None


def _told(error: BaseException) -> tuple[Ending, int, str]:
    """How work ended with an error: for the others, as an exit code, and why in words."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", 130, ""
    if isinstance(error, SystemExit | click.exceptions.Exit):
        code = error.code if isinstance(error, SystemExit) else error.exit_code
        number = code if isinstance(code, int) else int(bool(code))
        ending: Ending = "done" if number == 0 else "interrupted" if number == 130 else "failed"
        return ending, number, f"it ended with exit code {number}"
    if isinstance(error, click.ClickException):
        return "failed", error.exit_code, error.format_message()
    expected = isinstance(error, MlxprefError | OSError)
    return "failed", 1, str(error) if expected else f"{type(error).__name__}: {error}"
