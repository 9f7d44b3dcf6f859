"""The broker on one Redis (or Valkey) server, 6.2 or newer, or on the master that Sentinels name.

Cluster is refused: one script acts on many keys.

Keys, all under `fewstep:v1:` (the major version of the messages):

    queue:<deployment>:<class>   stream, consumer group `workers`: id, n (rows), c (cost, µs), m (GenerateRequest)
    flows:<…>  flow:<…>:<owner>  in which order a stream is claimed, see order.lua; with passes:<…>, looked:<…>
    req:<id>                     hash: status, deployment, class, version, owner, reply_to (a,b), entry, enqueued_ms,
                                 deadline_ms, cost_us, events, worker, started_ms, ended_ms, attempt, result;
                                 expires `result_ttl_s` after its end
    res:<id>:<i>                 encoded picture i; res:<id>:<i>:<attempt> while its request has not ended
    source:<id>                  raw pixels of the picture that a request changes, until it ends
    replies:<gateway>            stream: id, r (GenerateResult)
    events:<id>                  stream: e (StepEvent), d (partial picture)
    control                      stream: id of what was canceled or expired
    dead:<deployment>            stream of poisoned and unreadable messages, the last thousand
    pins:<deployment>            hash version -> unfinished requests
    load:<deployment>            hash class -> predicted engine microseconds of unfinished requests
    owed:<deployment>:<class>    hash owner -> the same of its requests; owners that have none are not in it
    servable:<deployment>        set of versions that publish accepts; absent: all
    idem:<owner>:<key>           "<body hash> <request id>"
    worker:<id>  workers         lease of a worker with what it says of itself; sorted set of ids by renewal
    swap:<swap_id>               hash worker -> Phase
    lease:<name>  fence:<name>   hash owner, fence; last fencing number
    master                       hash: replication id of the server, and since when (ms) it was seen
    announce                     pub/sub channel

Every change of several keys is one script beside this file, named after what it does. Streams say what waits and who
has what; the order is a help that scripts keep beside them, and what has no place in it gets one when it is looked at.
"""

from typing import Any

from server.brokers._redis_gateway import GatewaySide
from server.brokers._redis_link import Link
from server.brokers._redis_replies import Replies
from server.brokers._redis_swaps import SwapSide
from server.brokers._redis_worker import WorkerSide
from server.brokers.base import Store


class RedisBroker(GatewaySide, WorkerSide, SwapSide):
    """`identity` belongs to this process alone. `namespace` keeps several systems on one server apart.

    `patience_s` is how long an operation is tried while the server is away before it raises `Unavailable`.
    `restart_grace_s` (the lease time) is how long nothing is reclaimed from others after the server restarted, or
    another one became master. `hung_s` is how long a worker's event loop may be without a turn before its lease is no
    longer renewed.
    """

    def __init__(
        self,
        url: str,
        identity: str,
        *,
        lease_s: float = 5.0,
        result_ttl_s: float = 600.0,
        patience_s: float = 10.0,
        restart_grace_s: float | None = None,
        hung_s: float = 60.0,
        namespace: str = "fewstep",
    ) -> None:
        self.identity = identity
        self._url = url
        self._lease_ms = round(lease_s * 1000)
        self._hung_s = hung_s
        self._grace_ms = self._lease_ms if restart_grace_s is None else round(restart_grace_s * 1000)
        self._result_ttl_ms = max(1, round(result_ttl_s * 1000))
        self._link = Link(url, prefix=f"{namespace}:v1:", patience_s=patience_s)
        self._replies = Replies(self._link, identity, self._publish)
        self._held: dict[str, str] = {}
        self._control_from = b"0"
        self._turn = 1
        self._lease_until_s = float("-inf")
        self._lease_info: dict[str, Any] = {}

    async def start(self) -> None:
        await self._link.start()
        newest = await self._link.call("XREVRANGE", self._link.key("control"), "+", "-", "COUNT", 1)
        self._control_from = newest[0][0] if newest else b"0"

    async def close(self) -> None:
        await self._replies.close()
        await self._link.close()

    def now_ms(self) -> int:
        return self._link.now_ms()

    async def ping(self) -> bool:
        return await self._link.ping()

    async def store(self) -> Store:
        info = dict(line.split(":", 1) for line in (await self._link.call("INFO")).decode().splitlines() if ":" in line)
        return Store(
            memory_bytes=int(info["used_memory"]),
            limit_bytes=int(info["maxmemory"]) or int(info.get("total_system_memory", 0)),
            durable=info["aof_enabled"] == "1"
            and all(info[f"aof_last_{what}_status"] == "ok" for what in ("write", "bgrewrite")),
        )
