"""A deployment followed by workers: what is promoted goes live everywhere or nowhere, and what is left is unloaded."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from engines.errors import GoldenMismatch
from engines.registry.base import Candidate, Outcome, TierTarget
from engines.registry.memory import MemoryRegistry
from server import metrics
from server.brokers.base import Phase
from server.brokers.memory import MemoryBroker, MemoryServer
from server.follower import Follower, OnPhase
from server.settings import WorkerSettings
from server.stall import StallMeter
from tests.eventually import aeventually
from tests.unit.server import toy

V1, V2, V3 = (f"toy@{str(i) * 64}" for i in (1, 2, 3))


@dataclass
class ToyResidents:
    """Loads at once, unless told to wait or to refuse."""

    backend: str = "toy"
    loaded: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    specialised: list[frozenset[str]] = field(default_factory=list)
    served: frozenset[str] = frozenset()
    kept: list[tuple[str, ...]] = field(default_factory=list)
    cancelled: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def held(self) -> frozenset[str]:
        return frozenset(self.loaded)

    @property
    def known(self) -> frozenset[str]:
        return self.held | self.served

    def serve(self, versions: Sequence[str]) -> None:
        self.served = frozenset(versions)

    def keep(self, versions: Iterable[str]) -> None:
        self.kept.append(tuple(versions))

    async def preload(self, versions: Sequence[str], phase: OnPhase | None = None) -> None:
        await self.load(versions, phase)

    async def load(
        self, versions: Sequence[str], phase: OnPhase | None = None, *, beside: bool = False, keeps: Iterable[str] = ()
    ) -> None:
        for version in [version for version in versions if version not in self.loaded]:
            if phase:
                for name in ("building", "warming", "verifying"):
                    await phase(name)
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if version in self.bad:
                raise GoldenMismatch("does not reproduce sample 0")
            self.loaded.add(version)

    async def specialise(self, versions: Iterable[str]) -> None:
        self.specialised.append(frozenset(versions))

    async def unload(self, version: str) -> bool:
        if version in self.used:
            return False
        self.loaded.discard(version)
        return True


class World:
    """One registry and one broker server, with any number of workers that follow the deployment."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.server = MemoryServer()
        self.broker = MemoryBroker(self.server, "gateway")
        self.now_ms = 0

    def follower(
        self,
        name: str,
        *,
        keep_previous_s: float = 0.0,
        swap_timeout_s: float = 120.0,
        specialise_after_s: float = float("inf"),
    ) -> Follower:
        broker = MemoryBroker(self.server, name)
        residents = ToyResidents()
        residents.gate.set()
        settings = WorkerSettings(
            redis_url="memory:",
            registry_url="memory:",
            poll_s=0.02,
            keep_previous_s=keep_previous_s,
            swap_timeout_s=swap_timeout_s,
            specialise_after_s=specialise_after_s,
        )

        async def changed() -> None:
            await broker.renew_lease({"deployments": {"toys": []}})

        made = Follower(
            "toys",
            broker=broker,
            registry=self.registry,
            residents=residents,
            settings=settings,
            metrics=metrics.make(),
            meter=StallMeter(),
            changed=changed,
        )
        made.toy = residents  # type: ignore[attr-defined]
        made.broker = broker  # type: ignore[attr-defined]
        return made

    def promote(self, version: str) -> Candidate:
        current = self.registry.current("toys")
        return self.registry.propose(
            "toys",
            {"low": TierTarget(student=version, steps=1)},
            default_tier="low",
            allowed={version: [1]},
            base_revision=current.number if current else 0,
        )

    async def outcome(self, candidate: Candidate) -> Outcome:
        async def ended() -> Outcome | None:
            return self.registry.outcome("toys", candidate.swap_id)

        found = await aeventually(ended)
        assert found is not None
        return found

    async def phases(self, candidate: Candidate) -> dict[str, Phase]:
        return await self.broker.phases(candidate.swap_id)


class Running:
    """Followers that run until the block ends, with live leases."""

    def __init__(self, *followers: Follower) -> None:
        self.followers = followers
        self.tasks: dict[Follower, asyncio.Task[None]] = {}

    async def __aenter__(self) -> "Running":
        for one in self.followers:
            await self.start(one)
        return self

    async def start(self, one: Follower) -> None:
        await one.broker.renew_lease({"deployments": {"toys": []}})  # type: ignore[attr-defined]
        self.tasks[one] = asyncio.create_task(one.run())

    async def kill(self, one: Follower) -> None:
        self.tasks[one].cancel()
        await asyncio.gather(self.tasks.pop(one), return_exceptions=True)
        await one.broker.release_lease()  # type: ignore[attr-defined]

    async def __aexit__(self, *_: object) -> None:
        for one in list(self.tasks):
            await self.kill(one)


