"""A whole worker whose engine makes two calls at once."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from engines.backends.base import tolerance
from engines.cost import CostKey
from engines.student import sample
from server.brokers.memory import MemoryBroker, MemoryServer
from tests.integration.test_worker_requests import picture
from tests.integration.test_worker_swaps import Traffic
from tests.integration.worker_stack import Running, running, student


@pytest.fixture
async def up() -> AsyncIterator[Running]:
    server = MemoryServer()
    gateway = MemoryBroker(server, "gateway")
    async with running(MemoryBroker(server, "worker"), gateway, backend="openvino", streams=2) as made:
        yield made


async def test_every_request_is_answered_with_its_own_picture(up: Running) -> None:
    requests = [up.request(f"r{i}", seed=i, steps=(1, 4)[i % 2]) for i in range(24)]
    results = await asyncio.gather(*(up.answer(request) for request in requests))
    allowed = tolerance("openvino", "fp32")
    for request, result in zip(requests, results, strict=True):
        [expected] = sample(up.student(), [request.prompt], [request.seed], request.steps)
        assert result.status == "succeeded"
        assert allowed.fault(await picture(up, request.id), expected) is None


async def test_a_swap_under_requests_fails_none(up: Running) -> None:
    async with Traffic(up) as traffic:
        await traffic.further(5)
        assert (await up.outcome(up.propose(student(up.registry, 0.9), 4))).state == "live"
        await traffic.further(5)
    assert {result.status for result in traffic.results} == {"succeeded"}
    assert len({result.version for result in traffic.results}) == 2


async def test_it_claims_for_both_streams_and_says_what_a_row_costs_with_both_at_work(up: Running) -> None:
    await up.answer(up.request("r1"))
    lease, served = up.students.lease(), up.student()
    decoder = CostKey("decode", served.manifest.components["decoder"].weights, served.latent_shape)
    call_s = up.students.cost.seconds(decoder, 4)
    assert call_s is not None
    assert lease.costs[served.version].decode.row_s == pytest.approx(call_s / (4 * 2))
    assert lease.batch_rows == 4 * 2
    assert up.worker._room().rows == 4 * 3
