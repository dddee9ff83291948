"""Processes on this machine: one that works alone, and several that meet as those of `mlx.launch` do.

The latter are started by hand, with the variables that it sets: mlx.launch 0.32 itself takes a core for as long as it
runs (its threads wait for standard inputs that can always be written to), which would be in every measurement.
"""

import json
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, TypeVar

__all__ = ["alone", "start", "wait"]

T = TypeVar("T")


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """What some work returns in a process of its own, so that peaks of memory are those of this work."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def start(
    count: int, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start a command as `count` processes; their output goes to files `out.0`, `err.0`, ... of a folder."""
    hosts = folder / "hosts.json"
    if count > 1:
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    processes = []
    for rank in range(count):
        variables: dict[str, Any] = {**os.environ, **(env or {})}
        if count > 1:
            variables |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        with (folder / f"out.{rank}").open("wb") as out, (folder / f"err.{rank}").open("wb") as err:
            processes.append(_started(command, variables, out, err))
    return processes


def wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """The exit codes; what has not ended in time is killed, and TimeoutExpired raised."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _started(
    command: Sequence[str], variables: Mapping[str, str], out: IO[bytes], err: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _free_ports(count: int) -> list[int]:
    """Ports that were free just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
