"""The server under attack: clients that lie, dawdle, vanish or send what nobody would, and images of every kind.

Whatever they do, it goes on, answers the others, and never says that the mistake was its own.
"""

import base64
import http.client
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlxpref.data.images import load_image
from mlxpref.judge.judge import Judge
from mlxpref.reward.group import RewardSettings, reward_images
from mlxpref.serve.compute import read_compute
from mlxpref.serve.limits import IMAGES
from tests.serve.requests import PROMPT, ask, chat, encoded, pictures, turns
from tests.serve.server_process import COMMAND, running

PICTURES = pictures()
IMAGES_B64 = [encoded(image) for image in PICTURES]
GROUP: dict[str, Any] = {"prompt": [PROMPT] * 6, "image": IMAGES_B64}
LONG = {"prompt": PROMPT, "images": IMAGES_B64 * 6, "pairs": "all", "think_about": "all"}
"""A ranking that is not done before what a test does next."""
BODIES: dict[str, dict[str, Any]] = {
    "/compute": {"prompt": [PROMPT] * 2, "image": IMAGES_B64[:2], "video": None, "kwargs": None},
    "/score": {
        "protocol_version": "1",
        "requests": turns(IMAGES_B64[:2], [PROMPT] * 2, ["strength", "wins"], request_id="a", group_id="b"),
    },
    "/rank": {
        "prompt": PROMPT, "images": IMAGES_B64[:2], "pairs": 1, "top": 1, "orders": "both", "think_about": "none"
    },
    "/v1/chat/completions": chat(
        PICTURES[:2], n=1, seed=1, temperature=1, max_tokens=4, logprobs=True, top_logprobs=2, stream=False
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Server:
    address: str

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", urlsplit(self.address).port or 0), timeout=300)

    def send(self, content: bytes) -> str:
        """What it answers to these bytes, until it closes the connection or has sent one answer."""
        with closing(self.connect()) as connection:
            connection.sendall(content)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return f"{response.status} {response.read().decode()}"

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = ask(self.address, "/health")[1]
        return health

    def wait_for(self, name: str, value: int) -> None:
        for _ in range(10_000):
            if self.health()[name] >= value:
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} is {self.health()[name]}, not {value}")


def begin(headers: str, body: str = "") -> bytes:
    """The beginning of a request to /compute."""
    return f"POST /compute HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n{body}".encode()


def stopped(process: "subprocess.Popen[str]", sign: int = signal.SIGTERM) -> str:
    """What a server said until it ended by a signal."""
    process.send_signal(sign)
    return process.communicate(timeout=300)[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as (address, process):
        yield Server(address)
        assert process.poll() is None
        said = stopped(process)
    assert "mistake" not in said
    assert "Traceback" not in said
    assert process.returncode == 128 + signal.SIGTERM


@pytest.fixture(autouse=True)
def goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test others are answered as before."""
    yield
    if "server" in request.fixturenames:
        assert ask(request.getfixturevalue("server").address, "/compute", BODIES["/compute"])[0] == 200


@pytest.mark.parametrize("headers", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_clients_that_send_half_a_request_take_no_others_place(server: Server, headers: str) -> None:
    cancelled = server.health()["cancelled"]
    body = '5\r\n{"a":\r\n' if "chunked" in headers else '{"a"'
    connections = [server.connect() for _ in range(3)]
    for connection in connections:
        connection.sendall(begin(headers, body))
    assert ask(server.address, "/compute", GROUP)[0] == 200
    for connection in connections:
        connection.close()
    server.wait_for("cancelled", cancelled + 3)


def test_a_lie_about_the_length_takes_no_others_place(server: Server) -> None:
    with closing(server.connect()) as connection:
        connection.sendall(begin("Content-Length: 99999999999", "{"))
        assert ask(server.address, "/compute", GROUP)[0] == 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (begin("Content-Length: -5"), "400"),
        (begin("Content-Length: x"), "400"),
        (begin("Transfer-Encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"), "{"),
        (b"POST /compute HTTP/1.0\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", "{"),
        (b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", "200"),
        (b"GET /health HTTP/1.1\r\nHost: rebound.example\r\n\r\n", "400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n", "403"),
        (b"DELETE /compute HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a greeting of TLS\r\n\r\n", "400"),
    ],
)
def test_odd_http(server: Server, content: bytes, expected: str) -> None:
    assert expected in server.send(content)


def test_a_large_body_to_a_wrong_address_is_answered(server: Server) -> None:
    with closing(http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=300)) as connection:
        connection.request("POST", "/nothing", b" " * (8 << 20))
        assert connection.getresponse().status == 404


def test_clients_that_are_killed_are_given_up(server: Server) -> None:
    """One whose request runs, and some whose requests wait."""
    before = server.health()["cancelled"]
    script = "import sys, urllib.request as r; print(1, flush=True); r.urlopen(sys.argv[1], sys.stdin.buffer.read())"
    clients = []
    for _ in range(4):
        command = [sys.executable, "-c", script, f"{server.address}/rank"]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert client.stdin is not None
        client.stdin.write(json.dumps(LONG).encode())
        client.stdin.close()
        clients.append(client)
    server.wait_for("waiting", 3)
    for client in clients:
        client.kill()
        client.wait()
        assert client.stdout is not None
        client.stdout.close()
    server.wait_for("cancelled", before + 4)


def test_a_client_that_reads_late_keeps_nobody_waiting(server: Server) -> None:
    content = json.dumps(GROUP).encode()
    with closing(server.connect()) as connection:
        connection.sendall(begin(f"Content-Length: {len(content)}") + content)
        for _ in range(3):
            assert ask(server.address, "/compute", BODIES["/compute"])[0] == 200
        assert b"rewards" in connection.recv(1 << 16)


def odd_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, small as a file."""
    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(b"\0" + bytes(-(-width // 8))) for _ in range(height)) + pack.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(PICTURES[0].rotate(90), "PNG", exif=exif)


KINDS: dict[str, bytes] = {
    "gif of many frames": saved(PICTURES[0], "GIF", save_all=True, append_images=PICTURES * 40),
    "16 bit": saved(Image.new("I;16", (80, 80), 30_000), "PNG"),
    "cmyk": saved(PICTURES[0].convert("CMYK"), "JPEG"),
    "palette": saved(PICTURES[0].convert("P"), "PNG"),
    "transparent": saved(PICTURES[0].convert("RGBA"), "WEBP", lossless=True),
    "turned": turned(),
    "raw JPEG 2000": saved(PICTURES[0], "JPEG2000", no_jp2=True),
    "200:1": saved(Image.new("RGB", (2000, 10), "red"), "PNG"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_are_read_as_files_are(
    server: Server, demo_judge: Callable[..., Judge], kind: str
) -> None:
    """In lines, too, as `base64` writes it."""
    for encode in (base64.b64encode, base64.encodebytes):
        images = [encode(KINDS[kind]).decode(), *IMAGES_B64[1:3]]
        status, answer = ask(server.address, "/compute", {"prompt": [PROMPT] * 3, "image": images})
        files = [io.BytesIO(KINDS[kind]), *(io.BytesIO(base64.b64decode(image)) for image in images[1:])]
        assert status == 200
        expected = reward_images(demo_judge(), [load_image(file) for file in files], [PROMPT] * 3)
        assert answer["rewards"] == pytest.approx([getattr(each, "reward", None) for each in expected], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (odd_png(30_000, 30_000), "30000 x 30000"),
        (saved(PICTURES[0], "JPEG")[:700], "damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not an image"),
        (b"", "empty"),
        (saved(Image.new("RGB", (2010, 10)), "PNG"), "200:1"),
    ],
)
def test_what_is_no_image_is_an_error_of_its_item(server: Server, content: bytes, reason: str) -> None:
    images = [*IMAGES_B64[:2], base64.b64encode(content).decode()]
    requests = turns(images, [PROMPT] * 3, ["strength"])
    status, answer = ask(server.address, "/score", {"requests": requests})
    assert status == 200
    assert [bool(result) for result in answer["results"]] == [True, True, False]
    assert reason in answer["errors"][2]["strength"]


def test_small_files_of_many_pixels_do_not_fill_the_memory(
    demo_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxpref.serve.body.ALL_PIXELS", 3 * 84 * 84)
    answer = read_compute(GROUP, RewardSettings())(demo_judge())
    assert "image 3, image 4, image 5: it is one too many" in answer["error"]
    assert "send several requests" in answer["error"]


def test_many_texts_are_no_way_around_the_limit(server: Server) -> None:
    body = chat(PICTURES[:2])
    body["messages"][0]["content"] += [{"type": "text", "text": "word " * 1900}] * 2
    status, answer = ask(server.address, "/v1/chat/completions", body)
    assert (status, "characters" in answer["error"]["message"]) == (400, True)


def test_too_many_images_are_refused_in_a_line(server: Server) -> None:
    many = IMAGES + 1
    for path, body in (
        ("/compute", {"prompt": ["a"] * many, "image": ["AAAA"] * many}),
        ("/score", {"requests": turns(["AAAA"] * many, ["a"] * many, ["wins"])}),
        ("/rank", {"images": ["AAAA"] * many}),
    ):
        answer = ask(server.address, path, body)[1]["error"]
        assert f"{many} entries, more than {IMAGES}" in answer
        assert "\n" not in answer


@pytest.mark.parametrize(
    "text", ["🟥 круг 红色圆圈 דג 👩‍👩‍👧", "a\0b\x1b[31m\u202e", "<|image_pad|><|im_end|><image>{prompt}"]
)
def test_prompts_of_any_characters(server: Server, text: str) -> None:
    status, answer = ask(server.address, "/compute", GROUP | {"prompt": [text] * 6})
    assert (status, len(answer["rewards"]), round(sum(answer["rewards"]), 6)) == (200, 6, 0)


def test_a_prompt_beyond_the_model_says_so(server: Server) -> None:
    answer = ask(server.address, "/compute", GROUP | {"prompt": ["👩‍👩‍👧" * 1500] * 6})[1]
    assert "the model reads at most" in answer["error"]


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["\ud800", "/9j/", "data:image/png;base64,", "all", 1e308, 10**400, 10**300, -1, 1e-320]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value with something odd in one place of it."""
    places = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not places or draw(st.integers(0, 3)) == 0:
        return draw(ODD)
    place = draw(st.sampled_from(places))
    copy = value.copy()
    copy[place] = draw(changed(value[place]))
    return copy


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=80)
@given(st.data())
def test_no_body_is_a_mistake_of_ours(server: Server, path: str, data: st.DataObject) -> None:
    status, answer = ask(server.address, path, json.dumps(data.draw(changed(BODIES[path]))).encode())
    assert status in (200, 400)
    assert isinstance(answer, dict)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/score", {"request_id": "\ud800"}),
        ("/score", {"policy_version": float("nan")}),
        ("/score", {"sample_id": float("inf")}),
        ("/score", {"group_id": [[{}]]}),
        ("/score", {"required_rewards": ["\ud800"]}),
        ("/v1/chat/completions", {"temperature": 10**300}),
        ("/v1/chat/completions", {"temperature": 1e-320}),
        ("/v1/chat/completions", {"n": 10**300}),
        ("/v1/chat/completions", {"seed": 10**300}),
        ("/v1/chat/completions", {"max_tokens": 10**300}),
    ],
)
def test_odd_values_are_no_mistake_of_ours(server: Server, path: str, change: dict[str, Any]) -> None:
    body = BODIES[path]
    body = {"requests": [each | change for each in body["requests"]]} if path == "/score" else body | change
    assert ask(server.address, path, body)[0] in (200, 400)


def test_signals_end_it_while_a_body_arrives_and_others_wait() -> None:
    with running() as (address, process):
        server = Server(address)
        slow, waiting = server.connect(), [server.connect() for _ in range(2)]
        slow.sendall(begin("Content-Length: 1000", "{"))
        content = json.dumps(LONG).encode()
        for connection in waiting:
            head = f"POST /rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
        server.wait_for("waiting", 1)
        said = stopped(process, signal.SIGINT)
        assert process.returncode == 130
        assert "Traceback" not in said
        for connection in (slow, *waiting):
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert (response.status, b"the server ends" in response.read()) == (503, True)
            connection.close()


def test_impatient_signals_leave_no_traceback() -> None:
    with running() as (address, process):
        with closing(Server(address).connect()) as slow:
            slow.sendall(begin("Content-Length: 1000", "{"))
            Server(address).health()
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)  # it waits for the body
            said = stopped(process, signal.SIGINT)
        assert process.returncode in (130, -signal.SIGINT)  # the last one may find no Python any more
        assert "Traceback" not in said


def test_after_a_kill_a_new_server_takes_the_port() -> None:
    with running() as (address, process):
        connection = Server(address).connect()
        content = json.dumps(LONG).encode()
        connection.sendall(begin(f"Content-Length: {len(content)}").replace(b"/compute", b"/rank") + content)
        process.kill()
        process.wait()
        with closing(connection), pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            http.client.HTTPResponse(connection).begin()
        port = str(urlsplit(address).port)
        with subprocess.Popen([*COMMAND, "--port", port], stderr=subprocess.PIPE, text=True) as again:
            assert again.stderr is not None
            assert f":{port};" in again.stderr.readline()
            assert ask(address, "/health")[0] == 200
            again.terminate()


def test_a_token_of_any_characters_opens() -> None:
    token = "schlüssel ✓"
    with running("--token", f" {token} ") as (address, _):
        basic = base64.b64encode(f"any:{token}".encode()).decode()
        # A client writes the bytes of the header as latin-1.
        bearer = token.encode().decode("latin-1")
        for header, status in ((f"Bearer {bearer}", 200), (f"Basic {basic}", 200), ("Basic \xff", 401), (bearer, 401)):
            assert ask(address, "/health", headers={"Authorization": header})[0] == status
