"""Room for students in a worker's memory: who waits for it, who is evicted for whom, and how long that takes.

The rules are `server.residency`; here they are waited for. Loads that need room are served in the order in which they
were first asked for, one at a time, so that each gets its turn: whoever is in its way is given no more rows once it
has stayed as long as it may.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from server.metrics import Metrics
from server.residency import Parts, Residency, Tenant, Verdict, stay_s

_TICK_S = 0.001
Evict = Callable[[Tenant], Awaitable[bool]]


@dataclass(slots=True, eq=False)
class _Waiting:
    """Somebody who waits for room, or takes it."""

    wanted: Mapping[Tenant, Parts]


@dataclass(slots=True)
class Room:
    """One per worker, in one event loop; `ready_in_s` and `residency` may be read from any thread.

    `uses`: whether a row on this worker needs a version. `evict` unloads a tenant, or says that a row uses it again.
    """

    residency: Residency
    metrics: Metrics
    uses: Callable[[str], bool] = lambda version: False
    evict: Evict | None = None
    now_s: Callable[[], float] = time.monotonic
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: list[_Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metrics.resident_limit_bytes.set(self.residency.limit_bytes)

    @property
    def asked(self) -> bool:
        """Whether anybody waits for room."""
        return bool(self._waiting)

    def take_free(self, tenant: Tenant, parts: Parts) -> bool:
        """Room for a load that begins now, if nobody has to go or wait for it and nobody else loads it."""
        if self._waiting or tenant in self.residency.residents or not self._verdict({tenant: parts}).fits:
            return False
        self.residency.reserve({tenant: parts}, self.now_s())
        self._tell()
        return True

    async def take(self, wanted: Mapping[Tenant, Parts], *, beside: Collection[Tenant] = ()) -> frozenset[Tenant]:
        """Waits for room for loads that begin then, and evicts who is in the way; those that the caller has to load.

        The others of them are loaded, or are being loaded by somebody else.

        Raises:
            MemoryExceeded: there never can be, or not beside those that have to stay.
        """
        self.residency.check(wanted, beside)
        with self._asking(wanted):
            async with self._turn:
                try:
                    while not await self._made(wanted):
                        pass
                    return self.residency.reserve(wanted, self.now_s())
                finally:
                    self.residency.resume()
                    self._tell()

    def ready(self, tenant: Tenant) -> None:
        self.residency.ready(tenant, self.now_s())
        self._changed.set()

    def gone(self, tenant: Tenant) -> None:
        self.residency.gone(tenant)
        self._changed.set()
        self._tell()

    def moved(self) -> None:
        """A row has ended, or something else that somebody may wait for."""
        self._changed.set()

    def may_serve(self, tenant: Tenant) -> bool:
        """Whether it may be given further rows."""
        one = self.residency.residents.get(tenant)
        return one is not None and one.state == "resident"

    def ready_in_s(self, tenant: Tenant, parts: Parts) -> float:
        """When it could serve a row that comes now, as far as loads took the same time before."""
        rules, now_s = self.residency.snapshot(), self.now_s()
        load_s = rules.expected_load_s(tenant.version, parts)
        one = rules.residents.get(tenant)
        if one is not None and one.state == "resident":
            return 0.0
        if one is not None and one.state == "loading":
            return max(0.0, one.since_s + load_s - now_s)
        ahead_s = 0.0
        for other in list(self._waiting):
            if tenant in other.wanted:
                break
            ahead_s += sum(self._turn_s(each, its) for each, its in other.wanted.items())
        verdict = rules.verdict({tenant: parts}, now_s, lambda _: False)
        until_s = 0.0 if verdict.fits or verdict.again_s == float("inf") else max(0.0, verdict.again_s - now_s)
        return until_s + ahead_s + load_s

    def _turn_s(self, tenant: Tenant, parts: Parts) -> float:
        """A load, and the stay after it."""
        load_s = self.residency.expected_load_s(tenant.version, parts)
        return load_s + stay_s(load_s)

    async def _made(self, wanted: Mapping[Tenant, Parts]) -> bool:
        """One step towards room for these; whether it is there."""
        verdict = self._verdict(wanted)
        if verdict.fits:
            return True
        self._changed.clear()
        self.residency.stop((*verdict.idle, *verdict.busy))
        for tenant in verdict.idle:
            assert self.evict is not None
            if await self.evict(tenant):
                self.metrics.evictions.labels(tenant.deployment).inc()
        if not verdict.idle:
            within_s = None if verdict.again_s == float("inf") else max(_TICK_S, verdict.again_s - self.now_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), within_s)
        return False

    def _verdict(self, wanted: Mapping[Tenant, Parts]) -> Verdict:
        return self.residency.verdict(wanted, self.now_s(), lambda tenant: self.uses(tenant.version))

    @contextlib.contextmanager
    def _asking(self, wanted: Mapping[Tenant, Parts]) -> Iterator[None]:
        asked = _Waiting(wanted)
        self._waiting.append(asked)
        try:
            yield
        finally:
            self._waiting.remove(asked)

    def _tell(self) -> None:
        self.metrics.resident_bytes.set(self.residency.used_bytes)
