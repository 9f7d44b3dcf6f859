"""The swaps' part of the broker in memory."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping

from server.brokers._memory_state import Held, MemoryServer
from server.brokers.base import Phase


class MemorySwapSide:
    """Mixed into `MemoryBroker`, which makes this."""

    _server: MemoryServer

    async def report_phase(
        self,
        swap_id: str,
        worker_id: str,
        phase: str,
        reason: str | None = None,
        *,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        said = self._server.phases.setdefault(swap_id, {})
        before = said.get(worker_id)
        at_ms = before.at_ms if before is not None and before.phase == phase else self._server.clock_ms()
        said[worker_id] = Phase(worker_id, phase, reason, at_ms, dict(seconds or {}))

    async def phases(self, swap_id: str) -> dict[str, Phase]:
        return dict(self._server.phases.get(swap_id, {}))

    async def acquire(self, name: str, owner: str, ttl_s: float) -> int | None:
        now_ms = self._server.clock_ms()
        held = self._owned(name)
        if held is not None and held.owner != owner:
            return None
        if held is None:
            fence = max(self._server.fences.get(name, 0) + 1, now_ms)
            self._server.fences[name] = fence
            held = self._server.named[name] = Held(owner, fence, 0.0)
        held.until_ms = now_ms + ttl_s * 1000
        return held.fence

    async def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        held = self._owned(name)
        if held is None or held.owner != owner:
            return False
        held.until_ms = self._server.clock_ms() + ttl_s * 1000
        return True

    async def release(self, name: str, owner: str) -> None:
        held = self._owned(name)
        if held is not None and held.owner == owner:
            del self._server.named[name]

    def _owned(self, name: str) -> Held | None:
        held = self._server.named.get(name)
        return held if held is not None and held.until_ms > self._server.clock_ms() else None

    async def set_servable(self, deployment: str, versions: Iterable[str]) -> None:
        self._server.servable[deployment] = set(versions)

    async def servable(self, deployment: str) -> frozenset[str] | None:
        found = self._server.servable.get(deployment)
        return None if found is None else frozenset(found)

    async def retire(self, deployment: str, version: str) -> bool:
        if version in await self.pins(deployment):
            return False
        self._server.servable.get(deployment, set()).discard(version)
        return True

    async def pins(self, deployment: str) -> dict[str, int]:
        return dict(Counter(ticket.request.version for ticket in self._server.unfinished(deployment)))

    async def announce(self, topic: str) -> None:
        for listener in self._server.listeners:
            listener.put_nowait(topic)

    async def announcements(self) -> AsyncIterator[str]:
        listener: asyncio.Queue[str] = asyncio.Queue()
        self._server.listeners.append(listener)
        try:
            while True:
                yield await listener.get()
        finally:
            self._server.listeners.remove(listener)
