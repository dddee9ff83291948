"""The HTTP server: the network in a thread of its own, the judge in the one that runs the server.

Every request is read within bounds, waits for its turn, and gets its own answer; one whose client goes is ended.
"""

import asyncio
import base64
import binascii
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from socket import socket as Socket
from threading import Thread
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxpref.errors import MlxprefError
from mlxpref.judge.judge import Judge
from mlxpref.log import logger
from mlxpref.reward.group import RewardSettings
from mlxpref.serve.chat import read_chat
from mlxpref.serve.compute import read_compute
from mlxpref.serve.device_queue import BusyError, DeviceQueue, EndedError, Work
from mlxpref.serve.limits import BODY_BYTES, BODY_SECONDS, HELD_BYTES
from mlxpref.serve.rank import read_rank
from mlxpref.serve.score import PROTOCOL_VERSION, REWARDS, read_score
from mlxpref.text import one_line, shorten
from mlxpref.web import LOCAL_HOSTS, error_response, read_object, server_of

_CLIENT_GONE = 499
"""The status of an answer that nobody reads, as nginx has it."""
_SAID = 20
"""How many errors the server's own output has."""
_SECONDS_TO_END = 5
"""In which open connections may end."""


class RewardServer:
    """Serves one judge at a socket that listens already, to those who have the token, if there is one."""

    def __init__(self, judge: Judge, socket: Socket, token: str = "", settings: RewardSettings | None = None) -> None:
        self.queue = DeviceQueue(judge)
        self._judge, self._settings, self._token = judge, settings or RewardSettings(), token
        self._held, self._room = 0, asyncio.Condition()
        self._errors, self._cancelled = 0, 0
        self._socket = socket
        self._host, self.port = socket.getsockname()[:2]
        self._server = server_of(self._app(), timeout_graceful_shutdown=_SECONDS_TO_END)

    @property
    def address(self) -> str:
        """The address for clients."""
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}"

    def run(self) -> None:
        """Serve until an interrupt, which is raised, or `end`; requests that wait then are answered with 503."""
        # A daemon: a second Ctrl-C ends the process without it.
        network = Thread(target=self._server.run, args=([self._socket],), name="network", daemon=True)
        network.start()
        try:
            self.queue.run()
        finally:
            self._server.should_exit = True
            network.join()
            self._socket.close()

    def end(self) -> None:
        """Let `run` return after the requests that wait; any thread may call it."""
        self.queue.end()

    def _app(self) -> Starlette:
        is_local = self._host in LOCAL_HOSTS
        settings = self._settings
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/rewards", self._rewards),
                Route("/v1/models", self._models),
                self._route("/compute", lambda body: read_compute(body, settings)),
                self._route("/score", lambda body: read_score(body, settings)),
                self._route("/rank", read_rank),
                self._route("/v1/chat/completions", read_chat, _as_openai),
            ],
            middleware=[
                # Another site's name may lead to this machine, too: the server accepts only its own names.
                *([Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS, www_redirect=False)] * is_local),
                Middleware(_Guard, token=self._token),
            ],
            exception_handlers={HTTPException: _on_http_error},
        )

    def _route(
        self,
        path: str,
        read: Callable[[Mapping[str, Any]], Work],
        error_form: Callable[[int, str, Mapping[str, str] | None], Response] = error_response,
    ) -> Route:
        """A route whose answers are the judge's work: `read` makes it of the JSON, `error_form` writes errors."""

        async def answer(request: Request) -> Response:
            try:
                result = await self._result(request, read)
                if isinstance(result, dict) and "error" in result:
                    self._note_error(path, 200, result["error"])
                # With escapes: what is sent back of a request may be half of a surrogate pair.
                return Response(json.dumps(result, allow_nan=False), media_type="application/json")
            except ClientDisconnect:
                self._cancelled += 1
                return Response(status_code=_CLIENT_GONE)
            except (Exception, asyncio.CancelledError) as error:
                status, text, headers = _error_of(error)
                self._note_error(path, status, text)
                return error_form(status, text, headers)

        return Route(path, answer, methods=["POST"])

    async def _result(self, request: Request, read: Callable[[Mapping[str, Any]], Work]) -> Any:
        """What the judge says to one request; ClientDisconnect if nobody waits for it any more."""
        size = min(int(request.headers.get("content-length") or BODY_BYTES), BODY_BYTES)
        async with self._held_bytes(size):
            body = await read_object(request, BODY_BYTES, BODY_SECONDS)
            work = await run_in_threadpool(read, body)
            del body
            job = self.queue.put(work)
            done = asyncio.wrap_future(job.answer)
            gone = asyncio.ensure_future(_disconnection(request))
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not done.done():
                self.queue.cancel(job)
                done.cancel()
                raise ClientDisconnect
            return done.result()

    def _note_error(self, path: str, status: int, text: str) -> None:
        """Count an error, and say the first ones: many clients do not show them, but those that are to come again do.

        Not all: nobody may read this output, and a full pipe would stop the server.
        """
        self._errors += 1
        if status != 429 and self._errors <= _SAID:
            more = " (of further errors /health has the number)" if self._errors == _SAID else ""
            logger.warning(f"{path}: {status}: {shorten(text, 300)}{more}")

    @asynccontextmanager
    async def _held_bytes(self, size: int) -> AsyncIterator[None]:
        """Hold so many bytes of a body, as soon as there is room: some clients give up at a 429."""
        async with self._room:
            await self._room.wait_for(lambda: self._held + size <= HELD_BYTES)
            self._held += size
        try:
            yield
        finally:
            self._held -= size
            async with self._room:
                self._room.notify_all()

    async def _health(self, request: Request) -> Response:
        counts, judge = self.queue.counts, self._judge
        return JSONResponse(
            {
                "status": "ok",
                "model": judge.name,
                "adapter": str(judge.adapter) if judge.adapter else None,
                "profile": judge.profile.name,
                "think": judge.settings.think,
                "rewards": {name: ["ready"] for name in REWARDS},
                "protocol_version": PROTOCOL_VERSION,
                "waiting": self.queue.waiting,
                "requests": counts.requests,
                "cancelled": self._cancelled,
                "errors": self._errors,
                "comparisons": counts.comparisons,
                "seconds": round(counts.seconds, 3),
                "seconds_per_pair": counts.seconds_per_pair,
            }
        )

    async def _rewards(self, request: Request) -> Response:
        return JSONResponse({"rewards": list(REWARDS)})

    async def _models(self, request: Request) -> Response:
        model = {"id": self._judge.name, "object": "model", "created": 0, "owned_by": "mlxpref"}
        return JSONResponse({"object": "list", "data": [model]})


