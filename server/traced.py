"""The ASGI layer around all others where requests are traced; without tracing it is not there.

What is below finds the request's own span in the header `traceparent` and hands it on as it would hand on the client's.
"""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs, tracing
from server.tracing import Span, Tracing

_PREFIX = "/v1/"  # probes and metrics are no work
_HEADER = b"traceparent"
_TOLD = {b"x-request-id": "fewstep.http.request_id", b"x-generation-id": "fewstep.request.id"}


class Traced:
    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_PREFIX):
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER), None)
        span = self._tracing.begin(scope["method"], given, at_ns=tracing.now_ns(), kind="SERVER")
        headers = [header for header in scope["headers"] if header[0] != _HEADER]
        scope = {**scope, "headers": [*headers, (_HEADER, span.traceparent.encode())]}
        said: dict[str, Any] = {"http.response.status_code": 499}  # a client that left before there was an answer

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                said["http.response.status_code"] = message["status"]
                for name, value in message.get("headers", ()):
                    if key := _TOLD.get(name):
                        said[key] = value.decode("latin-1")
            await send(message)

        tokens = logs.trace_id.set(span.trace_id), tracing.exemplar.set(span.exemplar)
        try:
            await self._app(scope, receive, noted)
        except Exception:
            said["http.response.status_code"] = 500  # whatever had been said before
            raise
        finally:
            tracing.exemplar.reset(tokens[1])
            logs.trace_id.reset(tokens[0])
            _end(span, scope, said)


def _end(span: Span, scope: Scope, said: dict[str, Any]) -> None:
    route = getattr(scope.get("route"), "path", None)
    described = {"http.request.method": scope["method"], "url.path": scope["path"], **said}
    if route is not None:
        described["http.route"] = route
    status = said["http.response.status_code"]
    error = f"status {status}" if status >= 500 else None  # what a client did wrong is no error of the server's
    name = f"{scope['method']} {route}" if route else None
    span.end(tracing.now_ns(), attributes=described, name=name, error=error)
