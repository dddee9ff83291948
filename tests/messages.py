"""Collects what the library logs, and stands in for its progress bar."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxpref.log import Progress, logger


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect the messages that the block logs, in order."""
    lines: list[str] = []
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Tracked(Progress):
    """Passes work through a function of the work, its count and its name."""

    def __init__(self, through: Callable[[Iterable[Any], int, Any], Iterable[Any]]) -> None:
        self.through = through

    def track(self, work: Iterable[Any], count: int, what: Any) -> Iterator[Any]:
        return iter(self.through(work, count, what))
