"""A gateway and a real worker in one event loop: what the one tells of the other holds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from engines.errors import Overloaded, Unavailable
from engines.registry.base import Registry
from server import metrics
from server.auth import Principal
from server.brokers.memory import MemoryBroker, MemoryServer
from server.gateway import Gateway
from server.intent import Intent, Ticket
from server.menu import Wanted
from server.settings import GatewaySettings
from tests import tiny_sd
from tests.eventually import aeventually
from tests.integration.worker_stack import MODEL, copied, running

WEB = Principal("web", frozenset({"generate"}))
INTENT = Intent(Wanted(MODEL), "a red circle")


@contextlib.asynccontextmanager
async def gateway(server: MemoryServer, registry: Registry, **given: object) -> AsyncIterator[Gateway]:
    settings = GatewaySettings.model_validate({"redis_url": "memory:", "registry_url": "memory:", **given})
    made = Gateway(settings, MemoryBroker(server, "gateway"), registry, metrics.make())
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def test_while_the_first_engines_are_built_a_request_is_told_so_and_then_served() -> None:
    server, registry = MemoryServer(), copied(tiny_sd.teacher())
    said: set[str] = set()
    async with (
        gateway(server, registry, worker_grace_s=0, poll_s=0.01) as front,
        running(MemoryBroker(server, "worker"), front.broker, registry=registry, wait=False),
    ):

        async def served() -> bool:
            try:
                ticket = await front.submit(INTENT, WEB)
            except Unavailable as error:
                said.add(error.message)
                return False
            return bool((await front.answer(ticket)).images)

        await aeventually(served, 60)
    assert any("a worker has been loading this model for 0 s (" in message for message in said)


async def test_who_waits_as_long_as_refusals_say_is_admitted_within_the_two_retries_of_an_sdk() -> None:
    """A paced engine whose queue is full. A busy machine may be late once; nobody is sent away for ever."""
    server, registry = MemoryServer(), copied(tiny_sd.teacher())
    async with (
        gateway(server, registry, max_wait_s=0.5) as front,
        running(MemoryBroker(server, "worker"), front.broker, registry=registry, backend="paced"),
    ):
        await aeventually(lambda: _measured(front), 10)
        first, _ = await _fill(front)
        await asyncio.gather(*map(front.answer, first))  # now it knows how long waits are here
        await aeventually(lambda: _empty(front), 10)
        accepted, refused = await _fill(front)

        async def again(error: Overloaded) -> Ticket:
            await asyncio.sleep(error.retry_after_s or 0.0)
            try:
                return await front.submit(INTENT, WEB)
            except Overloaded as later:
                await asyncio.sleep(later.retry_after_s or 0.0)
                return await front.submit(INTENT, WEB)

        returned = await asyncio.gather(*map(again, refused))
        answers = await asyncio.gather(*map(front.answer, [*accepted, *returned]))
        assert all(answer.images for answer in answers)
        told = [error.retry_after_s or 0.0 for error in refused]
        assert told == sorted(set(told))  # each after the one before


async def _fill(front: Gateway) -> tuple[list[Ticket], list[Overloaded]]:
    """Asks until three are refused."""
    accepted, refused = list[Ticket](), list[Overloaded]()
    while len(refused) < 3:
        try:
            accepted.append(await front.submit(INTENT, WEB))
        except Overloaded as error:
            refused.append(error)
    return accepted, refused


async def _empty(front: Gateway) -> bool:
    return front.catalog.wait_s(MODEL, "normal") == 0


async def _measured(front: Gateway) -> bool:
    return any(lease.costs for lease in front.catalog.view.workers.values())
