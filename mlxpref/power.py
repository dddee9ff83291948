"""For a long run on a Mac: keep it awake, wire its memory, warn on battery. Does nothing on other systems."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlxpref.log import logger

_SWITCH = "MLXPREF_LONG_RUNS"
"""The environment variable whose value `off` disables all this."""
_TIMEOUT = 5.0
"""Timeout in seconds of the system's tools."""


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac awake and MLX's memory wired while the block runs; the display may sleep.

    Warns if the Mac is on battery. If macOS refuses one of these, the block runs without it.
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
    """Whether this is a Mac on battery."""
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

    The display may sleep: macOS 26 is known to end GPU work that runs while it draws (mlx issue 3267).
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
    """Let MLX wire as much memory as the device recommends, on macOS 15 or later."""
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
                mx.synchronize()  # the limit must not change during running work
                mx.set_wired_limit(limit)
