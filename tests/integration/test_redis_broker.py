"""What only the Redis broker has to bear: foreign messages, lost deliveries, other servers than it wants."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engines.errors import NotBuilt, Unavailable
from server.brokers.base import open_broker
from server.brokers.memory import MemoryBroker, MemoryServer
from server.brokers.redis import RedisBroker
from tests.contract.conftest import Hub, redis_server
from tests.contract.test_broker import claim_all, done, ids, request_of
from tests.eventually import aeventually
from tests.redis_server import RedisServer, documented_rights, fresh_namespace

__all__ = ["redis_server"]


@pytest.fixture
def namespace() -> str:
    return fresh_namespace()


@pytest.fixture
async def hub(redis_server: RedisServer, namespace: str) -> AsyncIterator[Hub]:
    calm = {"namespace": namespace, "restart_grace_s": 0.0}
    hub = Hub(lambda identity, options: RedisBroker(redis_server.url, identity, **(calm | options)))
    yield hub
    await hub.close()


@pytest.mark.parametrize("message", [b"\xff not msgpack", b"\x80"])
async def test_an_unreadable_message_is_answered_and_kept(
    hub: Hub, redis_server: RedisServer, namespace: str, message: bytes
) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    entry = await gateway.publish(request_of("r1"))
    stream = f"{namespace}:v1:queue:shapes:normal"
    with redis_server.client() as client:
        client.xdel(stream, entry.entry_id)
        client.hset(f"{namespace}:v1:req:r1", "entry", client.xadd(stream, {"id": "r1", "n": 1, "m": message}))
        client.xadd(stream, {"nothing": "of ours"})
        await gateway.publish(request_of("r2"))

        assert ids(await claim_all(worker)) == ["r2"]
        result = await gateway.wait("r1", 5)
        assert result is not None
        assert result.error is not None
        assert result.error.code == "unsupported_message"
        assert client.xlen(stream) == 1
        assert client.xlen(f"{namespace}:v1:dead:shapes") == 1
    assert await gateway.pins("shapes") == {request_of("r2").version: 1}
    assert await worker.dead_letters("shapes") == []


async def test_a_delivery_that_never_arrived_comes_back_to_its_worker(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    await gateway.publish(request_of("r1"))
    with redis_server.client() as client:  # what the server does for a claim whose reply is lost
        client.xgroup_create(f"{namespace}:v1:queue:shapes:normal", "workers", "0")
        client.xreadgroup("workers", "w1", {f"{namespace}:v1:queue:shapes:normal": ">"})
    assert await claim_all(worker) == []

    async def returned() -> list[str]:
        return ids(await worker.reclaim(["shapes"]))

    assert await aeventually(returned) == ["r1"]
    assert await worker.reclaim(["shapes"]) == []


async def test_what_a_worker_holds_takes_no_room_of_what_it_reclaims(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    gateway, holder, dead = await hub("gateway"), await hub("w1"), await hub("w2")
    await gateway.publish(request_of("r1"))
    [held] = await claim_all(holder)
    await gateway.publish(request_of("r2"))
    await claim_all(dead)
    await dead.release_lease()
    with redis_server.client() as client:
        client.xclaim(held.stream, "workers", "w1", 0, [held.entry_id], idle=60_000, justid=True)
    assert ids(await holder.reclaim(["shapes"], max_requests=1)) == ["r2"]


async def test_a_reply_goes_to_each_gateway_that_waits_once(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    gateway, other, worker = await hub("gateway"), await hub("other"), await hub("w1")
    await gateway.publish(request_of("r1"))
    for _ in range(2):
        assert await other.wait("r1", 0.01) is None
    [claim] = await claim_all(worker)
    await worker.finish(claim, done(claim))
    with redis_server.client() as client:
        assert [client.xlen(f"{namespace}:v1:replies:{each}") for each in ("gateway", "other")] == [1, 1]


async def test_small_pictures_come_with_the_reply_and_leave_the_stream_when_they_were_read(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    replies = f"{namespace}:v1:replies:gateway"
    with redis_server.client() as client:
        client.config_resetstat()
    for name in ("large", "small", "last"):
        await gateway.publish(request_of(name, n=2))
    large, small, last = await claim_all(worker)
    waiting = asyncio.create_task(gateway.answer("small", 10))
    await worker.finish(large, done(large, num_images=2), [b"p" * 16_384, b"q"])
    await worker.finish(small, done(small, num_images=2), [b"p" * 16_383, b"q"])
    await worker.finish(last, done(last))
    answered = await waiting
    assert answered is not None
    assert list(answered.images) == [b"p" * 16_383, b"q"]
    with redis_server.client() as client:
        assert "cmdstat_mget" not in client.info("commandstats")  # nothing was fetched
        carried = [[len(value) for value in entry.values()][2:] for _, entry in client.xrange(replies)]
        assert carried == [[], [1], []]  # fields of one name: the client keeps the last

    async def read() -> bool:
        with redis_server.client() as client:
            return bool(client.xlen(replies) == 1)

    await aeventually(read)


async def test_nothing_is_left_of_a_finished_request_but_its_answer(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    for i in range(3):
        await gateway.publish(request_of(f"r{i}"))
    claims = await claim_all(worker)
    await gateway.cancel("r1")
    for claim in claims:
        await worker.finish(claim, done(claim), [b"picture"])
    with redis_server.client() as client:
        keys = {key.decode().removeprefix(f"{namespace}:v1:") for key in client.keys(f"{namespace}:*")}
        stream = f"{namespace}:v1:queue:shapes:normal"
        assert (client.xlen(stream), client.xpending(stream, "workers")["pending"]) == (0, 0)
        kept = {"req:r0", "req:r1", "req:r2", "res:r0:0", "res:r2:0", "replies:gateway"}
        others = {"queue:shapes:normal", "looked:shapes:normal", "load:shapes", "control"}
        assert keys == kept | others | {"worker:w1", "workers"}
        assert all(client.ttl(f"{namespace}:v1:{key}") > 0 for key in kept)
        assert client.hgetall(f"{namespace}:v1:load:shapes") == {b"normal": b"0"}


async def test_consumers_of_dead_workers_are_removed(hub: Hub, redis_server: RedisServer, namespace: str) -> None:
    gateway, first, second = await hub("gateway"), await hub("w1"), await hub("w2")
    await gateway.publish(request_of("r1"))
    await claim_all(first)
    await first.release_lease()
    await second.reclaim(["shapes"])
    with redis_server.client() as client:
        consumers = client.xinfo_consumers(f"{namespace}:v1:queue:shapes:normal", "workers")
    assert [consumer["name"] for consumer in consumers] == [b"w2"]


async def test_a_restarted_server_gives_every_worker_time_to_renew(hub: Hub) -> None:
    gateway, first = await hub("gateway"), await hub("w1")
    careful = await hub("w2", restart_grace_s=3600.0)
    await gateway.publish(request_of("r1"))
    await claim_all(first)
    await first.release_lease()
    assert await careful.reclaim(["shapes"]) == []
    assert ids(await (await hub("w3")).reclaim(["shapes"])) == ["r1"]


async def test_a_server_that_became_master_gives_every_worker_time_to_renew(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    """What was renewed while it was promoted went to the master before."""
    gateway, first, careful = await hub("gateway"), await hub("w1"), await hub("w2", restart_grace_s=3600.0)
    await gateway.publish(request_of("r1"))
    await claim_all(first)
    await first.release_lease()
    with redis_server.client() as client:
        assert await careful.reclaim(["shapes"]) == []
        client.hset(f"{namespace}:v1:master", "since_ms", 0)  # an hour and more ago
        client.replicaof("127.0.0.1", 1)
        client.replicaof("NO", "ONE")
        assert await careful.reclaim(["shapes"]) == []
        client.hset(f"{namespace}:v1:master", "since_ms", 0)
    assert ids(await careful.reclaim(["shapes"])) == ["r1"]


async def test_scripts_are_sent_again_to_a_server_that_forgot_them(hub: Hub, redis_server: RedisServer) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    await gateway.publish(request_of("r1"))
    with redis_server.client() as client:
        client.script_flush()
    await asyncio.gather(*(gateway.publish(request_of(f"r{i}")) for i in range(2, 5)))
    assert ids(await claim_all(worker)) == ["r1", "r2", "r3", "r4"]


async def test_a_claim_that_is_canceled_loses_no_request(hub: Hub) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    found: list[str] = []
    for i in range(10):
        claiming = asyncio.create_task(worker.claim(["shapes"], 8, None))
        await asyncio.wait([claiming], timeout=0.005)
        await gateway.publish(request_of(f"r{i}"))
        claiming.cancel()
        await asyncio.wait([claiming])
        if not claiming.cancelled():
            found += ids(claiming.result())

    async def all_found() -> bool:
        found.extend([*ids(await worker.reclaim(["shapes"])), *ids(await claim_all(worker))])
        return len(found) >= 10

    await aeventually(all_found)
    assert sorted(found) == [f"r{i}" for i in range(10)]


@pytest.mark.parametrize("owners", ["abc", "abcdefghijkl"])
@pytest.mark.parametrize("seed", range(4))
async def test_requests_are_claimed_in_the_order_of_the_fair_queue(hub: Hub, seed: int, owners: str) -> None:
    """Redis keeps in Lua what the broker in memory keeps in Python: one history, one order."""
    rng = random.Random(seed)
    gateway, worker = await hub("gateway"), await hub("w1")
    server = MemoryServer()
    plain = MemoryBroker(server, "plain")
    order: list[str] = []
    for number in range(120):
        request = request_of(
            f"r{number}",
            owner=rng.choice(owners),
            n=rng.choice([1, 1, 2]),
            cost_s=rng.choice([0.0, 0.125, 0.25, 1.0]),
            due_after_s=10.0 * rng.randrange(1000),
            priority=rng.choice([0, 0, 9]),
        )
        await gateway.publish(request)
        await plain.publish(request)
        if rng.random() < 0.1:
            await gateway.cancel(request.id)
            await plain.cancel(request.id)
        if rng.random() < 0.3:
            options = {"max_rows_below_high": rng.randrange(4), "slack_below_ms": 15_000_000 // len(owners)}
            rows = rng.randrange(1, 8)
            found = ids(await claim_all(worker, rows, **options))
            assert found == ids(await claim_all(plain, rows, **options))
            order += found
    rest = ids(await claim_all(worker))
    assert rest == ids(await claim_all(plain))
    assert len({*order, *rest}) == len(order) + len(rest) > 90


async def test_a_message_of_a_release_without_the_order_is_claimed(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    gateway, worker = await hub("gateway"), await hub("w1")
    entry = await gateway.publish(request_of("r1"))
    with redis_server.client() as client:
        [(_, fields)] = client.xrange(f"{namespace}:v1:queue:shapes:normal")
        client.xdel(f"{namespace}:v1:queue:shapes:normal", entry.entry_id)
        old = {"id": fields[b"id"], "n": fields[b"n"], "m": fields[b"m"]}
        client.hset(f"{namespace}:v1:req:r1", "entry", client.xadd(f"{namespace}:v1:queue:shapes:normal", old))
    await gateway.publish(request_of("r2", due_after_s=10.0))
    assert ids(await claim_all(worker)) == ["r1", "r2"]


async def test_what_another_claimed_is_not_delivered_to_who_just_began_to_wait(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much comes between a claim that finds nothing and its wait, and another worker takes what is due first of it."""
    gateway, waiting, other = await hub("gateway"), await hub("w1"), await hub("w2")
    assert isinstance(waiting, RedisBroker)
    await claim_all(waiting)
    read, theirs = waiting._link.blocking, list[str]()

    async def late(*command: Any) -> Any:
        if not theirs:
            for i in range(80):
                await gateway.publish(request_of(f"r{i}", due_after_s=0.0 if i == 64 else 100.0))
            theirs.extend(ids(await claim_all(other, 1)))
        return await read(*command)

    monkeypatch.setattr(waiting._link, "blocking", late)
    mine: list[str] = []
    while len(mine) < 79 and (found := ids(await waiting.claim(["shapes"], 100, 0.05))):
        mine += found
    assert theirs == ["r64"]
    assert sorted([*mine, *theirs]) == sorted(f"r{i}" for i in range(80))


