"""How a gateway hears of its requests: one blocking reader of one stream, which wakes who waits.

The stream is only the fast way. What is waited for longer than a second is looked up in `req:<id>` as
well, so that neither a lost reply nor a trimmed stream leaves anybody waiting, and a request that the
server lost in a crash is published again under its id by the gateway that still holds it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from engines.errors import Unavailable, UnsupportedMessage
from server.brokers._outage import Outage
from server.brokers._redis_link import BROKEN, Link
from server.brokers.base import StaleVersion
from server.messages import GenerateRequest, GenerateResult, decode, ended_by

_BLOCK_MS = 1000
_LOOK_AFTER_S = 1.0
_PAUSE_S = 0.1
logger = logging.getLogger(__name__)


def answer_of(request_id: str, data: bytes) -> GenerateResult:
    """A result from its bytes; one that cannot be read is an answer too."""
    try:
        return decode(data, GenerateResult)
    except UnsupportedMessage as error:
        return ended_by(request_id, "failed", error)


@dataclass(frozen=True, slots=True)
class Reply:
    """`images` are all of the result's, or none: larger ones are fetched by whoever wants them."""

    result: GenerateResult
    images: Sequence[bytes] = ()


@dataclass(slots=True)
class _Wait:
    future: asyncio.Future[Reply | None]
    request: GenerateRequest | None  # what this gateway published
    source: bytes | None = None  # and the picture beside it
    looked_s: float = field(default_factory=time.monotonic)


class Replies:
    """`publish` is asked to queue a lost request again."""

    def __init__(
        self, link: Link, identity: str, publish: Callable[[GenerateRequest, bytes | None], Awaitable[object]]
    ) -> None:
        self._link = link
        self._identity = identity
        self._publish = publish
        self._waits: dict[str, _Wait] = {}
        self._reader: asyncio.Task[None] | None = None
        self._last = b"0"

    def expect(self, request: GenerateRequest, source: bytes | None) -> None:
        """From before the request is queued, so that its reply cannot come too early."""
        self._register(request.id, request).source = source

    def forget(self, request_id: str) -> None:
        """It was not queued."""
        wait = self._waits.pop(request_id, None)
        if wait is not None:
            wait.future.cancel()

    async def wait(self, request_id: str, timeout_s: float | None) -> Reply | None:
        wait = self._waits.get(request_id)
        if wait is None:
            wait = self._register(request_id, None)
            await self._attend(request_id)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(wait.future)
        except TimeoutError:
            return None

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
        for request_id in list(self._waits):
            self.forget(request_id)

    def _register(self, request_id: str, request: GenerateRequest | None) -> _Wait:
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        wait = self._waits.get(request_id)
        if wait is None:
            wait = self._waits[request_id] = _Wait(asyncio.get_running_loop().create_future(), request)
        return wait

    async def _attend(self, request_id: str) -> None:
        try:
            answer = await self._link.script("attend", request_id, self._identity)
        except BaseException:
            self.forget(request_id)
            raise
        if answer is None:
            self._resolve(request_id, None)
        elif answer:
            self._resolve(request_id, Reply(answer_of(request_id, answer)))

    def _resolve(self, request_id: str, reply: Reply | None) -> None:
        wait = self._waits.pop(request_id, None)
        if wait is not None and not wait.future.done():
            wait.future.set_result(reply)

    async def _read(self) -> None:
        stream = self._link.key("replies", self._identity)
        looked_s, outage = time.monotonic(), Outage("replies")
        while True:
            try:
                found = await self._link.blocking(
                    "XREAD", "COUNT", 512, "BLOCK", _BLOCK_MS, "STREAMS", stream, self._last
                )
                outage.worked()
                for entry, fields in found[0][1] if found else ():
                    self._last = entry
                    request_id = fields[1].decode()
                    self._resolve(request_id, Reply(answer_of(request_id, fields[3]), fields[5::2]))
                if time.monotonic() - looked_s >= _LOOK_AFTER_S:
                    looked_s = time.monotonic()
                    await self._look()
                    await self._link.call("XTRIM", stream, "MINID", self._last)  # what was read keeps pictures there
            except (*BROKEN, Unavailable) as error:
                outage.failed(error)
                await asyncio.sleep(_PAUSE_S)

    async def _look(self) -> None:
        """Looks up what has been waited for since the last look."""
        before_s = time.monotonic() - _LOOK_AFTER_S
        old = {each: wait for each, wait in self._waits.items() if wait.looked_s <= before_s}
        if not old:
            return
        found = await self._link.call_many([("HMGET", self._link.key("req", each), "status", "result") for each in old])
        for (request_id, wait), (status, result) in zip(old.items(), found, strict=True):
            wait.looked_s = time.monotonic()
            if result is not None:
                self._resolve(request_id, Reply(answer_of(request_id, result)))
            elif status is None:
                await self._lost(request_id, wait.request, wait.source)

    async def _lost(self, request_id: str, request: GenerateRequest | None, source: bytes | None) -> None:
        if request is None:
            self._resolve(request_id, None)
            return
        logger.warning("request_published_again", extra={"request_id": request_id})
        try:
            await self._publish(request, source)
        except StaleVersion:
            error = Unavailable("the broker lost this request and its version has retired; send it again")
            self._resolve(request_id, Reply(ended_by(request_id, "failed", error, request)))
