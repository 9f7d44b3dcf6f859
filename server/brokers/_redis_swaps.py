"""The swaps' part of the Redis broker: phases, named leases, servable versions and pins, announcements."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import msgspec

from server.brokers._outage import Outage
from server.brokers._redis_link import BROKEN, Link
from server.brokers.base import Phase

_PHASES_KEPT_MS = 24 * 3600 * 1000
_LISTEN_S = 5.0
_PAUSE_S = 0.1


class SwapSide:
    """Mixed into `RedisBroker`, which makes this."""

    _link: Link

    async def report_phase(
        self,
        swap_id: str,
        worker_id: str,
        phase: str,
        reason: str | None = None,
        *,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        key = self._link.key("swap", swap_id)
        known = await self._link.call("HGET", key, worker_id)
        at_ms = self._link.now_ms()
        if known is not None and (before := msgspec.msgpack.decode(known, type=Phase)).phase == phase:
            at_ms = before.at_ms
        said = msgspec.msgpack.encode(Phase(worker_id, phase, reason, at_ms, dict(seconds or {})))
        await self._link.call_many([("HSET", key, worker_id, said), ("PEXPIRE", key, _PHASES_KEPT_MS)])

    async def phases(self, swap_id: str) -> dict[str, Phase]:
        found = await self._link.call("HVALS", self._link.key("swap", swap_id))
        said = (msgspec.msgpack.decode(each, type=Phase) for each in found)
        return {phase.worker: phase for phase in said}

    async def acquire(self, name: str, owner: str, ttl_s: float) -> int | None:
        fence: int | None = await self._link.script("lease", "acquire", name, owner, _ttl_ms(ttl_s))
        return fence

    async def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        return bool(await self._link.script("lease", "renew", name, owner, _ttl_ms(ttl_s)))

    async def release(self, name: str, owner: str) -> None:
        await self._link.script("lease", "release", name, owner, 0)

    async def set_servable(self, deployment: str, versions: Iterable[str]) -> None:
        await self._link.script("servable", "set", deployment, *versions)

    async def servable(self, deployment: str) -> frozenset[str] | None:
        found = await self._link.call("SMEMBERS", self._link.key("servable", deployment))
        return frozenset(version.decode() for version in found) - {""} if found else None

    async def retire(self, deployment: str, version: str) -> bool:
        return bool(await self._link.script("servable", "retire", deployment, version))

    async def pins(self, deployment: str) -> dict[str, int]:
        found = await self._link.call("HGETALL", self._link.key("pins", deployment))
        return {version.decode(): int(count) for version, count in zip(found[::2], found[1::2], strict=True)}

    async def announce(self, topic: str) -> None:
        await self._link.call("PUBLISH", self._link.key("announce"), topic)

    async def announcements(self) -> AsyncIterator[str]:
        outage = Outage("announcements")
        while True:
            pubsub = self._link.pubsub()
            try:
                async for topic in self._heard(pubsub):
                    outage.worked()
                    if topic is not None:
                        yield topic
            except BROKEN as error:
                outage.failed(error)
                await asyncio.sleep(_PAUSE_S)
            finally:
                await pubsub.aclose()

    async def _heard(self, pubsub: Any) -> AsyncIterator[str | None]:
        """Topics, and None for other signs of life. Who says nothing is asked for one.

        redis-py takes a connection that the kernel gave up (ETIMEDOUT) for the end of its own wait and says so at once
        and for ever, without giving the event loop a turn; by the second silence it is known for what it is.
        """
        await pubsub.subscribe(self._link.key("announce"))
        asked = False
        while True:
            message = await pubsub.get_message(timeout=_LISTEN_S)
            if message is not None:
                asked = False
                yield message["data"].decode() if message["type"] == "message" else None
            elif asked:
                raise TimeoutError(f"no sign of life within {_LISTEN_S:.0f} s")
            else:
                asked = True
                await pubsub.ping()


def _ttl_ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))
