"""What a gateway knows: deployments and their students, the live workers and their load, as of the last look.

Requests are routed from memory. A poller looks every half second, or at once when something is
announced; a request that was routed by an old picture is refused by the broker (`StaleVersion`) and
routed again after a fresh look, so being a little late is safe.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engines.errors import FewstepError, InvalidRequest, ModelNotFound, Unavailable
from engines.manifest import StudentManifest, shown
from engines.refine import Refinement
from engines.registry.base import Registry, Revision, TierTarget
from server import leases, router
from server.admission import Loading
from server.brokers.base import Broker, QueueState
from server.fair_queue import passed_s
from server.leases import Evaluations, WorkerLease
from server.menu import Choice, Wanted
from server.messages import CLASSES, RequestClass

_logger = logging.getLogger(__name__)
Expect = Callable[[str, TierTarget], router.Expected | None]
"""What a request at a target of a deployment takes."""
_Asked = tuple[str, int, float | None, str | None, Refinement | None]
"""Version, steps, guidance, teacher and what that adds."""
_MAX_CHOICES = 4096  # remembered routings; a few kinds of request make up nearly all


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment with its current and previous revision and the manifests of both."""

    name: str
    current: Revision
    previous: Revision | None
    manifests: Mapping[str, StudentManifest]
    history: tuple[int, ...] = ()


@dataclass(slots=True)
class View:
    """One look at the world, replaced whole. Only what it remembers of choices and of our own requests grows."""

    deployments: dict[str, Deployment] = field(default_factory=dict)
    workers: dict[str, WorkerLease] = field(default_factory=dict)
    queues: dict[str, QueueState] = field(default_factory=dict)
    choices: dict[Wanted, tuple[Choice, ...]] = field(default_factory=dict)
    evaluations: dict[tuple[str, int, float | None, str | None, Refinement | None, int], Evaluations] = field(
        default_factory=dict
    )
    wanted: set[tuple[str, str]] = field(default_factory=set)  # announced since this look
    published_s: dict[tuple[str, str], float] = field(default_factory=dict)  # by us since this look, less what ended
    published_by_s: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # the same by owner


