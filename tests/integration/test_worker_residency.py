"""A worker that may not hold all that it serves: every request is answered, and memory is given back."""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from engines.backends.base import Choice, Profile
from engines.errors import Overloaded
from engines.loader import Loader, load_student
from engines.manifest import shown
from engines.registry.base import Candidate, Outcome, Registry, TierTarget
from engines.student import sample
from server.brokers.memory import MemoryBroker, MemoryServer
from server.brokers.redis import RedisBroker
from server.intent import Intent
from server.menu import Wanted
from server.messages import GenerateResult
from server.residency import Tenant, union_bytes
from tests import tiny_sd
from tests.contract.conftest import redis_server
from tests.eventually import aeventually
from tests.integration.test_gateway_worker import WEB, gateway
from tests.integration.test_worker_requests import picture, same
from tests.integration.worker_stack import MODEL, Running, copied, running, student
from tests.redis_server import RedisServer, fresh_namespace

__all__ = ["redis_server"]


def tiers(registry: Registry, **students: str) -> Candidate:
    """A candidate with a tier of one step for each of these; `low` is the default."""
    current = registry.current(MODEL)
    return registry.propose(
        MODEL,
        {tier: TierTarget(student=version, steps=1) for tier, version in students.items()},
        default_tier="low",
        allowed={version: [1, 4] for version in students.values()},
        base_revision=current.number if current else 0,
    )


def made_current(registry: Registry, candidate: Candidate) -> None:
    number, at = candidate.base_revision + 1, "2026-01-01T00:00:00Z"
    registry.commit(candidate.revision(number, created_at=at))
    registry.settle(MODEL, candidate.swap_id, Outcome(swap_id=candidate.swap_id, state="live", revision=number, at=at))


class Trio:
    """A registry whose deployment has three versions, which share encoder and decoder."""

    def __init__(self) -> None:
        self.registry = copied(tiny_sd.teacher())
        self.low, self.medium = student(self.registry, 1.02), student(self.registry, 1.04)
        self.high = tiny_sd.teacher().manifest.version
        self.versions = (self.low, self.medium, self.high)
        made_current(self.registry, tiers(self.registry, low=self.low, medium=self.medium, high=self.high))
        self.one_bytes, self.two_bytes = self.bytes(self.low), self.bytes(self.low, self.medium)

    def bytes(self, *versions: str) -> int:
        """Of the weights of these together."""
        graphs = tiny_sd.teacher().graphs
        loader = Loader(self.registry, Choice("eager", "fp32"), Profile((1,), threads=1), graphs)
        return union_bytes([loader.weight_bytes(self.registry.student(version)) for version in versions])


@pytest.fixture(scope="module")
def trio() -> Trio:
    """Read alone: whoever swaps makes one of its own."""
    return Trio()


def brokers() -> tuple[MemoryBroker, MemoryBroker]:
    server = MemoryServer()
    return MemoryBroker(server, "worker"), MemoryBroker(server, "gateway")


def total(up: Running, name: str) -> float:
    return up.metrics.registry.get_sample_value(f"fewstep_{name}", {"model": MODEL}) or 0.0


def states(up: Running) -> dict[str, str]:
    return {version: state.state for version, state in up.students.lease().versions[MODEL].items()}


async def test_what_does_not_fit_is_loaded_for_who_asks_and_every_request_is_answered(
    trio: Trio, redis_server: RedisServer
) -> None:
    namespace = fresh_namespace()
    worker, gateway = (RedisBroker(redis_server.url, name, namespace=namespace) for name in ("worker", "gateway"))
    await gateway.start()
    await worker.start()
    async with running(worker, gateway, registry=trio.registry, resident_bytes=trio.two_bytes) as up:
        assert Counter(states(up).values()) == {"resident": 2, "on_demand": 1}
        assert states(up)[trio.low] == "resident"  # the default tier comes first
        most_bytes: list[int] = []

        async def ask(i: int) -> GenerateResult:
            result = await up.answer(up.request(f"r{i}", version=trio.versions[i % 3], steps=1, seed=i), within_s=60)
            most_bytes.append(up.loader.loaded_bytes())
            return result

        results = await asyncio.gather(*map(ask, range(48)))
        assert {result.status for result in results} == {"succeeded"}
        assert [result.version for result in results] == [trio.versions[i % 3] for i in range(48)]
        for i in (0, 1, 2, 47):
            made_by = load_student(trio.registry, trio.registry.student(trio.versions[i % 3]))
            same(await picture(up, f"r{i}"), sample(made_by, ["a red circle"], [i], 1)[0])
        waited = [result.timing for result in results if result.timing.load_ms]
        assert waited
        assert all(timing.queue_ms >= timing.load_ms for timing in waited)
        # What an evicted version costs is told all the same, and when it could serve.
        lease = up.students.lease()
        assert set(lease.costs) == set(trio.versions)
        absent = [state for state in lease.versions[MODEL].values() if state.state == "on_demand"]
        assert [state.ready_in_s > 0 for state in absent] == [True]
        loads, evictions = total(up, "demand_load_seconds_count"), total(up, "evictions_total")
        assert 1 <= evictions <= loads <= 6  # and not 16: who waits for a version is served by one load of it
        assert max(most_bytes) <= trio.two_bytes
        assert up.loader.loaded_bytes() == up.students.room.residency.used_bytes == trio.two_bytes
        assert up.metrics.registry.get_sample_value("fewstep_resident_bytes") == trio.two_bytes
    await worker.close()
    await gateway.close()


