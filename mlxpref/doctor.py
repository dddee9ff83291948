"""The doctor: all checks in the order in which they rest on each other; what rests on something broken is left out."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from mlxpref.checkup import Finding, Machine, check_builds, check_packages, check_system, guarded, this_machine
from mlxpref.device_checks import (
    Device,
    check_arithmetic,
    check_blas,
    check_device,
    check_mlx,
    check_power,
    look_at_device,
)
from mlxpref.judge_checks import bytes_to_download, check_default_judge, check_demo, check_judge
from mlxpref.long_runs import System, this_system
from mlxpref.models import recommended_judges
from mlxpref.place_checks import Hub, check_hub, check_hub_cache, check_own_cache, look_for_hub

__all__ = ["examine"]

T = TypeVar("T", Device, Hub)


def examine(machine: Machine | None = None, system: System | None = None) -> list[Finding]:
    """Everything that is found here, or on a machine and a system that a test describes; no check raises."""
    at, on = machine or this_machine(), system or this_system()
    found = [
        guarded("system", partial(check_system, at)),
        guarded("packages", partial(check_packages, at)),
        guarded("MLX build", partial(check_builds, at)),
    ]
    if on.name == "Darwin":
        found.append(guarded("power", partial(check_power, on)))
    mlx = guarded("MLX", check_mlx)
    device: Device | None = None
    if mlx.state == "ok":
        device = _looked(found, "device", look_at_device, check_device)
    else:
        found.append(mlx)
    if device is not None:
        found.append(guarded("arithmetic", check_arithmetic))
        if device.backend == "CPU" and on.name == "Linux":
            found.append(guarded("BLAS", check_blas))
        found.append(guarded("demo judge", check_demo))
    hub = _looked(found, "hub", look_for_hub, check_hub)
    room = check_hub_cache
    if device is not None and hub is not None:
        recommended = device.recommended
        found.append(guarded("default judge", partial(check_default_judge, hub, recommended)))
        if hub.reached:
            room = partial(check_hub_cache, partial(bytes_to_download, recommended))
        listed = [judge for judge in recommended_judges() if judge.working_set_gb]  # what others need is not known
        found += [guarded("judge", partial(check_judge, judge, recommended)) for judge in listed]
    found.append(guarded("hub cache", room))
    found.append(guarded("mlxpref cache", check_own_cache))
    return found


def _looked(found: list[Finding], name: str, look: Callable[[], T], check: Callable[[T], Finding]) -> T | None:
    """What was looked at, after what is found of it; None where looking failed, which is found as well."""
    seen: list[T] = []

    def looked() -> Finding:
        seen.append(look())
        return check(seen[0])

    found.append(guarded(name, looked))
    return seen[0] if seen else None