class Catalog:
    """Call `start` before use and `stop` after."""

    def __init__(
        self,
        broker: Broker,
        registry: Registry,
        *,
        poll_s: float,
        clock_s: Callable[[], float],
        changed: Callable[[View, View], None],
    ) -> None:
        self.view = View()
        self._broker, self._registry = broker, registry
        self._poll_s, self._clock_s, self._changed = poll_s, clock_s, changed
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._worker_seen: dict[str, float] = {}
        self._started_s = clock_s()

    async def start(self) -> None:
        await self._try_refresh()
        self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._listen())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def refresh(self) -> None:
        """Looks now. Raises what registry and broker raise."""
        known = self.view.deployments
        found = await asyncio.to_thread(self._read, known)
        workers = {worker.id: leases.read(worker.info) for worker in await self._broker.workers()}
        queues = {name: await self._broker.queue_state(name) for name in found}
        for lease in workers.values():
            self._worker_seen.update(dict.fromkeys(lease.deployments, self._clock_s()))
        same = len(found) == len(known) and all(found[name] is known.get(name) for name in found)
        before, self.view = self.view, View(found, workers, queues, self.view.choices if same else {})
        self._changed(before, self.view)

    # --- questions -------------------------------------------------------------------------------

    def deployment(self, name: str) -> Deployment:
        found = self.view.deployments.get(name)
        if found is None:
            if not self.view.deployments:
                raise _nothing_yet()
            has = ", ".join(sorted(self.view.deployments))
            raise ModelNotFound(f"there is no model {name!r} here: there is {has}", param="model")
        return found

    def manifest(self, version: str) -> StudentManifest | None:
        """Of a version that serves or served last."""
        for deployment in self.view.deployments.values():
            if version in deployment.manifests:
                return deployment.manifests[version]
        return None

    def default_model(self) -> str:
        """The only deployment there is.

        Raises:
            InvalidRequest: there are several, so that the request has to choose.
            Unavailable: there is none yet.
        """
        names = sorted(self.view.deployments)
        if not names:
            raise _nothing_yet()
        if len(names) > 1:
            raise InvalidRequest(f"'model' is needed: choose from {', '.join(names)}", param="model")
        return names[0]

    def choices(self, wanted: Wanted, expect: Expect) -> tuple[Choice, ...]:
        """`router.resolve` on the present view, remembered where it does not depend on measurements."""
        view = self.view
        choices = view.choices.get(wanted)
        if choices is None:
            choices = self._resolve(wanted, expect)
            if wanted.max_latency_ms is None and len(view.choices) < _MAX_CHOICES:
                view.choices[wanted] = choices
        return choices

    def evaluations(
        self,
        deployment: str,
        target: TierTarget,
        guidance: float | None,
        teacher: str | None = None,
        refinement: Refinement | None = None,
        first: int = 0,
    ) -> Evaluations:
        """Network rows of one picture, with what `teacher`, a version, adds to it; `first` steps are left out."""
        known, key = self.view.evaluations, (target.student, target.steps, guidance, teacher, refinement, first)
        if key not in known:
            manifests = self.view.deployments[deployment].manifests
            by = manifests[teacher] if teacher else None
            known[key] = leases.evaluations(
                manifests[target.student], target.steps, guidance, by, refinement, first=first
            )
        return known[key]

    def num_workers(self, deployment: str) -> int:
        return sum(deployment in lease.deployments for lease in self.view.workers.values())

    def written(self, deployment: str) -> frozenset[str]:
        """The formats of videos that every worker of a deployment writes: any of them may get a request."""
        found = [lease.video_formats for lease in self.view.workers.values() if deployment in lease.deployments]
        return frozenset[str]().union(*found).intersection(*found)

    def worker_seen_s_ago(self, deployment: str) -> float:
        """Since a live worker of this deployment was seen; since the start where none ever was."""
        return self._clock_s() - self._worker_seen.get(deployment, self._started_s)

    def loading(self, deployment: str) -> Loading | None:
        """How far the worker is that has been loading this deployment for the longest; None where none is."""
        found = [lease.loading[deployment] for lease in self.view.workers.values() if deployment in lease.loading]
        first = min(found, key=lambda one: one.since_ms, default=None)
        return None if first is None else Loading(first.phase, (self._broker.now_ms() - first.since_ms) / 1000)

    def costs(self, version: str) -> list[leases.VersionCost]:
        return [lease.costs[version] for lease in self.view.workers.values() if version in lease.costs]

    def ready_in_s(self, deployment: str, version: str) -> float:
        """When a version could serve a row that comes now, on the slowest worker; 0 where it is in memory."""
        leases_ = self.view.workers.values()
        found = [lease.versions[deployment].get(version) for lease in leases_ if deployment in lease.versions]
        return max((one.ready_in_s for one in found if one), default=0.0)

    def lump_s(self, version: str, steps: int) -> float:
        """How long a full batch of such rows takes to its end, on the slowest worker."""
        return max((leases.lump_s(lease, version, steps) for lease in self.view.workers.values()), default=0.0)

    def wait_s(
        self,
        deployment: str,
        request_class: RequestClass,
        owner: str | None = None,
        cost_s: float = 0.0,
        later_share: float = 0.0,
    ) -> float:
        """When an engine is free for a request of this class: its workers share what is queued.

        For a request of `owner` that costs `cost_s`: keys take turns, so each other key gets at most as much before it
        as its own has, and a flood of one key is a wait for that key alone. `later_share` of what remains of its class
        is less urgent.
        """
        waiting_s = self.waiting_s(deployment, request_class)
        if owner is not None:
            waiting_s -= self._passed_s(deployment, request_class, owner, cost_s)
            above = CLASSES[: CLASSES.index(request_class)]
            above_s = self.waiting_s(deployment, above[-1]) if above else 0.0
            waiting_s -= later_share * max(0.0, waiting_s - above_s)
        return waiting_s / max(1, self.num_workers(deployment))

    def waiting_s(self, deployment: str, request_class: RequestClass) -> float:
        """Engine time of what is queued in this class and those above it."""
        view = self.view
        queue = view.queues.get(deployment)
        ahead = CLASSES[: CLASSES.index(request_class) + 1]
        queued = sum(queue.cost_s.get(name, 0.0) for name in ahead) if queue else 0.0
        return max(0.0, queued + sum(view.published_s.get((deployment, name), 0.0) for name in ahead))

    def _passed_s(self, deployment: str, request_class: RequestClass, owner: str, cost_s: float) -> float:
        """What waits in this class and yet comes after a new request of `owner`."""
        queue, key = self.view.queues.get(deployment), (deployment, request_class)
        owed = dict(queue.owed_s.get(request_class, {})) if queue else {}
        for name, more_s in self.view.published_by_s.get(key, {}).items():
            owed[name] = max(0.0, owed.get(name, 0.0) + more_s)
        return passed_s(owed, owner, cost_s)

    def published(self, deployment: str, request_class: RequestClass, cost_s: float, owner: str) -> None:
        """Counts a request of ours until the next look counts it."""
        published, key = self.view.published_s, (deployment, request_class)
        published[key] = published.get(key, 0.0) + cost_s
        by_owner = self.view.published_by_s.setdefault(key, {})
        by_owner[owner] = by_owner.get(owner, 0.0) + cost_s

    def ended(self, deployment: str, request_class: RequestClass, cost_s: float, owner: str) -> None:
        """Counts a request of ours as done: what may wait for milliseconds cannot go by a look of half a second ago."""
        self.published(deployment, request_class, -cost_s, owner)

    # --- looking ---------------------------------------------------------------------------------

    def _resolve(self, wanted: Wanted, expect: Expect) -> tuple[Choice, ...]:
        name, at, digest = wanted.model.partition("@")
        deployment = self._serving(name, digest) if at else self.deployment(name)
        revisions = [revision for revision in (deployment.current, deployment.previous) if revision is not None]
        return router.resolve(
            wanted,
            revisions,
            deployment.manifests,
            expect=lambda target: expect(deployment.name, target),
        )

    def _serving(self, name: str, digest: str) -> Deployment:
        """The deployment that serves `name@digest`; one whose current revision does is preferred."""
        deployments = self.view.deployments.values()
        for now in (True, False):
            for deployment in deployments:
                revision = deployment.current if now else deployment.previous
                if revision is not None and router.find_version(revision, name, digest) is not None:
                    return deployment
        served = sorted({shown(version) for deployment in deployments for version in deployment.current.allowed})
        raise ModelNotFound(
            f"{shown(f'{name}@{digest}')} serves nowhere here (all 64 digits or at least 12 are needed): "
            f"there is {', '.join(served) or 'nothing yet'}; promote it first",
            param="model",
        )

    def _read(self, known: Mapping[str, Deployment]) -> dict[str, Deployment]:
        """In a thread: files may be slow. A deployment whose revision has not changed is not read again."""
        found: dict[str, Deployment] = {}
        for name in self._registry.deployments():
            current = self._registry.current(name)
            if current is None:
                continue
            before = known.get(name)
            same = before is not None and before.current.number == current.number
            found[name] = before if same and before is not None else self._read_one(name, current)
        return found

    def _read_one(self, name: str, current: Revision) -> Deployment:
        history = tuple(number for number in self._registry.history(name) if number <= current.number)
        previous = self._registry.revision(name, history[-2]) if len(history) > 1 else None
        versions = current.versions | (previous.versions if previous else frozenset())
        manifests = {version: self._registry.student(version) for version in versions}
        return Deployment(name, current, previous, manifests, history)

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except (FewstepError, OSError) as error:
            _logger.warning("cannot look at registry or broker", extra={"error": str(error)})

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._poll_s)
            self._wake.clear()
            await self._try_refresh()

    async def _listen(self) -> None:
        while True:
            try:
                async for _ in self._broker.announcements():
                    self._wake.set()
            except (FewstepError, OSError) as error:
                _logger.warning("cannot hear announcements", extra={"error": str(error)})
            await asyncio.sleep(self._poll_s)


def _nothing_yet() -> Unavailable:
    return Unavailable("nothing is deployed here yet: promote a student first, or wait a moment", retry_after_s=1.0)
