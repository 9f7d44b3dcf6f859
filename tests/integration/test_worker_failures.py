"""What a worker's death leaves behind is taken over by others, once, and never for ever."""

import asyncio
import threading
from typing import Any

import pytest

from engines import images
from server.brokers.memory import MemoryBroker, MemoryServer
from tests.eventually import aeventually
from tests.integration.worker_stack import MODEL, Running, running


class Fails:
    """An engine that raises what nobody foresaw, while armed."""

    def __init__(self, up: Running) -> None:
        family: Any = up.student().family
        family.denoise = self._raise

    def _raise(self, *_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody foresaw this")


async def test_an_error_that_nobody_foresaw_ends_the_worker_and_its_requests_are_answered_by_another() -> None:
    server = MemoryServer()
    gateway = MemoryBroker(server, "gateway")
    async with running(MemoryBroker(server, "w1"), gateway) as first:
        Fails(first)
        for name in ("r1", "r2"):
            await gateway.publish(first.request(name))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(asyncio.shield(first.task), 10)
    assert await gateway.workers() == []
    async with running(MemoryBroker(server, "w2"), gateway):
        results = [await gateway.wait(name, 20) for name in ("r1", "r2")]
    assert [result and (result.status, result.worker) for result in results] == [("succeeded", "w2")] * 2


async def test_a_request_that_kills_its_workers_is_given_up_and_the_others_are_not() -> None:
    server = MemoryServer()
    gateway = MemoryBroker(server, "gateway")
    for i in range(2):
        async with running(MemoryBroker(server, f"w{i}"), gateway) as made:
            Fails(made)
            if i == 0:
                await gateway.publish(made.request("killer"))
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(asyncio.shield(made.task), 10)
    async with running(MemoryBroker(server, "w2"), gateway) as last:
        result = await gateway.wait("killer", 20)
        assert result is not None
        assert result.error is not None
        assert result.error.code == "request_poisoned"
        assert (await last.answer(last.request("fine"))).status == "succeeded"
    assert [request.id for request in await gateway.dead_letters(MODEL)] == ["killer"]


async def test_a_picture_that_cannot_be_encoded_fails_and_its_worker_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = images.encode

    def fails(pixels: Any, kind: str, compression: int | None = None) -> bytes:
        if kind == "webp":
            raise OSError("encoding error 6")
        return encode(pixels, kind, compression)

    monkeypatch.setattr(images, "encode", fails)
    server = MemoryServer()
    gateway = MemoryBroker(server, "gateway")
    async with running(MemoryBroker(server, "w1"), gateway) as up:
        bad = await up.answer(up.request("bad", output_format="webp", n=2))
        assert bad.error is not None
        assert (bad.error.code, "encoding error 6" in bad.error.message) == ("internal_error", True)
        assert (await up.answer(up.request("fine"))).status == "succeeded"
        assert not up.task.done()


async def test_a_worker_claims_no_more_than_its_encoders_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, gate = images.encode, threading.Event()

    def slow(*given: Any) -> bytes:
        gate.wait(20)
        return encode(*given)

    monkeypatch.setattr(images, "encode", slow)
    server = MemoryServer()
    gateway = MemoryBroker(server, "gateway")
    names = [f"r{i}" for i in range(12)]
    async with running(MemoryBroker(server, "w1"), gateway, batch_sizes=(1,)) as up:
        for name in names:
            await gateway.publish(up.request(name))
        assert await gateway.wait(names[-1], 1.0) is None
        assert sum(server.tickets[name].claimed_by is not None for name in names) <= 4
        gate.set()
        results = [await gateway.wait(name, 20) for name in names]
    assert [result and result.status for result in results] == ["succeeded"] * 12


async def test_a_request_that_a_death_returned_runs_alone() -> None:
    server = MemoryServer()
    gateway, dead = MemoryBroker(server, "gateway"), MemoryBroker(server, "dead")
    async with running(MemoryBroker(server, "w1"), gateway) as up:
        family: Any = up.student().family
        batches, denoise = list[int](), family.denoise

        def seen(x: Any, *args: Any, **named: Any) -> Any:
            batches.append(len(x))
            return denoise(x, *args, **named)

        family.denoise = seen
        server.leases["dead"] = server.leases["w1"]
        requests = [up.request(name, steps=1, guidance=1.0) for name in ("s1", "s2", "s3")]
        for request in requests:
            await gateway.publish(request)
            server.tickets[request.id].claimed_by = "dead"
            server.tickets[request.id].deliveries = 1
        await dead.release_lease()
        results = [await gateway.wait(request.id, 20) for request in requests]
    assert [result and result.status for result in results] == ["succeeded"] * 3
    assert batches == [1, 1, 1]


async def test_a_worker_without_a_loadable_deployment_claims_nothing_and_says_so() -> None:
    server = MemoryServer()
    gateway = MemoryBroker(server, "gateway")
    async with running(MemoryBroker(server, "w1"), gateway, wait=False, deployments=("other",)) as up:
        await gateway.publish(up.request("r1"))

        async def followed() -> bool:
            return "other" in up.students.lease().deployments

        await aeventually(followed)
        assert up.students.serving() == []
        status = await gateway.status("r1")
        assert status is not None
        assert status.state == "queued"
