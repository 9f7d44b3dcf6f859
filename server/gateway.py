"""The gateway: authorise → decide (version, plan, admission) → publish → await. HTTP is in `dialects/`.

A request is pinned to one version before it is queued, so that no swap can split it. Every accepted
request is answered: where no worker ends it in time, the gateway does.
"""

import asyncio
import logging
import math
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from engines.errors import DeadlineExceeded, Gone, NotFound, Overloaded, Unavailable
from engines.manifest import shown
from engines.registry.base import Registry
from server import leases, tracing
from server.auth import Keys, Principal, Scope
from server.brokers.base import Broker, Emitted, StaleVersion, Status
from server.catalog import Catalog, Deployment, View
from server.dispatcher import Dispatcher
from server.idempotency import Idempotency, remember
from server.intent import Answer, Decision, Intent, Ticket
from server.latencies import Latencies
from server.messages import CLASSES, GenerateRequest, GenerateResult
from server.metrics import Metrics, quality
from server.settings import GatewaySettings
from server.signing import Signer
from server.uploads import Unpacking

_logger = logging.getLogger(__name__)
_ATTEMPTS = 3  # a swap may retire a version between our look and the publish; three in a row do not happen
_ANSWER_GRACE_S = 1.0  # workers end what is late; only then the gateway does
_STORE_EVERY_S = 5.0
_MAX_SEED = 2**63 - 1
_ID = re.compile(r"^gen_([0-9a-f]{8})[0-9a-f]{20}$")  # the first eight digits are its Unix seconds


