"""A collector for tests: takes spans as OTLP over HTTP on a loopback port, and keeps them."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest


@dataclass(frozen=True)
class Received:
    """A span as it came. Ids in hexadecimal, times in nanoseconds of Unix time; no parent is an empty id."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    begun_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    error: str | None

    @property
    def ms(self) -> float:
        return (self.ended_ns - self.begun_ns) / 1e6

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"


class Receiver:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Received] = []

    def below(self, parent_id: str, name: str | None = None) -> list[Received]:
        """The children of a span in the order of their times."""
        found = [one for one in self.spans if one.parent_id == parent_id and name in (None, one.name)]
        return sorted(found, key=lambda one: one.begun_ns)

    def one(self, name: str) -> Received:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _read(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_received(service, span) for span in scope.spans]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Skips the test where OpenTelemetry is not installed, and fails it in CI."""
    if "CI" not in os.environ:
        pytest.importorskip("opentelemetry.proto", reason="pip install 'fewstep[tracing]'")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    taken = Receiver(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _received(service: str, span: Any) -> Received:
    return Received(
        service=service,
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begun_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        attributes=_read(span.attributes),
        error=span.status.message if span.status.code == 2 else None,
    )


def _read(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
