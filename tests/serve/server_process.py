"""A running `mlxpref serve` with the demo judge."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMMAND = [sys.executable, "-c", "from mlxpref.cli import main; main()", "serve", "--model", "demo"]


@contextmanager
def running(*options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a server on a free port, and its process, which is killed at the end if it still runs."""
    command = [*COMMAND, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines: list[str] = []
            while "http://" not in "".join(lines[-1:]):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            yield lines[-1].partition("listens at ")[2].partition(";")[0], process
        finally:
            process.kill()
