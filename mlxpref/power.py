"""A Mac during a long run: kept awake, its memory wired, a warning on battery. On other systems nothing is done."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlxpref.log import logger

_SWITCH = "MLXPREF_LONG_RUNS"
"""The environment variable that leaves the system alone where it is `off`."""
_TIMEOUT = 5.0
"""Seconds that a tool of the system may take to answer."""


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac from sleeping, and what MLX holds in memory, as long as the block runs; the display may sleep.

    A warning says that the Mac is on battery. Where macOS refuses one of these, the block runs without it.
    """
    if platform.system() != "Darwin" or os.environ.get(_SWITCH, "").strip().lower() == "off":
        yield
        return
    if on_battery():
        logger.warning(
            "on battery: macOS slows its GPU down, and the run ends when the battery is empty; plug the charger in"
        )
    with _caffeinated(), _wired():
        yield


def on_battery() -> bool:
    """Whether this is a Mac that says that it runs on its battery."""
    if platform.system() != "Darwin":
        return False
    try:
        answer = subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return "Battery Power" in answer.stdout


@contextmanager
def _caffeinated() -> Iterator[None]:
    """Keep the system awake; if this process is killed, `-w` ends caffeinate, too.

    The display is not kept awake: macOS 26 is known to end GPU work that runs while it draws (mlx issue 3267).
    """
    process = None
    with suppress(OSError):
        # In a session of its own: Ctrl-C in the terminal must not end it while this process still saves its work.
        process = subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())], start_new_session=True)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


@contextmanager
def _wired() -> Iterator[None]:
    """Let MLX keep as much memory wired as the device recommends; macOS does so from version 15 on."""
    import mlx.core as mx

    limit = None
    with suppress(ValueError, RuntimeError):
        if mx.metal.is_available():
            limit = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        if limit is not None:
            with suppress(ValueError, RuntimeError):
                mx.synchronize()  # the limit must not change under work that is still running
                mx.set_wired_limit(limit)
