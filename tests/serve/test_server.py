"""The server as a process: its routes, who may ask, how it says no, and how it ends."""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, permutations
from urllib.parse import urlsplit

import numpy as np
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mlxpref.demo.pictures import COLOURS, PictureSpec, render
from mlxpref.log import track
from mlxpref.serve import device_queue
from mlxpref.serve.device_queue import BusyError, DeviceQueue, EndedError
from mlxpref.serve.limits import BODY_BYTES, WAITING
from mlxpref.web import read_object
from tests.serve.requests import BEST, PROMPT, ask, chat, encoded, pictures, turns
from tests.serve.server_process import COMMAND, running

GROUP = {"prompt": [PROMPT] * 6, "image": [encoded(image) for image in pictures()]}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as (address, _):
        yield address


def test_every_protocol_finds_the_best_picture(address: str) -> None:
    images = GROUP["image"]
    status, answer = ask(address, "/compute", GROUP)
    assert (status, int(np.argmax(answer["rewards"]))) == (200, BEST)
    status, answer = ask(address, "/score", {"requests": turns(images, [PROMPT] * 6, ["wins"])})
    assert (status, int(np.argmax([each["wins"]["wins"] for each in answer["results"]]))) == (200, BEST)
    status, answer = ask(address, "/rank", {"prompt": PROMPT, "images": images})
    assert (status, answer["images"][0]["index"]) == (200, BEST)
    status, answer = ask(address, "/v1/chat/completions", chat(pictures()[:2]))
    content = answer["choices"][0]["message"]["content"]
    assert (status, content.startswith("<think>Image 1: ")) == (200, True)
    assert content.endswith("</think><answer>2</answer>")
    assert ask(address, "/rewards") == (200, {"rewards": ["strength", "wins"]})
    assert ask(address, "/v1/models")[1]["data"][0]["id"] == "demo"


def test_health_counts(address: str) -> None:
    before = ask(address, "/health")[1]
    ask(address, "/compute", GROUP)
    ask(address, "/compute", {"prompt": [], "image": []})
    alone = ask(address, "/compute", {"prompt": [PROMPT], "image": GROUP["image"][:1]})
    assert alone[0] == 200
    assert "the only readable image" in alone[1]["error"]
    after = ask(address, "/health")[1]
    assert after["status"] == "ok"
    assert (after["model"], after["profile"], after["think"]) == ("demo", "mlxpref", True)
    assert set(after["rewards"]) == {"strength", "wins"}
    assert (after["requests"] - before["requests"], after["errors"] - before["errors"]) == (2, 2)
    assert after["comparisons"] - before["comparisons"] == 24  # four an image
    assert after["seconds_per_pair"] > 0


@pytest.mark.parametrize("body", [b"", b"{", b"\x80\x04.", b'{"prompt": ' + b"[" * 100_000])
def test_no_json_is_a_400(address: str, body: bytes) -> None:
    assert ask(address, "/compute", body) == (400, {"error": "the request is no valid JSON"})


@pytest.mark.parametrize("body", [b"[]", b"null", b"5"])
def test_json_of_no_object_is_a_400(address: str, body: bytes) -> None:
    assert ask(address, "/compute", body) == (400, {"error": "a JSON object is expected"})


def test_errors_have_the_form_of_their_protocol(address: str) -> None:
    status, answer = ask(address, "/v1/chat/completions", chat(pictures()[:1]))
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "two images" in answer["error"]["message"]
    status, answer = ask(address, "/rank", {"prompt": PROMPT, "images": GROUP["image"], "pairs": -1})
    assert status == 400
    assert answer["error"].startswith("-1 pairs cannot be judged")
    assert ask(address, "/nothing")[0] == 404
    assert ask(address, "/compute")[0] == 405


def test_a_body_beyond_the_limit_is_a_413(address: str) -> None:
    status, answer = ask(address, "/compute", b" " * (BODY_BYTES + 1))
    assert status == 413
    assert answer["error"].startswith("a request of 67.1 MB, more than 67.1 MB")


