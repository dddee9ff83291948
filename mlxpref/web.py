"""What the local servers share: a port taken before they start, JSON requests within bounds, errors as JSON."""

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

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
        raise HTTPException(413, f"a request of {format_bytes(size)}, more than {format_bytes(most)}")
    body = _parse(content) if size < _PARSED_AT_ONCE else await run_in_threadpool(_parse, content)
    if not isinstance(body, dict):
        raise HTTPException(400, "a JSON object is expected")
    return body


def _parse(content: bytearray) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def error_response(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A response that says in one line what is wrong."""
    return JSONResponse({"error": plain(text)}, status_code=status, headers=headers)
