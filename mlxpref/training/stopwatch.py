"""The seconds of a step, by phase."""

import time

__all__ = ["Stopwatch"]

_PHASES = ("rollout", "score", "update", "evaluation")


class Stopwatch:
    """Counts the seconds of the phases of a step; what lies between two laps belongs to the later one."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds = dict.fromkeys(_PHASES, 0.0)

    def lap(self, phase: str) -> None:
        """A phase ends now."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """The fields of a report: every phase's seconds, and `seconds`, their sum."""
        rounded = {f"{phase}_seconds": round(seconds, 4) for phase, seconds in self._seconds.items()}
        return rounded | {"seconds": round(sum(rounded.values()), 4)}
