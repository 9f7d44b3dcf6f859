"""A worker: what it claims goes to its engine threads, and each request gets its one answer.

The event loop talks to the broker (`intake`, `answers`), some threads call engines (`engine_loop`), a few encode
pictures, and the lease is renewed by a thread of its own. Nothing here waits for a batch to fill. Whatever nobody
foresaw ends `run` with its error: the process ends, its lease goes, and its claims return to the others.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from itertools import count
from typing import Any

from engines import videos
from engines.aside import Aside
from engines.errors import FewstepError
from engines.student import Aid
from server import leases, logs, sources
from server.answers import Answers, Picture, collect, event, expired
from server.batcher import Batcher
from server.brokers.base import Broker, Claim, Finished
from server.engine_loop import EngineLoop
from server.intake import Intake, Parked, Room, held_at_most, room, unencoded
from server.messages import ErrorBody, ended_by
from server.metrics import Metrics
from server.prompt_cache import PromptCache
from server.request_trace import RequestTraces
from server.settings import WorkerSettings
from server.sources import Source
from server.stages import Plans, Stages
from server.stall import StallMeter
from server.students import Students
from server.tickets import LatentRow, PictureRow, Ticket, count_call, draw
from server.tracing import Tracing

log = logging.getLogger(__name__)
_JOIN_S = 5.0
_TICK_S = 0.05
_MOST_PARKED = 8
"""Times the rows that a worker claims at once: so many may wait for versions to be loaded before it claims no more."""

_DRAWN_AT_ONCE = 2**16  # values of noise that the event loop draws itself, in about .2 ms


async def run(settings: WorkerSettings) -> None:
    """One worker process until SIGTERM or SIGINT.

    Raises:
        Exception: what nobody foresaw; the process should end with it.
    """
    from server.worker_process import serve

    await serve(settings)


class Worker:
    """Make it inside the event loop that will run it."""

    def __init__(
        self,
        settings: WorkerSettings,
        broker: Broker,
        students: Students,
        metrics: Metrics,
        meter: StallMeter | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings, self._broker, self._students, self._metrics = settings, broker, students, metrics
        metrics.cancelled.labels("worker")  # from zero on, so that the first one is an increase
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, Ticket] = {}
        self._claimed = count()
        self._parked: dict[str, Parked] = {}
        self._death: asyncio.Future[None] = self._loop.create_future()
        self._side: set[asyncio.Task[None]] = set()
        self._plans = Plans()
        self._traces = RequestTraces(tracing, broker.now_ms)
        self._moving = False
        self._intake = Intake(
            broker,
            deployments=students.serving,
            room=self._room,
            admit=self._admit,
            forget=self._forget,
            poll_s=settings.poll_s,
            elsewhere_ms=lambda: students.elsewhere_ms,
        )
        self.engine = EngineLoop(
            Stages(PromptCache(settings.prompt_cache_bytes), students.device),
            Batcher(tuple(sorted(settings.batch_sizes)), students.call_s),
            self,
            now_s=self._now_s,
            meter=meter,
            streams=lambda: students.streams,
            threads=students.most_streams,
        )
        self._answers = Answers(broker, threads=settings.image_threads, ready=self._pictures, failed=self.engine.fail)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then finishes what is claimed, for at most `drain_s`.

        Raises:
            Exception: whatever ended an engine thread or a task; the process should end with it.
        """
        threads = [Aside(self.engine.run, f"engine-{stream}") for stream in range(self.engine.threads)]
        with self._broker.keep_lease(self._lease):
            for thread in threads:
                thread.start()
            tasks = [asyncio.create_task(work) for work in self._works()]
            stopping = asyncio.create_task(stop.wait())
            ends: list[asyncio.Future[Any]] = [stopping, self._death, *tasks]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                self._check(tasks)
                await self._drain(tasks)
            finally:
                await self._end([stopping, *tasks])
                self.engine.stop()
                until_s = time.monotonic() + _JOIN_S
                for thread in threads:
                    await asyncio.to_thread(thread.join, max(0.0, until_s - time.monotonic()))
                self._answers.close()
                self.engine.meter.flush()

    def _works(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (
            self._intake.claim(),
            self._intake.reclaim(),
            self._intake.hear_cancels(),
            self._answers.send(self._sent),
            self._answers.emit(),
            self._students.run(self.engine, self._uses, self._gone),
        )

    async def _drain(self, tasks: "Sequence[asyncio.Task[None]]") -> None:
        """Takes nothing new and finishes what is here; what is left after `drain_s` goes to the others."""
        log.info("draining", extra={"requests": len(self._tickets)})
        self._intake.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                await tasks[0]
                while self._tickets or self._parked or self._answers.pending:
                    self._check(tasks[1:])
                    await asyncio.sleep(_TICK_S)

    def _check(self, tasks: "Sequence[asyncio.Task[None]]") -> None:
        """Raises what ended an engine thread or a task."""
        if self._death.done():
            self._death.result()
        for task in tasks:
            if task.done():
                task.result()

    async def _end(self, tasks: "Sequence[asyncio.Task[Any]]") -> None:
        for task in (*tasks, *self._side):
            task.cancel()
        await asyncio.gather(*tasks, *self._side, return_exceptions=True)
        self._death.cancel()

    # --- requests --------------------------------------------------------------------------------

    def _room(self) -> Room:
        held, waited = {True: 0, False: 0}, 0
        for ticket in self._tickets.values():
            if ticket.load_s:
                waited += ticket.rows_left
            else:
                held[ticket.claim.request.request_class == "high"] += ticket.rows_left
        latest_s = max((ticket.due_s for ticket in self._tickets.values()), default=None)
        slack_ms = None if latest_s is None else int(1000 * (latest_s - self._now_s())) - 1
        streams, largest = self.engine.streams(), max(self._settings.batch_sizes)
        limit = held_at_most(streams, largest)
        held[False] += unencoded(self._answers.encoding, streams, largest)
        if sum(parked.claim.request.n for parked in self._parked.values()) >= _MOST_PARKED * limit:
            return Room(0, 0)
        # Rows that waited for their version come all at once; the others are not kept out for as long as those take.
        return room(limit, held[True], held[False] + min(waited, limit // 2), slack_below_ms=slack_ms)

    def _admit(self, claims: Sequence[Claim], load_s: float = 0.0, source: Source | None = None) -> None:
        """Hands claims to the engine at once; whether they are still wanted is asked meanwhile.

        `source` is what the one claim that comes with it changes.
        """
        tickets = [ticket for claim in claims if (ticket := self._ticket(claim, load_s, source))]
        for ticket in tickets:
            self._tickets[ticket.id] = ticket
            self._touch(ticket)
            self._metrics.running.labels(ticket.claim.request.model).inc(ticket.claim.request.n)
        if tickets:
            self._draw_and_submit(tickets)
            self._aside(self._mark_running([ticket.claim for ticket in tickets]))

    def _draw_and_submit(self, tickets: Sequence[Ticket]) -> None:
        """Noise is drawn beside the engine's calls: in its threads every draw would come between two of them."""
        if sum(ticket.undrawn for ticket in tickets) > _DRAWN_AT_ONCE:
            drawing = self._loop.run_in_executor(None, draw, tickets)
            drawing.add_done_callback(lambda _: self.engine.submit(tickets))
        else:
            draw(tickets)
            self.engine.submit(tickets)

    def _ticket(self, claim: Claim, load_s: float, source: Source | None) -> Ticket | None:
        """None where the claim is here already, was answered, or waits for its version or its picture."""
        request = claim.request
        if request.id in self._tickets or request.id in self._parked:
            return None
        student = self._students.loaded(request.model, request.version)
        teacher = self._students.loaded(request.model, request.teacher) if request.teacher else None
        waits_for_picture = request.edits_from is not None and source is None
        if student is None or (request.teacher and teacher is None) or waits_for_picture:
            self._parked[request.id] = Parked(claim, self._aside(self._admit_later(claim, self._now_s() - load_s)))
            return None
        aid = Aid(teacher, request.refinement) if teacher and request.refinement else None
        try:
            videos.check(request.output_format)
            solver = self._plans.solver(student, request.steps, request.guidance, aid)
        except FewstepError as error:
            self._answer_failed(claim, error)
            return None
        # From the claim on: having waited behind requests of its own key makes none more urgent. Those claimed together
        # keep their order, since rows due at the very same time would take turns and all end last.
        deadline_s = claim.deadline_ms / 1000
        claimed_s = self._now_s() + next(self._claimed) % 1000 * 1e-6
        return Ticket(
            claim,
            student,
            solver.plan,
            solver,
            due_s=min(deadline_s, claimed_s + request.due_after_s),
            deadline_s=deadline_s,
            least_s=self._students.least_s,
            teacher=teacher,
            load_s=load_s,
            source=source,
            trace=self._traces.begin(claim),
        )

    async def _admit_later(self, claim: Claim, since_s: float) -> None:
        """A request of a version that is not in memory, or one that changes a picture, which travels by itself; rows of
        others go on meanwhile."""
        request, source = claim.request, None
        try:
            async with asyncio.timeout(claim.deadline_ms / 1000 - self._now_s()):
                await self._students.fetch(request.model, filter(None, (request.version, request.teacher)))
                if request.edits_from is not None:
                    await self._students.open_pictures(request.model, request.version)
                load_s = self._now_s() - since_s
                if request.edits_from is not None:
                    source = await sources.fetch(self._broker, request)
        except TimeoutError:
            self._answers.add(expired(claim))
            return
        except FewstepError as error:
            self._answer_failed(claim, error)
            return
        finally:
            self._parked.pop(request.id, None)
            self._intake.moved()
        self._admit([claim], load_s, source)

    async def _mark_running(self, claims: Sequence[Claim]) -> None:
        try:
            wanted = {claim.request.id for claim in await self._broker.running(claims)}
        except FewstepError as error:
            log.warning("cannot mark as running", extra={"error": str(error)})
        else:
            self._forget([claim.request.id for claim in claims if claim.request.id not in wanted])

    def _forget(self, request_ids: Sequence[str]) -> None:
        """Somebody else has ended these requests."""
        known = [self._tickets[request_id] for request_id in request_ids if request_id in self._tickets]
        for request_id in request_ids:
            if parked := self._parked.pop(request_id, None):
                parked.task.cancel()
                self._metrics.cancelled.labels("worker").inc()
        if known:
            self.engine.drop(known)
            for ticket in known:
                self._traces.canceled(ticket)
                self._release(ticket.id)
                self._metrics.cancelled.labels("worker").inc()

    def _release(self, request_id: str) -> None:
        ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            self._metrics.running.labels(ticket.claim.request.model).dec(ticket.claim.request.n)
            self._touch(ticket)
            self._intake.moved()

    def _touch(self, ticket: Ticket) -> None:
        for student in filter(None, (ticket.student, ticket.teacher)):
            self._students.used(ticket.claim.request.model, student.version)

    def _uses(self, version: str) -> bool:
        """Whether a request here still needs the engines of a version."""
        return any(ticket.needs(version) for ticket in self._tickets.values())

    def _gone(self, version: str, blobs: frozenset[str]) -> None:
        self._plans.forget(version)
        self.engine.forget(blobs)

    # --- answers ---------------------------------------------------------------------------------

    def _pictures(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            row, ticket = picture.row, picture.row.ticket
            if ticket.over or row.request_id not in self._tickets:
                continue
            if row.partial_index is None:
                collect(picture)
            else:
                ticket.shown += 1
                self._answers.progress(event(row, "partial_image"), picture.data)
            if ticket.whole:
                self._answer(ticket)

    def _answer(self, ticket: Ticket) -> None:
        result = ticket.result(worker=self._broker.identity, now_s=self._now_s())
        if result.refined and result.refined.refine == "redo":
            judged = self._metrics.judged
            judged.labels(ticket.claim.request.model, "redone").inc(len(ticket.redone))
            judged.labels(ticket.claim.request.model, "kept").inc(result.num_images - len(ticket.redone))
        exemplar = ticket.trace.span.exemplar if ticket.trace else None
        queue_seconds = self._metrics.queue_seconds.labels(ticket.claim.request.model)
        queue_seconds.observe(result.timing.queue_ms / 1000, exemplar)
        self._answers.add(Finished(ticket.claim, result, [image for image in ticket.images if image is not None]))

    def _answer_failed(self, claim: Claim, error: FewstepError) -> None:
        log.warning("request failed", extra={**logs.about(claim.request), "code": error.code, "error": str(error)})
        self._answers.add(Finished(claim, ended_by(claim.request.id, "failed", error, claim.request)))

    def _sent(self, answer: Finished, mine: bool) -> None:
        if mine:
            self._traces.end(answer, self._tickets.get(answer.claim.request.id))
        else:
            log.info("request had ended", extra=logs.about(answer.claim.request))
        self._release(answer.claim.request.id)

    # --- the sink of the engine threads ----------------------------------------------------------

    def moved(self) -> None:
        if not self._moving:  # one wake-up of the event loop for all that happens before it
            self._moving = True
            self._loop.call_soon_threadsafe(self._has_moved)

    def _has_moved(self) -> None:
        self._moving = False
        self._intake.moved()

    def recalled(self, known: bool) -> None:
        self._metrics.embedding_cache.labels("hit" if known else "miss").inc()

    def ran(self, rows: Sequence[Any], seconds: float, lone: bool) -> None:
        self._students.observe(rows, seconds, lone)
        count_call(self._metrics, rows, seconds, self._students.backend, self._traces.called(rows, seconds))
        if rows[0].lane.stage == "denoise":
            self.moved()  # a full worker looks at every step boundary for what is more urgent

    def stepped(self, rows: Sequence[PictureRow]) -> None:
        for row in rows:
            if row.ticket.claim.request.events:
                self._loop.call_soon_threadsafe(self._answers.progress, event(row, "step"))

    def decoded(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        self._answers.encode(rows, pixels)

    def failed(self, ticket: Ticket, error: FewstepError) -> None:
        result = ticket.failure(ErrorBody.of(error), worker=self._broker.identity, now_s=self._now_s())
        self._loop.call_soon_threadsafe(self._answers.add, Finished(ticket.claim, result))

    def expired(self, ticket: Ticket) -> None:
        self._loop.call_soon_threadsafe(self._answers.add, expired(ticket.claim))

    def died(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._die, error)

    # --- small things ----------------------------------------------------------------------------

    def _die(self, error: BaseException) -> None:
        if not self._death.done():
            self._death.set_exception(error)

    def _now_s(self) -> float:
        return self._broker.now_ms() / 1000

    def _lease(self) -> Mapping[str, Any]:
        return leases.write(self._students.lease())

    def _aside(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._side.add(task)
        task.add_done_callback(self._aside_done)
        return task

    def _aside_done(self, task: "asyncio.Task[None]") -> None:
        self._side.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._die(error)
