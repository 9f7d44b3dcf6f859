"""The bench of long queues measures what it says: rows as the broker writes them, claimed by the broker."""

import contextlib
import secrets

from bench.queues import opened, queues, request
from tests.contract.conftest import redis_server
from tests.redis_server import RedisServer

__all__ = ["redis_server"]


async def test_rows_that_are_filled_in_are_those_that_a_gateway_publishes(redis_server: RedisServer) -> None:
    names = [secrets.token_hex(4) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        filled, published = [await stack.enter_async_context(opened(redis_server.admin_url, name)) for name in names]
        await filled.fill(40, 60.0)
        for number in range(40):
            await published.broker.publish(request(number))
        with redis_server.client() as client:
            keys = [{key.partition(b":v1:")[2] for key in client.scan_iter(f"{name}:*")} for name in names]
            assert keys[0] == keys[1]
            for number in range(40):
                rows = [client.hgetall(f"{name}:v1:req:{request(number).id}") for name in names]
                for row in rows:
                    for when in (b"entry", b"enqueued_ms", b"deadline_ms"):
                        del row[when]
                assert rows[0] == rows[1]
        claims = await filled.broker.claim(["shapes"], 100, 0.0)
    assert {claim.request.id: claim.request for claim in claims} == {request(i).id: request(i) for i in range(40)}


async def test_a_settled_queue_has_been_looked_at_to_its_end(redis_server: RedisServer) -> None:
    name = secrets.token_hex(4)
    async with opened(redis_server.admin_url, name) as queue:
        await queue.fill(1100, 60.0)
        await queue.settle()
        with redis_server.client() as client:
            [(last, _)] = client.xrevrange(f"{name}:v1:queue:shapes:normal", count=1)
            assert client.get(f"{name}:v1:looked:shapes:normal") == last
        state = await queue.broker.queue_state("shapes")
        assert (state.waiting["normal"], state.running) == (1100, 0)


async def test_both_queues_keep_their_length_and_are_compared() -> None:
    found = await queues(rows=1500, runs=2, batches=25, fill_s=60.0)
    assert [cell["queued"] for cell in found["claim_and_finish"]] == [1000, 1500]
    assert all(found[name] > 0 for name in ("ratio", "server_ratio", "fresh_ratio", "fresh_server_ratio"))
    assert [cell["keys"] for cell in found["claim_in_vain"]] == [1, 8, 64]
