"""The server of the page: on this machine only, to whoever has the address with its token, and to no other page.

Nothing in a request names a file: pictures have numbers. What an image file holds beside its pixels is never sent.
"""

import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from threading import Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mlxpref.errors import ConfigError, MlxprefError
from mlxpref.label.session import LabelSession
from mlxpref.report.html import page_script, render_page
from mlxpref.text import plain

__all__ = ["LabelServer"]

_HERE = "127.0.0.1"
_MOST_BYTES = 4096
"""What a request may bring along; an answer takes some sixty bytes."""
_LONGEST = 86_400.0
"""Seconds that an answer may have taken; who took longer was away."""
_PATIENCE = 3600
"""Seconds that a connection without requests stays open: a rater may think for longer than servers usually wait."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address has the token
    "X-Content-Type-Options": "nosniff",
}
_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; script-src '{}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class LabelServer:
    """Serves one labelling. The port is taken when it is made, so that `address` can be told before `run`."""

    def __init__(self, labelling: LabelSession, port: int = 0) -> None:
        self.labelling = labelling
        self.token = secrets.token_urlsafe(24)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((_HERE, port))
            self._socket.listen()  # who opens the page before `run` waits for it
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"--port {port}: cannot be taken ({error.strerror}); leave it out") from error
        self.port = int(self._socket.getsockname()[1])
        self._hosts = {f"{name}:{self.port}" for name in (_HERE, "localhost")}
        config = uvicorn.Config(
            self._app(), log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=1, timeout_keep_alive=_PATIENCE,
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    @property
    def address(self) -> str:
        """Where the page is; whoever knows it can answer."""
        return f"http://{_HERE}:{self.port}/{self.token}/"

    def run(self) -> bool:
        """Serve until the page says that it is finished (True), or Ctrl-C (False)."""
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            return False
        finally:
            self._socket.close()
        return True

    def end(self) -> None:
        """Let `run` return, from any thread; what is being answered is answered."""
        self._server.should_exit = True

    def _app(self) -> Starlette:
        at = "/" + self.token
        return Starlette(
            routes=[
                Route(at + "/", self._page),
                Route(at + "/state", self._state),
                Route(at + "/pictures/{number:int}", self._picture),
                Route(at + "/small/{number:int}", self._small),
                Route(at + "/ranking/{sheet:int}", self._ranking),
                Route(at + "/answer", self._answer, methods=["POST"]),
                Route(at + "/undo", self._undo, methods=["POST"]),
                Route(at + "/finish", self._finish, methods=["POST"]),
            ],
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._guarded)],
            exception_handlers={MlxprefError: _failed, HTTPException: _refused, Exception: _broken},
        )

    async def _guarded(self, request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse requests of other pages and without the token; other sites' names may lead to this machine, too."""
        why = self._objection(request)
        response = _error(*why) if why else await go_on(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def _objection(self, request: Request) -> tuple[int, str] | None:
        origins = {f"http://{host}" for host in self._hosts}
        origin = request.headers.get("origin")
        if request.headers.get("host") not in self._hosts:
            return 400, f"this page is http://{_HERE}:{self.port} only"
        if origin not in origins and (origin is not None or request.method == "POST"):
            return 403, "only the page itself may ask"
        token = str(request.scope["path"]).lstrip("/").partition("/")[0]
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            return 403, "the address lacks its token: open the one that `mlxpref label` printed"
        return None

    async def _page(self, request: Request) -> Response:
        script = page_script("label.js")
        labelling = self.labelling
        page = render_page(
            "label.html",
            script=script["script"],
            data={
                "prompts": [plain(sheet.prompt) for sheet in labelling.sheets],
                "names": [plain(name) for name in labelling.names],
                "output": plain(labelling.file.path),
            },
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY.format(script["script_hash"])})

    async def _state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.labelling.state))

    async def _picture(self, request: Request) -> Response:
        return await self._image(request, self.labelling.pictures.whole, "image/png")

    async def _small(self, request: Request) -> Response:
        return await self._image(request, self.labelling.pictures.small, "image/webp")

    async def _image(self, request: Request, encode: Callable[[int], bytes], kind: str) -> Response:
        number = _below(request.path_params["number"], len(self.labelling.pictures.images))
        content = await run_in_threadpool(encode, number)
        return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def _ranking(self, request: Request) -> Response:
        sheet = _below(request.path_params["sheet"], len(self.labelling.sheets))
        return JSONResponse(await run_in_threadpool(self.labelling.ranking, sheet))

    async def _answer(self, request: Request) -> Response:
        asked = await _body(request)
        number, choice, seconds = (asked.get(name) for name in ("number", "choice", "seconds"))
        if type(number) is not int or choice not in ("first", "second", "tie", "skip"):
            raise HTTPException(400, "an answer is {number, choice, seconds}")
        if not isinstance(seconds, int | float) or not 0 <= seconds < _LONGEST:
            seconds = None
        return await self._changed(self.labelling.answer, number, choice, seconds and round(float(seconds), 2))

    async def _undo(self, request: Request) -> Response:
        number = (await _body(request)).get("number")
        if type(number) is not int:
            raise HTTPException(400, "an undo is {number}")
        return await self._changed(self.labelling.undo, number)

    async def _changed(self, change: Callable[..., bool], *arguments: Any) -> Response:
        """Make a change and answer with the state after it; 409 where it was about an earlier state."""
        done = await run_in_threadpool(change, *arguments)
        if self.labelling.questions.is_low():
            # Beside the work: who answers does not wait for a fit of many images.
            Thread(target=self.labelling.questions.refill, daemon=True).start()
        return JSONResponse(await run_in_threadpool(self.labelling.state), status_code=200 if done else 409)

    async def _finish(self, request: Request) -> Response:
        self.end()  # which lets this answer be sent
        return JSONResponse({})


def _below(number: int, count: int) -> int:
    if number >= count:
        raise HTTPException(404, "there is no such picture or prompt")
    return number


async def _body(request: Request) -> dict[str, Any]:
    """A small JSON object."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise HTTPException(413, f"more than {_MOST_BYTES} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, "a JSON object is expected")
    return found


def _failed(request: Request, error: Exception) -> Response:
    return _error(500, str(error))


def _broken(request: Request, error: Exception) -> Response:
    return _error(500, f"a mistake in mlxpref ({type(error).__name__}); what was answered is kept: reload the page")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": plain(text)}, status_code=status)
