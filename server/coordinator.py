"""The coordinator of a deployment's swaps: the one worker that turns a decision into files.

Every worker calls it; only the holder of the lease `swap:<deployment>` acts. It keeps nothing between two calls, so
a successor continues where it stopped.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from engines.errors import AlreadyEnded, RevisionConflict
from engines.registry.base import Candidate, Outcome, Registry, Revision
from server import swaps
from server.brokers.base import Broker
from server.metrics import Metrics

log = logging.getLogger(__name__)
LEASE_S = 5.0
TOPIC = "deployments"
ENDS = ("live", "dropped", "superseded")


class Coordinator:
    def __init__(
        self, deployment: str, broker: Broker, registry: Registry, metrics: Metrics, *, timeout_s: float
    ) -> None:
        self._deployment, self._timeout_s = deployment, timeout_s
        self._broker, self._registry, self._metrics = broker, registry, metrics
        for state in ENDS:  # from zero on: the first one is an increase too
            metrics.swaps.labels(deployment, state)

    async def coordinate(self, candidate: Candidate, seen_ms: int) -> bool:
        """Decides what becomes of a candidate, if that is ours to decide; whether it ended."""
        if not await self._mine():
            return False
        phases = await self._broker.phases(candidate.swap_id)
        current = await asyncio.to_thread(self._registry.current, self._deployment)
        decision = swaps.decide(
            swaps.Situation(
                candidate=candidate,
                current=current,
                workers=[
                    w.id for w in await self._broker.workers() if self._deployment in w.info.get("deployments", ())
                ],
                phases=phases,
                waited_s=(self._broker.now_ms() - swaps.begun_ms(phases, seen_ms)) / 1000,
                timeout_s=self._timeout_s,
            )
        )
        match decision.kind:
            case "wait":
                return False
            case "commit":
                if not await self._commit(candidate, current):
                    return False
                await self._live(candidate, swaps.phase_seconds(phases.values()))
            case "settle":
                await self._live(candidate, swaps.phase_seconds(phases.values()))
            case "drop":
                await self._settle(candidate, state="dropped", reason=decision.reason)
            case "supersede":
                await self._settle(candidate, state="superseded", reason=decision.reason)
        return True

    async def open(self, versions: Iterable[str]) -> None:
        """Lets these versions be asked for, where Redis is new or lost what it knew."""
        if await self._mine():
            await self._broker.set_servable(self._deployment, versions)

    async def retire(self, version: str) -> bool:
        """Ends admission of a version that no request pins; whether it has ended."""
        return await self._mine() and await self._broker.retire(self._deployment, version)

    async def _mine(self) -> bool:
        name = f"swap:{self._deployment}"
        return await self._broker.acquire(name, self._broker.identity, LEASE_S) is not None

    async def _commit(self, candidate: Candidate, current: Revision | None) -> bool:
        """First everybody may ask for the new versions, then they are current: no gateway is refused in between."""
        servable = await self._broker.servable(self._deployment) or frozenset()
        now = current.versions if current else frozenset()
        await self._broker.set_servable(self._deployment, servable | now | candidate.versions)
        try:
            revision = candidate.revision(candidate.base_revision + 1, created_at=_now())
            await asyncio.to_thread(self._registry.commit, revision)
        except RevisionConflict:
            return False  # somebody else was first: the next look says what that means
        return True

    async def _live(self, candidate: Candidate, seconds: dict[str, float]) -> None:
        await self._settle(candidate, state="live", revision=candidate.base_revision + 1, phases=seconds)

    async def _settle(self, candidate: Candidate, **outcome: Any) -> None:
        said = Outcome.model_validate({"swap_id": candidate.swap_id, "at": _now(), **outcome})
        with contextlib.suppress(AlreadyEnded):
            await asyncio.to_thread(self._registry.settle, self._deployment, candidate.swap_id, said)
            self._metrics.swaps.labels(self._deployment, said.state).inc()
            log.info("settled", extra={"swap_id": said.swap_id, "state": said.state, "reason": said.reason})
        await self._broker.announce(TOPIC)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
