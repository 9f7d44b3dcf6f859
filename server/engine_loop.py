"""The one thread that calls engines: live rows most urgent first, and between them the small work of a swap.

Work-conserving: it sleeps only when nothing waits. What others want of it (new tickets, cancels) is posted to its
inbox and taken at the next step boundary, so its state needs no lock. It reports to a `Sink` and decides nothing
but what follows from a failure: a row that fails ends its own request, a batch that is too large is split, and
what nobody foresaw ends the thread and with it the process.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar, cast

import torch

from engines.errors import FewstepError, InternalError
from server.batcher import Batcher, LaneKey, Row
from server.stages import Stages, partial_index
from server.stall import StallMeter
from server.tickets import LatentRow, PictureRow, Ticket, latent_row, prompts_of, rows_of

log = logging.getLogger(__name__)
T = TypeVar("T")
BEHIND_SHARE = 0.1
"""Of the engine's time, what work behind live rows gets even if they never pause: a swap ends under any load."""
_LEAST_WAIT_S = 0.01


class Sink(Protocol):
    """What the engine thread tells. Called in that thread: take note and return at once."""

    def moved(self) -> None:
        """There is room for new claims, or soon will be."""

    def recalled(self, known: bool) -> None:
        """A prompt was asked of the cache."""

    def ran(self, rows: Sequence[Row], seconds: float) -> None:
        """A live engine call has ended."""

    def stepped(self, rows: Sequence[PictureRow]) -> None: ...
    def decoded(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        """pixels uint8 [B, 3, H, W], the sink's own."""

    def failed(self, ticket: Ticket, error: FewstepError) -> None: ...
    def expired(self, ticket: Ticket) -> None: ...
    def died(self, error: BaseException) -> None:
        """The thread has ended with an error that nobody foresaw."""


@dataclass(slots=True)
class _Background:
    work: Callable[[], Any]
    future: "Future[Any]"
    since_s: float


class EngineLoop:
    """`run` is the body of the thread; everything public may be called from any thread."""

    def __init__(
        self,
        stages: Stages,
        batcher: Batcher[Any],
        sink: Sink,
        *,
        now_s: Callable[[], float],
        meter: StallMeter | None = None,
    ) -> None:
        self._stages, self._batcher, self._sink = stages, batcher, sink
        self._now_s = now_s
        self.meter = meter or StallMeter()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._background: deque[_Background] = deque()
        self._behind_s = 0.0  # what the last piece of background work took
        self._stopping = False

    # --- from any thread -------------------------------------------------------------------------

    def submit(self, tickets: Sequence[Ticket]) -> None:
        self._inbox.put(lambda: self._admit(tickets))

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forgets these requests at the next step boundary; whoever drops them has answered them."""
        gone = frozenset(request_ids)

        def drop() -> None:
            self._forget(self._batcher.remove(gone))

        self._inbox.put(drop)

    def background(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` in the engine thread when no live row waits. Keep it as short as a step."""
        future: Future[T] = Future()
        self._inbox.put(lambda: self._background.append(_Background(work, future, time.monotonic())))
        return future

    def forget(self, encoders: Iterable[str]) -> None:
        """Drops the embeddings of encoders that are no longer here, at the next step boundary."""
        gone = frozenset(encoders)

        def forget() -> None:
            for encoder in gone:
                self._stages.cache.forget_encoder(encoder)

        self._inbox.put(forget)

    def stop(self) -> None:
        """Ends the thread at the next step boundary, whatever waits."""

        def stop() -> None:
            self._stopping = True

        self._inbox.put(stop)

    # --- in the engine thread --------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._stopping:
                self._listen()
                self._turn()
        except BaseException as error:
            log.exception("engine thread died")
            self._sink.died(error)

    def _listen(self) -> None:
        """Takes what was posted; waits for it only if there is nothing else to do."""
        if not len(self._batcher) and not self._background:
            self._inbox.get()()
        with contextlib.suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _turn(self) -> None:
        late = self._batcher.expire(self._now_s())
        if late:
            for ticket in self._forget(late):
                self._sink.expired(ticket)
        batch = [] if self._starved() else self._batcher.next_batch()
        if batch:
            self._live(batch)
        elif self._background:
            self._behind(self._background.popleft())

    def _starved(self) -> bool:
        if not self._background:
            return False
        patience_s = max(_LEAST_WAIT_S, self._behind_s * (1 / BEHIND_SHARE - 1))
        return time.monotonic() - self._background[0].since_s > patience_s

    def _behind(self, piece: _Background) -> None:
        if not piece.future.set_running_or_notify_cancel():
            return
        begun_s = time.monotonic()
        try:
            piece.future.set_result(piece.work())
        except Exception as error:
            piece.future.set_exception(error)
        self._behind_s = time.monotonic() - begun_s
        if self._background:
            self._background[0].since_s = time.monotonic()

    def _admit(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            prompts = prompts_of(ticket)
            ticket.missing = len(prompts)
            for row in prompts:
                known = self._stages.recall(row)
                self._sink.recalled(known)
                if not known:
                    self._batcher.add(row)
            self._join(ticket)
        if len(self._batcher):
            self.meter.waiting(self._now_s())

    def _join(self, ticket: Ticket) -> None:
        if not ticket.missing and not ticket.over:
            for row in rows_of(ticket):
                self._batcher.add(row)

    def _live(self, batch: list[Any]) -> None:
        lane: LaneKey = batch[0].lane
        now_s, begun = self._now_s(), time.perf_counter()
        for row in batch:
            row.ticket.begin(now_s)
        try:
            self._call(lane, batch)
        except FewstepError as error:
            self._isolate(batch, error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._split(batch, error)
        else:
            seconds = time.perf_counter() - begun
            for ticket in {row.ticket: None for row in batch}:
                setattr(ticket, f"{lane.stage}_s", getattr(ticket, f"{lane.stage}_s") + seconds)
            self._sink.ran(batch, seconds)
        waiting = len(self._batcher) > 0
        self.meter.stepped(
            self._now_s(),
            still_waiting=waiting,
            stage=lane.stage,
            rows=len(batch),
            seconds=time.perf_counter() - begun,
        )

    def _call(self, lane: LaneKey, batch: list[Any]) -> None:
        if lane.stage == "encode":
            self._stages.encode(batch)
            for ticket in {row.ticket: None for row in batch}:
                self._join(ticket)
        elif lane.stage == "denoise":
            self._denoise(batch)
        else:
            self._sink.decoded(batch, self._stages.decode(batch))

    def _denoise(self, rows: list[PictureRow]) -> None:
        self._leave(rows)
        estimates = self._stages.denoise(rows)
        ended = [row for row in rows if row.done]
        for row in ended:
            self._finish_row(row)
        for place, latents in estimates.items():
            self._batcher.add(latent_row(rows[place], latents, partial_index=partial_index(rows[place])))
        for row in rows:
            if not row.done:
                self._again(row)
        self._sink.stepped(rows)

    def _leave(self, rows: Sequence[PictureRow]) -> None:
        """Rows in their last step make room for new claims already while it runs."""
        last = [row for row in rows if row.step + 1 == len(row.ticket.plan) and not row.leaving]
        for row in last:
            row.leaving = True
            row.ticket.rows_left -= 1
        if last:
            self._sink.moved()

    def _finish_row(self, row: PictureRow) -> None:
        latents = cast(torch.Tensor, row.state and row.state.x)
        if bool(torch.isfinite(latents).all()):
            self._batcher.add(latent_row(row, latents))
        else:
            self._fail(row.ticket, InternalError(f"picture {row.index} is not finite: try another seed or guidance"))

    def _again(self, row: PictureRow) -> None:
        row.lane = row.ticket.lane(row.step)
        row.network_rows = row.ticket.network_rows(row.step)
        if not row.ticket.over:
            self._batcher.add(row)

    def _isolate(self, batch: list[Any], error: FewstepError) -> None:
        """A refused batch: every row alone, so that only the request at fault fails."""
        tickets = list({row.ticket: None for row in batch})
        if len(tickets) == 1:
            self._fail(tickets[0], error)
            return
        for ticket in tickets:
            self._live([row for row in batch if row.ticket is ticket])

    def _split(self, batch: list[Any], error: BaseException) -> None:
        log.warning("out of memory", extra={"rows": len(batch), "stage": batch[0].lane.stage})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._fail(batch[0].ticket, InternalError(f"one picture does not fit into this worker's memory: {error}"))
            return
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._live(part)

    def _fail(self, ticket: Ticket, error: FewstepError) -> None:
        if not ticket.over:
            self._batcher.remove([ticket.id])
            self._forget_ticket(ticket)
            self._sink.failed(ticket, error)

    def _forget(self, rows: Iterable[Any]) -> list[Ticket]:
        """Gives up the tickets of these rows and returns them."""
        tickets = [ticket for ticket in {row.ticket: None for row in rows} if not ticket.over]
        self._batcher.remove(ticket.id for ticket in tickets)
        for ticket in tickets:
            self._forget_ticket(ticket)
        if not len(self._batcher):
            self.meter.idle()
        return tickets

    def _forget_ticket(self, ticket: Ticket) -> None:
        ticket.over, ticket.rows_left = True, 0
        self._sink.moved()