def held(one: Follower) -> set[str]:
    return one.toy.loaded  # type: ignore[attr-defined, no-any-return]


def toys(one: Follower) -> ToyResidents:
    return one.toy  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
async def world() -> World:
    return World()


async def test_the_first_promotion_goes_live_on_every_worker(world: World) -> None:
    a, b = world.follower("a"), world.follower("b")
    async with Running(a, b):
        outcome = await world.outcome(world.promote(V1))
        assert (outcome.state, outcome.revision) == ("live", 1)
        await aeventually(_is(lambda: [one.current and one.current.number for one in (a, b)], [1, 1]))
        assert held(a) == held(b) == {V1}


async def test_a_candidate_waits_for_the_slowest_worker_and_nobody_switches_before(world: World) -> None:
    a, b = world.follower("a"), world.follower("b")
    async with Running(a, b):
        await world.outcome(world.promote(V1))
        toys(b).gate.clear()
        candidate = world.promote(V2)

        async def waiting() -> bool:
            said = await world.phases(candidate)
            return {name: phase.phase for name, phase in said.items()} == {"a": "ready", "b": "verifying"}

        await aeventually(waiting)
        assert world.registry.outcome("toys", candidate.swap_id) is None
        assert a.current is not None
        assert a.current.number == 1
        toys(b).gate.set()
        outcome = await world.outcome(candidate)
        assert outcome.state == "live"
        assert set(outcome.phases) >= {"staged", "building", "warming", "verifying"}


async def test_a_rejected_candidate_is_dropped_with_its_reason_and_unloaded_everywhere(world: World) -> None:
    a, b = world.follower("a"), world.follower("b")
    async with Running(a, b):
        await world.outcome(world.promote(V1))
        toys(b).bad.add(V2)
        outcome = await world.outcome(world.promote(V2))
        assert outcome.state == "dropped"
        assert outcome.reason is not None
        assert "b: golden_mismatch at verifying" in outcome.reason
        await aeventually(_is(lambda: [held(a), held(b)], [{V1}, {V1}]))
        current = world.registry.current("toys")
        assert current is not None
        assert current.number == 1


async def test_the_coordinator_may_die_and_another_finishes_the_swap(world: World) -> None:
    a, b = world.follower("a"), world.follower("b")
    async with Running(a, b) as running:
        await world.outcome(world.promote(V1))
        toys(a).gate.clear()
        toys(b).gate.clear()
        candidate = world.promote(V2)

        async def coordinator() -> str | None:
            held = world.server.named.get("swap:toys")
            return held.owner if held and await world.phases(candidate) else None

        first = a if await aeventually(coordinator) == "a" else b
        await running.kill(first)
        world.server.named.pop("swap:toys")  # its time is over
        toys(b if first is a else a).gate.set()
        assert (await world.outcome(candidate)).state == "live"


async def test_a_candidate_that_is_never_ready_is_dropped_in_time(world: World) -> None:
    a = world.follower("a", swap_timeout_s=0.2)
    async with Running(a):
        await world.outcome(world.promote(V1))
        toys(a).gate.clear()
        outcome = await world.outcome(world.promote(V2))
        assert outcome.state == "dropped"
        assert "a is verifying" in str(outcome.reason)


async def test_a_newer_candidate_ends_the_older_one(world: World) -> None:
    a = world.follower("a")
    async with Running(a):
        await world.outcome(world.promote(V1))
        toys(a).gate.clear()
        older = world.promote(V2)
        await aeventually(_later(lambda: world.phases(older)))
        newer = world.promote(V3)
        await aeventually(_is(lambda: toys(a).cancelled, 1))
        toys(a).gate.set()
        assert (await world.outcome(older)).state == "superseded"
        assert (await world.outcome(newer)).state == "live"
        await aeventually(_is(lambda: held(a), {V3}))
        assert toys(a).cancelled == 1


