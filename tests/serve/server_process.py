"""A running `mlxpref serve` with the demo judge."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.served_command import PROGRAM, served_command

COMMAND = [*PROGRAM, "serve", "--model", "demo"]


@contextmanager
def running(*options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a server on a free port, and its process, which is killed at the end if it still runs."""
    with served_command([*COMMAND, "--port", "0", *options]) as (process, lines):
        yield lines[-1].partition("listens at ")[2].partition(";")[0], process
