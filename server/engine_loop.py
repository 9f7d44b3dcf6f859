"""The threads that call engines: live rows most urgent first, and behind them the small work of a swap.

Each of them decides what it calls next, calls it, and sees to what came of it; only the calls themselves overlap. With
one thread all of the processor's cores share a call, with several each has its own unless nothing else is to be done:
small networks gain nothing from cores that wait for each other. Work-conserving: a thread sleeps only when nothing
waits. What others want of the threads (new tickets, cancels) is posted to their inbox and taken at the next step
boundary. They report to a `Sink` and decide nothing but what follows from a failure: a row that fails ends its own
request, a batch that is too large is split, and what nobody foresaw ends the thread and with it the process.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

import torch

from engines.editing import Looked
from engines.errors import FewstepError, InternalError
from engines.streams import alone
from server.batcher import Batcher, LaneKey
from server.behind import Piece
from server.prompt_cache import Embedding
from server.sink import Sink
from server.stages import Stages, give, partial_index, show
from server.stall import StallMeter
from server.tickets import (
    LatentRow,
    PictureRow,
    PromptRow,
    SourceRow,
    Ticket,
    latent_row,
    prompts_of,
    rows_of,
    sources_of,
)
from server.turns import Turns

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineLoop:
    """`run` is the body of each of its `threads`, of which `streams()` call at once. Any thread may call the rest."""

    def __init__(
        self,
        stages: Stages,
        batcher: Batcher[Any],
        sink: Sink,
        *,
        now_s: Callable[[], float],
        meter: StallMeter | None = None,
        streams: Callable[[], int] = lambda: 1,
        threads: int = 1,
    ) -> None:
        self._stages, self._batcher, self._sink = stages, batcher, sink
        self._now_s = now_s
        self.meter = meter or StallMeter()
        self.streams, self.threads = streams, threads
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # of all below
        self._turns: Turns[Any] = Turns(batcher, streams)
        self._behind, self._flights = self._turns.behind, self._turns.flights
        self._made: deque[tuple[Sequence[LatentRow], Any]] = deque()  # pictures that nobody was told of yet
        self._idle = 0  # threads that wait for the inbox
        self._stopping = False

    # --- from any thread -------------------------------------------------------------------------

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Their first step does not wait for their noise if that is drawn (`Ticket.draw`)."""
        if not self._lock.acquire(blocking=False):
            self._inbox.put(lambda: self._admit(tickets))
            return
        try:  # here and now, beside the calls that run: an engine thread would do it between two of them
            self._admit(tickets)
            if self._idle:
                self._inbox.put(_nothing)
        finally:
            self._lock.release()

    def drop(self, tickets: Sequence[Ticket]) -> None:
        """Forgets these requests at the next step boundary; whoever drops them has answered them."""

        def drop() -> None:
            self._forget(tickets)

        self._inbox.put(drop)

    def fail(self, ticket: Ticket, error: FewstepError) -> None:
        """Ends a request that failed after its last call."""
        self._inbox.put(lambda: self._fail(ticket, error))

    def background(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` in an engine thread when no live row waits. Keep it as short as a step."""
        future: Future[T] = Future()
        self._inbox.put(lambda: self._behind.add(work, future))
        return future

    def landed(self) -> "Future[None]":
        """Done when every call has ended that runs when this is heard."""
        future: Future[None] = Future()
        self._inbox.put(lambda: self._flights.wait(future))
        return future

    def forget(self, encoders: Iterable[str]) -> None:
        """Drops the embeddings of encoders that are no longer here, at the next step boundary."""
        gone = frozenset(encoders)

        def forget() -> None:
            for encoder in gone:
                self._stages.cache.forget_encoder(encoder)

        self._inbox.put(forget)

    def stop(self) -> None:
        """Ends the threads at their next step boundary, whatever waits."""

        def stop() -> None:
            self._stopping = True

        self._inbox.put(stop)

    # --- in an engine thread, without the lock -----------------------------------------------------

    def run(self) -> None:
        try:
            while (work := self._next()) is not None:
                work()
        except BaseException as error:
            log.exception("engine thread died")
            self._sink.died(error)

    def _next(self) -> Callable[[], None] | None:
        """What this thread does now, for which it waits if need be. None is the end."""
        while True:
            with self._lock:
                self._listen()
                if self._stopping:
                    self._inbox.put(_nothing)  # for the next thread that waits
                    return None
                if work := self._work():
                    if self._idle and self._turns.free and self._turns.waiting:
                        self._inbox.put(_nothing)  # wakes another thread for what is left
                    return work
                self._tell_made()
                self._idle += 1
            posted = self._inbox.get()
            with self._lock:
                self._idle -= 1
                posted()

    def _fly(self, batch: list[Any], number: int, lone: bool) -> None:
        self._live(batch, lone)
        with self._lock:
            self._flights.end(number)

    def _live(self, batch: list[Any], lone: bool = False) -> None:
        lane: LaneKey = batch[0].lane
        begun = time.perf_counter()
        if lane.stage != "denoise":
            self._hand_over()
        try:
            with alone() if lone else contextlib.nullcontext():
                settle = self._call(lane, batch)
        except FewstepError as error:
            self._isolate(batch, error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._split(batch, error)
        else:
            seconds = time.perf_counter() - begun
            with self._lock:
                for ticket in {row.ticket: None for row in batch}:
                    setattr(ticket, f"{lane.stage}_s", getattr(ticket, f"{lane.stage}_s") + seconds)
                self._sink.ran(batch, seconds, lone)  # first: what follows may be answered at once
                settle()
        with self._lock:
            self.meter.stepped(
                self._now_s(),
                still_waiting=len(self._batcher) > 0,
                stage=lane.stage,
                rows=len(batch),
                seconds=time.perf_counter() - begun,
            )

    def _call(self, lane: LaneKey, batch: list[Any]) -> Callable[[], None]:
        """The engine call; returns what follows from it, to be called with the lock."""
        if isinstance(batch[0], SourceRow):
            return partial(self._looked, batch, self._stages.look(batch))
        if lane.stage == "encode":
            return partial(self._encoded, batch, self._stages.encode(batch))
        if lane.stage == "denoise":
            self._leave(batch)
            return partial(self._denoised, batch, self._stages.denoise(batch, self._hand_over))
        made = (batch, self._stages.decode(batch))
        return lambda: self._made.append(made)

    def _hand_over(self) -> None:
        """Tells of what was decoded. Before a step only when its network is called: encoders and event loop would take
        the GIL from the thread that prepares it."""
        if self._made:
            with self._lock:
                self._tell_made()

    def _run_behind(self, piece: Piece) -> None:
        self._hand_over()
        piece.run()
        with self._lock:
            self._behind.end()

    def _leave(self, rows: Sequence[PictureRow]) -> None:
        """Rows in their last step make room for new claims already while it runs."""
        with self._lock:
            self._leaving([row for row in rows if row.step + 1 == len(row.ticket.plan)])

    def _isolate(self, batch: list[Any], error: FewstepError) -> None:
        """A refused batch: every row alone, so that only the request at fault fails."""
        tickets = list({row.ticket: None for row in batch})
        if len(tickets) == 1:
            with self._lock:
                self._fail(tickets[0], error)
            return
        for ticket in tickets:
            self._live([row for row in batch if row.ticket is ticket])

    def _split(self, batch: list[Any], error: BaseException) -> None:
        log.warning("out of memory", extra={"rows": len(batch), "stage": batch[0].lane.stage})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            with self._lock:
                self._fail(batch[0].ticket, InternalError(f"one picture does not fit this worker's memory: {error}"))
            return
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._live(part)

    # --- in an engine thread, with the lock ---------------------------------------------------------

    def _listen(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _tell_made(self) -> None:
        while self._made:
            self._sink.decoded(*self._made.popleft())

    def _work(self) -> Callable[[], None] | None:
        now_s = self._now_s()
        late = self._batcher.expire(now_s)
        if late:
            for ticket in self._forget({row.ticket: None for row in late}):
                self._sink.expired(ticket)
        work = self._turns.next()
        if work is None:
            return None
        if isinstance(work, Piece):
            return partial(self._run_behind, work)
        for row in work:
            row.ticket.begin(now_s)
        lone = self._turns.lone
        return partial(self._fly, work, self._flights.begin(work), lone)

    def _admit(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if ticket.over:  # dropped before it came
                continue
            prompts = prompts_of(ticket)
            sources = sources_of(ticket)
            ticket.missing = len(prompts) + len(sources)
            for source in sources:
                self._batcher.add(source)
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

    def _looked(self, rows: list[SourceRow], made: Sequence[Looked]) -> None:
        for row, looked in zip(rows, made, strict=True):
            show(row, looked)
        for ticket in {row.ticket: None for row in rows}:
            self._join(ticket)

    def _encoded(self, rows: list[PromptRow], made: Mapping[str, Embedding]) -> None:
        for row in rows:
            give(row, made[row.prompt])
        for ticket in {row.ticket: None for row in rows}:
            self._join(ticket)

    def _denoised(self, rows: list[PictureRow], estimates: Mapping[int, torch.Tensor]) -> None:
        ended = [row for row in rows if row.done and not row.ticket.over]
        self._leaving(ended)  # some end before the last step of their plan
        for row in ended:
            self._batcher.add(latent_row(row, cast(torch.Tensor, row.state and row.state.x)))
        for place, row in enumerate(rows):
            if place in estimates and not row.done and not row.ticket.over:
                row.ticket.shows += 1
                self._batcher.add(latent_row(row, estimates[place], partial_index=partial_index(row)))
            if not row.done and not row.ticket.over:
                self._again(row)
        self._sink.stepped([row for row in rows if not row.ticket.over])

    def _leaving(self, rows: Sequence[PictureRow]) -> None:
        last = [row for row in rows if not row.leaving]
        for row in last:
            row.leaving = True
            row.ticket.rows_left -= 1
        if last:
            self._sink.moved()

    def _again(self, row: PictureRow) -> None:
        row.lane = row.ticket.lane(row.step)
        row.network_rows, row.needs_s = row.ticket.network_rows(row.step), row.ticket.needs_s[row.step]
        if row.ticket.plan[row.step].share < 1:  # not every row comes so far
            row.ticket.redone.add(row.index)
        self._batcher.add(row)

    def _fail(self, ticket: Ticket, error: FewstepError) -> None:
        if not ticket.over:
            self._batcher.remove([ticket.id])
            self._forget_ticket(ticket)
            self._sink.failed(ticket, error)

    def _forget(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Gives up those of these tickets that are not over, and returns them."""
        given_up = [ticket for ticket in tickets if not ticket.over]
        self._batcher.remove(ticket.id for ticket in given_up)
        for ticket in given_up:
            self._forget_ticket(ticket)
        if not len(self._batcher):
            self.meter.idle()
        return given_up

    def _forget_ticket(self, ticket: Ticket) -> None:
        ticket.over, ticket.rows_left = True, 0
        self._sink.moved()


def _nothing() -> None: ...
