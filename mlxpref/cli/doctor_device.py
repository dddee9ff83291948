"""Checks of MLX and the device: that it is there, that it computes rightly, and how fast."""

import os
import shutil
import sys
import time
from typing import NamedTuple

from mlxpref._blas import blas_in_use
from mlxpref.checkpoints.resolve import device_working_set
from mlxpref.cli.doctor_checkup import CheckResult
from mlxpref.power import System, on_battery
from mlxpref.text import format_bytes, one_line

__all__ = ["Device", "check_arithmetic", "check_blas", "check_device", "check_mlx", "check_power", "look_at_device"]

_SIDE, _KNOWN = 1024, 48
"""Sides of the matrices whose product is timed, and of those whose product is known."""


class Device(NamedTuple):
    """What MLX computes on; memory in bytes, `recommended` what a model may take of it."""

    backend: str
    name: str
    memory: int | None
    recommended: int


def check_mlx() -> CheckResult:
    """That MLX can be imported at all."""
    try:
        import mlx.core  # noqa: F401
    except Exception as error:  # a library that lacks its symbols, or is of another machine
        least = "mlx" if sys.platform == "darwin" else "mlx mlx-cpu"
        remedy = f"pip install --force-reinstall {least} (with CUDA: mlx and its mlx-cuda package)"
        return CheckResult("MLX", f"cannot be imported: {one_line(error)}", "fails", remedy)
    return CheckResult("MLX", "can be imported")


def look_at_device() -> Device:
    """The device that MLX uses if it is not told otherwise."""
    import mlx.core as mx

    info = mx.device_info()
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    backend = ("Metal" if mx.metal.is_available() else "CUDA") if on_gpu else "CPU"
    memory = info.get("memory_size") or info.get("total_memory") or _memory()
    return Device(backend, str(info.get("device_name", "of no name")), int(memory) or None, device_working_set())


def check_device(device: Device) -> CheckResult:
    """The backend, the memory, and how much of it a model may take."""
    memory = f", {format_bytes(device.memory)} of memory" if device.memory else ""
    found = f"{device.backend}, {device.name}{memory}, {format_bytes(device.recommended)} for a model"
    if device.backend != "CPU":
        return CheckResult("device", found)
    slow = f"{found}; a real judge is slow on a CPU, and all is float32"
    if sys.platform == "darwin":
        return CheckResult(
            "device", slow, "note", "Metal is not available: do not run it in a virtual machine or a sandbox"
        )
    if shutil.which("nvidia-smi"):
        remedy = 'use the NVIDIA GPU: pip uninstall mlx-cpu && pip install "mlx[cuda13]"'
        return CheckResult("device", slow, "note", remedy)
    return CheckResult("device", slow)


def check_arithmetic() -> CheckResult:
    """That a product of matrices comes out as it must, and how many operations a second it takes."""
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng(0)
    whole = [rng.integers(-9, 10, (_KNOWN, _KNOWN)) for _ in range(2)]
    found = np.array(mx.array(whole[0], mx.float32) @ mx.array(whole[1], mx.float32))
    if not np.array_equal(found, whole[0] @ whole[1]):
        remedy = "install MLX anew: pip install --force-reinstall mlx; restart the machine if that changes nothing"
        return CheckResult("arithmetic", "a product of whole numbers comes out wrong", "fails", remedy)
    large = mx.array(rng.standard_normal((_SIDE, _SIDE)), mx.float32)
    mx.eval(large)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(large @ large)
        seconds.append(time.perf_counter() - started)
    return CheckResult("arithmetic", f"right, {2 * _SIDE**3 / min(seconds) / 1e9:.0f} GFLOP/s in float32")


def check_blas() -> CheckResult:
    """Which library multiplies matrices, on a Linux CPU: the one that MLX brings is forty times slower."""
    found = blas_in_use()
    if found["blas_kernels"] is None:
        remedy = "pip install --force-reinstall opencv-python: its wheel brings a fast one, which mlxpref opens"
        return CheckResult("BLAS", "the reference one of MLX's wheel, some forty times slower", "note", remedy)
    return CheckResult("BLAS", f"OpenBLAS ({found['blas_kernels']}), {found['blas_threads']} threads")


def check_power(system: System) -> CheckResult:
    """Whether a Mac is on battery, where it slows its GPU down."""
    if on_battery(system):
        return CheckResult("power", "on battery", "note", "plug the charger in before a long run")
    return CheckResult("power", "from the mains")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
