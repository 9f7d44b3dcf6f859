"""The worker's half of the Redis broker: claim, run, answer, and take over what a dead worker held."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from engines.errors import RequestPoisoned, UnsupportedMessage
from server.brokers._outage import Outage
from server.brokers._redis_lease import LeaseKeeper, lease_commands
from server.brokers._redis_link import BROKEN, LONGEST_BLOCK_S, Command, Link
from server.brokers.base import NOWHERE, POISONED_AT, Claim, Finished, WorkerInfo
from server.fair_queue import in_turn
from server.messages import CLASSES, GenerateRequest, GenerateResult, StepEvent, decode, encode, ended_by

_LOST_AFTER_MS = 1000  # an own entry that is not held after this was lost on its way
_EVENTS_KEPT = 256
_PAUSE_S = 0.1
_LOOK_AGAIN_S = 0.05  # what came just before a wait began, or was left to others long enough, is found after this
logger = logging.getLogger(__name__)
_Raw = tuple[str, str, list[bytes], int]  # stream, entry, fields, deliveries


class WorkerSide:
    """Mixed into `RedisBroker`, which makes these."""

    identity: str
    _url: str
    _link: Link
    _lease_ms: int
    _grace_ms: int
    _result_ttl_ms: int
    _held: dict[str, str]  # stream and entry of what was handed out and has not ended -> request
    _control_from: bytes
    _turn: int
    _hung_s: float
    _lease_until_s: float
    _lease_info: Mapping[str, Any]

    # --- taking ----------------------------------------------------------------------------------

    async def claim(
        self,
        deployments: Sequence[str],
        max_rows: int,
        block_s: float | None,
        *,
        max_rows_below_high: int | None = None,
        slack_below_ms: int | None = None,
        elsewhere_ms: Mapping[str, int] = NOWHERE,
    ) -> list[Claim]:
        below = max_rows if max_rows_below_high is None else min(max_rows, max_rows_below_high)
        if max_rows <= 0 or not deployments:
            return []
        if time.monotonic() > self._lease_until_s:
            await self.renew_lease(self._lease_info)
        await self._link.read_clock()
        until_s = None if block_s is None else time.monotonic() + block_s
        streams = self._streams(deployments)
        while True:
            claims = await self._take(streams, max_rows, below, slack_below_ms, elsewhere_ms)
            self._turn += bool(claims and below)
            left_s = LONGEST_BLOCK_S if until_s is None else min(LONGEST_BLOCK_S, until_s - time.monotonic())
            if claims or left_s <= 0:
                return claims
            open_to_us = [name for name, low in streams if below or not low]
            if elsewhere_ms:  # a blocking read of the group would take what is to be left
                await self._await_any(open_to_us, min(left_s, _LOOK_AGAIN_S))
            elif claims := await self._await_one(open_to_us, left_s):
                return claims

    def _streams(self, deployments: Sequence[str]) -> list[tuple[str, bool]]:
        """Stream names in the order of this turn, and whether each is below class high."""
        queues = in_turn(self._turn, deployments)
        return [(self._link.key("queue", name, each), each != "high") for name, each in queues]

    async def _take(
        self,
        streams: list[tuple[str, bool]],
        max_rows: int,
        below: int,
        slack_below_ms: int | None,
        elsewhere_ms: Mapping[str, int],
    ) -> list[Claim]:
        flat = [part for name, low in streams for part in (name, "1" if low else "0")]
        slack = "" if slack_below_ms is None else slack_below_ms
        others = " ".join(f"{version} {self._link.now_ms() - ms}" for version, ms in elsewhere_ms.items())
        found = await self._link.script("claim", self.identity, max_rows, below, slack, others, *flat)
        return await self._claims(_delivered(found))

    async def _await_any(self, streams: Sequence[str], block_s: float) -> None:
        """Until something arrives in one of the streams, which is not taken."""
        command = ("XREAD", "COUNT", 1, "BLOCK", max(1, int(block_s * 1000)), "STREAMS", *streams)
        try:
            await self._link.blocking(*command, *("$" for _ in streams))
        except BROKEN as error:
            logger.warning("claim_interrupted", extra={"error": str(error)})
            await asyncio.sleep(_PAUSE_S)

    async def _await_one(self, streams: Sequence[str], block_s: float) -> list[Claim]:
        """The first request that arrives in one of the streams."""
        command = ("XREADGROUP", "GROUP", "workers", self.identity, "COUNT", 1, "BLOCK", max(1, int(block_s * 1000)))
        reading = self._link.blocking(*command, "STREAMS", *streams, *(">" for _ in streams))
        try:
            found = await reading
        except BROKEN as error:
            logger.warning("claim_interrupted", extra={"error": str(error)})
            await asyncio.sleep(_PAUSE_S)
            return []
        except Exception as error:
            if "NOGROUP" not in str(error):
                raise
            await self._link.script("group", *streams)  # nothing was claimed yet, or the server restarted empty
            return []
        return await self._claims(_delivered(found or ()))

    async def reclaim(self, deployments: Sequence[str], *, max_requests: int = 32) -> list[Claim]:
        found = await self._link.script(
            "reclaim",
            *(self.identity, max_requests, self._grace_ms, _LOST_AFTER_MS, ",".join(self._held)),
            *(self._link.key("queue", name, each) for name in deployments for each in CLASSES),
        )
        raws = ((stream.decode(), entry.decode(), fields, deliveries) for stream, entry, fields, deliveries in found)
        return await self._claims(raws)

    async def _claims(self, raws: Iterable[_Raw]) -> list[Claim]:
        """What can be read, registered as held; what cannot is answered."""
        claims = []
        for stream, entry, fields, deliveries in raws:
            if f"{stream} {entry}" in self._held:
                continue
            named = dict(zip(fields[::2], fields[1::2], strict=False))
            try:
                request = decode(named.get(b"m", b""), GenerateRequest)
            except UnsupportedMessage as error:
                await self._refuse(stream, entry, named.get(b"id", b"").decode(), error)
                continue
            self._held[f"{stream} {entry}"] = request.id
            claims.append(Claim(request, stream, entry, int(entry.partition("-")[0]), deliveries))
        return claims

    async def _refuse(self, stream: str, entry: str, request_id: str, error: UnsupportedMessage) -> None:
        logger.error("unsupported_message", extra={"entry": entry, "request_id": request_id, "error": str(error)})
        result = ended_by(request_id, "failed", error)
        await self._link.script("finish", *self._ending(request_id, result, "", 0), "dead", stream, entry)

    # --- running ---------------------------------------------------------------------------------

    async def source(self, request_id: str) -> bytes | None:
        data: bytes | None = await self._link.call("GET", self._link.key("source", request_id))
        return data

    async def running(self, claims: Sequence[Claim]) -> list[Claim]:
        if not claims:
            return []
        pairs = [part for claim in claims for part in (claim.request.id, _running_event(claim.request))]
        wanted = await self._link.script("running", self.identity, self._result_ttl_ms, *pairs)
        for claim, alive in zip(claims, wanted, strict=True):
            if not alive:
                self._held.pop(_place(claim), None)
        return [claim for claim, alive in zip(claims, wanted, strict=True) if alive]

    async def emit(self, event: StepEvent, data: bytes | None = None) -> None:
        stream = self._link.key("events", event.id)
        picture = () if data is None else ("d", data)
        try:
            await self._link.call_many(
                [
                    ("XADD", stream, "MAXLEN", "~", _EVENTS_KEPT, "*", "e", encode(event), *picture),
                    ("PEXPIRE", stream, self._result_ttl_ms),
                ]
            )
        except Exception as error:
            logger.warning("event_dropped", extra={"kind": event.kind, "error": str(error)})

    # --- answering -------------------------------------------------------------------------------

    async def finish(self, claim: Claim, result: GenerateResult, images: Sequence[bytes] = ()) -> bool:
        return (await self.finish_many([Finished(claim, result, images)]))[0]

    async def finish_many(self, answers: Sequence[Finished]) -> list[bool]:
        if not answers:
            return []
        attempt = secrets.token_hex(4)
        pictures, endings = [], []
        for answer in answers:
            claim, names = answer.claim, self._pictures(answer, attempt)
            pictures += [
                ("SET", name, data, "PX", self._result_ttl_ms) for name, data in zip(names, answer.images, strict=True)
            ]
            parts = self._ending(claim.request.id, answer.result, attempt, len(names))
            endings.append(self._link.command("finish", *parts, "", claim.stream, claim.entry_id))
        try:
            replies = await self._link.call_many([*pictures, *endings])
        finally:  # what could not be answered comes back through `reclaim`
            for answer in answers:
                self._held.pop(_place(answer.claim), None)
        won = [bool(reply) for reply in replies[len(pictures) :]]
        await self._drop([answer for answer, ours in zip(answers, won, strict=True) if not ours], attempt)
        return won

    def _pictures(self, answer: Finished, attempt: str) -> list[str]:
        """Where pictures wait for the transition: under names of this attempt, which nobody else writes."""
        names = range(len(answer.images))
        return [self._link.key("res", answer.claim.request.id, str(i), attempt) for i in names]

    async def _drop(self, losers: Sequence[Finished], attempt: str) -> None:
        names = [name for answer in losers for name in self._pictures(answer, attempt)]
        if names:
            await self._link.call("UNLINK", *names)

    def _ending(self, request_id: str, result: GenerateResult, attempt: str, num_images: int) -> Command:
        """The arguments of finish.lua up to the ended event."""
        ended = encode(StepEvent(id=request_id, kind="ended", status=result.status))
        return (request_id, result.status, encode(result), attempt, self._result_ttl_ms, num_images, ended)

    async def poison(self, claim: Claim) -> bool:
        error = RequestPoisoned(
            f"request {claim.request.id} was given up: {POISONED_AT - 1} workers died while they had it"
        )
        result = ended_by(claim.request.id, "failed", error, claim.request)
        parts = self._ending(claim.request.id, result, secrets.token_hex(4), 0)
        self._held.pop(_place(claim), None)
        return bool(await self._link.script("finish", *parts, "dead", claim.stream, claim.entry_id))

    async def dead_letters(self, deployment: str) -> list[GenerateRequest]:
        found = await self._link.call("XRANGE", self._link.key("dead", deployment), "-", "+")
        kept = []
        for _, fields in found:
            try:
                kept.append(decode(dict(zip(fields[::2], fields[1::2], strict=True))[b"m"], GenerateRequest))
            except (UnsupportedMessage, KeyError):
                logger.info("dead_letter_unreadable", extra={"deployment": deployment})
        return kept

    # --- living ----------------------------------------------------------------------------------

    async def renew_lease(self, info: Mapping[str, Any]) -> None:
        self._lease_info = info
        renewed_s = time.monotonic()
        await self._link.call_many(lease_commands(self._link, self.identity, info, self._lease_ms))
        self._lease_until_s = renewed_s + self._lease_ms / 1000

    async def release_lease(self) -> None:
        self._lease_until_s = float("-inf")
        await self._link.call_many(
            [("DEL", self._link.key("worker", self.identity)), ("ZREM", self._link.key("workers"), self.identity)]
        )

    def keep_lease(self, info: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[None]:
        def renewed(until_s: float, said: Mapping[str, Any]) -> None:
            self._lease_until_s, self._lease_info = until_s, said

        return LeaseKeeper(
            self._url,
            self._link,
            self.identity,
            lease_ms=self._lease_ms,
            hung_s=self._hung_s,
            info=info,
            renewed=renewed,
        )

    async def workers(self) -> list[WorkerInfo]:
        found = await self._link.call("ZRANGE", self._link.key("workers"), 0, -1, "WITHSCORES")
        names = [name.decode() for name in found[::2]]
        if not names:
            return []
        infos = await self._link.call("MGET", *(self._link.key("worker", name) for name in names))
        gone = [name for name, info in zip(names, infos, strict=True) if info is None]
        if gone:
            await self._link.call("ZREM", self._link.key("workers"), *gone)
        return [
            WorkerInfo(name, int(float(score)), msgspec.msgpack.decode(info))
            for name, score, info in zip(names, found[1::2], infos, strict=True)
            if info is not None
        ]

    async def cancels(self) -> AsyncIterator[str]:
        last, outage = self._control_from, Outage("cancels")
        while True:
            try:
                found = await self._link.blocking(
                    "XREAD", "BLOCK", int(LONGEST_BLOCK_S * 1000), "STREAMS", self._link.key("control"), last
                )
            except BROKEN as error:
                outage.failed(error)
                await asyncio.sleep(_PAUSE_S)
                continue
            outage.worked()
            for entry, fields in found[0][1] if found else ():
                last, gone = entry, fields[1].decode()
                for place in [place for place, request_id in self._held.items() if request_id == gone]:
                    del self._held[place]  # it has ended: nobody will finish it
                yield gone


def _delivered(found: Iterable[Any]) -> list[_Raw]:
    """What XREADGROUP gave, as first deliveries."""
    return [(stream.decode(), entry.decode(), fields or [], 1) for stream, part in found for entry, fields in part]


def _place(claim: Claim) -> str:
    """Entry ids are unique in one stream only."""
    return f"{claim.stream} {claim.entry_id}"


def _running_event(request: GenerateRequest) -> bytes:
    return encode(StepEvent(id=request.id, kind="running", total=request.num_evaluations)) if request.events else b""
