"""One deployment on one worker: loads what is current, tries candidates beside it, switches, and unloads what is left.

Everything it acts on is read anew from registry and broker each time it looks, so that a lost announcement, a
restarted Redis or a dead coordinator delay a swap and never break one. Whichever worker holds the lease
`swap:<deployment>` also coordinates: it decides by the rules of `server.swaps` and is the only one that writes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engines.errors import FewstepError, MemoryExceeded
from engines.manifest import shown
from engines.registry.base import Candidate, Registry, Revision
from server import swaps
from server.brokers.base import Broker
from server.coordinator import Coordinator
from server.leases import Loading
from server.metrics import Metrics
from server.settings import WorkerSettings
from server.stall import StallMeter
from server.tracing import Attributes, Mark, Tracing, now_ns

log = logging.getLogger(__name__)
OnPhase = Callable[[str], Awaitable[None]]
_FAST_S = 0.05  # how often it looks while a swap is under way


class Residents(Protocol):
    """The students of one deployment whose engines are on this worker."""

    @property
    def backend(self) -> str: ...

    @property
    def held(self) -> frozenset[str]:
        """Versions that can serve now."""

    @property
    def known(self) -> frozenset[str]:
        """Versions that can serve, now or once a row asks for them."""

    def serve(self, versions: Sequence[str]) -> None:
        """From now on these are served: one assignment, between two steps. The first is the default tier's."""

    def keep(self, versions: Iterable[str]) -> None:
        """These are not unloaded for others from now on."""

    async def preload(self, versions: Sequence[str], phase: OnPhase | None = None) -> None:
        """Builds, warms and verifies what is about to be served, as far as there is room, saying when a phase begins.

        Raises:
            FewstepError: one of them may not serve here; what was loaded of the others stays.
        """

    async def load(
        self, versions: Sequence[str], phase: OnPhase | None = None, *, beside: bool = False, keeps: Iterable[str] = ()
    ) -> None:
        """The same with each of these that is not here, in turn; room is made for it, but not of `keeps`.

        It is niced where it is `beside` live traffic. Raises the same.
        """

    async def specialise(self, versions: Iterable[str]) -> None:
        """Has versions that serve answer faster, if they can; gives way to every load."""

    async def unload(self, version: str) -> bool:
        """Frees a version; False if a request here still needs it."""


@dataclass(slots=True)
class Swap:
    """A candidate on this worker: its phase, since when, and the seconds in those before."""

    candidate: Candidate
    seen_ms: int
    phase: str = ""
    reason: str | None = None
    since_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)  # when each phase began
    task: "asyncio.Task[None] | None" = None


