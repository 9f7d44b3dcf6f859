"""Keeps a worker's lease alive from a thread of its own while the event loop is busy, and lets it go if that hangs."""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from engines.errors import Unavailable
from engines.redis_address import connect
from server.brokers._outage import Outage
from server.brokers._redis_link import BROKEN, Link

_RENEWALS_PER_LEASE = 4
_PAUSE_S = 0.2
logger = logging.getLogger(__name__)


class LeaseKeeper(AbstractContextManager[None]):
    """Renews while the context is open. A server that is away is tried again until it is back.

    An event loop that has had no turn for `hung_s` answers nobody: until it has one, nothing is renewed, and what is
    claimed goes to others. `renewed` hears until when (monotonic seconds) the lease is good and what was said; it runs
    in the thread.
    """

    def __init__(
        self,
        url: str,
        link: Link,
        identity: str,
        *,
        lease_ms: int,
        hung_s: float,
        info: Callable[[], Mapping[str, Any]],
        renewed: Callable[[float, Mapping[str, Any]], None],
    ) -> None:
        self._link = link
        self._identity = identity
        self._lease_ms = lease_ms
        self._hung_s = hung_s
        self._info = info
        self._renewed = renewed
        self._client: Any = connect(
            url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=lease_ms / 1000, socket_connect_timeout=1.0
        )
        self._hung = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{identity}", daemon=True)

    def __enter__(self) -> None:
        """
        Raises:
            Unavailable: the server takes nothing at this moment, as with a full disk.
        """
        try:
            self._renew()
        except redis.ResponseError as error:
            raise Unavailable(f"the broker takes no lease: {error}", retry_after_s=5.0) from error
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        self._had_turn()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.execute_command("DEL", self._link.key("worker", self._identity))
                pipe.execute_command("ZREM", self._link.key("workers"), self._identity)
                pipe.execute()
        except (*BROKEN, redis.ResponseError) as error:
            logger.warning("lease_not_released", extra={"error": str(error)})
        self._renewed(float("-inf"), {})
        self._client.close()

    def _run(self) -> None:
        pause_s, outage = self._lease_ms / 1000 / _RENEWALS_PER_LEASE, Outage("lease")
        while not self._stop.wait(pause_s):
            if self._hangs():
                continue
            try:
                self._renew()
                outage.worked()
                pause_s = self._lease_ms / 1000 / _RENEWALS_PER_LEASE
            except (*BROKEN, redis.ResponseError) as error:
                outage.failed(error)
                pause_s = min(_PAUSE_S, pause_s)

    def _hangs(self) -> bool:
        hangs = time.monotonic() - self._turn_s > self._hung_s
        if hangs and not self._hung:
            where = traceback.format_stack(sys._current_frames()[self._loop_thread])
            logger.error("event_loop_hangs", extra={"for_s": self._hung_s, "stack": "".join(where)})
        elif self._hung and not hangs:
            logger.warning("event_loop_runs_again")
        self._hung = hangs
        self._loop.call_soon_threadsafe(self._had_turn)
        return hangs

    def _had_turn(self) -> None:
        self._turn_s = time.monotonic()

    def _renew(self) -> None:
        said = self._info()
        renewed_s = time.monotonic()
        with self._client.pipeline(transaction=False) as pipe:
            for command in lease_commands(self._link, self._identity, said, self._lease_ms):
                pipe.execute_command(*command)
            pipe.execute()
        self._renewed(renewed_s + self._lease_ms / 1000, said)


def lease_commands(link: Link, identity: str, info: Mapping[str, Any], lease_ms: int) -> list[tuple[Any, ...]]:
    """Renew the lease and the place in the list of workers."""
    return [
        ("SET", link.key("worker", identity), msgspec.msgpack.encode(info), "PX", lease_ms),
        ("ZADD", link.key("workers"), link.now_ms(), identity),
    ]
