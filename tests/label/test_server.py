"""The server of the page: only to this machine, only to the page itself, pixels only; answers kept or refused whole."""

import http.client
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlxpref.errors import ConfigError
from mlxpref.label.server import LabelServer
from tests.conftest import picture
from tests.label_pages import pictures, served


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    with served(tmp_path / "p.jsonl", {"a hat": pictures(tmp_path / "pictures", 5)}) as running:
        yield running


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: LabelServer, path: str, body: bytes | None = None, /, token: str | None = None, **headers: str
) -> Answer:
    """A request as the page makes it, but for the headers that are given; one that is empty is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    sent = {"Host": f"127.0.0.1:{server.port}"}
    if body is not None:
        sent |= {"Origin": f"http://127.0.0.1:{server.port}", "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest("GET" if body is None else "POST", f"/{token or server.token}{path}", skip_host=True)
    for name, value in sent.items():
        if value:
            connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = Answer(connection.getresponse())
    connection.close()
    return answer


def send(server: LabelServer, path: str, **content: Any) -> Answer:
    return ask(server, path, json.dumps(content).encode())


def lines(server: LabelServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.session.file.path.read_text().splitlines()]


def test_answer_is_on_disk(server: LabelServer) -> None:
    state = ask(server, "/state").json
    after = send(server, "/answer", number=state["number"], choice="second", seconds=1.234)
    (line,) = lines(server)
    assert after.status == 200
    assert after.json["number"] == 2
    names = sorted(server.session.names[image] for image in state["question"])
    assert [Path(line["a"]).name, Path(line["b"]).name] == names
    better = server.session.names[state["question"][1]]
    assert Path(line[line["answer"]]).name == better
    assert (line["seconds"], line["prompt"]) == (1.23, "a hat")


def test_late_answer_changes_nothing(server: LabelServer) -> None:
    state = ask(server, "/state").json
    send(server, "/answer", number=1, choice="first", seconds=1)
    late = send(server, "/answer", number=1, choice="second", seconds=1)
    assert late.status == 409
    assert late.json["number"] == 2
    assert late.json["question"] != state["question"]
    assert send(server, "/undo", number=1).status == 409
    assert len(lines(server)) == 1


def test_undo_is_a_record_too(server: LabelServer) -> None:
    state = ask(server, "/state").json
    assert send(server, "/undo", number=1).status == 409, "there is nothing to take back"
    send(server, "/answer", number=1, choice="tie", seconds=None)
    back = send(server, "/undo", number=2)
    assert (back.status, back.json["question"], back.json["undo"]) == (200, state["question"], False)
    assert [line["answer"] for line in lines(server)] == ["tie", "undo"]
    assert lines(server)[1]["undoes"] == 1


@pytest.mark.parametrize(
    ("path", "body"), [("/", None), ("/state", None), ("/pictures/0", None), ("/answer", b"{}"), ("/nothing", None)]
)
def test_token_is_required(server: LabelServer, path: str, body: bytes | None) -> None:
    for token in ("x", server.token[:-1], server.token + "x", server.token.swapcase(), "%00", "%C3%A9"):
        answer = ask(server, path, body, token=token)
        assert answer.status == 403
        assert "the address lacks its token" in answer.json["error"]
    assert len(server.token) >= 32
    assert lines(server) == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "[::1]:{port}", ""])
def test_another_host_is_refused(server: LabelServer, host: str) -> None:
    answer = ask(server, "/state", Host=host.format(port=server.port))
    assert answer.status == 400
    assert b"question" not in answer.body


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1", ""]
)
def test_another_origin_is_refused(server: LabelServer, origin: str) -> None:
    address = origin.format(port=server.port)
    body = json.dumps({"number": 1, "choice": "first", "seconds": 1}).encode()
    assert ask(server, "/answer", body, Origin=address).status == 403
    if address:
        assert ask(server, "/state", Origin=address).status == 403
    assert lines(server) == []
    assert (
        ask(server, "/state", Origin=f"http://localhost:{server.port}", Host=f"localhost:{server.port}").status == 200
    )


@pytest.mark.parametrize(
    "path",
    [
        "/../state", "/pictures/../../pyproject.toml", "/pictures/..%2f..%2fetc%2fpasswd", "/pictures/%2e%2e/0",
        "/pictures//etc/passwd", "/pictures/-1", "/pictures/5", "/pictures/99999999999999999999", "/pictures/0.png",
        "/small/5", "/ranking/1", "/pictures/0%00", "/pictures/", "/label.js", "//",
    ],
)  # fmt: skip
def test_no_request_names_a_file(server: LabelServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status in (403, 404)
    assert answer.headers["Content-Type"] in ("application/json", "text/plain; charset=utf-8")
    assert len(answer.body) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"[" * 4000, b"{}", b'{"number": "1", "choice": "first"}',
        b'{"number": 1, "choice": "both"}', b'{"number": true, "choice": "first"}', b'{"number": 1.0, "choice": "tie"}',
        b'{"number": 1, "choice": ["first"]}', b"\xff\xfe", b'{"x": "' + b"a" * 5000 + b'"}',
    ],
)  # fmt: skip
def test_malformed_answer_is_refused(server: LabelServer, body: bytes) -> None:
    for path in ("/answer", "/undo"):
        answer = ask(server, path, body)
        if path == "/answer" or b"number" not in body:
            assert answer.status == (413 if len(body) > 4096 else 400)
            assert answer.json["error"]
    assert lines(server) == []


@pytest.mark.parametrize("seconds", ["1", None, -1, 1e9, float("nan"), [1]])
def test_impossible_seconds_are_left_out(server: LabelServer, seconds: Any) -> None:
    assert send(server, "/answer", number=1, choice="first", seconds=seconds).status == 200
    assert lines(server)[0]["seconds"] is None


def test_only_pixels_are_sent(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    folder = tmp_path / "pictures"
    pictures(folder, 1)
    picture(7, (64, 32)).save(folder / "turned.jpg", exif=exif, comment=b"my name")
    large = Image.new("RGB", (3000, 1500), "red")
    large.save(folder / "large.png", pnginfo=None)
    with served(tmp_path / "p.jsonl", {"x": sorted(folder.iterdir())}) as server:
        sizes = {}
        for number, name in enumerate(server.session.names):
            for kind, form in (("pictures", "PNG"), ("small", "WEBP")):
                answer = ask(server, f"/{kind}/{number}")
                assert answer.headers["Content-Type"] == f"image/{form.lower()}"
                assert b"where I live" not in answer.body
                assert b"my name" not in answer.body
                with Image.open(io.BytesIO(answer.body)) as image:
                    assert image.format == form
                    assert not image.getexif()
                    sizes[kind, name] = image.size
                    if name == "0000.png":
                        assert image.convert("RGB").tobytes() == picture(0, (60, 40)).tobytes()
        assert sizes["pictures", "turned.jpg"] == (32, 64)  # upright
        assert sizes["pictures", "large.png"] == (2048, 1024)
        assert sizes["small", "large.png"] == (160, 80)


def test_security_headers(server: LabelServer) -> None:
    for path in ("/", "/state", "/pictures/0", "/nothing"):
        headers = ask(server, path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "server" not in headers
    policy = ask(server, "/").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_unsaved_answer(server: LabelServer) -> None:
    path = server.session.file.path
    path.rename(path.with_suffix(".moved"))
    answer = send(server, "/answer", number=1, choice="first", seconds=1)
    assert answer.status == 500
    assert "this answer is not kept; put it back" in answer.json["error"]
    path.with_suffix(".moved").rename(path)
    assert ask(server, "/state").json["number"] == 1
    assert send(server, "/answer", number=1, choice="first", seconds=1).status == 200
    assert len(lines(server)) == 1


def test_missing_picture(server: LabelServer) -> None:
    server.session.pictures.images[2].unlink()
    answer = ask(server, "/pictures/2")
    assert answer.status == 500
    assert "cannot be opened" in answer.json["error"]
    assert ask(server, "/pictures/1").status == 200


def test_port_in_use(server: LabelServer) -> None:
    with pytest.raises(ConfigError, match=f"--port {server.port}: cannot be taken"):
        LabelServer(server.session, server.port)


def test_only_this_machine_is_served(server: LabelServer) -> None:
    with pytest.raises(OSError, match=r"."):  # another address of this machine, where it has one
        socket.create_connection(("127.0.0.2", server.port), timeout=5).close()


def test_the_ranking_follows_the_answers(server: LabelServer) -> None:
    for _ in range(11):  # ten pairs, and one of them again
        state = ask(server, "/state").json
        if state["question"] is None:
            break
        better = "first" if state["question"][0] > state["question"][1] else "second"
        send(server, "/answer", number=state["number"], choice=better, seconds=1)
    ranking = ask(server, "/ranking/0").json
    assert [image["image"] for image in ranking["images"]] == [4, 3, 2, 1, 0]
    assert all(image["low"] < image["strength"] < image["high"] for image in ranking["images"])
    assert ranking["ticks"][0] <= min(image["low"] for image in ranking["images"])
    assert ask(server, "/state").json["asked"] == 10
