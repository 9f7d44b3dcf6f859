"""How requests come into a worker: claims as there is room, claims of the dead, and word of those that were canceled.

Loops that wait and ask; what is done with a claim is the worker's.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import FewstepError
from server import logs
from server.brokers.base import NOWHERE, Broker, Claim

log = logging.getLogger(__name__)
_BLOCK_S = 0.25  # a request that others left behind just as this worker began to wait is found after this
_FULL_S = 0.05  # a worker that is full looks for urgent requests at least this often
_VAIN_S = 0.01  # and, where its steps are shorter, not again this soon after it found none: that costs all who claim
_RETRY_S = 0.5
_RECLAIM_S = 1.0


@dataclass(frozen=True, slots=True)
class Room:
    """Rows that may be claimed: in all, and of the classes below high."""

    rows: int
    below_high: int
    slack_below_ms: int | None = None  # what should be done sooner than this may have the place kept for high


@dataclass(frozen=True, slots=True)
class Parked:
    """A claim that waits for its version to be loaded."""

    claim: Claim
    task: "asyncio.Task[None]"


def held_at_most(streams: int, largest_batch: int) -> int:
    """Rows that a worker holds at once: those of the calls that run, and those of the next one."""
    return (1 + streams) * largest_batch


def unencoded(waiting: int, streams: int, largest_batch: int) -> int:
    """Of the rows whose pixels wait for an encoder those that are held still: what has just left the calls is not."""
    return max(0, waiting - streams * largest_batch)


def room(limit: int, held_high: int, held_below: int, slack_below_ms: int | None = None) -> Room:
    """A quarter of `limit` is kept for class high and for what would overtake something that is here.

    Long rows would fill the whole worker otherwise, and short ones that should pass them could not come in. A row in
    its last step is no longer held (`Ticket.rows_left`): it leaves its place when the step ends, and then the next
    batch must be there.
    """
    rows = limit - held_high - held_below
    return Room(rows, min(rows, limit - limit // 4 - held_below), slack_below_ms)


class Intake:
    """Belongs to one event loop. `stop` ends claiming; cancels are heard until the tasks are cancelled."""

    def __init__(
        self,
        broker: Broker,
        *,
        deployments: Callable[[], Sequence[str]],
        room: Callable[[], Room],
        admit: Callable[[Sequence[Claim]], None],
        forget: Callable[[Sequence[str]], None],
        poll_s: float,
        elsewhere_ms: Callable[[], Mapping[str, int]] = lambda: NOWHERE,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker, self._deployments, self._room = broker, deployments, room
        self._admit, self._forget, self._poll_s, self._now_s = admit, forget, poll_s, now_s
        self._elsewhere_ms = elsewhere_ms
        self._moved = asyncio.Event()
        self._stopped = False
        self._vain_s = float("-inf")  # when the last look for urgent requests found none

    def moved(self) -> None:
        """There may be more room than before, or another deployment."""
        self._moved.set()

    def stop(self) -> None:
        self._stopped = True
        self._moved.set()

    async def claim(self) -> None:
        while not self._stopped:
            try:
                await self._claim_once()
            except FewstepError as error:
                log.warning("cannot claim", extra={"error": str(error)})
                await asyncio.sleep(_RETRY_S)

    async def _claim_once(self) -> None:
        names, now = self._deployments(), self._room()
        self._moved.clear()
        if not names or now.rows <= 0:
            await self._wait(self._poll_s)
            return
        if now.below_high > 0:
            block_s = _BLOCK_S
        else:  # only what is urgent would be taken: a long wait for it would miss the moment when there is room for all
            await self._wait(_FULL_S)
            block_s, now = 0.0, self._room()
            if now.below_high <= 0 and self._now_s() < self._vain_s + _VAIN_S:
                return
        claims = await self._broker.claim(
            names,
            now.rows,
            block_s,
            max_rows_below_high=max(0, now.below_high),
            slack_below_ms=now.slack_below_ms,
            elsewhere_ms=self._elsewhere_ms(),
        )
        if not claims and now.below_high <= 0:
            self._vain_s = self._now_s()
        self._admit(claims)

    async def _wait(self, within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), within_s)

    async def reclaim(self) -> None:
        while not self._stopped:
            await asyncio.sleep(_RECLAIM_S)
            try:
                claims = await self._broker.reclaim(self._deployments())
                for claim in claims:
                    if claim.poisoned:
                        log.error("poisoned", extra={**logs.about(claim.request), "deliveries": claim.deliveries})
                        await self._broker.poison(claim)
                self._admit([claim for claim in claims if not claim.poisoned])
            except FewstepError as error:
                log.warning("cannot reclaim", extra={"error": str(error)})

    async def hear_cancels(self) -> None:
        while True:
            try:
                async for request_id in self._broker.cancels():
                    self._forget([request_id])
            except FewstepError as error:
                log.warning("cannot hear cancels", extra={"error": str(error)})
            await asyncio.sleep(_RETRY_S)
