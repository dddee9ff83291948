"""A command that serves until it is killed, as a process."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PROGRAM = [sys.executable, "-c", "from mlxpref.cli import main; main()"]


@contextmanager
def served_command(command: Sequence[str]) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """A running command, and its lines on stderr until its address, which is in the last; it is killed at the end."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines: list[str] = []
            while "http://" not in "".join(lines[-1:]):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            yield process, lines
        finally:
            process.kill()