class Follower:
    """`look` does one round; `run` repeats it. All in one event loop."""

    def __init__(
        self,
        deployment: str,
        *,
        broker: Broker,
        registry: Registry,
        residents: Residents,
        settings: WorkerSettings,
        metrics: Metrics,
        meter: StallMeter,
        changed: Callable[[], Awaitable[None]],
        tracing: Tracing | None = None,
    ) -> None:
        """`changed` is called when what this worker can say of the deployment is no longer what it said."""
        self.deployment = deployment
        self.current: Revision | None = None
        self.previous: Revision | None = None
        self.joined = False
        self.loading: Loading | None = None  # of the current revision, where it was not staged
        self._broker, self._registry, self._residents = broker, registry, residents
        self._settings, self._metrics, self._meter, self._changed = settings, metrics, meter, changed
        self._tracing = tracing
        self._current_since_s = float("-inf")  # monotonic
        self._coordinator = Coordinator(deployment, broker, registry, metrics, timeout_s=settings.swap_timeout_s)
        self._swaps: dict[str, Swap] = {}
        self._leaving: Swap | None = None  # the swap whose old version is still pinned
        self._specialising: asyncio.Task[None] | None = None
        self.wake = asyncio.Event()

    async def run(self) -> None:
        try:
            while True:
                try:
                    await self.look()
                except (FewstepError, OSError) as error:
                    log.warning("cannot look", extra={"deployment": self.deployment, "error": str(error)})
                self.wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), _FAST_S if self._busy() else self._settings.poll_s)
        finally:
            for swap in self._swaps.values():
                if swap.task:
                    swap.task.cancel()
            if self._specialising:
                self._specialising.cancel()

    async def look(self) -> None:
        """One round: follow the current revision, try the newest candidate, coordinate, unload."""
        current = await asyncio.to_thread(self._registry.current, self.deployment)
        if current is not None and (self.current is None or current.number != self.current.number):
            await self._follow(current)
            self.joined = True
            await self._changed()
        elif not self.joined:
            self.joined = True
            await self._changed()
        pending = await asyncio.to_thread(self._registry.pending, self.deployment)
        for swap_id in [known for known in self._swaps if known not in {each.swap_id for each in pending}]:
            self._end(self._swaps.pop(swap_id))
        candidate = pending[-1] if pending else None
        if candidate is not None:
            await self._try(candidate)
        await self._watch_leaving()
        await self._tidy(candidate)
        self._specialise()

    # --- following -------------------------------------------------------------------------------

    async def _follow(self, revision: Revision) -> None:
        """Makes a revision the one served. Its students are loaded first where they were not staged."""
        versions = _in_order(revision)
        if missing := [version for version in versions if version not in self._residents.held]:
            log.info("loading", extra={"deployment": self.deployment, "versions": [shown(v) for v in missing]})
            await self._load(versions)
        self.previous = self.current or await self._before(revision)
        self._residents.serve(versions)
        self._residents.keep(())
        self.current, self._current_since_s = revision, time.monotonic()
        swap = self._swaps.pop(revision.swap_id or "", None)
        log.info("live", extra={"deployment": self.deployment, "revision": revision.number})
        if swap is not None:
            await self._advance(swap, "live")
            await self._advance(swap, "draining")
            if self._leaving is not None:
                self._close(self._leaving)
            self._leaving = swap
        for version in revision.versions:
            self._metrics.model_info.labels(self.deployment, shown(version), self._residents.backend).set(1)

    async def _load(self, versions: Sequence[str]) -> None:
        """Says meanwhile how far it is, for those who ask and find nobody who serves; a retry goes on counting."""
        since_ms = self.loading.since_ms if self.loading else self._broker.now_ms()

        async def phase(name: str) -> None:
            self.loading = Loading(phase=name, since_ms=since_ms)
            with contextlib.suppress(FewstepError):
                await self._changed()

        try:
            await self._residents.preload(versions, phase)
        except MemoryExceeded as error:
            await phase(f"{error.code}: {error}")
            raise
        self.loading = None

    async def _before(self, revision: Revision) -> Revision | None:
        """The revision before, for a worker that joins. It is not loaded: nobody here serves it yet."""
        numbers = await asyncio.to_thread(self._registry.history, self.deployment)
        earlier = [number for number in numbers if number < revision.number]
        if not earlier:
            return None
        return await asyncio.to_thread(self._registry.revision, self.deployment, earlier[-1])

    # --- trying ----------------------------------------------------------------------------------

    async def _try(self, candidate: Candidate) -> None:
        swap = self._swaps.get(candidate.swap_id)
        if swap is None:
            for older in list(self._swaps):
                self._end(self._swaps.pop(older))
            swap = self._swaps[candidate.swap_id] = Swap(candidate, self._broker.now_ms())
            log.info("trying", extra={"swap_id": candidate.swap_id, "tiers": swaps.describe(candidate)})
            self._meter.open(candidate.swap_id, self._broker.now_ms() / 1000)
            swap.task = asyncio.create_task(self._stage(swap))
        else:
            await self._report(swap)  # again: Redis may have lost it
        if await self._coordinator.coordinate(candidate, swap.seen_ms):
            self.wake.set()

    async def _stage(self, swap: Swap) -> None:
        """Takes a candidate through its phases; whatever goes wrong with it is its rejection, never our death."""

        async def phase(name: str) -> None:
            await self._advance(swap, name)

        try:
            await phase("staged")
            await self._stage_beside(swap.candidate, phase)
            await phase("ready")
        except Exception as error:  # compilers and runtimes raise what they like
            log.warning("rejected", extra={"swap_id": swap.candidate.swap_id, "error": str(error)})
            code = error.code if isinstance(error, FewstepError) else type(error).__name__
            at = swap.phase
            await self._advance(swap, "rejected", f"{code} at {at}: {error}")
        self.wake.set()

    async def _stage_beside(self, candidate: Candidate, phase: OnPhase) -> None:
        """Whatever is new is verified here; the default tier's version comes last and stays, beside the one before."""
        first, *others = _in_order(candidate)
        new = [version for version in others if version not in self._residents.known]
        stays = [first, *(_in_order(self.current)[:1] if self.current else ())]
        self._residents.keep(stays)
        await self._residents.load([*new, first], phase, beside=True, keeps=stays)

    async def _advance(self, swap: Swap, phase: str, reason: str | None = None) -> None:
        if swap.phase == phase:
            return
        now_s = time.monotonic()
        if swap.phase:
            seconds = now_s - swap.since_s
            swap.seconds[swap.phase] = swap.seconds.get(swap.phase, 0.0) + seconds
            self._metrics.swap_seconds.labels(self.deployment, swap.phase).observe(seconds)
        swap.phase, swap.reason, swap.since_s = phase, reason, now_s
        swap.marks.append((phase, now_ns()))
        at_s = self._broker.now_ms() / 1000
        self._meter.note(swap=swap.candidate.swap_id, deployment=self.deployment, phase=phase, at_s=at_s)
        await self._report(swap)

    async def _report(self, swap: Swap) -> None:
        """Best effort: it is said again at the next look."""
        if swap.phase:
            with contextlib.suppress(FewstepError):
                await self._broker.report_phase(
                    swap.candidate.swap_id, self._broker.identity, swap.phase, swap.reason, seconds=swap.seconds
                )

    def _end(self, swap: Swap) -> None:
        """Forgets a candidate that ended otherwise than by becoming current."""
        if swap.task:
            swap.task.cancel()
        self._residents.keep(())
        self._close(swap)

    # --- leaving ---------------------------------------------------------------------------------

    async def _watch_leaving(self) -> None:
        """Closes the window of a swap as soon as no request pins what was served before."""
        swap, current = self._leaving, self.current
        if swap is None or current is None:
            return
        pins = await self._broker.pins(self.deployment)
        if not set(pins) - current.versions:
            self._leaving = None
            await self._advance(swap, "drained")
            self._close(swap)

    def _close(self, swap: Swap) -> None:
        with contextlib.suppress(KeyError):
            stall_s = self._meter.close(swap.candidate.swap_id, self._broker.now_ms() / 1000)
            if swap.phase == "drained":
                self._metrics.swap_stall_seconds.labels(self.deployment).observe(stall_s)
            self._trace(swap, stall_s)
        self._meter.flush()

    def _trace(self, swap: Swap, stall_s: float) -> None:
        if self._tracing is None:
            return
        if swap.phase not in ("drained", "rejected"):  # it is over in the middle of a phase
            swap.marks.append((swap.phase, now_ns()))
        told: Attributes = {
            "fewstep.model": self.deployment,
            "fewstep.swap.id": swap.candidate.swap_id,
            "fewstep.swap.tiers": swaps.describe(swap.candidate),
            "fewstep.swap.phase": swap.phase,
            "fewstep.swap.stall_s": stall_s,
            "fewstep.worker": self._broker.identity,
        }
        self._tracing.record("swap", swap.marks, swap.candidate.traceparent, attributes=told, error=swap.reason)

    async def _tidy(self, candidate: Candidate | None) -> None:
        """Retires versions that nothing needs, and unloads those that are retired and not in use here."""
        if self.current is None:
            return
        servable = await self._broker.servable(self.deployment)
        if servable is None or not self.current.versions <= servable:
            await self._coordinator.open(self.current.versions | (servable or frozenset()))
            return
        holdings = swaps.Holdings(
            held=self._residents.known | servable,
            current=self.current.versions,
            previous=self.previous.versions if self.previous else frozenset(),
            candidate=candidate.versions if candidate else frozenset(),
            since_s=time.monotonic() - self._current_since_s,
        )
        for version in swaps.retirable(holdings, self._settings.keep_previous_s):
            if version not in servable or await self._coordinator.retire(version):
                await self._unload(version)

    async def _unload(self, version: str) -> None:
        if version in self._residents.known and await self._residents.unload(version):
            log.info("retired", extra={"deployment": self.deployment, "version": shown(version)})
            self._metrics.forget_version(self.deployment, shown(version))

    def _specialise(self) -> None:
        """Between swaps, and of versions that stay: compiling beside traffic is what a swap spares."""
        if self._specialising is not None and self._specialising.done():
            self._specialising.result()
            self._specialising = None
        stays = time.monotonic() - self._current_since_s >= self._settings.specialise_after_s
        if stays and self._specialising is None and self.current and not self._busy():
            self._specialising = asyncio.create_task(self._residents.specialise(self.current.versions))

    # --- small things ----------------------------------------------------------------------------

    def _busy(self) -> bool:
        return bool(self._swaps) or self._leaving is not None


def _in_order(revision: Revision | Candidate) -> list[str]:
    """Its versions, that of the default tier first."""
    first = revision.tiers[revision.default_tier].student
    return [first, *sorted(revision.versions - {first})]
