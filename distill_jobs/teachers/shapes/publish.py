"""Publishes the embedded teacher as a student like any other, and deploys it as tier `high`.

Nothing here is private to it: any diffusers directory of a known family goes the same way.
"""

from datetime import UTC, datetime
from pathlib import Path

from engines.artefact import import_diffusers
from engines.manifest import Guidance, Schedule
from engines.registry.base import Registry, Revision, TierTarget

PIPELINE = Path(__file__).parent / "pipeline"
NAME = "shapes-teacher"
STEPS = 32
"""Where more steps no longer change its pictures much; measured in the model card."""
COMPARED = (1, 2, 4, 8, 16)
"""Counts at which it is only ever compared, never served."""
GUIDANCE = Guidance(mode="cfg", default=2.0, minimum=1.0, maximum=8.0)
SOLVER = "dpmpp_2m"
TIER = "high"
PROMPTS = (
    "a small red circle above a large blue square on a white background",
    "a large green ring",
    "a yellow triangle left of a purple cross on a black background",
    "a pink square on a grey background",
)


def uniform(steps: int) -> Schedule:
    """Equal steps of the flow's time, from noise at 1 to the picture at 0."""
    return Schedule(times=tuple(1 - index / steps for index in range(steps + 1)))


def publish(registry: Registry, deployment: str, directory: Path = PIPELINE) -> str:
    """Imports the directory, deploys it as the first revision of `deployment` and returns its version."""
    version = import_diffusers(
        directory,
        registry,
        name=NAME,
        schedules=[uniform(steps) for steps in (*COMPARED, STEPS)],
        guidance=GUIDANCE,
        solver=SOLVER,
        golden_prompts=PROMPTS,
    )
    registry.commit(
        Revision(
            deployment=deployment,
            number=1,
            tiers={TIER: TierTarget(student=version, steps=STEPS)},
            default_tier=TIER,
            allowed={version: [STEPS]},
            created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            note="the embedded teacher",
        )
    )
    return version
