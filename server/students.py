"""Everything that a worker can serve: its deployments, each followed by itself, and what their calls cost."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engines import aside, memory, videos
from engines.backends.base import fitting
from engines.cost import CostKey, CostModel
from engines.errors import FewstepError
from engines.loader import Loader
from engines.registry.base import Registry
from engines.slot import EngineSlot
from engines.student import LoadedStudent
from server import leases
from server.batcher import LaneKey
from server.brokers.base import NOWHERE, Broker
from server.engine_loop import EngineLoop
from server.follower import Follower
from server.leases import StageCost, VersionCost, WorkerLease, write
from server.media import OF_VIDEOS
from server.metrics import Metrics
from server.residency import Residency, Tenant
from server.residents import NICE, OnGone, Residents
from server.room import Room
from server.settings import WorkerSettings
from server.tracing import Tracing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Demand:
    """Versions of a deployment that rows wait for together."""

    deployment: str
    versions: frozenset[str]


class Students:
    """One event loop, but for `lease`, `observe`, `call_s` and `least_s`, which other threads call."""

    def __init__(
        self,
        settings: WorkerSettings,
        broker: Broker,
        registry: Registry,
        loader: Loader,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings, self._broker, self._registry = settings, broker, registry
        self._loader, self._metrics, self._tracing = loader, metrics, tracing
        self.cost = CostModel()
        self._batches = tuple(sorted(settings.batch_sizes))
        self._video_formats: list[str] = [one for one in OF_VIDEOS if videos.writes(one)]
        self._followers: dict[str, Follower] = {}
        self._residents: dict[str, Residents] = {}
        self._costs: dict[str, VersionCost] = {}  # as they were when each version was loaded last
        self._demands: dict[Demand, asyncio.Task[None]] = {}
        self.room = Room(Residency(settings.resident_bytes or memory.share(loader.profile.device)), metrics)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.elsewhere_ms: Mapping[str, int] = NOWHERE  # as `Broker.claim` takes it

    @property
    def backend(self) -> str:
        return self._loader.choice.backend

    @property
    def device(self) -> str:
        """Where rows live between calls of their engines."""
        return self._loader.profile.device

    @property
    def streams(self) -> int:
        """Engine calls at once."""
        return self._loader.profile.streams

    @property
    def most_streams(self) -> int:
        """What `streams` may become."""
        return self._loader.most_streams

    def serving(self) -> list[str]:
        """Deployments that may be claimed for: their current revision is loaded."""
        return [name for name, follower in self._followers.items() if follower.joined and follower.current]

    def loaded(self, deployment: str, version: str) -> LoadedStudent | None:
        """For one more row; None where it has to be fetched first."""
        residents = self._residents.get(deployment)
        return residents.student(version) if residents else None

    def used(self, deployment: str, version: str) -> None:
        """A row of it has come or gone."""
        self._residents[deployment].used(version)
        self.room.moved()

    async def fetch(self, deployment: str, versions: Iterable[str]) -> None:
        """Loads versions that a request needs together, once for all who ask meanwhile.

        Raises:
            FewstepError: they cannot be had.
        """
        await asyncio.shield(self._demand(Demand(deployment, frozenset(versions))))

    def _demand(self, demand: Demand) -> "asyncio.Task[None]":
        task = self._demands.get(demand)
        if task is None:
            task = asyncio.create_task(self._bring(demand))
            self._demands[demand] = task
            task.add_done_callback(lambda done: self._fetched(demand, done))
        return task

    async def _bring(self, demand: Demand) -> None:
        """Gateways hear at once that it is being loaded, and that it is there."""
        with contextlib.suppress(FewstepError):
            await self._renew()
        await self._residents[demand.deployment].fetch(sorted(demand.versions))
        with contextlib.suppress(FewstepError):
            await self._renew()

    def _fetch_for_later(self, deployment: str, version: str) -> None:
        """Somebody was told to come again when this is loaded."""
        residents = self._residents.get(deployment)
        if residents is not None and version in residents.known and residents.student(version) is None:
            self._demand(Demand(deployment, frozenset({version})))

    def _fetched(self, demand: Demand, task: "asyncio.Task[None]") -> None:
        del self._demands[demand]
        if not task.cancelled() and (error := task.exception()):  # whoever waits has it too, but may have gone
            log.warning("cannot load on demand", extra={"deployment": demand.deployment, "error": str(error)})

    async def open_pictures(self, deployment: str, version: str) -> None:
        """Has the engine there that encodes pictures, for a version that is here; the first time that is heavy.

        Raises:
            FewstepError: the version has none, or it cannot be had.
        """
        student = self.loaded(deployment, version)
        if student is None:  # unloaded again: who asks will see that, and have it loaded once more
            return
        opened = aside.run(partial(self._loader.pictures, student.manifest), "pictures", nice=NICE)
        await asyncio.shield(asyncio.wrap_future(opened))

    # --- following -------------------------------------------------------------------------------

    async def run(self, engine: EngineLoop, uses: Callable[[str], bool], gone: OnGone) -> None:
        """Follows every deployment that there is, or those of the settings, for ever. For the rest see `Residents`."""
        self.room.uses, self.room.evict = uses, self._evict
        listening = asyncio.create_task(self._listen())
        try:
            while True:
                for name in await self._names():
                    if name not in self._followers:
                        self._follow(name, engine, gone)
                for task in (*self._tasks.values(), listening):
                    if task.done():
                        task.result()
                self.elsewhere_ms = await self._look_elsewhere()
                await asyncio.sleep(self._settings.poll_s)
        finally:
            tasks = [listening, *self._tasks.values(), *self._demands.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _names(self) -> Sequence[str]:
        return self._settings.deployments or await asyncio.to_thread(self._registry.deployments)

    async def _look_elsewhere(self) -> Mapping[str, int]:
        """Only a worker that lacks a version asks what others have."""
        mine = self.lease()
        if all(state.state != "on_demand" for states in mine.versions.values() for state in states.values()):
            return NOWHERE
        with contextlib.suppress(FewstepError):
            workers = await self._broker.workers()
            return leases.elsewhere_ms(
                mine, (leases.read(one.info) for one in workers if one.id != self._broker.identity)
            )
        return NOWHERE

    def _follow(self, name: str, engine: EngineLoop, gone: OnGone) -> None:
        slot = EngineSlot(self._loader, self.cost)
        residents = Residents(name, slot, engine, self.room, gone, pinned=self._settings.pinned)
        follower = Follower(
            name,
            broker=self._broker,
            registry=self._registry,
            residents=residents,
            settings=self._settings,
            metrics=self._metrics,
            meter=engine.meter,
            changed=self._renew,
            tracing=self._tracing,
        )
        self._residents = {**self._residents, name: residents}
        self._followers = {**self._followers, name: follower}
        self._tasks[name] = asyncio.create_task(follower.run())

    async def _evict(self, tenant: Tenant) -> bool:
        return await self._residents[tenant.deployment].evict(tenant.version)

    async def _renew(self) -> None:
        """The lease is renewed by its own thread; what is new in it should not wait for that."""
        await self._broker.renew_lease(write(self.lease()))

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(FewstepError, OSError):
                async for topic in self._broker.announcements():
                    if wanted := leases.read_wanted(topic):
                        self._fetch_for_later(*wanted)
                    else:
                        for follower in self._followers.values():
                            follower.wake.set()
            await asyncio.sleep(self._settings.poll_s)

    # --- costs -----------------------------------------------------------------------------------

    def observe(self, rows: Sequence[Any], seconds: float, lone: bool) -> None:
        """A live call took this long; a `lone` one was `engines.streams.alone`."""
        lane: LaneKey = rows[0].lane
        prompts = lane.stage == "encode" and not lane.shape  # pictures to change have one
        weight = len({row.prompt for row in rows}) if prompts else sum(row.network_rows for row in rows)
        if weight <= self._batches[-1]:
            key, size, lone = _key(lane), fitting(weight, self._batches), lone and self.streams > 1
            expected_s = self.cost.lone_s(key, size) if lone else self.cost.seconds(key, size)
            if expected_s is not None:
                self._metrics.call_seconds.labels(lane.stage).inc(seconds)
                self._metrics.call_expected_seconds.labels(lane.stage).inc(expected_s)
            self.cost.observe(key, size, seconds, lone=lone)

    def call_s(self, lane: LaneKey, size: int) -> float | None:
        """What one call of a lane takes at a warmed size, measured."""
        return self.cost.seconds(_key(lane), size)

    def least_s(self, lane: LaneKey) -> float:
        """What the quickest call of a lane took so far."""
        return self.cost.least_s(_key(lane))

    def lease(self) -> WorkerLease:
        """What this worker says of itself."""
        serving = {name: self._residents[name] for name, one in self._followers.items() if one.joined}
        known = {name: sorted(residents.known) for name, residents in serving.items()}
        costs, before = {}, self._costs
        for name, versions in known.items():
            for version in versions:
                if student := serving[name].family(version):
                    costs[version] = self._version_cost(student)
                elif version in before:
                    costs[version] = before[version]
        self._costs = costs
        return WorkerLease(
            deployments=known,
            loading={name: one.loading for name, one in self._followers.items() if one.loading},
            revisions={name: one.current.number for name, one in self._followers.items() if one.current},
            backend=self.backend,
            precision=self._loader.choice.precision,
            costs=costs,
            batch_rows=self._batches[-1] * self.streams,
            versions={name: residents.states() for name, residents in serving.items()},
            resident_bytes=self.room.residency.used_bytes,
            resident_limit_bytes=self.room.residency.limit_bytes,
            video_formats=self._video_formats,
        )

    def _version_cost(self, student: LoadedStudent) -> VersionCost:
        parts, shape = student.manifest.components, student.latent_shape
        return VersionCost(
            encode=self._stage_cost(CostKey("encode", parts["encoder"].weights, ())),
            step=self._stage_cost(CostKey("denoise", parts["denoiser"].weights, shape)),
            decode=self._stage_cost(CostKey("decode", parts["decoder"].weights, shape)),
        )

    def _stage_cost(self, key: CostKey) -> StageCost:
        alone, full = self.cost.lone_s(key, self._batches[0]), self.cost.predict(key, self._batches[-1])
        return StageCost(alone_s=alone or 0.0, row_s=(full or 0.0) / (self._batches[-1] * self.streams))


def _key(lane: LaneKey) -> CostKey:
    """A lane's engine is a blob and, for denoisers, the inputs that it reads."""
    return CostKey(lane.stage, lane.engine.partition(":")[0], lane.shape)
