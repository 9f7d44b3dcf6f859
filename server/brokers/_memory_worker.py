"""The worker's half of the broker in memory."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

from engines.errors import RequestPoisoned
from server.brokers._memory_state import MemoryServer, Ticket
from server.brokers.base import NOWHERE, POISONED_AT, Claim, Emitted, Finished, WorkerInfo
from server.fair_queue import Source, Waiting, in_turn, take
from server.messages import GenerateRequest, GenerateResult, StepEvent, ended_by


class MemoryWorkerSide:
    """Mixed into `MemoryBroker`, which makes these."""

    identity: str
    _server: MemoryServer
    _lease_s: float
    _turn: int
    _cancels_from: int
    _lease_info: Mapping[str, Any]

    def _end(self, ticket: Ticket | None, result: GenerateResult, images: Sequence[bytes]) -> bool:
        raise NotImplementedError

    async def claim(
        self,
        deployments: Sequence[str],
        max_rows: int,
        block_s: float | None,
        *,
        max_rows_below_high: int | None = None,
        slack_below_ms: int | None = None,
        elsewhere_ms: Mapping[str, int] = NOWHERE,
    ) -> list[Claim]:
        if max_rows <= 0 or not deployments:
            return []
        if self.identity not in {worker.id for worker in await self.workers()}:
            await self.renew_lease(self._lease_info)
        below = max_rows if max_rows_below_high is None else min(max_rows, max_rows_below_high)

        slack_s = float("-inf") if slack_below_ms is None else slack_below_ms / 1000
        queues = in_turn(self._turn, deployments)
        sources = [Source(self._server.queues[name, each], each != "high") for name, each in queues]

        def left(one: Waiting[str]) -> bool:
            version = self._server.tickets[one.key].request.version
            return self._server.clock_ms() - 1000 * one.came_s < elsewhere_ms.get(version, 0)

        def handed_out() -> list[Claim]:
            taken = take(sources, max_rows, below, slack_s, left if elsewhere_ms else None)
            return [self._hand_out(self._server.tickets[one.key]) for one in taken]

        claims: list[Claim] = await self._server.until(handed_out, block_s)
        self._turn += bool(claims and below)
        return claims

    async def reclaim(self, deployments: Sequence[str], *, max_requests: int = 32) -> list[Claim]:
        living = {worker.id for worker in await self.workers()} | {self.identity}
        tickets = (ticket for name in deployments for ticket in self._server.unfinished(name))
        left = [ticket for ticket in tickets if ticket.claimed_by is not None and ticket.claimed_by not in living]
        return [self._hand_out(ticket) for ticket in left[:max_requests]]

    def _hand_out(self, ticket: Ticket) -> Claim:
        ticket.claimed_by = self.identity
        ticket.deliveries += 1
        stream = f"{ticket.request.model}:{ticket.request.request_class}"
        return Claim(ticket.request, stream, ticket.entry.entry_id, ticket.entry.enqueued_ms, ticket.deliveries)

    async def source(self, request_id: str) -> bytes | None:
        ticket = self._server.tickets.get(request_id)
        return None if ticket is None else ticket.source

    async def running(self, claims: Sequence[Claim]) -> list[Claim]:
        wanted = []
        for claim in claims:
            ticket = self._server.tickets.get(claim.request.id)
            if ticket is None or ticket.ended:
                continue
            ticket.state, ticket.worker = "running", self.identity
            ticket.started_ms = ticket.started_ms or self._server.clock_ms()
            if ticket.request.events:
                ticket.events.append(
                    Emitted(StepEvent(id=claim.request.id, kind="running", total=ticket.request.num_evaluations))
                )
            wanted.append(claim)
        self._server.changed()
        return wanted

    async def emit(self, event: StepEvent, data: bytes | None = None) -> None:
        ticket = self._server.tickets.get(event.id)
        if ticket is not None:
            ticket.events.append(Emitted(event, data))
            self._server.changed()

    async def finish(self, claim: Claim, result: GenerateResult, images: Sequence[bytes] = ()) -> bool:
        return self._end(self._server.tickets.get(claim.request.id), result, images)

    async def finish_many(self, answers: Sequence[Finished]) -> list[bool]:
        return [await self.finish(answer.claim, answer.result, answer.images) for answer in answers]

    async def poison(self, claim: Claim) -> bool:
        error = RequestPoisoned(
            f"request {claim.request.id} was given up: {POISONED_AT - 1} workers died while they had it"
        )
        won = await self.finish(claim, ended_by(claim.request.id, "failed", error, claim.request))
        if won:
            self._server.dead.setdefault(claim.request.model, []).append(claim.request)
        return won

    async def dead_letters(self, deployment: str) -> list[GenerateRequest]:
        return list(self._server.dead.get(deployment, ()))

    async def renew_lease(self, info: Mapping[str, Any]) -> None:
        self._lease_info = info
        now_ms = self._server.clock_ms()
        self._server.leases[self.identity] = WorkerInfo(self.identity, now_ms, dict(info)), now_ms + self._lease_s * 1e3

    async def release_lease(self) -> None:
        self._server.leases.pop(self.identity, None)

    @contextmanager
    def _kept(self, info: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        said = WorkerInfo(self.identity, self._server.clock_ms(), dict(info()))
        self._server.leases[self.identity] = said, float("inf")
        try:
            yield
        finally:
            self._server.leases.pop(self.identity, None)

    def keep_lease(self, info: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[None]:
        return self._kept(info)

    async def workers(self) -> list[WorkerInfo]:
        now_ms = self._server.clock_ms()
        return [worker for worker, until_ms in self._server.leases.values() if until_ms > now_ms]

    async def cancels(self) -> AsyncIterator[str]:
        canceled = self._server.canceled
        for at in count(self._cancels_from):
            await self._server.until(lambda at=at: len(canceled) > at, None)  # type: ignore[misc]
            yield canceled[at]
