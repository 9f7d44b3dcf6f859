"""Where Redis is: one server, or whichever one of several is master by what Sentinels say, with or without TLS.

    redis://user:password@host:6379/0        rediss:// with TLS        unix://user:password@/path
    redis+sentinel://user:password@host:26379,host:26379/service/0     rediss+sentinel:// with TLS, to Sentinels too

`?ssl_ca_certs=FILE` names a CA of one's own, `ssl_certfile` and `ssl_keyfile` a certificate to show. User and password
are the servers'; where Sentinels ask for some, they are `sentinel_username` and `sentinel_password` in the query.
"""

from dataclasses import dataclass
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.retry
import redis.sentinel
from redis.backoff import NoBackoff
from redis.connection import parse_url

from engines.errors import InvalidRequest, NotBuilt

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
_SENTINEL_PORT = 26379
_SENTINEL_TIMEOUT_S = 1.0  # then, or when it cannot be reached, the next one is asked
_SAY_NOTHING: dict[str, Any] = {"driver_info": None}  # else each connection begins with CLIENT SETINFO, a right more
_NOT_OURS = ("host", "port", "path", "connection_class")


def connect(url: str, **options: Any) -> "redis.Redis":
    """A client, which connects at its first command. `options` are those of `redis.Redis`.

    Raises:
        InvalidRequest: this is no address of Redis.
    """
    address = _parse(url)
    if isinstance(address, str):
        return redis.Redis.from_url(address, **_SAY_NOTHING, **options)
    once = {"retry": redis.retry.Retry(NoBackoff(), 0)}
    watch = redis.sentinel.Sentinel(address.hosts, sentinel_kwargs=address.sentinel | once)  # type: ignore[no-untyped-call]
    return watch.master_for(address.service, **address.server, **options)  # type: ignore[no-untyped-call, no-any-return]


def connect_async(url: str, **options: Any) -> Any:
    """The same for asyncio.

    Raises:
        InvalidRequest: this is no address of Redis.
    """
    address = _parse(url)
    if isinstance(address, str):
        return redis.asyncio.Redis.from_url(address, **_SAY_NOTHING, **options)
    once = {"retry": redis.asyncio.retry.Retry(NoBackoff(), 0)}
    watch = redis.asyncio.sentinel.Sentinel(address.hosts, sentinel_kwargs=address.sentinel | once)  # type: ignore[no-untyped-call]
    return watch.master_for(address.service, connection_pool_class=_MasterPool, **address.server, **options)


def refuse_cluster(enabled: bool) -> None:
    """To be asked with `cluster_enabled` of the server's INFO, before anything is kept there.

    Raises:
        NotBuilt: it is a Cluster.
    """
    if enabled:
        raise NotBuilt(
            "this Redis is a Cluster, over whose slots one script cannot act; use a single server or one shard"
        )


class _MasterPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """Closes the connections to Sentinels with its own, which redis-py leaves open."""

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


@dataclass(frozen=True, slots=True)
class _Sentinels:
    """`server` and `sentinel` are how each is connected to."""

    hosts: list[tuple[str, int]]
    service: str
    server: dict[str, Any]
    sentinel: dict[str, Any]


def _parse(url: str) -> str | _Sentinels:
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise InvalidRequest(f"an address of Redis begins with one of {', '.join(f'{each}://' for each in SCHEMES)}")
    return _sentinels(scheme, rest) if scheme.endswith("+sentinel") else url


def _sentinels(scheme: str, rest: str) -> _Sentinels:
    rest, _, query = rest.partition("?")
    place, _, path = rest.partition("/")
    login, _, hosts = place.rpartition("@")
    service, _, database = path.partition("/")
    if not (hosts and service):
        raise InvalidRequest(f"{scheme}:// is followed by host:port,host:port/service, the master's name in Sentinels")
    plain = scheme.removesuffix("+sentinel")
    server: dict[str, Any] = parse_url(f"{plain}://{login}@host/{database}?{query}")  # type: ignore[no-untyped-call]
    sentinel = {name: server.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    server = {name: value for name, value in server.items() if name not in _NOT_OURS}
    shared = {name: value for name, value in server.items() if name.startswith("ssl")} | {"ssl": plain == "rediss"}
    shared |= _SAY_NOTHING
    waits = {"socket_timeout": _SENTINEL_TIMEOUT_S, "socket_connect_timeout": _SENTINEL_TIMEOUT_S}
    places = [_host(each) for each in hosts.split(",")]
    return _Sentinels(places, service, {**server, **shared}, {**shared, **sentinel, **waits})


def _host(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):  # an IPv6 address has colons of its own
        host, port = text, str(_SENTINEL_PORT)
    if not (host and port.isdigit()):
        raise InvalidRequest(f"{text!r} is no host:port of a Sentinel")
    return host.strip("[]"), int(port)
