"""Messages and progress. The library itself prints nothing.

Messages go to `logger`, the logger "mlxpref": warnings about the trust in a result, such as rows that were left out,
and infos about the work, such as a download. Without configuration Python shows the warnings on stderr;
`logging.basicConfig(level=logging.INFO)` shows both. The command line shows both as plain lines.

Progress goes to the object that `showing` sets in the current context; by default nothing is shown.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger("mlxpref")
MANY = 20_000
"""More items than these take seconds even in quick work."""


class Progress:
    """Receives the progress of work and shows nothing; subclasses show it."""

    def track(self, work: Iterable[T], count: int, what: str | Callable[[], str]) -> Iterator[T]:
        """Pass on at most `count` items; `what` names the work, or is a function that returns the current name."""
        return iter(work)


_progress: ContextVar[Progress] = ContextVar("mlxpref_progress", default=Progress())  # noqa: B039  it has no state


@contextmanager
def showing(progress: Progress) -> Iterator[None]:
    """Let an object show the progress of work inside the block."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def track(work: Iterable[T], count: int, what: str | Callable[[], str]) -> Iterator[T]:
    """Pass on items and show how many of `count` are done; see `Progress.track`."""
    return _progress.get().track(work, count, what)


def track_many(work: Collection[T], what: str) -> Iterable[T]:
    """Pass on items of quick work; its progress is shown if there are more than MANY."""
    return track(work, len(work), what) if len(work) > MANY else work
