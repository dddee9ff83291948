"""The queue of the device: requests wait for the judge, which one thread asks, one request at a time.

It is the thread that loaded the model: MLX's streams belong to threads.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition
from typing import Any, TypeVar

from mlxpref.judge.judge import Judge
from mlxpref.log import Progress, showing
from mlxpref.serve.limits import WAITING

T = TypeVar("T")
Work = Callable[[Judge], Any]
"""What a request asks of the judge: the JSON of its answer."""


class BusyError(Exception):
    """The queue is full; it has room in about `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"{WAITING} requests are waiting; ask again in {seconds} s")
        self.seconds = seconds


class EndedError(Exception):
    """The server ends."""


class _Cancelled(Exception):  # noqa: N818  nothing is wrong
    """The client has gone."""


@dataclass
class Counts:
    """What the device has done: `requests` at their end, `comparisons` as they are made; `since` the one at work began.

    `past_seconds` are those of all requests before that one.
    """

    requests: int = 0
    comparisons: int = 0
    past_seconds: float = 0.0
    since: float | None = None

    @property
    def seconds(self) -> float:
        """The time of all comparisons."""
        since = self.since
        return self.past_seconds + (0.0 if since is None else time.perf_counter() - since)

    @property
    def seconds_per_pair(self) -> float | None:
        """The mean time of a pair in both orders; None before the first."""
        return 2 * self.seconds / self.comparisons if self.comparisons else None


class Job(Progress):
    """One request in the queue, and the place of its answer; it counts comparisons, and ends if the client goes."""

    def __init__(self, work: Work, counts: Counts) -> None:
        self.work, self.answer = work, Future[Any]()
        self._counts, self._is_cancelled = counts, False

    def cancel(self) -> None:
        """End it after the comparisons that run now; any thread may call it."""
        self._is_cancelled = True
        self.answer.cancel()

    def track(self, work: Iterable[T], count: int, what: str | Callable[[], str]) -> Iterator[T]:
        """Pass on items, each of which is a comparison, until the client has gone."""
        for item in work:
            if self._is_cancelled:
                raise _Cancelled
            self._counts.comparisons += 1
            yield item


class DeviceQueue:
    """A bounded queue of requests; `run` answers them, all else may be called from any thread."""

    def __init__(self, judge: Judge) -> None:
        self.counts = Counts()
        self._judge, self._jobs, self._changed = judge, deque[Job](), Condition()
        self._ends, self._ended = False, False

    @property
    def waiting(self) -> int:
        """The requests that wait."""
        return len(self._jobs)

    def put(self, work: Work) -> Job:
        """Let work wait for its turn; BusyError if too much waits already, EndedError if the server ends."""
        job = Job(work, self.counts)
        with self._changed:
            if self._ended:
                raise EndedError
            if self.waiting >= WAITING:
                mean = self.counts.seconds / max(1, self.counts.requests)
                raise BusyError(max(1, math.ceil(mean * self.waiting / 2)))
            self._jobs.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job whose client has gone: one that waits leaves its place, and what it holds, at once."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        job.cancel()

    def run(self) -> None:
        """Answer requests until `end`, or an interrupt, which is raised; those that wait then get an EndedError."""
        job: Job | None = None
        try:
            while (job := self._next()) is not None:
                self._answer(job)
        finally:
            with self._changed:
                self._ended = True
                left = [*([job] if job else []), *self._jobs]
                self._jobs.clear()
            for each in left:
                if not each.answer.done():
                    each.answer.set_exception(EndedError())

    def end(self) -> None:
        """Let `run` return after the requests that wait."""
        with self._changed:
            self._ends = True
            self._changed.notify()

    def _next(self) -> Job | None:
        """The request whose turn it is, as soon as there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ends)
            return self._jobs.popleft() if self._jobs else None

    def _answer(self, job: Job) -> None:
        if not job.answer.set_running_or_notify_cancel():
            return
        self.counts.since = start = time.perf_counter()
        answer: Any = None
        problem: Exception | None = None
        try:
            with showing(job):
                answer = job.work(self._judge)
        except _Cancelled:
            problem = EndedError()
        except Exception as error:
            problem = error
        finally:
            self.counts.requests += 1
            self.counts.since = None
            self.counts.past_seconds += time.perf_counter() - start
        # After the counts: whoever has an answer finds it in /health.
        if problem is None:
            job.answer.set_result(answer)
        else:
            job.answer.set_exception(problem)
