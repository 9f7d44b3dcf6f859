"""What a gateway decides of a request before it is queued: what serves it, and whether it may join.

The rules are pure and elsewhere (`router`, `admission`, `degrader`); here they are asked with what the catalog and the
latest answers say of the present load. `auto` goes down its ladder before anything is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from engines.errors import InvalidRequest, Overloaded, Unavailable
from engines.refine import teacher_of
from engines.registry.base import TierTarget
from server import admission, leases
from server.batcher import due
from server.catalog import Catalog
from server.degrader import Degrader, Thresholds
from server.intent import Decision, Intent
from server.latencies import Latencies, Work
from server.menu import Choice
from server.messages import RequestClass, class_of
from server.metrics import Metrics
from server.router import Expected
from server.settings import GatewaySettings
from server.urgency import Urgency
from server.waits import Waits


class Dispatcher:
    """`decide` for each request, `look` whenever the catalog has looked."""

    def __init__(
        self,
        settings: GatewaySettings,
        catalog: Catalog,
        latencies: Latencies,
        metrics: Metrics,
        clock_s: Callable[[], float],
        wanted: Callable[[str, str], None],
    ) -> None:
        """`wanted` hears the deployment and version of who is sent away until it is in memory."""
        self._wanted = wanted
        self._catalog, self._latencies, self._metrics, self._clock_s = catalog, latencies, metrics, clock_s
        self._ageing_s = settings.ageing_s
        self._limits = admission.Limits(settings.max_wait_s, settings.worker_grace_s, look_s=settings.poll_s)
        self._thresholds = Thresholds(settings.degrade_wait_s, settings.degrade_hold_s)
        self._degraders: dict[tuple[str, RequestClass], Degrader] = {}
        self._waits: dict[tuple[str, RequestClass], Waits] = {}
        self._urgency: dict[tuple[str, RequestClass], Urgency] = {}

    def decide(self, intent: Intent, budget_s: float, owner: str) -> Decision:
        """`owner` is the name of the API key that asks: its own requests are what it waits behind.

        Raises:
            InvalidRequest and below: it cannot be served as asked.
            Overloaded, Unavailable: not now.
        """
        if not intent.wanted.model:
            intent = replace(intent, wanted=replace(intent.wanted, model=self._catalog.default_model()))
        try:
            ladder = self._catalog.choices(intent.wanted, partial(self._expect, intent, budget_s, owner))
            if intent.partial_images and ladder[0].form.fps is not None:
                raise InvalidRequest(
                    f"partial_images={intent.partial_images}: {ladder[0].deployment} makes videos, which are shown "
                    "when they are whole: leave it out",
                    param="partial_images",
                )
            return self._admit(intent, self._rungs(intent, ladder), budget_s, owner)
        except (Overloaded, Unavailable) as error:
            self._metrics.shed.labels(error.code).inc()
            raise

    def look(self) -> None:
        """Shows every ladder the present load, so that it is climbed again when nobody asks."""
        for deployment, request_class in self._degraders:
            self._look(deployment, request_class)
        for queue, waits in self._waits.items():
            if not self._catalog.wait_s(*queue):
                waits.lump_s = 0.0

    def joined(self, decision: Decision, request_id: str, budget_s: float) -> None:
        """A request that was decided so is queued."""
        urgency = self._urgency.setdefault((decision.choice.deployment, decision.request_class), Urgency())
        urgency.add(request_id, decision.due_after_s, decision.cost_s, self._clock_s() + budget_s)

    def ended(self, request_id: str) -> None:
        """It is answered, given up, or nobody here will hear of its end: what is long over must not count as later."""
        for urgency in self._urgency.values():
            urgency.remove(request_id)

    def waited(self, decision: Decision, seconds: float) -> None:
        """A request that was decided so waited this long for its first engine call."""
        self._waits[decision.choice.deployment, decision.request_class].waited(decision.wait_s, seconds)

    def _rungs(self, intent: Intent, ladder: Sequence[Choice]) -> Sequence[Choice]:
        """What may still serve at this load, best first."""
        if len(ladder) == 1:
            return ladder
        key = ladder[0].deployment, class_of(intent.priority)
        degrader = self._degraders.setdefault(key, Degrader(self._thresholds))
        degrader.depth = max(degrader.depth, len(ladder) - 1)
        return ladder[min(self._look(*key), len(ladder) - 1) :]

    def _look(self, deployment: str, request_class: RequestClass) -> int:
        rung = self._degraders[deployment, request_class].look(
            self._catalog.wait_s(deployment, request_class), self._clock_s()
        )
        self._metrics.degraded.labels(deployment, request_class).set(rung)
        return rung

    def _admit(self, intent: Intent, rungs: Sequence[Choice], budget_s: float, owner: str) -> Decision:
        """The first of these choices that may join: a cheaper one leaves more of its time for waiting.

        Raises:
            Overloaded, Unavailable: of the last.
        """
        key, now_s = (rungs[0].deployment, class_of(intent.priority)), self._clock_s()
        waits = self._waits.setdefault(key, Waits())
        for choice in rungs:
            decision, load = self._weighed(intent, choice, waits, budget_s, owner)
            try:
                admission.admit(load, self._limits, budget_s=budget_s)
            except Overloaded as error:
                if load.ready_in_s:
                    self._wanted(choice.deployment, choice.version)
                if choice is rungs[-1]:
                    waits.book(now_s + (error.retry_after_s or 0.0), decision.cost_s / max(1, load.num_workers))
                    raise
            else:
                break
        waits.lump_s = max(waits.lump_s, self._catalog.lump_s(decision.choice.version, decision.choice.steps))
        return decision

    def _weighed(
        self, intent: Intent, choice: Choice, waits: Waits, budget_s: float, owner: str
    ) -> tuple[Decision, admission.Load]:
        """What a choice would cost, and what stands before it."""
        request_class = class_of(intent.priority)
        catalog, target = self._catalog, TierTarget(student=choice.version, steps=choice.steps)
        wanted, first = intent.wanted, choice.edits_from or 0
        rows = catalog.evaluations(
            choice.deployment, target, wanted.guidance, choice.teacher, wanted.refinement, first=first
        )
        costs = catalog.costs(choice.version)
        cost_s = intent.n * leases.queued_s(costs, rows.expected)
        due_after_s = self._due_after_s(intent, cost_s, budget_s)
        load = admission.Load(
            num_workers=catalog.num_workers(choice.deployment),
            wait_s=self._wait_s(choice.deployment, request_class, owner, cost_s, due_after_s),
            service_s=leases.alone_s(costs, rows.most) or 0.0,
            worker_seen_s_ago=catalog.worker_seen_s_ago(choice.deployment),
            loading=catalog.loading(choice.deployment),
            lump_s=waits.lump_s,
            booked_s=waits.booked_s(self._clock_s()),
            stretch=waits.stretch,
            ready_in_s=catalog.ready_in_s(choice.deployment, choice.version),
        )
        size = choice.width, choice.height
        work = Work(choice.deployment, choice.version, rows.expected, size) if intent.n == 1 else None
        wait_s = max(load.wait_s, load.ready_in_s)
        return Decision(choice, request_class, cost_s, due_after_s, wait_s, work), load

    def _due_after_s(self, intent: Intent, cost_s: float, budget_s: float) -> float:
        priority = intent.priority
        return due(arrived_s=0.0, deadline_s=budget_s, cost_s=cost_s, priority=priority, ageing_s=self._ageing_s)

    def _wait_s(
        self, deployment: str, request_class: RequestClass, owner: str, cost_s: float, due_after_s: float
    ) -> float:
        """Behind what is at least as urgent: of what other gateways queued as large a part as of what this one did."""
        urgency = self._urgency.get((deployment, request_class))
        later_share = urgency.later_share(due_after_s, self._clock_s()) if urgency else 0.0
        return self._catalog.wait_s(deployment, request_class, owner, cost_s, later_share)

    def _expect(
        self, intent: Intent, budget_s: float, owner: str, deployment: str, target: TierTarget
    ) -> Expected | None:
        """By what such requests took of late at a load like this; by costs and predicted wait where too few did."""
        catalog, wanted = self._catalog, intent.wanted
        manifests = catalog.deployment(deployment).manifests
        student = manifests[target.student]
        teacher = teacher_of(student, manifests) if wanted.refinement else None
        first = 0 if wanted.strength is None else student.first_step(target.steps, wanted.strength)
        rows = catalog.evaluations(deployment, target, wanted.guidance, teacher, wanted.refinement, first=first)
        costs = catalog.costs(target.student)
        alone_s = leases.alone_s(costs, rows.most)
        if alone_s is None:
            return None
        row_s = leases.queued_s(costs, rows.expected)
        more_s = (intent.n - 1) * row_s
        cost_s = intent.n * row_s
        due_after_s = self._due_after_s(intent, cost_s, budget_s)
        wait_s = self._wait_s(deployment, class_of(intent.priority), owner, cost_s, due_after_s)
        wait_s = max(wait_s, catalog.ready_in_s(deployment, target.student))
        size = wanted.size or manifests[target.student].resolutions[0]
        p95_ms = self._latencies.p95_ms(Work(deployment, target.student, rows.expected, size), wait_s)
        now_ms = 1000 * (wait_s + alone_s) if p95_ms is None else p95_ms
        return Expected(alone_ms=1000 * (alone_s + more_s), now_ms=now_ms + 1000 * more_s)