def test_pages_and_other_hosts_may_not_ask(address: str) -> None:
    assert ask(address, "/health", headers={"Origin": "http://127.0.0.1:1"})[0] == 403
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(address).port, timeout=300)
    connection.request("GET", "/health", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 400
    connection.close()


def test_only_the_token_opens() -> None:
    with running("--no-think", "--token", "a secret") as (address, _):
        assert ask(address, "/health")[0] == 401
        assert ask(address, "/health", headers={"Authorization": "Bearer another"})[0] == 401
        status, health = ask(address, "/health", headers={"Authorization": "Bearer a secret"})
        assert (status, health["think"]) == (200, False)
        basic = {"Authorization": "Basic YW55OmEgc2VjcmV0"}  # any:a secret
        assert ask(address, "/compute", GROUP, basic)[0] == 200


def test_other_machines_need_a_token() -> None:
    result = subprocess.run([*COMMAND, "--host", "0.0.0.0"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "give --token" in result.stderr


def test_one_port_has_one_server(address: str) -> None:
    command = [*COMMAND, "--port", str(urlsplit(address).port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: --port {urlsplit(address).port}: cannot be taken (")
    assert len(result.stderr.splitlines()) == 1


def long_request() -> bytes:
    """A ranking that takes the demo judge a minute or more: 144 pictures, all pairs, with thinking."""
    images = [
        encoded(render(PictureSpec(*colours, quality), np.random.default_rng(number)))
        for number, colours in enumerate(islice(permutations(COLOURS, 4), 72))
        for quality in ("clean", "noisy")
    ]
    return json.dumps({"prompt": PROMPT, "images": images, "pairs": "all", "think_about": "all"}).encode()


def started(address: str, body: bytes) -> http.client.HTTPConnection:
    """A connection whose request the judge works on."""
    before = ask(address, "/health")[1]["comparisons"]
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(address).port or 0, timeout=300)
    connection.request("POST", "/rank", body)
    while ask(address, "/health")[1]["comparisons"] == before:
        time.sleep(0.05)
    return connection


def test_a_request_ends_when_its_client_goes() -> None:
    with running() as (address, _):
        started(address, long_request()).close()
        assert ask(address, "/compute", GROUP)[0] == 200
        health = ask(address, "/health")[1]
        assert health["cancelled"] == 1
        assert health["comparisons"] < 144 * 143 / 2


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_and_clients_hear_of_it(name: str, code: int) -> None:
    with running() as (address, process), ThreadPoolExecutor(1) as pool:
        connection = started(address, long_request())
        waiting = pool.submit(ask, address, "/compute", GROUP)
        while ask(address, "/health")[1]["waiting"] == 0:
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        response = connection.getresponse()
        assert (response.status, json.load(response)) == (503, {"error": "the server ends"})
        assert waiting.result() == (503, {"error": "the server ends"})
        assert process.wait(60) == code
        assert process.stderr is not None
        errors = process.stderr.read()
        assert "Traceback" not in errors
        assert "terminate" not in errors
        connection.close()


def test_a_full_queue_says_when_to_come_again() -> None:
    queue = DeviceQueue(None)  # type: ignore[arg-type]  # the work needs none
    jobs = [queue.put(lambda judge: 1) for _ in range(WAITING)]
    with pytest.raises(BusyError) as caught:
        queue.put(lambda judge: 1)
    assert caught.value.seconds >= 1
    queue.cancel(jobs[5])
    assert queue.waiting == WAITING - 1
    last = queue.put(lambda judge: 2)
    queue.end()
    queue.run()
    assert last.answer.result() == 2
    assert jobs[5].answer.cancelled()
    assert queue.counts.requests == WAITING


def test_a_client_that_has_gone_leaves_nothing_in_the_queue() -> None:
    class Images:
        pass

    queue = DeviceQueue(None)  # type: ignore[arg-type]
    images = Images()
    kept = weakref.ref(images)
    job = queue.put(lambda judge, images=images: images)  # type: ignore[misc]
    queue.cancel(job)
    del images, job
    assert kept() is None
    assert queue.waiting == 0


def test_what_waits_is_answered_when_the_queue_ends() -> None:
    queue = DeviceQueue(None)  # type: ignore[arg-type]

    def interrupt(judge: object) -> None:
        raise KeyboardInterrupt

    jobs = [queue.put(lambda judge: "done"), queue.put(interrupt), queue.put(lambda judge: "never")]
    with pytest.raises(KeyboardInterrupt):
        queue.run()
    assert jobs[0].answer.result() == "done"
    for job in jobs[1:]:
        assert isinstance(job.answer.exception(), EndedError)
    with pytest.raises(EndedError):
        queue.put(lambda judge: "late")


def test_a_mistake_in_the_work_is_that_of_its_request_alone() -> None:
    queue = DeviceQueue(None)  # type: ignore[arg-type]
    jobs = [queue.put(lambda judge: 1 / 0), queue.put(lambda judge: "done")]
    queue.end()
    queue.run()
    assert isinstance(jobs[0].answer.exception(), ZeroDivisionError)
    assert jobs[1].answer.result() == "done"


def test_time_is_counted_while_a_request_runs() -> None:
    queue = DeviceQueue(None)  # type: ignore[arg-type]
    rates: list[float | None] = []

    def work(judge: object) -> None:
        for _ in track(range(4), 4, "work"):
            time.sleep(0.001)
            rates.append(queue.counts.seconds_per_pair)

    queue.put(work)
    queue.end()
    queue.run()
    assert all(rate is not None and rate >= 0.002 for rate in rates)
    assert queue.counts.seconds_per_pair == pytest.approx(queue.counts.past_seconds / 2)


def test_progress_counts_comparisons_and_ends_a_cancelled_job() -> None:
    counts = device_queue.Counts()
    job = device_queue.Job(lambda judge: None, counts)
    work = job.track(range(5), 5, "work")
    assert [next(work), next(work)] == [0, 1]
    job.cancel()
    with pytest.raises(device_queue._Cancelled):
        next(work)
    assert counts.comparisons == 2


def test_requests_that_are_no_http_fill_no_pipe() -> None:
    with running() as (address, process):
        for _ in range(30):
            with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as connection:
                connection.sendall(b"GARBAGE\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 400")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert process.stderr is not None
        assert "Invalid HTTP" not in process.stderr.read()


def test_a_slow_body_is_a_408() -> None:
    async def receive() -> dict[str, object]:
        await asyncio.sleep(300)
        raise AssertionError("it was waited for")

    request = Request({"type": "http", "headers": []}, receive)
    with ThreadPoolExecutor(1) as pool:  # a browser's loop may run in this thread
        reading = pool.submit(lambda: asyncio.run(read_object(request, 100, seconds=0.01)))
        error = reading.exception()
    assert isinstance(error, HTTPException)
    assert error.status_code == 408
