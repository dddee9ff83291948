"""Many clients at once ask a running `mlxpref serve`: is every request answered, and with its own answer?

    python -m scripts.serve_load --requests 1000 --clients 16 --burst 400

Groups for /compute and /score, rankings, and chats with and without thinking, each of pictures of its own. The same
judge answers each in this process first. Of the server's answers those are wrong that differ by more than rounding. A
client that is told that the server is busy (429) asks again after the seconds of `Retry-After`; at the end the `burst`
sends so many requests together. Exit status 1 if an answer is wrong or lost. Memory is the server's resident one.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, Any, TypeAlias

from scripts.bench_common import pictures  # isort: skip  opens the fast BLAS before anything imports MLX

import click
import numpy as np
from PIL import Image

import mlxpref
from mlxpref.cli.output import note, print_table, print_text
from mlxpref.demo.briefs import draw_brief, prompt_text
from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.preferences import Pair
from mlxpref.reward.group import reward_images
from mlxpref.text import format_bytes, shorten

_SIZE = 84
_TOLERANCE = 1e-4
"""Between two runs of one computation; any two requests' numbers differ by more."""
_TIMEOUT = 600.0

Numbers: TypeAlias = list[float]


@dataclass(frozen=True)
class Case:
    """A request and its right numbers; `read` takes those of an answer, the best image's or the likeliest label's."""

    kind: str
    path: str
    body: bytes
    read: Callable[[Any], Numbers]
    right: Numbers


@dataclass(frozen=True)
class Outcome:
    """What came of a request: how often the server was busy, and what is wrong, if anything."""

    kind: str
    seconds: float
    busy: int
    fault: str = ""
    is_lost: bool = False


def make_case(judge: Judge, number: int) -> Case:
    """A request with pictures of its own, of one kind after the other."""
    draw = np.random.default_rng(number)
    prompt = prompt_text(draw_brief(draw))
    kind = list(_KINDS)[number % len(_KINDS)]
    images = pictures(2 if kind.startswith("chat") else int(draw.integers(4, 13)), _SIZE, number)
    path, body, read, right = _KINDS[kind](judge, images, prompt)
    return Case(kind, path, json.dumps(body).encode(), read, right)


_Made: TypeAlias = tuple[str, dict[str, Any], Callable[[Any], Numbers], Numbers]


def _compute(judge: Judge, images: Sequence[Image.Image], prompt: str) -> _Made:
    body = {"prompt": [prompt] * len(images), "image": [_encoded(image) for image in images]}
    return "/compute", body, lambda answer: list(answer["rewards"]), _strengths(judge, images, prompt)


def _score(judge: Judge, images: Sequence[Image.Image], prompt: str) -> _Made:
    requests = [
        {"history": [{"text": prompt, "image_b64": _encoded(image)}], "required_rewards": ["strength"]}
        for image in images
    ]
    read = lambda answer: [each["strength"]["strength"] for each in answer["results"]]  # noqa: E731
    return "/score", {"requests": requests}, read, _strengths(judge, images, prompt)


def _rank(judge: Judge, images: Sequence[Image.Image], prompt: str) -> _Made:
    body = {"prompt": prompt, "images": [_encoded(image) for image in images]}
    right = [number for entry in judge.rank(list(images), prompt) for number in (entry.index, entry.strength)]
    read = lambda answer: [each[name] for each in answer["images"] for name in ("index", "strength")]  # noqa: E731
    return "/rank", body, read, right


