"""The broker in one process and one event loop: for tests and for trying a gateway without Redis."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from engines.errors import DeadlineExceeded, RequestCanceled
from server.brokers._memory_state import MemoryServer, Ticket
from server.brokers._memory_swaps import MemorySwapSide
from server.brokers._memory_worker import MemoryWorkerSide
from server.brokers.base import OWNERS, Answered, Emitted, Entry, QueueState, Remembered, StaleVersion, Status
from server.messages import CLASSES, GenerateRequest, GenerateResult, StepEvent, ended_by

__all__ = ["MemoryBroker", "MemoryServer"]


class MemoryBroker(MemoryWorkerSide, MemorySwapSide):
    """One process's view of a `MemoryServer`; brokers of one server see each other."""

    def __init__(
        self, server: MemoryServer, identity: str, *, lease_s: float = 5.0, result_ttl_s: float = 600.0
    ) -> None:
        self.identity = identity
        self._server = server
        self._lease_s = lease_s
        self._result_ttl_s = result_ttl_s
        self._turn = 1
        self._cancels_from = len(server.canceled)
        self._lease_info: dict[str, Any] = {}

    async def start(self) -> None:
        """There is nothing to connect to."""

    async def close(self) -> None:
        """The state belongs to the server."""

    def now_ms(self) -> int:
        return self._server.clock_ms()

    async def ping(self) -> bool:
        return True

    async def store(self) -> None:
        """The memory of this process."""

    async def publish(self, request: GenerateRequest, source: bytes | None = None) -> Entry:
        known = self._known(request.id)
        if known is not None:
            entry = known.entry
            return Entry(entry.id, entry.entry_id, entry.enqueued_ms, entry.deadline_ms, created=False)
        servable = self._server.servable.get(request.model)
        if servable is not None and request.version not in servable:
            raise StaleVersion(request.model, request.version)
        now_ms, sequence = self._server.clock_ms(), self._server.next_sequence()
        entry = Entry(request.id, f"{now_ms}-{sequence}", now_ms, now_ms + request.budget_ms)
        ticket = self._server.tickets[request.id] = Ticket(request, entry, sequence, source)
        self._server.enqueue(ticket)
        if request.events:
            ticket.events.append(Emitted(StepEvent(id=request.id, kind="queued", total=request.num_evaluations)))
        self._server.changed()
        return entry

    def _known(self, request_id: str) -> Ticket | None:
        """The ticket, unless its time after the end has passed."""
        ticket = self._server.tickets.get(request_id)
        if ticket is None or ticket.ended_ms is None:
            return ticket
        if self._server.clock_ms() - ticket.ended_ms < self._result_ttl_s * 1000:
            return ticket
        del self._server.tickets[request_id]
        return None

    async def wait(self, request_id: str, timeout_s: float | None) -> GenerateResult | None:
        def ended() -> bool:
            ticket = self._known(request_id)
            return ticket is None or ticket.ended

        await self._server.until(ended, timeout_s)
        return await self.result(request_id)

    async def answer(self, request_id: str, timeout_s: float | None) -> Answered | None:
        result = await self.wait(request_id, timeout_s)
        return None if result is None else Answered(result, await self.images(request_id, result.num_images))

    async def events(self, request_id: str, *, after: int = 0) -> AsyncIterator[Emitted]:
        ticket = self._known(request_id)
        for seen in count():
            if ticket is None:
                return
            await self._server.until(partial(_moved, ticket, seen), None)
            if len(ticket.events) <= seen:
                yield Emitted(StepEvent(id=request_id, kind="ended", status=ticket.state))
                return
            if seen >= after:
                yield ticket.events[seen]
            if ticket.events[seen].event.kind == "ended":
                return

    async def result(self, request_id: str) -> GenerateResult | None:
        ticket = self._known(request_id)
        return None if ticket is None else ticket.result

    async def image(self, request_id: str, index: int) -> bytes | None:
        return (await self.images(request_id, index + 1))[index]

    async def images(self, request_id: str, count: int) -> list[bytes | None]:
        ticket = self._known(request_id)
        kept = [] if ticket is None else ticket.images
        return [kept[i] if i < len(kept) else None for i in range(count)]

    async def status(self, request_id: str, *, with_position: bool = False) -> Status | None:
        ticket = self._known(request_id)
        if ticket is None:
            return None
        position = self._position(ticket) if with_position and ticket.state == "queued" else None
        return Status(
            id=request_id,
            state=ticket.state,
            deployment=ticket.request.model,
            version=ticket.request.version,
            owner=ticket.request.owner,
            enqueued_ms=ticket.entry.enqueued_ms,
            deadline_ms=ticket.entry.deadline_ms,
            started_ms=ticket.started_ms,
            ended_ms=ticket.ended_ms,
            worker=ticket.worker,
            position=position,
            result=ticket.result,
        )

    def _position(self, ticket: Ticket) -> int:
        return self._server.queue(ticket.request).ahead(ticket.request.id, ticket.request.owner)

    async def cancel(self, request_id: str) -> bool:
        error = RequestCanceled(f"request {request_id} was canceled")
        return self._tell(request_id, ended_by(request_id, "canceled", error))

    async def expire(self, request_id: str) -> bool:
        error = DeadlineExceeded(f"request {request_id} was not done within its time; allow more or ask for less")
        return self._tell(request_id, ended_by(request_id, "expired", error))

    def _tell(self, request_id: str, result: GenerateResult) -> bool:
        won = self._end(self._known(request_id), result, ())
        if won:
            self._server.canceled.append(request_id)
            self._server.changed()
        return won

    def _end(self, ticket: Ticket | None, result: GenerateResult, images: Sequence[bytes]) -> bool:
        """The one terminal transition."""
        if ticket is None or ticket.ended:
            return False
        ticket.state, ticket.result, ticket.images, ticket.source = result.status, result, list(images), None
        ticket.ended_ms = self._server.clock_ms()
        self._server.queue(ticket.request).remove(ticket.request.id, ticket.request.owner)
        if ticket.request.events:
            ticket.events.append(Emitted(StepEvent(id=result.id, kind="ended", status=result.status)))
        self._server.changed()
        return True

    async def queue_state(self, deployment: str) -> QueueState:
        tickets = self._server.unfinished(deployment)
        by_class = {each: [one for one in tickets if one.request.request_class == each] for each in CLASSES}
        return QueueState(
            waiting={each: sum(one.claimed_by is None for one in found) for each, found in by_class.items()},
            running=sum(one.claimed_by is not None for one in tickets),
            cost_s={each: sum(one.request.cost_s for one in found) for each, found in by_class.items()},
            owed_s={each: _by_owner(found) for each, found in by_class.items()},
        )

    async def remember(
        self, key: str, body_hash: str, request_id: str, ttl_s: float, *, owner: str = ""
    ) -> Remembered | None:
        now_ms, mine = self._server.clock_ms(), Remembered(body_hash, request_id)
        known, until_ms = self._server.idempotency.get((owner, key), (mine, 0.0))
        if until_ms > now_ms and known != mine:
            return known
        if until_ms <= now_ms:
            self._server.idempotency[owner, key] = mine, now_ms + ttl_s * 1000
        return None


def _moved(ticket: Ticket, seen: int) -> bool:
    return ticket.ended or len(ticket.events) > seen


def _by_owner(tickets: Sequence[Ticket]) -> dict[str, float]:
    owed: dict[str, float] = {}
    for one in tickets:
        owed[one.request.owner] = owed.get(one.request.owner, 0.0) + one.request.cost_s
    return {owner: cost_s for owner, cost_s in owed.items() if cost_s > 0} if len(owed) <= OWNERS else {}