class _Guard:
    """Refuses requests of web pages, and those without the token, if there is one: as Bearer, or as a password."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path = scope["path"] = re.sub("/+", "/", scope["path"])  # of an address that ends in one
        error_form = _as_openai if path.startswith("/v1/") else error_response
        if "origin" in headers:
            response: ASGIApp = error_form(403, "pages of a browser may not ask this server")
        elif self._token and not secrets.compare_digest(_token_in(headers.get("authorization", "")), self._token):
            line = "no token, or a wrong one: send `Authorization: Bearer TOKEN`, or ask http://any:TOKEN@host:port"
            response = error_form(401, line, {"WWW-Authenticate": "Basic"})
        else:
            response = self._app
        await response(scope, receive, send)


def _token_in(authorization: str) -> bytes:
    """The token in a header: that of a Bearer, or the password of Basic."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1")  # as the header came
    try:
        return base64.b64decode(value).partition(b":")[2] if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return b""


async def _disconnection(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_of(error: BaseException) -> tuple[int, str, Mapping[str, str] | None]:
    """The status, the line and the headers that an error is answered with."""
    match error:
        case HTTPException():
            return error.status_code, error.detail, error.headers
        case BusyError():
            return 429, str(error), {"Retry-After": str(error.seconds)}
        case EndedError() | asyncio.CancelledError():  # uvicorn cancels at its end
            return 503, "the server ends", None
        case MlxprefError():
            return 400, str(error), None
    return 500, f"a mistake in mlxpref ({one_line(error)}); the server goes on", None


def _as_openai(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 429 else "server_error"
    error = {"message": text, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, error.detail, error.headers)
