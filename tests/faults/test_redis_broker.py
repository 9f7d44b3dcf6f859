"""The Redis broker when the server or a worker is killed or stopped: each request still ends once."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from server.brokers.base import Broker, Claim, Finished
from server.brokers.redis import RedisBroker
from tests.contract.conftest import Hub
from tests.contract.test_broker import V1, done, ids, request_of
from tests.eventually import aeventually
from tests.redis_server import RedisServer

pytestmark = pytest.mark.faults
SPAWN = multiprocessing.get_context("spawn")
LEASE_S = 0.5


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server that keeps its data, for this test to kill."""
    server = RedisServer(aof=True).start()
    yield server
    server.close()


@pytest.fixture
async def hub(server: RedisServer) -> AsyncIterator[Hub]:
    calm = {"restart_grace_s": 0.0}
    hub = Hub(lambda identity, options: RedisBroker(server.url, identity, **(calm | options)))
    yield hub
    await hub.close()


async def work(worker: Broker) -> None:
    """Answers whatever comes, as a worker does that knows nothing of failures."""
    await worker.renew_lease({})
    while True:
        claims = [*await worker.claim(["shapes"], 8, 0.2), *await worker.reclaim(["shapes"])]
        wanted = await worker.running(claims)
        await worker.finish_many([Finished(claim, done(claim), [claim.request.id.encode()]) for claim in wanted])


async def stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_every_request_is_answered_although_the_server_is_killed_under_load(
    hub: Hub, server: RedisServer
) -> None:
    gateway, first, second = await hub("gateway"), await hub("w1"), await hub("w2")
    workers = [asyncio.create_task(work(worker)) for worker in (first, second)]
    names = (f"r{i}" for i in count())
    answered: list[str] = []
    restarted = asyncio.Event()

    async def ask() -> None:
        """One client in a closed loop, until well after the restart."""
        while not restarted.is_set() or len(answered) % 50:
            name = next(names)
            await gateway.publish(request_of(name))
            result = await gateway.wait(name, None)
            assert result is not None
            assert result.status == "succeeded"
            answered.append(name)

    async def crash() -> None:
        async def busy() -> bool:
            return len(answered) > 50

        for _ in range(3):
            answered.clear()
            await aeventually(busy)
            server.kill()
            await asyncio.to_thread(server.start)
        answered.clear()  # written out each second: on a slow disk pictures that were answered before are lost with it
        restarted.set()

    await asyncio.gather(crash(), *(ask() for _ in range(16)))
    seen = answered.copy()

    async def settled() -> bool:
        state = await gateway.queue_state("shapes")
        return await gateway.pins("shapes") == {} and sum(state.waiting.values()) + state.running == 0

    await aeventually(settled)
    await stop(*workers)
    for name in seen:
        assert await gateway.image(name, 0) == name.encode()


async def test_a_request_that_the_server_lost_is_published_again_by_its_gateway(hub: Hub, server: RedisServer) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    await gateway.publish(request_of("r1"))
    await gateway.publish(request_of("edit", edits_from=1), b"pixels")
    waiting = asyncio.create_task(gateway.wait("r1", None))
    with server.client() as client:
        client.flushall()
    await aeventually(lambda: worker.source("edit"), 10)
    working = asyncio.create_task(work(worker))
    result = await asyncio.wait_for(waiting, 10)
    assert result is not None
    assert result.status == "succeeded"
    await stop(working)


def _hold(url: str, claimed: Any, go_on: Any, finished: Any, hangs: bool = False) -> None:
    """A worker process: claims one request, waits for a word, then answers. If it `hangs` its event loop waits, too."""

    async def run() -> None:
        worker = RedisBroker(url, "w1", lease_s=LEASE_S, hung_s=2 * LEASE_S)
        await worker.start()
        with worker.keep_lease(dict):
            [claim] = await worker.claim(["shapes"], 1, None)
            claimed.set()
            if hangs:
                go_on.wait()
            else:
                await asyncio.to_thread(go_on.wait)
            finished.put(await worker.finish(claim, done(claim, worker="w1"), [b"w1"]))
        await worker.close()

    asyncio.run(run())


async def test_claims_of_a_killed_worker_go_to_another_one(hub: Hub, server: RedisServer) -> None:
    gateway, heir = await hub("gateway"), await hub("w2")
    await gateway.publish(request_of("r1"))
    claimed, go_on, finished = SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    process = SPAWN.Process(target=_hold, args=(server.url, claimed, go_on, finished))
    process.start()
    await asyncio.to_thread(claimed.wait, 30)
    assert await heir.reclaim(["shapes"]) == []
    process.kill()
    await asyncio.to_thread(process.join, 10)

    async def returned() -> list[Claim]:
        return await heir.reclaim(["shapes"])

    [claim] = await aeventually(returned)
    assert claim.returned
    assert await heir.finish(claim, done(claim))
    assert await gateway.wait("r1", 5) == done(claim)


@pytest.mark.parametrize("hangs", [False, True], ids=["stopped", "its event loop hangs"])
async def test_a_worker_that_does_nothing_past_its_lease_loses_to_its_heir(
    hub: Hub, server: RedisServer, hangs: bool
) -> None:
    gateway, heir = await hub("gateway"), await hub("w2")
    await gateway.publish(request_of("r1"))
    claimed, go_on, finished = SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    process = SPAWN.Process(target=_hold, args=(server.url, claimed, go_on, finished, hangs))
    process.start()
    await asyncio.to_thread(claimed.wait, 30)
    assert process.pid is not None
    if not hangs:
        os.kill(process.pid, signal.SIGSTOP)

    async def returned() -> list[Claim]:
        return await heir.reclaim(["shapes"])

    [claim] = await aeventually(returned)
    assert await gateway.pins("shapes") == {V1: 1}
    assert await heir.finish(claim, done(claim, worker="w2"), [b"w2"])
    if not hangs:
        os.kill(process.pid, signal.SIGCONT)
    go_on.set()
    assert await asyncio.to_thread(finished.get, True, 10) is False
    await asyncio.to_thread(process.join, 10)
    result = await gateway.wait("r1", 5)
    assert result is not None
    assert result.worker == "w2"
    assert await gateway.image("r1", 0) == b"w2"
    assert await gateway.pins("shapes") == {}
    assert ids(await heir.reclaim(["shapes"])) == []
