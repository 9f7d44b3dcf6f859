"""A gateway and a real worker in one event loop: what the one tells of the other holds."""

import contextlib
from collections.abc import AsyncIterator

from engines.errors import Unavailable
from engines.registry.base import Registry
from server import metrics
from server.auth import Principal
from server.brokers.memory import MemoryBroker, MemoryServer
from server.gateway import Gateway
from server.intent import Intent
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