class Gateway:
    """One per process. `start` it inside the event loop that serves, `stop` it there too."""

    def __init__(
        self,
        settings: GatewaySettings,
        broker: Broker,
        registry: Registry,
        metrics: Metrics,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self.broker, self.registry, self.metrics = settings, broker, registry, metrics
        self.catalog = Catalog(broker, registry, poll_s=settings.poll_s, clock_s=clock_s, changed=self._looked)
        self.latencies = Latencies(clock_s)
        self._dispatcher = Dispatcher(settings, self.catalog, self.latencies, metrics, clock_s, self._wanted)
        self.keys = Keys(settings.keys)
        secret = settings.url_secret.get_secret_value().encode() if settings.url_secret else os.urandom(32)
        self.signer = Signer(secret, settings.base_url, settings.url_ttl_s, now_s=now_s)
        self.uploads = Unpacking(settings.max_image_pixels)
        self.draining = False
        self._clock_s, self._now_s = clock_s, now_s
        self._background: set[asyncio.Task[Any]] = set()
        self._store_seen_s = -math.inf
        metrics.cancelled.labels("gateway")  # from zero on, so that the first one is an increase
        for refusal in (Overloaded, Unavailable):
            metrics.shed.labels(refusal.code)

    async def start(self) -> None:
        if self.settings.url_secret is None:
            _logger.info("url_secret is not set: result urls are valid at this gateway and for its lifetime only")
        await self.catalog.start()

    def refuse(self) -> None:
        """From now on new work is answered with 503; what is under way goes on."""
        self.draining = True

    async def stop(self) -> None:
        self.refuse()
        await self.catalog.stop()
        await asyncio.gather(*self._background, return_exceptions=True)

    def authorise(self, authorization: str | None, scope: Scope) -> Principal:
        """Raises `AuthenticationFailed` or `PermissionDenied`."""
        return self.keys.authorise(authorization, scope)

    # --- one request -----------------------------------------------------------------------------

    async def submit(self, intent: Intent, principal: Principal, idempotency: Idempotency | None = None) -> Ticket:
        """Queues a request, or finds the one that the idempotency key stands for.

        Raises:
            InvalidRequest and below: it cannot be served as asked.
            Overloaded, Unavailable: not now.
        """
        started_s = self._clock_s()
        if self.draining:
            raise Unavailable("this gateway is stopping: ask again, another one answers", retry_after_s=1.0)
        timeout_ms = min(intent.timeout_ms or self.settings.default_timeout_ms, self.settings.max_timeout_ms)
        request_id = f"gen_{int(self._now_s()):08x}{secrets.token_hex(10)}"
        if idempotency is not None:
            earlier = await remember(
                self.broker, idempotency, request_id, self.settings.idempotency_ttl_s, owner=principal.owner
            )
            if earlier is not None:
                request_id = earlier
                status = await self.broker.status(request_id)
                if status is not None:
                    return Ticket(request_id, status.deployment, timeout_ms / 1000, started_s, None)
        decision = await self._publish(intent, principal, request_id, timeout_ms)
        return Ticket(request_id, decision.choice.deployment, timeout_ms / 1000, started_s, decision, principal.owner)

    async def answer(self, ticket: Ticket) -> Answer:
        """Waits for the end of a request.

        Raises:
            FewstepError: what it ended with, in its own class; `Gone` when the pictures have expired.
        """
        answered = await self.broker.answer(ticket.id, ticket.budget_s + _ANSWER_GRACE_S)
        result = await self._give_up(ticket) if answered is None else answered.result
        self.count(ticket, result)
        if result.error is not None:
            raise result.error.exception()
        found = answered.images if answered else await self.broker.images(ticket.id, result.num_images)
        images = [image for image in found if image is not None]
        if len(images) < len(found):
            raise Gone(f"the pictures of {ticket.id} have expired: generate them again with their seeds")
        return Answer(result, images)

    async def wait(self, ticket: Ticket, timeout_s: float) -> bool:
        """Whether the request ended within `timeout_s`."""
        return await self.broker.wait(ticket.id, timeout_s) is not None

    async def status(self, request_id: str, principal: Principal) -> Status:
        """
        Raises:
            NotFound: unknown, or somebody else's.
            Gone: an id of ours from so long ago that its answer has expired.
        """
        status = await self.broker.status(request_id, with_position=True)
        if status is None and self._forgotten(request_id):
            raise Gone(f"generation {request_id} has expired: make it again, with the same seed for the same picture")
        if status is None or not principal.sees(status.owner):
            raise NotFound(f"there is no generation {request_id!r}: it never was, or it is not yours")
        return status

    async def cancel(self, request_id: str) -> bool:
        """Whether this ended the request."""
        self._dispatcher.ended(request_id)
        won = await self.broker.cancel(request_id)
        if won:
            self.metrics.cancelled.labels("gateway").inc()
        return won

    def cancel_soon(self, request_id: str) -> None:
        """`cancel` by a task of its own: whoever asks is being torn down."""
        self._spawn(self.cancel(request_id))

    def events(self, request_id: str, after: int = 0) -> AsyncIterator[Emitted]:
        return self.broker.events(request_id, after=after)

    def expire_later(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for, should no worker do so in time."""
        self._dispatcher.ended(ticket.id)

        def late() -> None:
            self._spawn(self.broker.expire(ticket.id))

        asyncio.get_running_loop().call_later(ticket.budget_s + _ANSWER_GRACE_S, late)

    def _forgotten(self, request_id: str) -> bool:
        made = _ID.match(request_id)
        return made is not None and int(made.group(1), 16) < self._now_s() - self.settings.result_ttl_s

    # --- inside ----------------------------------------------------------------------------------

    async def _publish(self, intent: Intent, principal: Principal, request_id: str, timeout_ms: int) -> Decision:
        seed = intent.seed if intent.seed is not None else secrets.randbelow(_MAX_SEED)
        for _ in range(_ATTEMPTS):
            decision = self._dispatcher.decide(intent, timeout_ms / 1000, principal.owner)
            choice = decision.choice
            request = GenerateRequest(
                id=request_id,
                model=choice.deployment,
                version=choice.version,
                tier=choice.tier,
                steps=choice.steps,
                guidance=intent.wanted.guidance,
                prompt=intent.prompt,
                negative_prompt=intent.negative_prompt,
                n=intent.n,
                width=choice.width,
                height=choice.height,
                seed=seed,
                output_format=choice.form.output_format,
                fps=choice.form.fps,
                compression=intent.compression,
                priority=intent.priority,
                budget_ms=timeout_ms,
                partial_images=intent.partial_images,
                events=intent.events,
                reply_to=self.broker.identity,
                owner=principal.owner,
                created_at=self._now_s(),
                traceparent=intent.traceparent,
                cost_s=decision.cost_s,
                due_after_s=decision.due_after_s,
                downgraded_from=choice.downgraded_from,
                refinement=choice.refinement,
                teacher=choice.teacher,
                edits_from=choice.edits_from,
            )
            source = None
            if intent.upload is not None:
                source = await self.uploads.fitted(intent.upload, choice.width, choice.height)
            try:
                await self.broker.publish(request, source)
            except StaleVersion:
                await self.catalog.refresh()
                continue
            self.catalog.published(choice.deployment, request.request_class, decision.cost_s, request.owner)
            self._dispatcher.joined(decision, request_id, timeout_ms / 1000)
            if choice.downgraded_from is not None:
                self.metrics.tier_downgraded.labels(choice.downgraded_from.tier, choice.tier).inc()
            return decision
        raise Unavailable(f"{intent.wanted.model} is being replaced just now: try again in a second", retry_after_s=1.0)

    async def _give_up(self, ticket: Ticket) -> GenerateResult:
        """Ends a request that nobody ended in time, and says how it ended."""
        await self.broker.expire(ticket.id)
        result = await self.broker.result(ticket.id)
        if result is None:
            raise DeadlineExceeded(
                f"{ticket.id} was not answered within {ticket.budget_s:g} s: allow more with timeout_ms, or try later"
            )
        return result

    def count(self, ticket: Ticket, result: GenerateResult) -> None:
        """Counts the end of a request; `answer` does so itself."""
        seconds = self._clock_s() - ticket.started_s
        self.metrics.requests.labels(ticket.model, result.tier, result.status).inc()
        if result.status == "expired":
            self.metrics.deadline_missed.labels(ticket.model).inc()
        if ticket.decision is not None:
            self.catalog.ended(ticket.model, ticket.decision.request_class, ticket.decision.cost_s, ticket.owner)
            self._dispatcher.ended(ticket.id)
        if result.status == "succeeded" and ticket.decision is not None:
            if self.catalog.manifest(result.version) is not None:  # else its series are gone, and would stay for good
                latency = self.metrics.request_seconds.labels(ticket.model, result.tier, shown(result.version))
                latency.observe(seconds, tracing.exemplar.get())
            self._dispatcher.waited(ticket.decision, result.timing.queue_ms / 1000)
            if ticket.decision.work is not None:
                self.latencies.add(ticket.decision.work, ticket.decision.wait_s, seconds * 1000)

    def _looked(self, before: View, now: View) -> None:
        """Sets the gauges that belong to what is deployed, and removes those of what no longer is."""
        self._dispatcher.look()
        if self._clock_s() - self._store_seen_s >= _STORE_EVERY_S:
            self._store_seen_s = self._clock_s()
            self._spawn(self._show_store())
        for name, queue in now.queues.items():
            for request_class in CLASSES:
                self.metrics.waiting.labels(name, request_class).set(queue.waiting.get(request_class, 0))
        for name, deployment in now.deployments.items():
            earlier = before.deployments.get(name)
            if earlier is deployment:
                continue
            for version in (set(earlier.manifests) if earlier else set()) - set(deployment.manifests):
                self.metrics.forget_version(name, shown(version))
                self.latencies.forget(name, version)
            for version in (earlier.current.versions if earlier else frozenset()) - deployment.current.versions:
                self.metrics.forget_quality(name, shown(version))
            self.metrics.deadline_missed.labels(name)
            self._spawn(self._show_quality(deployment))

    async def _show_store(self) -> None:
        if (store := await self.broker.store()) is not None:
            self.metrics.redis_memory_bytes.set(store.memory_bytes)
            self.metrics.redis_memory_limit_bytes.set(store.limit_bytes)
            self.metrics.redis_durable.set(store.durable)

    async def _show_quality(self, deployment: Deployment) -> None:
        """Of what it offers now: what it may go back to would hide that it got worse."""
        for version in deployment.current.versions:
            report = await asyncio.to_thread(self.registry.report, version)
            if self.catalog.view.deployments.get(deployment.name) is not deployment:
                return
            for metric, value in quality(report or {}).items():
                self.metrics.student_quality.labels(deployment.name, shown(version), metric).set(value)

    def _wanted(self, deployment: str, version: str) -> None:
        """Has a version loaded for somebody who will come again; said once a look."""
        said = self.catalog.view.wanted
        if (deployment, version) not in said:
            said.add((deployment, version))
            self._spawn(self.broker.announce(leases.wanted(deployment, version)))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.warning("work beside requests failed", extra={"error": str(error)})
