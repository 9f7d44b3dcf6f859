"""What a worker did for a sampled request, and when; it becomes spans once the answer is sent."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engines.manifest import shown
from server.brokers.base import Claim, Finished
from server.messages import GenerateResult
from server.tracing import Attributes, Part, Span, Tracing, now_ns

if TYPE_CHECKING:
    from server.tickets import Ticket

_MS = 1_000_000  # nanoseconds


class RequestTrace:
    """Of one request. `parts` are its engine calls and encoded pictures; appending to a list takes no lock."""

    def __init__(self, span: Span, queued_ns: int) -> None:
        self.span, self.queued_ns, self.admitted_ns = span, queued_ns, now_ns()
        self.parts: list[Part] = []

    def pictured(self, index: int, begun_ns: int, seconds: float, num_bytes: int) -> None:
        """A picture became bytes."""
        told = {"fewstep.picture": index, "fewstep.bytes": num_bytes}
        self.parts.append(Part("image", begun_ns, begun_ns + round(seconds * 1e9), told))

    def waited(self, result: GenerateResult) -> list[Part]:
        """What it waited for before its first engine call, and after its last picture."""
        timing, ready_ns = result.timing, self.queued_ns + round(result.timing.total_ms * _MS)
        found = [Part("queue", self.queued_ns, self.queued_ns + round(timing.queue_ms * _MS))]
        if timing.load_ms:
            found.append(Part("load", self.admitted_ns - round(timing.load_ms * _MS), self.admitted_ns))
        return [*found, Part("answer", ready_ns, max(ready_ns, now_ns()))]


class RequestTraces:
    """Of a worker. `tracing` is None where nothing is traced; then every call returns at once."""

    def __init__(self, tracing: Tracing | None, now_ms: Callable[[], int]) -> None:
        self._tracing, self._now_ms = tracing, now_ms

    def begin(self, claim: Claim) -> RequestTrace | None:
        """None where it is not sampled. Its span begins when the request was queued."""
        if self._tracing is None:
            return None
        queued_ns = now_ns() - max(0, self._now_ms() - claim.enqueued_ms) * _MS  # of two clocks
        span = self._tracing.begin("generate", claim.request.traceparent, at_ns=queued_ns, kind="CONSUMER")
        return RequestTrace(span, queued_ns) if span.sampled else None

    def called(self, rows: Sequence[Any], seconds: float) -> dict[str, str] | None:
        """An engine call of rows has just ended; returns the exemplar of what it observes. In an engine thread."""
        if self._tracing is None:
            return None
        ended_ns = now_ns()
        found: dict[str, str] | None = None
        for ticket in {row.ticket: None for row in rows}:
            if ticket.trace is None:
                continue
            own = [row for row in rows if row.ticket is ticket]
            told = {"fewstep.rows": len(own), "fewstep.batch.rows": sum(row.network_rows for row in rows)}
            stage = own[0].lane.stage
            if stage == "denoise":
                told["fewstep.step"] = own[0].step  # the first is 1
            ticket.trace.parts.append(Part(stage, ended_ns - round(seconds * 1e9), ended_ns, told))
            found = found or ticket.trace.span.exemplar
        return found

    def end(self, answer: Finished, ticket: "Ticket | None") -> None:
        """The broker has taken the one answer of a request; `ticket` is None where it never came to the engines."""
        if self._tracing is None:
            return
        claim, result = answer.claim, answer.result
        trace = ticket.trace if ticket else self.begin(claim)
        if trace is None:
            return
        request = claim.request
        told: Attributes = {
            "fewstep.request.id": request.id,
            "fewstep.model": request.model,
            "fewstep.version": shown(request.version),
            "fewstep.tier": request.tier,
            "fewstep.steps": request.steps,
            "fewstep.pictures": request.n,
            "fewstep.backend": result.backend,
            "fewstep.worker": result.worker,
            "fewstep.status": result.status,
            "fewstep.deliveries": claim.deliveries,
        }
        error = f"{result.error.code}: {result.error.message}" if result.error else None
        parts = [*trace.waited(result), *trace.parts] if result.timing.total_ms else trace.parts
        ended_ns = max([now_ns(), *(part.ended_ns for part in parts)])
        trace.span.end(ended_ns, parts, attributes=told, error=error)

    def canceled(self, ticket: "Ticket") -> None:
        """Somebody else has ended a request that is here."""
        if ticket.trace is not None:
            request = ticket.claim.request
            told = {"fewstep.request.id": request.id, "fewstep.model": request.model, "fewstep.status": "canceled"}
            ticket.trace.span.end(now_ns(), ticket.trace.parts, attributes=told)
