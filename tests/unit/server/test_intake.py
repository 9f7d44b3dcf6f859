"""What a worker claims: as much as it has room for, with a part of the room kept for class high."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from engines.errors import Unavailable
from server.brokers.base import Claim
from server.brokers.memory import MemoryBroker, MemoryServer
from server.intake import Intake, Room, room, unencoded
from tests.eventually import aeventually
from tests.unit.server import toy


@pytest.mark.parametrize(
    ("held_high", "held_below", "expected"),
    [(0, 0, Room(16, 12)), (0, 12, Room(4, 0)), (8, 0, Room(8, 8)), (4, 12, Room(0, 0)), (0, 14, Room(2, -2))],
)
def test_a_quarter_of_the_room_is_kept_for_high(held_high: int, held_below: int, expected: Room) -> None:
    assert room(16, held_high, held_below) == expected


def test_pixels_that_wait_for_an_encoder_are_held_once_there_are_more_than_calls_make_at_once() -> None:
    assert [unencoded(waiting, 2, 4) for waiting in (0, 8, 9, 20)] == [0, 0, 1, 12]


@dataclass
class Side:
    """A worker's other half: it holds what it is given until told otherwise."""

    limit: int = 8
    held: list[Claim] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    serving: Sequence[str] = ("toys",)

    def room(self) -> Room:
        rows = {True: 0, False: 0}
        for claim in self.held:
            rows[claim.request.request_class == "high"] += claim.request.n
        return room(self.limit, rows[True], rows[False])

    def ids(self) -> list[str]:
        return [claim.request.id for claim in self.held]


class Worker:
    """An intake on a broker in memory, and a gateway to publish with."""

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self.server = MemoryServer()
        self.now_s = 100.0
        self.gateway = MemoryBroker(self.server, "gateway")
        self.side = Side()
        self.intake = Intake(
            broker or MemoryBroker(self.server, "worker"),
            deployments=lambda: self.side.serving,
            room=self.side.room,
            admit=self.side.held.extend,
            forget=self.side.forgotten.extend,
            poll_s=0.02,
            now_s=lambda: self.now_s,
        )

    async def publish(self, *names: str, **given: Any) -> None:
        student = toy.student()
        for name in names:
            await self.gateway.publish(toy.request(student, name, **given))


class Running:
    def __init__(self, *loops: Callable[[], Any]) -> None:
        self._loops = loops

    async def __aenter__(self) -> None:
        self._tasks = [asyncio.create_task(loop()) for loop in self._loops]

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def has(check: Callable[[], bool]) -> None:
    async def ask() -> bool:
        return check()

    await aeventually(ask)


async def test_requests_are_claimed_until_the_room_for_them_is_full() -> None:
    worker = Worker()
    await worker.publish(*[f"r{i}" for i in range(9)])
    async with Running(worker.intake.claim):
        await has(lambda: len(worker.side.held) == 6)
        await worker.publish("urgent", priority=9)
        await has(lambda: "urgent" in worker.side.ids())
        assert len(worker.side.held) == 7


async def test_room_that_was_made_is_used_at_once() -> None:
    worker = Worker()
    await worker.publish(*[f"r{i}" for i in range(7)])
    async with Running(worker.intake.claim):
        await has(lambda: len(worker.side.held) == 6)
        worker.side.held.pop()
        worker.intake.moved()
        await has(lambda: "r6" in worker.side.ids())


class Counting(MemoryBroker):
    """A broker that counts the claims and gives nothing."""

    calls = 0

    async def claim(self, *args: Any, **named: Any) -> list[Claim]:
        self.calls += 1
        await asyncio.sleep(0)
        return []


async def test_a_full_worker_that_found_nothing_urgent_does_not_ask_at_every_step() -> None:
    broker = Counting(MemoryServer(), "worker")
    worker = Worker(broker)
    await worker.publish(*[f"r{i}" for i in range(6)])
    worker.side.held = await worker.gateway.claim(["toys"], 6, 0)

    async def steps(count: int) -> int:
        before = broker.calls
        for _ in range(count):
            worker.intake.moved()
            await asyncio.wait([asyncio.create_task(asyncio.sleep(0)) for _ in range(3)])
        return broker.calls - before

    async with Running(worker.intake.claim):
        asked = []
        for _ in range(3):
            asked.append(await steps(8))
            worker.now_s += 0.011
        assert asked == [1, 1, 1]
        worker.side.held.pop()  # room for all: that is used at once
        assert await steps(1) > 0


async def test_nothing_is_claimed_for_what_is_not_loaded() -> None:
    worker = Worker()
    worker.side.serving = ()
    await worker.publish("r1")
    async with Running(worker.intake.claim):
        await asyncio.sleep(0)
        worker.side.serving = ("toys",)
        await has(lambda: worker.side.ids() == ["r1"])


async def test_claims_of_the_dead_are_admitted_and_poisoned_ones_answered() -> None:
    worker = Worker()
    await worker.publish("once", "thrice")
    for name, deliveries in (("once", 1), ("thrice", 2)):
        worker.server.tickets[name].claimed_by = "dead"
        worker.server.tickets[name].deliveries = deliveries
    async with Running(worker.intake.reclaim):
        await has(lambda: worker.side.ids() == ["once"])
        result = await worker.gateway.wait("thrice", 5)
    assert worker.side.held[0].returned
    assert result is not None
    assert result.error is not None
    assert result.error.code == "request_poisoned"


async def test_cancels_are_heard() -> None:
    worker = Worker()
    await worker.publish("r1")
    async with Running(worker.intake.claim, worker.intake.hear_cancels):
        await has(lambda: worker.side.ids() == ["r1"])
        await worker.gateway.cancel("r1")
        await has(lambda: worker.side.forgotten == ["r1"])


class Away(MemoryBroker):
    """A broker whose server is away for the first calls."""

    calls = 0

    async def claim(self, *args: Any, **named: Any) -> list[Claim]:
        self.calls += 1
        if self.calls < 2:
            raise Unavailable("Redis is away")
        return await super().claim(*args, **named)


async def test_a_broker_that_is_away_for_a_while_ends_nothing() -> None:
    server = MemoryServer()
    worker = Worker(Away(server, "worker"))
    worker.gateway = MemoryBroker(server, "gateway")
    await worker.publish("r1")
    async with Running(worker.intake.claim):
        await has(lambda: worker.side.ids() == ["r1"])


async def test_a_stopped_intake_claims_nothing_more() -> None:
    worker = Worker()
    task = asyncio.create_task(worker.intake.claim())
    worker.intake.stop()
    await asyncio.wait_for(task, 5)
    await worker.publish("r1")
    assert worker.side.held == []