def _chat(judge: Judge, images: Sequence[Image.Image], prompt: str, think: bool) -> _Made:
    urls = [{"url": f"data:image/png;base64,{_encoded(image)}"} for image in images]
    content = [*({"type": "image_url", "image_url": url} for url in urls), {"type": "text", "text": prompt}]
    body = {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": 20}
    (verdict,) = next(judge.pairs([Pair(images[0], images[1], prompt)], think=think)).a_shown_first
    right = [verdict.p_label_first, verdict.p_label_second]
    return "/v1/chat/completions", body if think else body | {"max_tokens": 1}, _labels, right


def _labels(answer: Any) -> Numbers:
    """The probabilities of the labels 1 and 2 at the answer."""
    (position,) = answer["choices"][0]["logprobs"]["content"]
    logs = {each["token"]: each["logprob"] for each in position["top_logprobs"]}
    return [float(np.exp(logs[label])) for label in sorted(logs)][:2]


_KINDS: dict[str, Callable[[Judge, Sequence[Image.Image], str], _Made]] = {
    "compute": _compute,
    "score": _score,
    "rank": _rank,
    "chat": partial(_chat, think=False),
    "chat, thinking": partial(_chat, think=True),
}


def _strengths(judge: Judge, images: Sequence[Image.Image], prompt: str) -> Numbers:
    rewards = reward_images(judge, images, [prompt] * len(images))
    return [each.strength for each in rewards if not isinstance(each, DataError)]


def _encoded(image: Image.Image) -> str:
    with BytesIO() as file:
        image.save(file, "PNG")
        return b64encode(file.getvalue()).decode()


@dataclass
class Clients:
    """Asks a server, each client on a connection of its own; `memory` are the server's bytes after each answer."""

    port: int
    pid: int
    memory: list[int] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def ask_all(self, cases: Sequence[Case], together: int) -> list[Outcome]:
        """The outcomes of requests, so many at the same time."""
        with ThreadPoolExecutor(together) as threads:
            parts = threads.map(self._ask_some, [cases[start::together] for start in range(together)])
            return [outcome for part in parts for outcome in part]

    def health(self) -> dict[str, Any]:
        """The server's own counts."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)) as connection:
            connection.request("GET", "/health")
            counts: dict[str, Any] = json.load(connection.getresponse())
        return counts

    def _ask_some(self, cases: Sequence[Case]) -> list[Outcome]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)) as connection:
            return [self._ask(connection, case) for case in cases]

    def _ask(self, connection: http.client.HTTPConnection, case: Case) -> Outcome:
        start, busy = time.perf_counter(), 0
        try:
            while (answer := _post(connection, case))[0] == 429:
                busy += 1
                time.sleep(float(answer[1]["Retry-After"] or 1))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return Outcome(case.kind, time.perf_counter() - start, busy, repr(error), is_lost=True)
        seconds, (status, _, content) = time.perf_counter() - start, answer
        with self._lock:
            self.memory.append(resident_bytes(self.pid))
        fault = _fault(case, content) if status == 200 else f"{status}: {shorten(content.decode(), 200)}"
        return Outcome(case.kind, seconds, busy, fault)


def _post(connection: http.client.HTTPConnection, case: Case) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection.request("POST", case.path, case.body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        connection.close()  # before a wait, in which the server may do so
    return response.status, response.headers, content


def _fault(case: Case, content: bytes) -> str:
    """What is wrong with an answer, if anything."""
    try:
        numbers = case.read(json.loads(content))
        if np.allclose(numbers, case.right, rtol=0, atol=_TOLERANCE):
            return ""
        return f"{numbers} instead of {case.right}"
    except (LookupError, TypeError, ValueError) as error:
        return f"{error!r}: {shorten(content.decode(), 200)}"


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        kilobytes = re.search(r"VmRSS:\s+(\d+)", status.read_text())
        return int(kilobytes[1]) << 10 if kilobytes else 0
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], stdout=subprocess.PIPE).stdout or 0) << 10


@contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A running `mlxpref serve` with the demo judge, and its port; what it says is shown at the end."""
    command = [sys.executable, "-c", "from mlxpref.cli import main; main()", "serve", "--model", "demo", "--port", "0"]
    with TemporaryFile("a+") as said, subprocess.Popen([*command, *options], stderr=said) as process:
        try:
            while not (found := re.search(r"http://[^ ;]+:(\d+);", _text(said))):
                assert process.poll() is None, _text(said)
                time.sleep(0.05)
            yield process, int(found[1])
        finally:
            process.terminate()
            process.wait()
            note(shorten(_text(said).strip(), 1000))


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def print_outcomes(outcomes: Sequence[Outcome], seconds: float) -> None:
    """A row for each kind of request, and one for all."""
    kinds = {kind: [each for each in outcomes if each.kind == kind] for kind in _KINDS}
    rows = []
    for kind, some in [*kinds.items(), ("all", list(outcomes))]:
        if some:
            times = sorted(1000 * each.seconds for each in some)
            lost = sum(each.is_lost for each in some)
            wrong = sum(bool(each.fault) for each in some) - lost
            busy = sum(each.busy for each in some)
            late = times[min(len(times) - 1, int(0.99 * len(times)))]
            cells = (len(some), len(some) - lost, wrong, lost, busy, f"{len(some) / seconds:.1f}")
            rows.append((kind, *cells, f"{statistics.median(times):.0f}", f"{late:.0f}"))
    columns = ("kind", "requests", "answered", "wrong", "lost", "429s", "requests/s", "median ms", "99 % ms")
    print_table(columns, rows)
    for fault, count in Counter(each.fault for each in outcomes if each.fault).most_common(5):
        print_text(f"{count} x {shorten(fault, 500)}")


def _memory_line(memory: Sequence[int]) -> str:
    """What the server took at the start, after each quarter of the requests so far, and at most."""
    last = len(memory) - 1
    marks = [f"after {last * part // 4} {format_bytes(memory[last * part // 4])}" for part in range(1, 5)]
    return ", ".join([f"start {format_bytes(memory[0])}", *marks, f"peak {format_bytes(max(memory))}"])


@click.command(help=__doc__)
@click.option("--requests", default=1000, show_default=True)
@click.option("--clients", default=16, show_default=True)
@click.option("--burst", default=400, show_default=True, help="Requests that are sent together at the end.")
@click.option("--seed", default=0, show_default=True)
def main(requests: int, clients: int, burst: int, seed: int) -> None:
    """Ask, compare and print."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    judge = mlxpref.load("demo")
    cases = [make_case(judge, number) for number in range(seed, seed + requests + burst)]
    note(f"{len(cases)} requests and their right answers are made")
    outcomes: list[Outcome] = []
    with served() as (process, port):
        asking = Clients(port, process.pid, [resident_bytes(process.pid)])
        left = iter(cases)
        for title, count, together in (("load", requests, clients), ("burst", burst, burst)):
            if not count:
                continue
            print_text(f"{title}: {count} requests from {together} clients")
            start = time.perf_counter()
            some = asking.ask_all(list(islice(left, count)), together)
            print_outcomes(some, time.perf_counter() - start)
            outcomes += some
            print_text(f"memory: {_memory_line(asking.memory)}")
        counts = asking.health()
        pair = 1000 * (counts["seconds_per_pair"] or 0)
        print_text(f"/health: {counts['requests']} requests, {counts['comparisons']} comparisons, {pair:.1f} ms a pair")
    sys.exit(any(each.fault for each in outcomes))


if __name__ == "__main__":
    main()
