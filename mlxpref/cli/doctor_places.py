"""Checks of places: whether the hub answers, and where caches are, how large, and whether they can be written."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxpref.cli.doctor_checkup import CheckResult
from mlxpref.files import cache_dir, free_bytes
from mlxpref.hub import SPARE
from mlxpref.text import format_bytes

__all__ = ["Hub", "check_hub", "check_hub_cache", "check_own_cache", "probe_hub"]

_HUB_SECONDS = 4.0
"""How long the hub may take to answer."""
_LOOKING_SECONDS = 2.0
"""How long the files of a cache are counted."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub as it answered, or `why` it was not `reached`; `token` says that one is set, never which."""

    endpoint: str
    reached: bool
    why: str = ""
    offline: bool = False
    token: bool = False


def probe_hub() -> Hub:
    """Ask the configured endpoint for its head, unless HF_HUB_OFFLINE is set; no token is sent."""
    from huggingface_hub import constants, get_session, get_token

    token, endpoint = get_token() is not None, constants.ENDPOINT
    shown = re.sub(r"//[^/]*@", "//", endpoint)  # a mirror's may hold a password
    if constants.HF_HUB_OFFLINE:
        return Hub(shown, False, offline=True, token=token)
    try:
        status = get_session().head(endpoint, timeout=_HUB_SECONDS).status_code
    except Exception as error:  # the hub's transport library raises its own errors, and changes between releases
        return Hub(shown, False, type(error).__name__, token=token)
    return Hub(shown, status < 500, f"it answered {status}", token=token)


def check_hub(hub: Hub) -> CheckResult:
    """Whether models and data can be downloaded. That they cannot is no failure: what is here works without."""
    token = "a token is set" if hub.token else "no token, which only gated models need"
    if hub.offline:
        return CheckResult("hub", f"HF_HUB_OFFLINE is set, so nothing is downloaded; {token}")
    if hub.reached:
        return CheckResult("hub", f"{hub.endpoint} answers; {token}")
    remedy = "to download, check the connection, HTTPS_PROXY and HF_ENDPOINT; what is here works without"
    return CheckResult("hub", f"{hub.endpoint} is not reached ({hub.why}); {token}", "note", remedy)


def check_hub_cache(needed: Callable[[], int] = lambda: 0) -> CheckResult:
    """The cache of the hub, into which `needed` bytes are to be downloaded."""
    from huggingface_hub import constants

    return _cache("hub cache", Path(constants.HF_HUB_CACHE).expanduser(), "set HF_HOME to another place", needed())


def check_own_cache() -> CheckResult:
    """The cache of mlxpref: comparisons, calibrations, unpacked images."""
    return _cache("mlxpref cache", cache_dir(), "set MLXPREF_CACHE to another place")


def _cache(name: str, place: Path, elsewhere: str, needed: int = 0) -> CheckResult:
    """Where a cache is, how large it is, and how much is free there."""
    there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    if not there.is_dir():
        return CheckResult(name, f"{place}: {there} is a file", "fails", f"remove that file, or {elsewhere}")
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        return CheckResult(name, f"{place}: cannot be written", "fails", f"make it your own, or {elsewhere}")
    size, whole = _size(place)
    free = free_bytes(place)
    found = f"{place}: {'' if whole else 'more than '}{format_bytes(size)}, {format_bytes(free)} free"
    if needed and needed + SPARE > free:
        return CheckResult(name, f"{found}, {format_bytes(needed)} to download", "fails", f"make room, or {elsewhere}")
    if free < SPARE:
        return CheckResult(name, found, "note", f"make room, or {elsewhere}")
    return CheckResult(name, found)


def _size(folder: Path) -> tuple[int, bool]:
    """Bytes of the files in a folder, links apart, and whether there was time to count all."""
    until, total, waiting = time.monotonic() + _LOOKING_SECONDS, 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:  # what cannot be read, or went away meanwhile, is not counted
            continue
        if time.monotonic() > until:
            return total, not waiting
    return total, True
