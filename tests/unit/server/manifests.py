"""Small manifests for tests that route requests and never run a network."""

import hashlib

from engines.manifest import Component, Guidance, Schedule, StudentManifest
from engines.registry.base import Registry, Revision, TierTarget

SIZE = 32


def manifest(
    name: str, *steps: int, mark: int = 0, guidance: Guidance | None = None, base: StudentManifest | None = None
) -> StudentManifest:
    """A student that allows these step counts; `mark` makes another digest of it. It shares its base's encoder."""
    component = Component(weights=hashlib.sha256(_blob(mark)).hexdigest(), files={})
    return StudentManifest(
        name=name,
        family="sd",
        kind="full",
        base=base.version if base else None,
        components={
            "encoder": base.components["encoder"] if base else component,
            "denoiser": component,
            "decoder": component,
        },
        schedules={k: Schedule(times=tuple(1 - i / k for i in range(k + 1))) for k in steps},
        guidance=guidance or Guidance(),
        resolutions=((SIZE, SIZE), (64, 48)),
        latent_channels=4,
        downscale=8,
    )


CFG = Guidance(mode="cfg", default=2.0, minimum=1.0, maximum=8.0)


def revision(
    number: int, tiers: dict[str, tuple[StudentManifest, int]], *, default: str = "medium", deployment: str = "shapes"
) -> Revision:
    return Revision(
        deployment=deployment,
        number=number,
        tiers={tier: TierTarget(student=student.version, steps=steps) for tier, (student, steps) in tiers.items()},
        default_tier=default,
        allowed={student.version: sorted(student.schedules) for student, _ in tiers.values()},
        created_at="2026-01-02T03:04:05+00:00",
    )


def publish(registry: Registry, *manifests: StudentManifest) -> None:
    """With blobs for every mark below ten."""
    for mark in range(10):
        registry.put_blob(_blob(mark))
    for one in manifests:
        registry.publish(one)


def _blob(mark: int) -> bytes:
    return b"weights %d" % mark
