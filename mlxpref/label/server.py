"""The page's server: it answers only this machine, the address with the token, and its own page.

Requests name pictures by number, never files. The server sends only the pixels of an image file.
"""

import secrets
from collections.abc import Awaitable, Callable
from threading import Thread
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mlxpref.errors import MlxprefError
from mlxpref.label.session import LabelSession
from mlxpref.report.html import page_script, render_page
from mlxpref.text import plain
from mlxpref.web import LOCAL_HOSTS, error_response, listen, read_object, server_of

_MAX_BYTES = 4096  # of a request; an answer takes some sixty
_MAX_SECONDS = 86_400.0  # of an answer; after a day the rater was away
_KEEP_ALIVE = 3600  # seconds that a connection without requests stays open while a rater thinks
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
    """Serves one labelling. The constructor takes the port, so `address` is known before `run`."""

    def __init__(self, session: LabelSession, port: int = 0) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        self._socket = listen(LOCAL_HOSTS[0], port, "leave it out")
        self.port = int(self._socket.getsockname()[1])
        self._server = server_of(self._app(), timeout_graceful_shutdown=1, timeout_keep_alive=_KEEP_ALIVE)

    @property
    def address(self) -> str:
        """The page's address; anyone who knows it can answer."""
        return f"http://{LOCAL_HOSTS[0]}:{self.port}/{self.token}/"

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
        """Let `run` return after the open requests; any thread may call it."""
        self._server.should_exit = True

    def _app(self) -> Starlette:
        root = "/" + self.token
        return Starlette(
            routes=[
                Route(root + "/", self._page),
                Route(root + "/state", self._state),
                Route(root + "/pictures/{number:int}", self._picture),
                Route(root + "/small/{number:int}", self._small),
                Route(root + "/ranking/{task:int}", self._ranking),
                Route(root + "/answer", self._answer, methods=["POST"]),
                Route(root + "/undo", self._undo, methods=["POST"]),
                Route(root + "/finish", self._finish, methods=["POST"]),
            ],
            # Another site's name may lead to this machine, too: the server accepts only its own names.
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=self._guard),
                Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS, www_redirect=False),
            ],
            exception_handlers={MlxprefError: _on_error, HTTPException: _on_error, Exception: _on_error},
        )

    async def _guard(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse requests of other pages and without the token; give every response its headers."""
        origin, own = request.headers.get("origin"), [f"http://{host}:{self.port}" for host in LOCAL_HOSTS]
        token = str(request.scope["path"]).lstrip("/").partition("/")[0]
        if origin not in own and (origin or request.method == "POST"):
            response: Response = error_response(403, "only the page itself may ask")
        elif not secrets.compare_digest(token.encode(), self.token.encode()):
            response = error_response(403, "the address lacks its token: open the one that `mlxpref label` printed")
        else:
            response = await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    async def _page(self, request: Request) -> Response:
        script = page_script("label.js")
        page = render_page(
            "label.html",
            script=script["script"],
            data={
                "prompts": [plain(task.prompt) for task in self.session.tasks],
                "names": [plain(name) for name in self.session.names],
                "output": plain(self.session.file.path),
            },
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY.format(script["script_hash"])})

    async def _state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.session.state))

    async def _picture(self, request: Request) -> Response:
        return await self._image(request, self.session.pictures.whole, "image/png")

    async def _small(self, request: Request) -> Response:
        return await self._image(request, self.session.pictures.small, "image/webp")

    async def _image(self, request: Request, encode: Callable[[int], bytes], kind: str) -> Response:
        number = _below(request.path_params["number"], len(self.session.pictures.images))
        content = await run_in_threadpool(encode, number)
        return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def _ranking(self, request: Request) -> Response:
        task = _below(request.path_params["task"], len(self.session.tasks))
        return JSONResponse(await run_in_threadpool(self.session.ranking, task))

    async def _answer(self, request: Request) -> Response:
        body = await read_object(request, _MAX_BYTES)
        number, choice, seconds = (body.get(name) for name in ("number", "choice", "seconds"))
        if type(number) is not int or choice not in ("first", "second", "tie", "skip"):
            raise HTTPException(400, "an answer is {number, choice, seconds}")
        if not isinstance(seconds, int | float) or not 0 <= seconds < _MAX_SECONDS:
            seconds = None
        return await self._change(self.session.answer, number, choice, seconds and round(float(seconds), 2))

    async def _undo(self, request: Request) -> Response:
        number = (await read_object(request, _MAX_BYTES)).get("number")
        if type(number) is not int:
            raise HTTPException(400, "an undo is {number}")
        return await self._change(self.session.undo, number)

    async def _change(self, change: Callable[..., bool], *arguments: Any) -> Response:
        """Make a change and respond with the new state; 409 where the request was about an earlier state."""
        success = await run_in_threadpool(change, *arguments)
        if self.session.questions.is_low():
            # In the background: a rater does not wait for a fit of many images.
            Thread(target=self.session.questions.refill, daemon=True).start()
        return JSONResponse(await run_in_threadpool(self.session.state), status_code=200 if success else 409)

    async def _finish(self, request: Request) -> Response:
        self.end()  # the server sends this response first
        return JSONResponse({})


def _below(number: int, count: int) -> int:
    if number >= count:
        raise HTTPException(404, "there is no such picture or prompt")
    return number


def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return error_response(error.status_code, error.detail)
    if isinstance(error, MlxprefError):
        return error_response(500, str(error))
    return error_response(500, f"a mistake in mlxpref ({type(error).__name__}); no answer is lost: reload the page")
