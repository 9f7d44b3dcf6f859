"""Redis behind real Sentinels: its host is lost while requests run, and everybody goes on with the one that follows."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest
import redis

from distill_jobs.queue import connect
from server.brokers.redis import RedisBroker
from server.embedded import free_port
from server.redis_copy import snapshot
from tests.contract.conftest import Hub
from tests.contract.test_broker import done, request_of
from tests.eventually import aeventually, eventually
from tests.faults.test_redis_broker import stop, work
from tests.redis_server import RedisServer, binary, login, start_child

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
SERVICE = "pictures"
LEASE_S = 0.5
_LOCAL = ("--bind", "127.0.0.1")
_PATIENCE_S = 90.0  # a Sentinel that had no processor for two seconds trusts its clock again only after thirty


class Guarded:
    """A master with a replica, and three Sentinels of which two must agree that the master is gone."""

    def __init__(self, folder: Path) -> None:
        self.ports = [free_port() for _ in range(2)]
        self.sentinel_ports = [free_port() for _ in range(3)]
        self.folder = folder
        self.servers = [RedisServer(port=port, args=_LOCAL) for port in self.ports]
        self.sentinels: list[Sentinel] = []

    def start(self) -> "Guarded":
        for server in self.servers:
            server.start()
        with self.servers[1].client() as client:
            client.replicaof("127.0.0.1", self.ports[0])
            eventually(lambda: client.info("replication")["master_link_status"] == "up", 10)
        for port in self.sentinel_ports:
            self.sentinels.append(Sentinel(self.folder / f"sentinel-{port}.conf", port, self.ports[0]))
        eventually(lambda: all(sentinel.knows_all() for sentinel in self.sentinels), _PATIENCE_S)
        return self

    def url(self, user: str = "fewstep") -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{login(user)}@{hosts}/{SERVICE}/0"

    def lose_a_host(self) -> None:
        """The master and the Sentinel beside it, the first that is asked, are gone at once."""
        self.servers[0].kill()
        self.sentinels[0].close()

    def close(self) -> None:
        for process in (*self.sentinels, *self.servers):
            process.close()


class Sentinel:
    def __init__(self, config: Path, port: int, master: int) -> None:
        lines = ["bind 127.0.0.1", f"port {port}", f"sentinel monitor {SERVICE} 127.0.0.1 {master} 2"]
        lines += [f"sentinel down-after-milliseconds {SERVICE} 300", f"sentinel failover-timeout {SERVICE} 3000"]
        config.write_text("\n".join(lines) + "\n")
        self._process = start_child([binary(), str(config), "--sentinel"])
        self._client = redis.Redis(port=port)

    def knows_all(self) -> bool:
        try:
            [master] = self._client.sentinel_masters().values()
        except redis.RedisError:
            return False
        return master["num-other-sentinels"] == 2 and master["num-slaves"] == 1

    def close(self) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(tmp_path)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
async def hub(guarded: Guarded) -> AsyncIterator[Hub]:
    calm = {"patience_s": _PATIENCE_S}
    hub = Hub(lambda identity, options: RedisBroker(guarded.url(), identity, **(calm | options)))
    yield hub
    await hub.close()


async def test_everything_goes_on_with_the_replica_when_the_master_is_lost(
    hub: Hub, guarded: Guarded, tmp_path: Path
) -> None:
    gateway, away, holder = await hub("gateway"), await hub("away"), await hub("holder", lease_s=LEASE_S)
    names, answered = (f"r{i}" for i in count()), list[str]()
    lost = asyncio.Event()

    async def ask() -> None:
        """One client in a closed loop, until well after the failover."""
        while not lost.is_set() or len(answered) % 50:
            name = next(names)
            await gateway.publish(request_of(name))
            result = await gateway.wait(name, None)
            assert result is not None
            assert result.status == "succeeded"
            answered.append(name)

    with holder.keep_lease(dict), connect(guarded.url()) as jobs:
        await gateway.publish(request_of("held"))
        [held] = await holder.claim(["shapes"], 1, None)
        workers = [asyncio.create_task(work(await hub(name, lease_s=60.0))) for name in ("w1", "w2")]
        asking = [asyncio.create_task(ask()) for _ in range(8)]

        async def busy() -> bool:
            return len(answered) > 50

        await aeventually(busy, 30)
        # Accepted, and nobody waits who could publish it again: it is safe once the replica has it.
        await gateway.publish(request_of("accepted", reply_to="somebody else"))
        jobs.zadd("fewstep:v1:jobs:waiting", {"dj_1": 1.0})
        with guarded.servers[0].client() as client:
            assert client.wait(1, 5000) == 1
        guarded.lose_a_host()
        answered.clear()
        await aeventually(busy, _PATIENCE_S)
        lost.set()
        await asyncio.gather(*asking)
        seen = answered.copy()
        assert await holder.finish(held, done(held, worker="holder"), [b"held"]), "it was taken from a living worker"
        for name in ("held", "accepted"):
            result = await away.wait(name, 30)
            assert result is not None
            assert result.status == "succeeded"
        assert jobs.zrange("fewstep:v1:jobs:waiting", 0, -1) == ["dj_1"]
        await stop(*workers)
    for name in seen:
        assert await gateway.image(name, 0) == name.encode()
    assert await gateway.pins("shapes") == {}
    assert snapshot(guarded.url("fewstep-backup"), tmp_path / "copy.rdb") > 0
