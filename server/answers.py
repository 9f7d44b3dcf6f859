"""What leaves a worker: pictures and videos as bytes, the one answer of each request, and progress on the way.

Pictures are encoded in a few threads, one hop per batch and not per picture. Answers that are ready together go to
the broker together, and those that it cannot take now are kept until it can.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from engines import images, videos
from engines.errors import DeadlineExceeded, FewstepError, InternalError
from server import logs
from server.brokers.base import Broker, Claim, Emitted, Finished
from server.messages import StepEvent, ended_by
from server.tickets import LatentRow, PictureRow, Ticket
from server.tracing import now_ns

log = logging.getLogger(__name__)
_RETRY_S = 0.2
_MIN_SHARE = 4  # pictures for which a second thread pays


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded row."""

    row: LatentRow
    data: bytes
    begun_ns: int  # of Unix time
    seconds: float


class Answers:
    """Belongs to the worker's event loop; `encode` alone may be called from any thread."""

    def __init__(
        self,
        broker: Broker,
        *,
        threads: int,
        ready: Callable[[Sequence[Picture]], None],
        failed: Callable[[Ticket, FewstepError], None],
    ) -> None:
        """`ready` hears of each batch of encoded pictures in the event loop, `failed` in any thread of what an encoder
        did not take."""
        self._broker, self._ready, self._failed = broker, ready, failed
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image")
        self._answers: list[Finished] = []
        self._events: deque[Emitted] = deque()
        self._answered, self._evented, self._told = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._sending = 0
        self._noted = self._emitted = 0  # events
        self._given = self._taken = 0  # rows to encode, and those of them that are done with

    @property
    def pending(self) -> int:
        """Answers that the broker has not taken yet."""
        return len(self._answers) + self._sending

    @property
    def encoding(self) -> int:
        """Rows whose pixels wait here to be encoded."""
        return self._given - self._taken

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- pictures --------------------------------------------------------------------------------

    def encode(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        """pixels uint8 [B, 3, H, W], of videos [B, T, 3, H, W], kept until they are encoded. One thread at a time."""
        self._given += len(rows)
        share = _MIN_SHARE if pixels.ndim == 4 else 1
        parts = min(self._threads, max(1, len(rows) // share))
        for part in range(parts):
            self._pool.submit(self._encode, rows[part::parts], pixels[part::parts])

    def _encode(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        made = []
        for row, picture in zip(rows, pixels, strict=True):
            if row.ticket.over:  # nobody waits for it any more
                continue
            try:
                made.append(_picture(row, picture))
            except FewstepError as error:
                self._failed(row.ticket, error)
            except Exception as error:  # an encoder's own: it would meet the same request at every worker
                log.exception("cannot encode", extra=logs.about(row.ticket.claim.request))
                self._failed(row.ticket, InternalError(f"{type(error).__name__} of the encoder: {error}"))
        self._loop.call_soon_threadsafe(self._encoded, made, len(rows))

    def _encoded(self, made: Sequence[Picture], rows: int) -> None:
        self._taken += rows
        self._ready(made)

    # --- answers ---------------------------------------------------------------------------------

    def add(self, answer: Finished) -> None:
        self._answers.append(answer)
        self._answered.set()

    async def send(self, sent: Callable[[Finished, bool], None]) -> None:
        """Sends answers for ever, each behind the progress that was noted before it.

        `sent` hears of each and whether it was the one that ended its request.
        """
        while True:
            await self._answered.wait()
            self._answered.clear()
            batch, self._answers = self._answers, []
            self._sending = len(batch)
            await self._emitted_up_to(self._noted)
            try:
                won = await self._broker.finish_many(batch)
            except FewstepError as error:
                log.warning("answers wait for the broker", extra={"answers": len(batch), "error": str(error)})
                self._answers, self._sending = batch + self._answers, 0
                self._answered.set()
                await asyncio.sleep(_RETRY_S)
                continue
            self._sending = 0
            for answer, mine in zip(batch, won, strict=True):
                sent(answer, mine)

    # --- progress --------------------------------------------------------------------------------

    def progress(self, event: StepEvent, data: bytes | None = None) -> None:
        self._events.append(Emitted(event, data))
        self._noted += 1
        self._evented.set()

    async def emit(self) -> None:
        """Sends progress for ever, in its order."""
        while True:
            await self._evented.wait()
            self._evented.clear()
            batch = list(self._events)
            self._events.clear()
            # Begun in their order, which a broker keeps: one round trip, since answers wait behind them.
            await asyncio.gather(*(self._broker.emit(emitted.event, emitted.data) for emitted in batch))
            self._emitted += len(batch)
            self._told.set()

    async def _emitted_up_to(self, count: int) -> None:
        while self._emitted < count:
            self._told.clear()
            await self._told.wait()


def _picture(row: LatentRow, pixels: Any) -> Picture:
    begun, begun_ns = time.perf_counter(), now_ns()
    request = row.ticket.claim.request
    if row.ticket.source is not None:
        pixels = row.ticket.source.kept(pixels)
    if request.fps is None:
        data = images.encode(pixels, request.output_format, request.compression)
    else:
        data = videos.encode(pixels, request.output_format, fps=request.fps, compression=request.compression)
    return Picture(row, data, begun_ns, time.perf_counter() - begun)


def collect(picture: Picture) -> None:
    """Puts a picture into its ticket."""
    ticket = picture.row.ticket
    ticket.images[picture.row.index] = picture.data
    ticket.image_s += picture.seconds
    if ticket.trace is not None:
        ticket.trace.pictured(picture.row.index, picture.begun_ns, picture.seconds, len(picture.data))


def event(row: PictureRow | LatentRow, kind: Literal["step", "partial_image"]) -> StepEvent:
    """What is said of a row after a step."""
    partial_index = row.partial_index or 0 if isinstance(row, LatentRow) else 0
    total, first = len(row.ticket.plan), row.ticket.first
    return StepEvent(
        id=row.request_id,
        kind=kind,
        step=row.step - first,
        total=total - first,
        image_index=row.index,
        partial_index=partial_index,
    )


def expired(claim: Claim) -> Finished:
    """The answer of a request whose deadline has passed."""
    request = claim.request
    error = DeadlineExceeded(f"not done within its {request.budget_ms} ms: raise timeout_ms or try again later")
    return Finished(claim, ended_by(request.id, "expired", error, request))
