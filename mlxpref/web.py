"""What the local servers share: a port taken before they start, JSON requests within bounds, errors as JSON."""

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlxpref.errors import ConfigError
from mlxpref.text import format_bytes, plain

LOCAL_HOSTS = ("127.0.0.1", "localhost")
"""The names of this machine in a request to itself."""
_PARSED_AT_ONCE = 1 << 16
"""Bytes of JSON that are parsed without a thread."""


def listen(host: str, port: int, remedy: str) -> socket.socket:
    """A socket that listens at an address, port 0 being any free one; clients may connect before a server accepts.

    ConfigError, which ends in `remedy`, if the address cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        where = f"--host {host} " * (host not in LOCAL_HOSTS)
        raise ConfigError(f"{where}--port {port}: cannot be taken ({reason}); {remedy}") from error


async def read_object(request: Request, most: int, seconds: float | None = None) -> dict[str, Any]:
    """The JSON object of a request of at most `most` bytes, read within `seconds`; HTTPException for anything else.

    The rest of a longer body is read and dropped: a client that still writes would not see the answer.
    """
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    content += chunk
                else:
                    content.clear()
    except TimeoutError as error:
        raise HTTPException(408, f"the request was not complete after {seconds:g} seconds") from error
    if size > most:
        more = f"a request of {format_bytes(size)}, more than {format_bytes(most)}: send less, or images as JPEG"
        raise HTTPException(413, more)
    return _object_in(content) if size < _PARSED_AT_ONCE else await run_in_threadpool(_object_in, content)


def _object_in(content: bytearray) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is no valid JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "a JSON object is expected")
    return body


def server_of(app: ASGIApp, **settings: Any) -> uvicorn.Server:
    """A server of HTTP that says nothing by itself; `settings` are uvicorn's."""
    config = uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, lifespan="off", ws="none", server_header=False,
        **settings,
    )  # fmt: skip
    return uvicorn.Server(config)


def error_response(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A response that says in one line what is wrong."""
    return JSONResponse({"error": plain(text)}, status_code=status, headers=headers)
