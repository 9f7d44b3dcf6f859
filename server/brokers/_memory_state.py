"""What a server would hold for `memory.py`: plain data, changed only between two awaits, so that each
method of the broker is as atomic as a script is on Redis."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.brokers.base import Emitted, Entry, Phase, Remembered, WorkerInfo
from server.fair_queue import FairQueue, Waiting
from server.messages import ENDINGS, GenerateRequest, GenerateResult, RequestClass, State


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Ticket:
    """A request from its queue to its end."""

    request: GenerateRequest
    entry: Entry
    sequence: int
    source: bytes | None = None
    state: State = "queued"
    claimed_by: str | None = None
    deliveries: int = 0
    started_ms: int | None = None
    ended_ms: int | None = None
    worker: str | None = None
    result: GenerateResult | None = None
    images: list[bytes] = field(default_factory=list)
    events: list[Emitted] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in ENDINGS


@dataclass(slots=True)
class Held:
    """A named lease."""

    owner: str
    fence: int
    until_ms: float


class MemoryServer:
    """Shared by the `MemoryBroker`s that are to see each other. `clock_ms` is the clock that deadlines are on."""

    def __init__(self, clock_ms: Callable[[], int] = wall_ms) -> None:
        self.clock_ms = clock_ms
        self.tickets: dict[str, Ticket] = {}
        self.queues: defaultdict[tuple[str, RequestClass], FairQueue[str]] = defaultdict(FairQueue)
        self.servable: dict[str, set[str]] = {}
        self.idempotency: dict[tuple[str, str], tuple[Remembered, float]] = {}
        self.leases: dict[str, tuple[WorkerInfo, float]] = {}
        self.canceled: list[str] = []
        self.dead: dict[str, list[GenerateRequest]] = {}
        self.phases: dict[str, dict[str, Phase]] = {}
        self.named: dict[str, Held] = {}
        self.fences: dict[str, int] = {}
        self.listeners: list[asyncio.Queue[str]] = []
        self._sequence = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def unfinished(self, deployment: str) -> list[Ticket]:
        tickets = (ticket for ticket in self.tickets.values() if ticket.request.model == deployment)
        return sorted((each for each in tickets if not each.ended), key=lambda each: each.sequence)

    def queue(self, request: GenerateRequest) -> FairQueue[str]:
        """Where a request waits until a worker has it."""
        return self.queues[request.model, request.request_class]

    def enqueue(self, ticket: Ticket) -> None:
        request, came_s = ticket.request, ticket.entry.enqueued_ms / 1000
        slack_s = request.due_after_s
        self.queue(request).add(Waiting(request.id, request.owner, request.n, came_s, slack_s, request.cost_s))

    def changed(self) -> None:
        """Wakes everybody who waits for something."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, check: Callable[[], Any], timeout_s: float | None) -> Any:
        """The first truthy answer of `check`, or its last one after `timeout_s`."""
        loop = asyncio.get_running_loop()
        give_up_s = None if timeout_s is None else loop.time() + timeout_s
        while not (answer := check()):
            left_s = None if give_up_s is None else give_up_s - loop.time()
            if left_s is not None and left_s <= 0:
                return answer
            waiter = loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=left_s)
            finally:
                self._waiters.discard(waiter)
        return answer
