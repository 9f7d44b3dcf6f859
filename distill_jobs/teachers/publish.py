"""Publishes an embedded teacher as a student like any other, and deploys it as tier `high`.

Nothing here is private to it: any diffusers directory of a known family goes the same way.
"""

from datetime import UTC, datetime
from pathlib import Path

from distill_jobs.tasks import shapes
from distill_jobs.tasks.base import DEFAULT, Task
from engines.artefact import import_diffusers
from engines.manifest import ProcessSpec, Schedule
from engines.registry.base import Registry, Revision, TierTarget

TIER = "high"


def uniform(steps: int) -> Schedule:
    """Equal steps of the flow's time, from noise at 1 to the picture at 0."""
    return Schedule(times=tuple(1 - index / steps for index in range(steps + 1)))


def publish(registry: Registry, deployment: str, directory: Path | None = None, *, task: Task = shapes.TASK) -> str:
    """Imports the task's teacher (or `directory`, another of its kind), deploys it as the first revision of
    `deployment` and returns its version."""
    contract = task.teacher
    version = import_diffusers(
        directory or task.pipeline,
        registry,
        name=contract.name,
        schedules=[uniform(steps) for steps in (*contract.compared, contract.steps)],
        guidance=contract.guidance,
        solver=contract.solver,
        process=ProcessSpec(kind="rf"),  # taught at all times of the flow, not at the ticks of the scheduler beside it
        golden_prompts=contract.prompts,
        task=None if task.name == DEFAULT else task.name,
    )
    registry.commit(
        Revision(
            deployment=deployment,
            number=1,
            tiers={TIER: TierTarget(student=version, steps=contract.steps)},
            default_tier=TIER,
            allowed={version: [contract.steps]},
            created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            note="the embedded teacher",
        )
    )
    return version