async def test_requests_go_to_the_worker_that_has_their_version_as_long_as_it_lives(
    trio: Trio, redis_server: RedisServer
) -> None:
    namespace = fresh_namespace()
    names = ("one", "two", "gateway")
    one, two, gateway = (RedisBroker(redis_server.url, name, namespace=namespace) for name in names)
    for broker in (one, two, gateway):
        await broker.start()
    given: dict[str, Any] = {"registry": trio.registry, "resident_bytes": trio.two_bytes}
    async with running(one, gateway, **given) as up:
        await up.answer(up.request("first", version=trio.high, steps=1))  # medium has to go for it
        async with running(two, gateway, **given) as other:
            assert states(other)[trio.medium] == "resident"

            async def loads() -> list[bool]:
                """Whether each version, of which both workers have two, was loaded for who asked for it."""
                asked = [up.request(secrets.token_hex(4), version=v, steps=1) for v in trio.versions]
                return [(await up.answer(request)).timing.load_ms > 0 for request in asked]

            async def settled() -> bool:  # a worker that waits for requests already takes one more of any version
                return not any([any(await loads()) for _ in range(6)])

            await aeventually(settled, 30)
        asked = [up.request(secrets.token_hex(4), version=v, steps=1) for v in trio.versions]
        assert {(await up.answer(request)).worker for request in asked} == {"one"}  # whatever it has to load
    for broker in (one, two, gateway):
        await broker.close()


async def test_rows_that_wait_for_a_load_keep_no_other_version_waiting(trio: Trio) -> None:
    async with running(*brokers(), registry=trio.registry, resident_bytes=trio.two_bytes) as up:
        await up.answer(up.request("warm", version=trio.medium, steps=1))
        cold = [
            asyncio.create_task(up.answer(up.request(f"c{i}", version=trio.high, steps=1, seed=i))) for i in range(20)
        ]
        warm = await up.answer(up.request("w", version=trio.low, steps=1))
        assert warm.timing.load_ms == 0.0
        assert {(await one).status for one in cold} == {"succeeded"}
        assert total(up, "demand_load_seconds_count") == 1


async def test_rows_that_come_all_at_once_after_a_load_leave_room_for_what_is_more_urgent(trio: Trio) -> None:
    async with running(*brokers(), registry=trio.registry, resident_bytes=trio.two_bytes, backend="paced") as up:
        cold = [
            asyncio.create_task(up.answer(up.request(f"c{i}", version=trio.high, steps=1, seed=i, due_after_s=30.0)))
            for i in range(40)
        ]

        async def there() -> bool:
            return states(up)[trio.high] == "resident"

        await aeventually(there, 20)
        for i in range(2):  # the first may come in by a claim that was under way
            await up.answer(up.request(f"urgent{i}", version=trio.low, steps=1))
        assert sum(one.done() for one in cold) < 24  # and not only when there is room for the next batch
        assert {(await one).status for one in cold} == {"succeeded"}


@contextlib.contextmanager
def swapped(up: Running, *versions: str) -> Iterator[None]:
    """As long as a swap keeps these, nobody else can be loaded."""
    pins = up.students.room.residency.swapping
    pins[MODEL] = frozenset(Tenant(MODEL, version) for version in versions)
    yield
    pins[MODEL] = frozenset()
    up.students.room.moved()


async def test_who_waits_for_a_load_past_its_time_or_is_canceled_is_done_with_at_once(trio: Trio) -> None:
    async with running(*brokers(), registry=trio.registry, resident_bytes=trio.two_bytes) as up:
        with swapped(up, trio.low, trio.medium):
            late = await up.answer(up.request("late", version=trio.high, steps=1, budget_ms=150))
            assert (late.status, late.error and late.error.code) == ("expired", "deadline_exceeded")
            await up.gateway.publish(up.request("gone", version=trio.high, steps=1))

            async def claimed() -> bool:
                return (await up.gateway.queue_state(MODEL)).waiting["normal"] == 0

            await aeventually(claimed)
            assert await up.gateway.cancel("gone")

            async def forgotten() -> bool:
                return up.metrics.registry.get_sample_value("fewstep_cancelled_total", {"where": "worker"}) == 1

            await aeventually(forgotten)
        assert (await up.answer(up.request("next", version=trio.high, steps=1))).status == "succeeded"


