"""A worker with a tiny real model, inside the test's own event loop, on any broker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from engines.artefact import make_student
from engines.backends.base import Choice, Profile
from engines.loader import Loader
from engines.manifest import Guidance
from engines.registry.base import Candidate, Outcome, Registry, TierTarget
from engines.registry.memory import MemoryRegistry
from engines.student import LoadedStudent
from server import metrics
from server.brokers.base import Broker
from server.messages import GenerateRequest, GenerateResult
from server.metrics import Metrics
from server.settings import WorkerSettings
from server.students import Students
from server.tracing import Tracing
from server.worker import Worker
from tests import tiny_sd
from tests.eventually import aeventually

MODEL = "tinies"


@dataclass
class Running:
    """One worker that serves, and what a gateway would use."""

    worker: Worker
    students: Students
    loader: Loader
    gateway: Broker
    registry: Registry
    metrics: Metrics
    stop: asyncio.Event
    task: "asyncio.Task[None]"

    def request(self, request_id: str, **given: Any) -> GenerateRequest:
        current = self.registry.current(MODEL)
        assert current is not None
        target = current.tiers[current.default_tier]
        fields: dict[str, Any] = {
            "model": MODEL,
            "version": target.student,
            "tier": current.default_tier,
            "steps": target.steps,
            "prompt": "a red circle",
            "width": 16,
            "height": 16,
            "seed": 7,
            "budget_ms": 30_000,
            "reply_to": self.gateway.identity,
        }
        return GenerateRequest(id=request_id, **(fields | given))

    async def answer(self, request: GenerateRequest, within_s: float = 20.0) -> GenerateResult:
        await self.gateway.publish(request)
        result = await self.gateway.wait(request.id, within_s)
        assert result is not None, f"{request.id} was not answered"
        return result

    def student(self, version: str | None = None) -> LoadedStudent:
        current = self.registry.current(MODEL)
        assert current is not None
        found = self.students.loaded(MODEL, version or current.tiers[current.default_tier].student)
        assert found is not None
        return found

    def propose(self, version: str, steps: int = 1) -> Candidate:
        return propose(self.registry, version, steps)

    async def outcome(self, candidate: Candidate, within_s: float = 20.0) -> Outcome:
        async def ended() -> Outcome | None:
            return self.registry.outcome(MODEL, candidate.swap_id)

        found = await aeventually(ended, within_s)
        assert found is not None
        return found


def propose(registry: Registry, version: str, steps: int = 1, traceparent: str | None = None) -> Candidate:
    """A candidate whose only tier is `version` at `steps`."""
    current = registry.current(MODEL)
    return registry.propose(
        MODEL,
        {"low": TierTarget(student=version, steps=steps)},
        default_tier="low",
        allowed={version: sorted(registry.student(version).schedules)},
        base_revision=current.number if current else 0,
        traceparent=traceparent,
    )


def settings(**given: Any) -> WorkerSettings:
    fields: dict[str, Any] = {
        "redis_url": "memory:",
        "registry_url": "memory:",
        "poll_s": 0.05,
        "batch_sizes": (1, 2, 4),
        "keep_previous_s": 0.0,
        "drain_s": 10.0,
    }
    return WorkerSettings(**(fields | given))


@contextlib.asynccontextmanager
async def running(
    broker: Broker,
    gateway: Broker,
    *,
    registry: Registry | None = None,
    wait: bool = True,
    backend: str = "eager",
    streams: int = 1,
    tracing: Tracing | None = None,
    **given: Any,
) -> AsyncIterator[Running]:
    """A worker whose registry deploys the tiny teacher; stopped and drained at the end."""
    teacher = tiny_sd.teacher()
    if registry is None:
        registry = copied(teacher)
    chosen = settings(**given)
    profile = Profile(batches=chosen.batch_sizes, threads=1, streams=streams)
    loader = Loader(registry, Choice(backend, "fp32"), profile, teacher.graphs)
    measured = metrics.make()
    students = Students(chosen, broker, registry, loader, measured, tracing)
    worker, stop = Worker(chosen, broker, students, measured, tracing=tracing), asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    made = Running(worker, students, loader, gateway, registry, measured, stop, task)
    try:
        if wait:
            await serving(made)
        yield made
    finally:
        stop.set()
        if not task.done():
            await asyncio.wait_for(task, 20)


async def serving(made: Running) -> None:
    async def check() -> bool:
        if made.task.done():
            made.task.result()
        return made.students.serving() == [MODEL]

    await aeventually(check, 20)


def student(registry: Registry, scale: float, name: str = "student") -> str:
    """Publishes the teacher with other weights, for 1 and 4 steps."""
    base = tiny_sd.teacher().manifest
    weights = load(registry.read_blob(base.components["denoiser"].weights))
    scaled = {key: value * scale for key, value in weights.items()}
    return make_student(registry, base.version, name, denoiser_weights=scaled, schedules=tiny_sd.SCHEDULES)


def weighted_student(registry: Registry) -> str:
    """Publishes the teacher with a layer for its guidance weight that is not zero, for 1 and 4 steps at 1..4."""
    base = tiny_sd.teacher().manifest
    weights = load(registry.read_blob(base.components["denoiser"].weights))
    width = weights["time_embedding.linear_1.weight"].shape[1]
    weights["guidance.weight"] = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return make_student(
        registry,
        base.version,
        "weighted",
        denoiser_weights=weights,
        schedules=tiny_sd.SCHEDULES,
        guidance=Guidance(mode="embedded", default=2.0, minimum=1.0, maximum=4.0),
        inputs=("w",),
    )


def copied(teacher: tiny_sd.Teacher, to: Registry | None = None) -> Registry:
    """A registry of its own (or `to`) with the teacher in it, deployed."""
    registry = to or MemoryRegistry()
    manifest = teacher.manifest
    for sha in manifest.blobs:
        registry.put_blob(teacher.registry.read_blob(sha))
    registry.publish(manifest)
    candidate = propose(registry, manifest.version, 4)
    registry.commit(candidate.revision(1, created_at="2026-01-01T00:00:00Z"))
    registry.settle(
        MODEL,
        candidate.swap_id,
        Outcome(swap_id=candidate.swap_id, state="live", revision=1, at="2026-01-01T00:00:00Z"),
    )
    return registry
