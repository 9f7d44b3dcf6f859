"""What every dialect is made of: reading a body, documenting an operation, sending events.

A dialect is one file with `DIALECT`, an object whose `router(gateway)` has the routes and whose
`schemas` are the records that their documents name. Bodies are msgspec records and routes hand their
`Request` straight to the endpoint: that costs a tenth of what pydantic and dependency injection do,
and the OpenAPI document is made from the very types that decode and encode.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engines.errors import FewstepError, InternalError, InvalidRequest
from server import http_errors
from server.gateway import Gateway
from server.media import OutputFormat

MIME: dict[OutputFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "mp4": "video/mp4",
}
FORM = "multipart/form-data"
_HEARTBEAT_S = 10.0
encode = msgspec.json.Encoder().encode
Body = TypeVar("Body")


class Dialect(Protocol):
    """One API dialect. A busy one's paths are looked through first: each look costs microseconds."""

    busy: bool
    schemas: tuple[type, ...]

    def router(self, gateway: Gateway) -> APIRouter: ...


class _Direct(APIRoute):
    """A route whose endpoint takes the request itself and returns the response itself."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def new_router(tag: str) -> APIRouter:
    return APIRouter(tags=[tag], route_class=_Direct)


# --- bodies ----------------------------------------------------------------------------------------


async def read_json(request: Request, decoder: "msgspec.json.Decoder[Body]") -> tuple[Body, bytes]:
    """The decoded body of a JSON request, and its bytes.

    Raises:
        HTTPException: 415, it is something else.
        InvalidRequest: not JSON, or not what the decoder's type says; `param` is the field.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"send the body as application/json, not {kind or 'without a content-type'}")
    data = await request.body()
    try:
        return decoder.decode(data), data
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def invalid(text: str) -> InvalidRequest:
    """What msgspec found: "Expected `int` >= 1 - at `$.n`", "Object contains unknown field `foo`"."""
    what, _, path = text.partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    for marker in ("unknown field `", "missing required field `"):
        if marker in what:
            name = what.partition(marker)[2].rstrip("`")
            field = f"{field}.{name}" if field else name
            verb = "is not known here: remove it" if "unknown" in marker else "is required"
            return InvalidRequest(f"field '{field}' {verb}", param=field)
    return InvalidRequest(f"{field}: {what}" if field else what, param=field or None)


def respond(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")


# --- documents -------------------------------------------------------------------------------------


def ref(record: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{record.__name__}"}


def json_of(record: type) -> dict[str, Any]:
    return {"application/json": {"schema": ref(record)}}


def responses(ok: Mapping[int, dict[str, Any]], *failures: int) -> dict[int | str, dict[str, Any]]:
    """Every status of an operation: its good ones, and the failures that all have the one error body."""
    always = (400, 401, 403, 500, 503)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": _DESCRIPTIONS[status], "content": json_of(http_errors.ErrorResponse)}
        for status in sorted({*always, *failures})
    }
    return errors | {status: answer for status, answer in ok.items()}


_DESCRIPTIONS = {
    400: "The request cannot be served as it stands; `param` names the field",
    401: "No API key, or an unknown one",
    403: "The key lacks the scope, or the signature is wrong",
    404: "There is no such thing, or it belongs to another key",
    406: "None of the accepted types can be made",
    409: "It contradicts what there is already",
    410: "It was there and has expired",
    413: "The body is too large, or an upload has too many pixels",
    415: "The body is of another type than documented, or an upload is no PNG, WebP or JPEG",
    429: "The queue is too long; `retry-after` says when it will not be",
    500: "A fault of ours",
    501: "Not built",
    503: "Nothing can serve at the moment; `retry-after` says when to ask again",
    504: "Not answered within its time",
}


def parameter(name: str, where: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": text}


def in_path(name: str, text: str) -> dict[str, Any]:
    return parameter(name, "path", {"type": "string"}, text)


def operation(
    *parameters: dict[str, Any], body: type | None = None, form: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The part of an operation that a direct route has to say itself."""
    extra: dict[str, Any] = {"parameters": list(parameters)} if parameters else {}
    content = (json_of(body) if body is not None else {}) | (form or {})
    if content:
        extra["requestBody"] = {"required": True, "content": content}
    return extra


IDEMPOTENCY = parameter(
    "Idempotency-Key",
    "header",
    {"type": "string", "minLength": 1, "maxLength": 255},
    "The same key with the same body gets the same answer",
)


# --- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; `name` also stands in the data as `type`, for those who read only one."""

    name: str | None
    data: bytes
    id: str | None = None

    def encode(self) -> bytes:
        head = f"id: {self.id}\n" if self.id is not None else ""
        head += f"event: {self.name}\n" if self.name is not None else ""
        return head.encode() + b"data: " + self.data + b"\n\n"


def error_event(error: FewstepError, name: str | None = None) -> Event:
    return Event(name, encode(http_errors.ErrorResponse(error=http_errors.info(error))))


class EventStream(Response):
    """Server-sent events until the iterator ends or the client goes, with a comment when nothing happens.

    `gone` is called once if the client leaves before the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[Event], *, gone: Callable[[], None], headers: dict[str, str] | None = None
    ) -> None:
        self.status_code, self.background = 200, None
        self._events, self._gone = events, gone
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        left = asyncio.ensure_future(until_gone(receive))
        try:
            if await self._send_all(send, left):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                self._gone()
        finally:
            left.cancel()

    async def _send_all(self, send: Send, left: "asyncio.Future[None]") -> bool:
        """Whether the events ended before the client left."""
        coming: asyncio.Future[Event | None] = asyncio.ensure_future(_next(self._events))
        both: set[asyncio.Future[Any]]
        try:
            while not left.done():
                both = {coming, left}
                await asyncio.wait(both, timeout=_HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                chunk = b": still here\n\n"
                if coming.done():
                    event = coming.result()
                    if event is None:
                        return True
                    chunk = event.encode()
                    coming = asyncio.ensure_future(_next(self._events))
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            return False
        finally:
            coming.cancel()


async def _next(events: AsyncIterator[Event]) -> Event | None:
    """The next event; a failure is one too, and the last."""
    try:
        return await anext(events, None)
    except FewstepError as error:
        return error_event(error)
    except Exception as error:  # a border: the client is always answered
        return error_event(InternalError(f"the stream broke off here: {type(error).__name__}"))


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Watched:
    """Calls `gone` if the client leaves while the context is open; `None` watches nothing."""

    def __init__(self, request: Request, gone: Callable[[], None] | None) -> None:
        self._receive, self._gone = request.receive, gone
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._gone is not None:
            self._task = asyncio.get_running_loop().create_task(self._watch(self._gone))

    async def __aexit__(self, *failure: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self, gone: Callable[[], None]) -> None:
        await until_gone(self._receive)
        gone()


def format_of(data: bytes) -> OutputFormat:
    """Of a picture or video that we encoded, by its first bytes."""
    if data.startswith(b"\x89PNG"):
        return "png"
    if data[4:8] == b"ftyp":
        return "mp4"
    return "webp" if data[8:12] == b"WEBP" else "jpeg"
