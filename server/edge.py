"""The outermost ASGI layer: request ids, the limit of a body's size, and an answer to what nobody foresaw.

Plain ASGI, because a middleware class with tasks and queues would cost more than the request does.
"""

import logging
import re
import secrets
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import http_errors, logs

_logger = logging.getLogger(__name__)
_SANE = re.compile(rb"^[A-Za-z0-9._:/+=-]{1,128}$")


class Edge:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, uploads: Collection[str]) -> None:
        """`uploads` are the paths whose forms may be larger, because pictures are in them."""
        self._app = app
        self._max_body_bytes, self._max_upload_bytes = max_body_bytes, max_upload_bytes
        self._uploads = frozenset(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, length, is_form = _headers(scope)
        limit = self._max_upload_bytes if is_form and scope["path"] in self._uploads else self._max_body_bytes
        request_id = given if given and _SANE.match(given) else secrets.token_hex(12).encode()
        token = logs.request_id.set(request_id.decode())
        started = False

        async def stamped(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, _limited(receive, length, limit), stamped)
        except HTTPException as error:  # raised by the limit while a body was read
            await http_errors.respond(error)(scope, receive, stamped)
        except Exception as error:
            _logger.exception("unforeseen error", extra={"path": scope["path"], "method": scope["method"]})
            if started:
                raise
            await http_errors.respond(error)(scope, receive, stamped)
        finally:
            logs.request_id.reset(token)


def _limited(receive: Receive, length: int | None, limit: int) -> Receive:
    """`receive` that refuses a body which is, or grows, too large."""
    if length is not None and length <= limit:
        return receive  # the server holds the client to the length it gave
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > limit or (length is not None and message["type"] == "http.request"):
            raise HTTPException(413, f"a body may have {limit} bytes at most: send less")
        return message

    return counted


def _headers(scope: Scope) -> tuple[bytes | None, int | None, bool]:
    """The incoming request id, the length that the body is said to have, and whether it is a form with files."""
    request_id, length, is_form = None, None, False
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            request_id = value
        elif name == b"content-length" and value.isdigit():
            length = int(value)
        elif name == b"content-type":
            is_form = value.lower().startswith(b"multipart/form-data")
    return request_id, length, is_form