async def test_a_worker_claims_no_more_than_a_bounded_number_of_rows_that_wait_for_loads(trio: Trio) -> None:
    most = 8 * 2 * 4
    async with running(*brokers(), registry=trio.registry, resident_bytes=trio.two_bytes) as up:
        with swapped(up, trio.low, trio.medium):
            requests = [up.request(f"r{i}", version=trio.high, steps=1, seed=i) for i in range(most + 16)]
            for request in requests:
                await up.gateway.publish(request)

            async def full() -> bool:
                return (await up.gateway.queue_state(MODEL)).waiting["normal"] <= len(requests) - most

            await aeventually(full)
            assert await up.gateway.wait(requests[-1].id, 0.3) is None
            assert (await up.gateway.queue_state(MODEL)).waiting["normal"] > 0
        results = [await up.gateway.wait(request.id, 20) for request in requests]
        assert {result and result.status for result in results} == {"succeeded"}


async def test_a_pinned_version_stays_whatever_is_asked_for(trio: Trio) -> None:
    async with running(
        *brokers(), registry=trio.registry, resident_bytes=trio.two_bytes, pinned=(MODEL, shown(trio.medium))
    ) as up:
        failed = await up.answer(up.request("h", version=trio.high, steps=1))
        assert failed.error is not None
        assert failed.error.code == "memory_exceeded"
        assert states(up) == {trio.low: "resident", trio.medium: "resident", trio.high: "on_demand"}


async def test_a_worker_that_can_never_hold_a_version_serves_nothing_of_its_deployment_and_says_why(trio: Trio) -> None:
    async with running(*brokers(), registry=trio.registry, wait=False, resident_bytes=trio.one_bytes - 1) as up:

        async def told() -> str | None:
            loading = up.students.lease().loading.get(MODEL)
            return loading.phase if loading and "memory_exceeded" in loading.phase else None

        phase = await aeventually(told)
        assert phase is not None
        assert phase.count("MiB") == 2
        assert up.students.serving() == []
        assert up.loader.loaded_bytes() == 0


async def test_a_swap_makes_room_among_what_is_idle_and_keeps_the_old_version_beside_the_new_one() -> None:
    trio = Trio()
    async with running(*brokers(), registry=trio.registry, resident_bytes=trio.two_bytes) as up:
        new = student(trio.registry, 1.06)
        candidate = tiers(trio.registry, low=new, medium=trio.medium, high=trio.high)
        outcome = await up.outcome(candidate)
        assert (outcome.state, outcome.reason) == ("live", None)
        assert states(up)[new] == "resident"
        for i, version in enumerate((new, trio.medium, trio.high)):
            assert (await up.answer(up.request(f"r{i}", version=version, steps=1))).status == "succeeded"
        assert up.loader.loaded_bytes() <= trio.two_bytes


async def test_a_swap_that_cannot_hold_both_is_dropped_with_the_sizes_and_nothing_has_happened() -> None:
    trio = Trio()
    async with running(*brokers(), registry=trio.registry, resident_bytes=trio.two_bytes - 1) as up:
        assert list(states(up).values()).count("resident") == 1
        candidate = tiers(trio.registry, low=student(trio.registry, 1.06))
        outcome = await up.outcome(candidate)
        assert outcome.state == "dropped"
        assert "memory_exceeded at staged: student@" in (outcome.reason or "")
        assert (outcome.reason or "").count("MiB") == 3
        assert (await up.answer(up.request("r", steps=1))).version == trio.low
        assert set(states(up)) == set(trio.versions)


async def test_who_may_not_wait_for_a_load_is_told_when_and_then_finds_it_done(trio: Trio) -> None:
    server = MemoryServer()
    async with (
        gateway(server, trio.registry, poll_s=0.02) as front,
        running(
            MemoryBroker(server, "worker"), front.broker, registry=trio.registry, resident_bytes=trio.two_bytes
        ) as up,
    ):
        absent = next(version for version, state in states(up).items() if state == "on_demand")
        intent = Intent(Wanted(absent), "a red circle", timeout_ms=1)

        async def predicted() -> bool:
            return front.catalog.ready_in_s(MODEL, absent) > 0.0

        await aeventually(predicted, 10)
        with pytest.raises(Overloaded, match="will be in memory in") as caught:
            await front.submit(intent, WEB)
        assert caught.value.retry_after_s is not None

        async def there() -> bool:
            return states(up)[absent] == "resident" and front.catalog.ready_in_s(MODEL, absent) == 0.0

        await aeventually(there, 20)
        answer = await front.answer(await front.submit(Intent(Wanted(absent), "a red circle"), WEB))
        assert answer.result.timing.load_ms == 0.0
