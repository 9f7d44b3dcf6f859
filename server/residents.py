"""The students of one deployment on this worker: brings them in beside live traffic and lets them go.

`EngineSlot` says what there is to do, piece by piece; here each piece gets its place: engine calls go to an engine
thread behind live rows, what is heavy goes to a niced thread, and what only reads files to any thread.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from engines import aside
from engines.errors import StudentNotFound
from engines.manifest import shown
from engines.parts import EngineKey
from engines.slot import EngineSlot, Piece, Staging
from engines.student import LoadedStudent
from server.engine_loop import EngineLoop
from server.leases import VersionState
from server.residency import Tenant
from server.room import Room

log = logging.getLogger(__name__)
OnPhase = Callable[[str], Awaitable[None]]
OnGone = Callable[[str, frozenset[str]], None]
"""A version, and the blobs that no engine of this worker holds any more."""
NICE = 10


class Residents:
    """One event loop; stagings one after the other."""

    def __init__(
        self,
        deployment: str,
        slot: EngineSlot,
        engine: EngineLoop,
        room: Room,
        gone: OnGone,
        *,
        pinned: Sequence[str] = (),
    ) -> None:
        """`gone` hears of each version that is unloaded. `pinned`: see `WorkerSettings`."""
        self._deployment, self._slot, self._engine = deployment, slot, engine
        self._room, self._gone, self._pinned = room, gone, pinned
        self._lock = asyncio.Lock()
        self._wanted = 0  # how many loads wait or run
        self._settled: set[str] = set()  # versions that are specialised, or cannot be
        self._serving: frozenset[str] = frozenset()  # loaded, or on demand
        self._sizes: dict[str, Mapping[EngineKey, int]] = {}  # of versions that are loaded or on demand

    @property
    def backend(self) -> str:
        return self._slot.loader.choice.backend

    @property
    def held(self) -> frozenset[str]:
        return self._slot.versions

    @property
    def known(self) -> frozenset[str]:
        """Versions that are loaded, or are when a row asks for them."""
        return self._slot.versions | self._serving | frozenset(self._sizes)

    def student(self, version: str) -> LoadedStudent | None:
        """For one more row; None where it is not loaded, or is about to make room for another."""
        return self.family(version) if self._room.may_serve(self._tenant(version)) else None

    def family(self, version: str) -> LoadedStudent | None:
        """None where it is not loaded."""
        try:
            return self._slot.family(version)
        except StudentNotFound:
            return None

    def used(self, version: str) -> None:
        """A row of it has come or gone."""
        self._room.residency.used(self._tenant(version), self._room.now_s())

    def states(self) -> dict[str, VersionState]:
        """What is said of each version that is loaded or on demand. From any thread."""
        return {version: self._state(version, parts) for version, parts in list(self._sizes.items())}

    def serve(self, versions: Sequence[str]) -> None:
        """From now on these are served, what was drains. The first is the default tier's."""
        self._serving = frozenset(versions)
        self._slot.switch(self._serving & self._slot.versions)
        self._room.residency.pinned[self._deployment] = frozenset(map(self._tenant, self._pins(versions)))

    def keep(self, versions: Iterable[str]) -> None:
        """While their deployment is being swapped, these make no room for others."""
        self._room.residency.swapping[self._deployment] = frozenset(map(self._tenant, versions))
        self._room.moved()

    async def preload(self, versions: Sequence[str], phase: OnPhase | None = None) -> None:
        """Loads what is about to be served: as `serve` is told it, what is pinned and what there is room for.

        The others are loaded when a row asks for them.

        Raises:
            MemoryExceeded: there never is room for one of them.
        """
        for version in versions:
            self._sizes[version] = await self._size(version)
            self._room.residency.check({self._tenant(version): self._sizes[version]})
        pins = self._pins(versions)
        with self._first():
            for version in versions:
                tenant = self._tenant(version)
                if version in pins:
                    await self.load([version], phase)
                elif self._room.take_free(tenant, self._sizes[version]):
                    await self._load(tenant, self._sizes[version], phase)

    async def load(
        self, versions: Sequence[str], phase: OnPhase | None = None, *, beside: bool = False, keeps: Iterable[str] = ()
    ) -> None:
        """Loads and verifies each of these, when there is room for it; earlier ones may have to make it for later ones.

        Raises:
            MemoryExceeded: there never is, or not beside `keeps`, as far as they are loaded.
        """
        others = frozenset(map(self._tenant, keeps))
        with self._first():
            sizes = {self._tenant(version): await self._size(version) for version in versions}
            for tenant, parts in sizes.items():
                self._room.residency.check({tenant: parts}, others)
            for tenant, parts in sizes.items():
                while not self._room.may_serve(tenant):
                    if await self._room.take({tenant: parts}, beside=others):
                        await self._load(tenant, parts, phase, beside=beside)
                    else:
                        await self._loaded_by_another()

    async def fetch(self, versions: Sequence[str]) -> None:
        """Loads what rows wait for; they need all of these together.

        Raises:
            MemoryExceeded: there never is room for them.
        """
        begun_s = self._room.now_s()
        with self._first():
            wanted = {self._tenant(version): await self._size(version) for version in versions}
            while not all(map(self._room.may_serve, wanted)):
                await self._fetch(wanted, await self._room.take(wanted))
        self._room.metrics.demand_load_seconds.labels(self._deployment).observe(self._room.now_s() - begun_s)

    async def _fetch(self, wanted: Mapping[Tenant, Mapping[EngineKey, int]], mine: Iterable[Tenant]) -> None:
        """Loads those of these that are `mine`; what is left of them where one fails has no room any more."""
        left = set(mine)
        try:
            for tenant, parts in wanted.items():
                if tenant in left:
                    left.remove(tenant)
                    await self._load(tenant, parts)
                else:
                    await self._loaded_by_another()
        finally:
            for tenant in left:
                self._room.gone(tenant)

    async def specialise(self, versions: Iterable[str]) -> None:
        """Has loaded versions answer faster where their backend can, beside live traffic; gives way to every load."""
        for version in sorted(set(versions) - self._settled):
            async with self._lock:
                if self._others_first or version not in self._slot.versions:
                    continue
                beside = self._tenant(f"{version} specialised")
                device = self._room_beside(beside, await asyncio.to_thread(self._slot.specialising_bytes, version))
                if self._others_first:
                    self._room.gone(beside)
                    continue
                if device is None:
                    log.info("no room to specialise", extra={"version": shown(version)})
                    self._settled.add(version)
                    continue
                try:
                    await self._bring(self._slot.specialise(version, device), None, beside=True, gives_way=True)
                except _GaveWay:
                    continue
                except Exception as error:  # libraries raise what they like, and the version serves on as it was
                    log.warning("serves with weights set", extra={"version": shown(version), "error": str(error)})
                finally:  # at once, so that nobody takes what it has grown by
                    self._room.gone(beside)
                    self._room.residency.resize(self._tenant(version), self._slot.weight_bytes(version))
                self._settled.add(version)

    async def unload(self, version: str) -> bool:
        """A version that is not served any more; False if a row here still needs it."""
        if version in self._serving:
            return False
        if version in self._slot.versions and not await self.evict(version):
            return False
        self._sizes.pop(version, None)
        self._room.residency.forget(version)
        return True

    async def evict(self, version: str) -> bool:
        """Frees the memory of a version, which is loaded again when a row asks for it; False if one does now.

        After what is in the engine threads now: a row of a request that was canceled may still be there.
        """
        with self._first():
            async with self._lock:
                await asyncio.wrap_future(self._engine.landed())
                if self._room.uses(version):
                    return False
                self._gone(version, await asyncio.to_thread(self._slot.evict(version)))
                self._settled.discard(version)
                self._room.gone(self._tenant(version))
                log.info("evicted", extra={"deployment": self._deployment, "version": shown(version)})
                return True

    async def _load(
        self,
        tenant: Tenant,
        parts: Mapping[EngineKey, int],
        phase: OnPhase | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """Loads what room was taken for, and frees that where it fails."""
        try:
            async with self._lock:
                if tenant.version not in self._slot.versions:
                    await self._bring(self._slot.stage([tenant.version]), phase, beside=beside)
        except BaseException:
            self._room.gone(tenant)
            raise
        self._sizes[tenant.version] = parts
        self._room.ready(tenant)
        self._slot.switch(self._serving & self._slot.versions)

    @property
    def _others_first(self) -> bool:
        """Whether a load waits, here or for room, which what is specialised would give way to."""
        return self._wanted > 0 or self._room.asked

    def _room_beside(self, tenant: Tenant, choices: Mapping[str, Mapping[Any, int]]) -> str | None:
        """Takes room for something beside what is loaded: the first of `choices` that there is room for, by name."""
        for name, parts in choices.items():
            if self._room.take_free(tenant, {(tenant, part): size for part, size in parts.items()}):
                return name
        return None

    async def _loaded_by_another(self) -> None:
        """Waits for whoever took room for a version; whether it is there then is looked at again."""
        async with self._lock:
            pass

    @contextlib.contextmanager
    def _first(self) -> Iterator[None]:
        """Specialising gives way meanwhile."""
        self._wanted += 1
        try:
            yield
        finally:
            self._wanted -= 1

    async def _size(self, version: str) -> Mapping[EngineKey, int]:
        if version in self._sizes:
            return self._sizes[version]
        return await asyncio.to_thread(self._slot.weight_bytes, version)

    def _pins(self, versions: Sequence[str]) -> set[str]:
        """Those that an operator has pinned; by its deployment's name it is the first."""
        named = {version for version in versions if is_pinned(version, self._pinned)}
        return named | set(versions[:1] if self._deployment in self._pinned else ())

    def _state(self, version: str, parts: Mapping[EngineKey, int]) -> VersionState:
        tenant = self._tenant(version)
        one = self._room.residency.residents.get(tenant)
        return VersionState(
            state="on_demand" if one is None else "loading" if one.state == "loading" else "resident",
            weight_bytes=sum(parts.values()),
            ready_in_s=round(self._room.ready_in_s(tenant, parts), 3),
        )

    def _tenant(self, version: str) -> Tenant:
        return Tenant(self._deployment, version)

    async def _bring(self, staging: Staging, phase: OnPhase | None, *, beside: bool, gives_way: bool = False) -> None:
        pieces = iter(staging)
        said = ""
        running: Future[Any] = aside.run(lambda: next(pieces, None), "slot-next")
        try:
            while (piece := await _result(running)) is not None:
                if phase is not None and piece.phase != said:
                    said = piece.phase
                    await phase(said)
                running = self._begun(piece, beside=beside)
                await _result(running)
                if gives_way and self._others_first:
                    raise _GaveWay
                running = aside.run(lambda: next(pieces, None), "slot-next")
        except asyncio.CancelledError as error:
            # What runs goes on: only when it has ended, all that it loads can be let go of.
            reject = partial(staging.reject, error)
            running.add_done_callback(lambda _: self._engine.background(reject))
            raise
        except Exception as error:
            await asyncio.to_thread(staging.reject, error)
            raise

    def _begun(self, piece: Piece, *, beside: bool) -> "Future[Any]":
        """`beside` live traffic, what is heavy is niced; a worker that has nothing to serve yet hurries."""
        if piece.on_engine:
            return self._engine.background(piece.call)
        return aside.run(piece.call, f"slot-{piece.phase}", nice=NICE if beside else 0)


async def _result(running: "Future[Any]") -> Any:
    """Waits, and where that is cancelled, what runs is not."""
    return await asyncio.shield(asyncio.wrap_future(running))


class _GaveWay(Exception):
    """A load waits; what was begun is begun again later."""


def is_pinned(version: str, pins: Iterable[str]) -> bool:
    """Whether one of `pins` names this version by its name and 12 or more digits."""
    return any(len(pin.partition("@")[2]) >= 12 and version.startswith(pin) for pin in pins)