async def test_the_old_version_stays_while_a_request_pins_it(world: World) -> None:
    a = world.follower("a")
    async with Running(a):
        await world.outcome(world.promote(V1))
        request = toy.request(toy.student(), "r1", version=V1)
        await world.broker.publish(request)
        candidate = world.promote(V2)
        await world.outcome(candidate)

        async def draining() -> bool:
            return (await world.phases(candidate))["a"].phase == "draining"

        await aeventually(draining)
        assert held(a) == {V1, V2}
        await world.broker.cancel("r1")
        await aeventually(_is(lambda: held(a), {V2}))
        assert await world.broker.servable("toys") == {V2}


async def test_the_previous_version_is_kept_for_a_rollback(world: World) -> None:
    a = world.follower("a", keep_previous_s=300.0)
    async with Running(a):
        for version in (V1, V2, V3):
            assert (await world.outcome(world.promote(version))).state == "live"
        await aeventually(_is(lambda: held(a), {V2, V3}))
        assert await world.broker.servable("toys") == {V2, V3}
        assert toys(a).kept[-2:] == [(V3, V2), ()]  # both while they are swapped, and nobody afterwards
        toys(a).gate.clear()  # a rollback loads nothing
        assert (await world.outcome(world.promote(V2))).state == "live"


async def test_a_version_that_a_row_here_still_uses_is_not_unloaded(world: World) -> None:
    a = world.follower("a")
    async with Running(a):
        await world.outcome(world.promote(V1))
        toys(a).used.add(V1)
        await world.outcome(world.promote(V2))

        async def retired() -> bool:
            return await world.broker.servable("toys") == {V2}

        await aeventually(retired)
        assert held(a) == {V1, V2}
        toys(a).used.clear()
        await aeventually(_is(lambda: held(a), {V2}))


async def test_a_worker_that_joins_loads_what_is_current(world: World) -> None:
    a = world.follower("a")
    async with Running(a) as running:
        await world.outcome(world.promote(V1))
        b = world.follower("b")
        toys(b).gate.clear()
        await running.start(b)
        assert not b.joined
        toys(b).gate.set()
        await aeventually(_is(lambda: b.joined, True))
        assert held(b) == {V1}


async def test_phases_that_redis_lost_are_said_again(world: World) -> None:
    a = world.follower("a")
    async with Running(a):
        await world.outcome(world.promote(V1))
        toys(a).gate.clear()
        candidate = world.promote(V2)
        await aeventually(_later(lambda: world.phases(candidate)))
        world.server.phases.clear()
        await aeventually(_later(lambda: world.phases(candidate)))


def _is(read: Callable[[], object], wanted: object) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return read() == wanted

    return check


def _later(ask: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    async def check() -> object:
        return await ask()

    return check


async def test_what_is_loaded_unstaged_is_told_with_its_phase_and_since_when_over_retries() -> None:
    world = World()
    one = world.follower("a")
    toy_residents(one).gate.clear()
    world.registry.commit(world.promote(V1).revision(1, created_at="2026-01-01T00:00:00Z"))
    looking = asyncio.create_task(one.look())
    await aeventually(lambda: at_phase(one, "verifying"))
    assert one.loading is not None
    first = one.loading
    toy_residents(one).bad.add(V1)
    toy_residents(one).gate.set()
    with pytest.raises(GoldenMismatch):
        await looking
    assert one.loading == first
    toy_residents(one).bad.clear()
    await one.look()
    assert (one.loading, one.joined) == (None, True)


async def at_phase(one: Follower, phase: str) -> bool:
    return one.loading is not None and one.loading.phase == phase


def toy_residents(one: Follower) -> ToyResidents:
    return one.toy  # type: ignore[attr-defined, no-any-return]


async def test_what_is_served_is_specialised_between_swaps_and_not_during_one(world: World) -> None:
    a = world.follower("a", specialise_after_s=0.0)
    async with Running(a):
        await world.outcome(world.promote(V1))
        await aeventually(_is(lambda: frozenset({V1}) in toys(a).specialised, True))
        toys(a).gate.clear()
        candidate = world.promote(V2)

        async def building() -> bool:
            return bool(await world.phases(candidate))

        await aeventually(building)
        before = len(toys(a).specialised)
        for _ in range(3):
            await a.look()
        assert len(toys(a).specialised) == before
        toys(a).gate.set()
        await aeventually(_is(lambda: frozenset({V2}) in toys(a).specialised, True))


async def test_a_version_is_not_specialised_before_it_has_stayed(world: World) -> None:
    a = world.follower("a", specialise_after_s=3600.0)
    async with Running(a):
        await world.outcome(world.promote(V1))
        for _ in range(3):
            await a.look()
        assert toys(a).specialised == []
