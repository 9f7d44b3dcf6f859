"""The gateway's half of the Redis broker: publish, wait, look, cancel."""

import secrets
from collections.abc import AsyncIterator

from engines.errors import DeadlineExceeded, FewstepError, RequestCanceled, Unavailable
from server.brokers._redis_link import BROKEN, Command, Link
from server.brokers._redis_replies import Replies, Reply, answer_of
from server.brokers.base import OWNERS, Answered, Emitted, Entry, QueueState, Remembered, StaleVersion, Status
from server.messages import (
    CLASSES,
    ENDINGS,
    Ending,
    GenerateRequest,
    GenerateResult,
    StepEvent,
    decode,
    encode,
    ended_by,
)

_EVENTS_BLOCK_MS = 1000
_SOURCE_GRACE_MS = 10_000  # a picture that is changed goes with its request; this is for one whose end nobody made
_STATUS_FIELDS = (
    *("status", "deployment", "version", "owner", "enqueued_ms", "deadline_ms", "started_ms", "ended_ms", "worker"),
    *("result", "class", "entry"),
)


class GatewaySide:
    """Mixed into `RedisBroker`, which makes these."""

    identity: str
    _link: Link
    _replies: Replies
    _result_ttl_ms: int

    async def publish(self, request: GenerateRequest, source: bytes | None = None) -> Entry:
        awaited = request.reply_to == self.identity
        if awaited:
            self._replies.expect(request, source)
        try:
            return await self._publish(request, source)
        except BaseException:
            if awaited:
                self._replies.forget(request.id)
            raise

    async def _publish(self, request: GenerateRequest, source: bytes | None) -> Entry:
        commands = [publishing(self._link, request, self._result_ttl_ms)]
        if source is not None:
            ttl_ms = request.budget_ms + _SOURCE_GRACE_MS
            commands.insert(0, ("SET", self._link.key("source", request.id), source, "PX", ttl_ms))
        reply = (await self._link.call_many(commands))[-1]
        if reply[0] == -1:
            raise StaleVersion(request.model, request.version)
        entry, deadline_ms = reply[1].decode(), int(reply[2])
        return Entry(request.id, entry, _milliseconds(entry), deadline_ms, created=reply[0] == 1)

    async def wait(self, request_id: str, timeout_s: float | None) -> GenerateResult | None:
        reply = await self._reply(request_id, timeout_s)
        return None if reply is None else reply.result

    async def answer(self, request_id: str, timeout_s: float | None) -> Answered | None:
        reply = await self._reply(request_id, timeout_s)
        if reply is None:
            return None
        images = reply.images or await self.images(request_id, reply.result.num_images)
        return Answered(reply.result, images)

    async def _reply(self, request_id: str, timeout_s: float | None) -> Reply | None:
        if timeout_s == 0:
            result = await self.result(request_id)
            return None if result is None else Reply(result)
        return await self._replies.wait(request_id, timeout_s)

    async def result(self, request_id: str) -> GenerateResult | None:
        data = await self._link.call("HGET", self._link.key("req", request_id), "result")
        return None if data is None else answer_of(request_id, data)

    async def image(self, request_id: str, index: int) -> bytes | None:
        data: bytes | None = await self._link.call("GET", self._link.key("res", request_id, str(index)))
        return data

    async def images(self, request_id: str, count: int) -> list[bytes | None]:
        names = [self._link.key("res", request_id, str(i)) for i in range(count)]
        found: list[bytes | None] = await self._link.call("MGET", *names) if names else []
        return found

    async def status(self, request_id: str, *, with_position: bool = False) -> Status | None:
        found = await self._link.call("HMGET", self._link.key("req", request_id), *_STATUS_FIELDS)
        text = {
            name: value.decode()
            for name, value in zip(_STATUS_FIELDS, found, strict=True)
            if value is not None and name != "result"
        }
        if "status" not in text:
            return None
        position = None
        if with_position and text["status"] == "queued":
            place = f"{text['deployment']}:{text['class']}"
            position = await self._link.script("queue", "place", place, text["owner"], text["entry"])
        result = found[_STATUS_FIELDS.index("result")]
        return Status(
            id=request_id,
            state=text["status"],
            deployment=text["deployment"],
            version=text["version"],
            owner=text["owner"],
            enqueued_ms=int(text["enqueued_ms"]),
            deadline_ms=int(text["deadline_ms"]),
            started_ms=int(text["started_ms"]) if "started_ms" in text else None,
            ended_ms=int(text["ended_ms"]) if "ended_ms" in text else None,
            worker=text.get("worker"),
            position=position,
            result=None if result is None else answer_of(request_id, result),
        )

    async def cancel(self, request_id: str) -> bool:
        return await self._end(request_id, "canceled", RequestCanceled(f"request {request_id} was canceled"))

    async def expire(self, request_id: str) -> bool:
        error = DeadlineExceeded(f"request {request_id} was not done within its time; allow more or ask for less")
        return await self._end(request_id, "expired", error)

    async def _end(self, request_id: str, status: Ending, error: FewstepError, *, tell: str = "1") -> bool:
        result = encode(ended_by(request_id, status, error))
        ended = encode(StepEvent(id=request_id, kind="ended", status=status))
        attempt = secrets.token_hex(4)
        won = await self._link.script(
            "finish", request_id, status, result, attempt, self._result_ttl_ms, 0, ended, tell, "", ""
        )
        return bool(won)

    async def queue_state(self, deployment: str) -> QueueState:
        high, normal, low, running, *rest = await self._link.script("queue", "load", deployment, OWNERS)
        costs, owed = rest[:3], rest[3:]
        return QueueState(
            waiting={"high": high, "normal": normal, "low": low},
            running=running,
            cost_s={"high": costs[0] / 1e6, "normal": costs[1] / 1e6, "low": costs[2] / 1e6},
            owed_s={name: _by_owner(flat) for name, flat in zip(CLASSES, owed, strict=True)},
        )

    async def remember(
        self, key: str, body_hash: str, request_id: str, ttl_s: float, *, owner: str = ""
    ) -> Remembered | None:
        name, value = self._link.key("idem", owner, key), f"{body_hash} {request_id}"
        ttl_ms = max(1, round(ttl_s * 1000))
        known = await self._link.call("SET", name, value, "NX", "GET", "PX", ttl_ms)
        if known is None:
            return None
        old_hash, _, old_id = known.decode().partition(" ")
        if known.decode() == value:
            return None  # ours: the answer to the first try was lost
        return Remembered(old_hash, old_id)

    async def events(self, request_id: str, *, after: int = 0) -> AsyncIterator[Emitted]:
        stream, last, seen = self._link.key("events", request_id), b"0", 0
        block: tuple[str | int, ...] = ()  # the first look tells whether there is anything to wait for
        while True:
            try:
                found = await self._link.blocking("XREAD", *block, "STREAMS", stream, last)
            except BROKEN as error:
                if not await self._link.ping():
                    raise Unavailable(f"the broker cannot be reached: {error}", retry_after_s=1.0) from error
                continue
            for entry, fields in found[0][1] if found else ():
                last, seen = entry, seen + 1
                emitted = Emitted(decode(fields[1], StepEvent), fields[3] if len(fields) > 2 else None)
                if seen > after:
                    yield emitted
                if emitted.event.kind == "ended":
                    return
            block = ("BLOCK", _EVENTS_BLOCK_MS)
            if not found:
                status = await self.status(request_id)
                if status is None:
                    return
                if status.state in ENDINGS:
                    yield Emitted(StepEvent(id=request_id, kind="ended", status=status.state))
                    return


def publishing(link: Link, request: GenerateRequest, result_ttl_ms: int) -> Command:
    """The command that queues a request."""
    queued = encode(StepEvent(id=request.id, kind="queued", total=request.num_evaluations)) if request.events else b""
    return link.command(
        "publish",
        *(request.id, request.model, request.request_class, request.version, request.owner, request.reply_to),
        *(request.n, request.budget_ms, round(request.cost_s * 1e6), encode(request), queued, result_ttl_ms),
        round(request.due_after_s * 1000),
    )


def _milliseconds(entry: str) -> int:
    return int(entry.partition("-")[0])


def _by_owner(flat: list[bytes]) -> dict[str, float]:
    """Seconds, from owner and microseconds in turn."""
    return {owner.decode(): int(cost_us) / 1e6 for owner, cost_us in zip(flat[::2], flat[1::2], strict=True)}
