"""The doctor: all checks in the order in which they rest on each other; what rests on something broken is left out."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from mlxpref.checkpoints.resolve import recommended_judges
from mlxpref.cli.doctor_checkup import (
    CheckResult,
    Machine,
    check_builds,
    check_packages,
    check_system,
    safely,
    this_machine,
)
from mlxpref.cli.doctor_device import (
    Device,
    check_arithmetic,
    check_blas,
    check_device,
    check_mlx,
    check_power,
    look_at_device,
)
from mlxpref.cli.doctor_judges import bytes_to_download, check_default_judge, check_demo, check_judge
from mlxpref.cli.doctor_places import Hub, check_hub, check_hub_cache, check_own_cache, probe_hub
from mlxpref.power import System, this_system

__all__ = ["examine"]

T = TypeVar("T", Device, Hub)


def examine(machine: Machine | None = None, system: System | None = None) -> list[CheckResult]:
    """Everything that is found here, or on a machine and a system that a test describes; no check raises."""
    at, on = machine or this_machine(), system or this_system()
    found = [
        safely("system", partial(check_system, at)),
        safely("packages", partial(check_packages, at)),
        safely("MLX build", partial(check_builds, at)),
    ]
    if on.name == "Darwin":
        found.append(safely("power", partial(check_power, on)))
    mlx = safely("MLX", check_mlx)
    device: Device | None = None
    if mlx.state == "ok":
        device = _looked(found, "device", look_at_device, check_device)
    else:
        found.append(mlx)
    if device is not None:
        found.append(safely("arithmetic", check_arithmetic))
        if device.backend == "CPU" and on.name == "Linux":
            found.append(safely("BLAS", check_blas))
        found.append(safely("demo judge", check_demo))
    hub = _looked(found, "hub", probe_hub, check_hub)
    room = check_hub_cache
    if device is not None and hub is not None:
        recommended = device.recommended
        found.append(safely("default judge", partial(check_default_judge, hub, recommended)))
        if hub.reached:
            room = partial(check_hub_cache, partial(bytes_to_download, recommended))
        listed = [judge for judge in recommended_judges() if judge.working_set_gb]  # what others need is not known
        found += [safely("judge", partial(check_judge, judge, recommended)) for judge in listed]
    found.append(safely("hub cache", room))
    found.append(safely("mlxpref cache", check_own_cache))
    return found


def _looked(found: list[CheckResult], name: str, look: Callable[[], T], check: Callable[[T], CheckResult]) -> T | None:
    """What was looked at, after what is found of it; None where looking failed, which is found as well."""
    seen: list[T] = []

    def looked() -> CheckResult:
        seen.append(look())
        return check(seen[0])

    found.append(safely(name, looked))
    return seen[0] if seen else None