async def test_who_waits_where_nothing_was_ever_queued_waits_on_the_server(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await hub("w1")
    assert isinstance(worker, RedisBroker)
    read, reads = worker._link.blocking, 0

    async def counted(*command: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*command)

    monkeypatch.setattr(worker._link, "blocking", counted)
    assert await worker.claim(["shapes"], 8, 0.1) == []
    assert reads <= 3  # without the group, with it, and what is left of the time


async def test_a_claim_reads_little_of_a_long_queue(hub: Hub, redis_server: RedisServer, namespace: str) -> None:
    """Beside what it takes: twice what it has room for, to find what came without a place in the order."""
    gateway, worker = await hub("gateway"), await hub("w1")
    entries = [(await gateway.publish(request_of(f"r{i}"))).entry_id for i in range(60)]
    looked = f"{namespace}:v1:looked:shapes:normal"
    with redis_server.client() as client:
        for claims, upto in ((1, 19), (2, 39), (3, 59), (4, 59)):
            assert len(await claim_all(worker, 10)) == 10
            assert client.get(looked) == entries[upto].encode(), f"after {claims} claims"


async def test_a_message_without_a_place_does_not_wait_for_the_queue_to_run_empty(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    """Claims look at twice what they take, so that they are at its end when half of what came before it is taken."""
    gateway, worker = await hub("gateway"), await hub("w1")
    for i in range(40):
        await gateway.publish(request_of(f"r{i}", owner="a"))
    stream = f"{namespace}:v1:queue:shapes:normal"
    with redis_server.client() as client:
        [(_, fields)] = client.xrange(stream, count=1)
        foreign = client.xadd(stream, {"id": fields[b"id"], "n": 1, "m": fields[b"m"]}).decode()
    taken = [claim.entry_id for _ in range(6) for claim in await claim_all(worker, 4)]
    assert len(taken) == 24
    assert foreign in taken


async def test_a_worker_forgets_what_was_canceled_while_it_ran(hub: Hub) -> None:
    """What it holds goes into every `reclaim`."""
    gateway, worker = await hub("gateway"), await hub("w1")
    assert isinstance(worker, RedisBroker)
    await gateway.publish(request_of("r1"))
    [claim] = await claim_all(worker)
    assert await worker.running([claim]) == [claim]
    cancels = worker.cancels()
    told = asyncio.ensure_future(anext(cancels))
    await gateway.cancel("r1")
    assert await asyncio.wait_for(told, 5) == "r1"
    assert not worker._held
    await cancels.aclose()  # type: ignore[attr-defined]


async def test_a_key_whose_place_in_the_order_was_lost_holds_up_nobody_else(
    hub: Hub, redis_server: RedisServer, namespace: str
) -> None:
    """As an eviction or a hand would: the entries of one key are gone, the key still has a turn."""
    gateway, worker = await hub("gateway"), await hub("w1")
    await gateway.publish(request_of("r1", owner="a"))
    with redis_server.client() as client:
        assert client.delete(f"{namespace}:v1:flow:shapes:normal:a") == 1
    await gateway.publish(request_of("r2", owner="b"))
    assert ids(await claim_all(worker)) == ["r2"]


async def test_a_cluster_is_refused_with_what_to_use_instead() -> None:
    server = RedisServer(args=("--cluster-enabled", "yes")).start()
    broker = RedisBroker(server.url, "gateway")
    try:
        with pytest.raises(NotBuilt, match="single server"):
            await broker.start()
    finally:
        await broker.close()
        server.close()


async def test_a_server_that_is_not_there_is_unavailable_after_the_patience() -> None:
    broker = RedisBroker("unix:///nowhere/redis.sock", "gateway", patience_s=0.05)
    try:
        assert not await broker.ping()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await broker.start()
    finally:
        await broker.close()


async def test_the_url_chooses_the_broker() -> None:
    assert isinstance(open_broker("memory:", "gateway"), MemoryBroker)
    assert isinstance(open_broker("redis://localhost:1/0", "gateway"), RedisBroker)
    assert isinstance(open_broker("rediss+sentinel://one,two:26380/master", "gateway"), RedisBroker)


async def test_it_says_what_memory_it_uses_and_whether_it_keeps_what_it_is_given() -> None:
    server = RedisServer(aof=True, args=("--maxmemory", "64mb")).start()
    hub = Hub(lambda identity, options: RedisBroker(server.url, identity, **options))
    try:
        gateway = await hub("gateway")
        store = await gateway.store()
        assert store is not None
        assert 0 < store.memory_bytes < store.limit_bytes == 64 * 2**20
        assert store.durable
        with server.client() as client:
            client.config_set("appendonly", "no")
            client.config_set("maxmemory", 0)
        store = await gateway.store()
        assert store is not None
        assert store.limit_bytes > 64 * 2**20
        assert not store.durable
    finally:
        await hub.close()
        server.close()


def test_the_documented_user_may_do_nothing_that_is_never_done() -> None:
    """That it may do enough, all other tests show."""
    root = Path(__file__).parents[2]
    sources = [*(root / "server" / "brokers").iterdir(), root / "distill_jobs" / "queue.py"]
    said = "\n".join(path.read_text() for path in sources if path.is_file())
    rights = re.findall(r"\+(\S+)", documented_rights("fewstep"))
    assert [each for each in rights if not re.search(rf"(?i)[\"']{each}[\"']|\.{each}\(", said)] == []
