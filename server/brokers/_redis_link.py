"""One process's link to Redis: scripts, group commit, retries, the server's clock.

Commands that are issued while a round trip is under way travel together in the next one, so that the
cost of a round trip is shared exactly when there is load. They are executed in the order of issue.
Every command of the broker may be executed twice; so a broken connection is answered by sending again.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import Any

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from engines.errors import Unavailable
from engines.redis_address import connect_async, refuse_cluster

BROKEN = (ConnectionError, TimeoutError, OSError)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_CLOCK_AGE_S = 10.0
_TRIP_TIMEOUT_S = 4.0  # a host that went without a word is asked again, wherever it is by then, within the patience
LONGEST_BLOCK_S = 5.0
Command = tuple[Any, ...]
logger = logging.getLogger(__name__)


@cache
def _script(name: str) -> str:
    folder = resources.files("server.brokers")
    return folder.joinpath("order.lua").read_text() + folder.joinpath(f"{name}.lua").read_text()


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(_script(name).encode(), usedforsecurity=False).hexdigest()


class Link:
    """`patience_s` is how long a command is tried before it raises `Unavailable`."""

    def __init__(self, url: str, *, prefix: str, patience_s: float) -> None:
        self.prefix = prefix
        self._patience_s = patience_s
        self._client: Any = connect_async(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,  # with one, redis-py sends in `wait_for`, which loses cancellations before 3.12
            socket_connect_timeout=5.0,
            health_check_interval=0,
        )
        self._client.response_callbacks.clear()
        self._queue: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = []
        self._pump: asyncio.Task[None] | None = None
        self._offset_ms = 0.0
        self._clock_read_s = float("-inf")

    def key(self, *parts: str) -> str:
        return self.prefix + ":".join(parts)

    async def start(self) -> None:
        info = await self.call("INFO")
        refuse_cluster(_field(info, b"cluster_enabled") == b"1")
        await self.read_clock()
        policy = _field(info, b"maxmemory_policy")
        if policy != b"noeviction":
            logger.warning("broker_evicts", extra={"policy": policy.decode(), "wanted": "noeviction"})

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            with suppress(asyncio.CancelledError):
                await self._pump
        for _, future in self._queue:
            future.cancel()
        self._queue.clear()
        await self._client.aclose()

    async def call(self, *command: Any) -> Any:
        """The raw reply (bytes, int, list, None) of one command."""
        return (await self.call_many([command]))[0]

    async def script(self, name: str, *args: Any) -> Any:
        """Runs a `.lua` file of this folder; the key prefix becomes its first argument."""
        return await self.call(*self.command(name, *args))

    def command(self, name: str, *args: Any) -> Command:
        """A script call for `call_many`."""
        return ("EVALSHA", _sha(name), 0, self.prefix, *args, _Named(name))

    async def call_many(self, commands: Sequence[Command]) -> list[Any]:
        """The replies of several commands, which are executed in order, in one round trip."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._queue.append((commands, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        replies = await future
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def blocking(self, *command: Any) -> Any:
        """A command that waits on the server, on a connection of its own and without retries."""
        async with asyncio.timeout(LONGEST_BLOCK_S + _TRIP_TIMEOUT_S):
            try:
                return await self._client.execute_command(*command)
            except ResponseError as error:
                raise (ConnectionError(str(error)) if _says_later(error) or _full(error) else error) from None

    def pubsub(self) -> Any:
        return self._client.pubsub()

    async def ping(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                return bool(await self._client.execute_command("PING"))
        except (*BROKEN, ResponseError):
            return False

    def now_ms(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)

    async def read_clock(self) -> None:
        """Maps the server's clock to the monotonic one, when the last mapping is old."""
        sent_s = time.monotonic()
        if sent_s - self._clock_read_s < _CLOCK_AGE_S:
            return
        seconds, micros = await self.call("TIME")
        middle_s = (sent_s + time.monotonic()) / 2
        self._offset_ms = int(seconds) * 1000 + int(micros) / 1000 - middle_s * 1000
        self._clock_read_s = sent_s

    async def _run(self) -> None:
        """Sends what is queued, round trip after round trip, until nothing is."""
        while self._queue:
            batch, self._queue = self._queue, []
            commands = [command for group, _ in batch for command in group]
            try:
                replies = await self._patiently(commands)
            except Exception as error:
                for _, future in batch:
                    _settle(future, error)
                continue
            except asyncio.CancelledError:
                for _, future in batch:
                    future.cancel()
                raise
            for group, future in batch:
                _settle(future, replies[: len(group)])
                replies = replies[len(group) :]

    async def _patiently(self, commands: Sequence[Command]) -> list[Any]:
        give_up_s, pause_s = time.monotonic() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return await self._round_trip(commands)
            except (*BROKEN, _NotReady) as error:
                if time.monotonic() > give_up_s:
                    raise Unavailable(f"the broker cannot be reached: {error}", retry_after_s=1.0) from error
                logger.debug("broker_retry", extra={"error": str(error), "commands": len(commands)})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _round_trip(self, commands: Sequence[Command]) -> list[Any]:
        async with asyncio.timeout(_TRIP_TIMEOUT_S):
            replies = await self._send([_plain(command) for command in commands])
            missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            again = await self._send([_with_source(commands[i]) for i in missing]) if missing else []
        for i, reply in zip(missing, again, strict=True):
            replies[i] = reply
        for i, reply in enumerate(replies):
            if _says_later(reply):
                raise _NotReady(str(reply))
            if (why := _full(reply)) is not None:
                replies[i] = Unavailable(f"{why}: {reply}", retry_after_s=5.0)
        return replies

    async def _send(self, commands: list[Command]) -> list[Any]:
        """Straight on a connection of the pool: a redis-py pipeline costs twice the CPU time."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()
        try:
            await connection.send_packed_command(connection.pack_commands(commands))
            replies: list[Any] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
            return replies
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


class _NotReady(Exception):
    """The server answers, and will take commands in a while."""


def _says_later(reply: Any) -> bool:
    """It is loading, became a replica (which unblocks who waited), or has too few for its `min-replicas-to-write`."""
    if isinstance(reply, BusyLoadingError | ReadOnlyError | MasterDownError):
        return True
    return isinstance(reply, ResponseError) and str(reply).startswith(("NOREPLICAS", "UNBLOCKED"))


def _full(reply: Any) -> str | None:
    """Why it takes nothing until somebody makes room."""
    if isinstance(reply, OutOfMemoryError):
        return "the broker is full (maxmemory)"
    if isinstance(reply, ResponseError) and str(reply).startswith("MISCONF"):
        return "the broker cannot write its file"
    return None


class _Named(str):
    """The script's name at the end of a command, for the server that does not know its hash."""


def _plain(command: Command) -> Command:
    return command[:-1] if isinstance(command[-1], _Named) else command


def _with_source(command: Command) -> Command:
    return ("EVAL", _script(str(command[-1])), *command[2:-1])


def _field(info: bytes, name: bytes) -> bytes:
    """One line of what INFO says."""
    return info.partition(name + b":")[2].partition(b"\r")[0]


def _settle(future: asyncio.Future[list[Any]], outcome: list[Any] | Exception) -> None:
    if future.done():
        return  # whoever asked was canceled
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
