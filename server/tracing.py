"""OpenTelemetry spans of requests, swaps and jobs, told by its own variables and sent by OTLP over HTTP.

A span is made from times that are kept anyway, when what it is of has ended: nothing here is entered and left by the
threads that work. Without an endpoint there is no `Tracing` and OpenTelemetry's SDK is not even imported.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from engines.errors import InvalidRequest

Attributes = Mapping[str, str | int | float | bool]
Mark = tuple[str, int]
"""What began, and when: nanoseconds of Unix time."""
Kind = Literal["INTERNAL", "SERVER", "CONSUMER"]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FLUSH_S = 3.0
"""A process that stops waits so long at most for a collector to take its last spans."""

exemplar: ContextVar[dict[str, str] | None] = ContextVar("exemplar", default=None)
"""What an observation of a histogram is marked with while a sampled request is answered."""


@dataclass(frozen=True, slots=True)
class Part:
    """A child that has ended. Nanoseconds of Unix time."""

    name: str
    begun_ns: int
    ended_ns: int
    attributes: Attributes = field(default_factory=dict)


class Span:
    """What is still going on. `traceparent` is for those who do parts of it, `sampled` whether anybody will see it."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer, self._span = tracer, span
        context = span.get_span_context()
        self.sampled: bool = context.trace_flags.sampled
        self.trace_id, self.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"

    @property
    def traceparent(self) -> str:
        """W3C Trace Context, version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    @property
    def exemplar(self) -> dict[str, str] | None:
        return {"trace_id": self.trace_id, "span_id": self.span_id} if self.sampled else None

    def end(
        self,
        at_ns: int,
        parts: Iterable[Part] = (),
        *,
        attributes: Attributes | None = None,
        name: str | None = None,
        error: str | None = None,
    ) -> None:
        """`error` says why it failed; `name` replaces the first one, where a better one is known now."""
        if not self.sampled:
            return
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        inside = set_span_in_context(self._span)
        for part in parts:
            child = self._tracer.start_span(
                part.name, inside, attributes=dict(part.attributes), start_time=part.begun_ns
            )
            child.end(part.ended_ns)
        if name is not None:
            self._span.update_name(name)
        self._span.set_attributes(dict(attributes or {}))
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(at_ns)


class Tracing:
    """Makes the spans of one process."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    def begin(self, name: str, traceparent: str | None, *, at_ns: int, kind: Kind = "INTERNAL") -> Span:
        """A span below `traceparent`, or of a trace of its own where that is missing or malformed."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carried = {} if traceparent is None else {"traceparent": traceparent}
        # An empty context of our own: nothing that runs here by chance becomes a parent.
        above = TraceContextTextMapPropagator().extract(carried, _nothing())
        return Span(self._tracer, self._tracer.start_span(name, above, kind=SpanKind[kind], start_time=at_ns))

    def record(
        self,
        name: str,
        marks: Sequence[Mark],
        traceparent: str | None,
        *,
        attributes: Attributes,
        error: str | None = None,
    ) -> None:
        """A span of what is over, with a part from each mark to the next. The last one ends it."""
        if not marks:
            return
        parts = [Part(what, begun, ended) for (what, begun), (_, ended) in pairwise(marks)]
        span = self.begin(name, traceparent, at_ns=marks[0][1])
        span.end(marks[-1][1], parts, attributes=attributes, error=error)


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether spans would go anywhere.

    Raises:
        InvalidRequest: they are to go where they cannot.
    """
    if not any(environ.get(name) for name in ENDPOINTS) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter not in ("otlp", "none"):
        raise InvalidRequest(f"OTEL_TRACES_EXPORTER={exporter}: set otlp, or none for no traces")
    protocol = next(filter(None, map(environ.get, _PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        raise InvalidRequest(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: traces leave by http/protobuf only (port 4318)")
    return exporter == "otlp"


@contextlib.contextmanager
def opened(process: str) -> Iterator[Tracing | None]:
    """The tracing of this process; None without an endpoint. What was recorded is sent before it closes.

    Raises:
        InvalidRequest: OpenTelemetry's variables ask for what cannot be, or its packages are missing.
    """
    if not wanted(os.environ):
        yield None
        return
    provider = _provider(f"fewstep-{process}")
    try:
        yield Tracing(provider.get_tracer("fewstep"))
    finally:
        closing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_FLUSH_S)


def _provider(service: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        asked = next(name for name in ENDPOINTS if os.environ.get(name))
        raise InvalidRequest(
            f"{asked} is set and OpenTelemetry is missing ({error}): pip install 'fewstep[tracing]', or unset it"
        ) from error
    # What the variables say of the service comes last and wins.
    resource = Resource.create({"service.name": service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _nothing() -> Any:
    from opentelemetry.context import Context

    return Context()


def now_ns() -> int:
    """Nanoseconds of Unix time, on the clock of all spans."""
    return time.time_ns()
