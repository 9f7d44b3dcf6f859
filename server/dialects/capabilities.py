"""What can be asked for here: per model its sizes, tiers, step counts, guidance and measured latencies."""

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engines import refine
from engines.errors import InvalidRequest
from engines.frames import MAX_FPS
from engines.manifest import StudentManifest, shown
from engines.registry.base import TierTarget
from server import leases, media
from server.catalog import Deployment
from server.dialects import base
from server.dialects._native_request import MAX_PROMPT_CHARS
from server.gateway import Gateway
from server.latencies import Work


class GuidanceRange(msgspec.Struct, frozen=True, kw_only=True):
    mode: str
    default: float
    minimum: float
    maximum: float


class TierCapability(msgspec.Struct, frozen=True, kw_only=True):
    """`p50_ms` and `p95_ms` are of this gateway's last answers, `alone_ms` is predicted from the engines' costs.

    `refine` lists what the teacher can add in a request of this tier.
    """

    model_version: str
    steps: int
    allowed_steps: list[int]
    guidance: GuidanceRange
    refine: list[str]
    alone_ms: float | None
    p50_ms: float | None
    p95_ms: float | None


class LimitRecord(msgspec.Struct, frozen=True, kw_only=True):
    n: int
    prompt_chars: int
    timeout_ms: int
    body_bytes: int
    upload_bytes: int
    image_pixels: int


class VideoRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Of a model that makes videos: their frames, and how many are shown a second where a request does not say."""

    num_frames: int
    fps: int
    max_fps: int = MAX_FPS

    @classmethod
    def of(cls, manifest: StudentManifest) -> "VideoRecord | None":
        frames = manifest.frames
        return None if frames is None else cls(num_frames=frames.number, fps=frames.fps)


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    sizes: list[str]
    output_formats: list[str]
    video: VideoRecord | None
    default_tier: str
    tiers: dict[str, TierCapability]
    workers: int
    limits: LimitRecord


class CapabilityList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Capability]


class Capabilities:
    busy = False
    schemas = (CapabilityList,)

    def router(self, gateway: Gateway) -> APIRouter:
        routes = base.new_router("generations")

        async def read(request: Request) -> Response:
            gateway.authorise(request.headers.get("authorization"), "generate")
            deployments = sorted(gateway.catalog.view.deployments.items())
            return base.respond(CapabilityList(data=[_capability(gateway, one) for _, one in deployments]))

        listed = {200: {"description": "Per model", "content": base.json_of(CapabilityList)}}
        routes.get("/v1/capabilities", summary="What can be asked for", responses=base.responses(listed))(read)
        return routes


DIALECT = Capabilities()


def _capability(gateway: Gateway, deployment: Deployment) -> Capability:
    revision, settings = deployment.current, gateway.settings
    manifest = deployment.manifests[revision.tiers[revision.default_tier].student]
    return Capability(
        model=deployment.name,
        sizes=[f"{width}x{height}" for width, height in manifest.resolutions],
        output_formats=_formats(gateway, deployment.name, manifest),
        video=VideoRecord.of(manifest),
        default_tier=revision.default_tier,
        tiers={tier: _tier(gateway, deployment, target) for tier, target in revision.tiers.items()},
        workers=gateway.catalog.num_workers(deployment.name),
        limits=LimitRecord(
            n=10,
            prompt_chars=MAX_PROMPT_CHARS,
            timeout_ms=settings.max_timeout_ms,
            body_bytes=settings.max_body_bytes,
            upload_bytes=settings.max_upload_bytes,
            image_pixels=settings.max_image_pixels,
        ),
    )


def _formats(gateway: Gateway, deployment: str, manifest: StudentManifest) -> list[str]:
    """What may be asked for: any format of pictures, and of videos what the workers there write."""
    usual, *others = media.formats(manifest)
    written = gateway.catalog.written(deployment) if manifest.frames else others
    return [usual, *(one for one in others if one in written)]


def _tier(gateway: Gateway, deployment: Deployment, target: TierTarget) -> TierCapability:
    manifest, catalog = deployment.manifests[target.student], gateway.catalog
    guidance, rows = manifest.guidance, catalog.evaluations(deployment.name, target, None).most
    alone_s = leases.alone_s(catalog.costs(target.student), rows)
    seen = gateway.latencies.quantiles(Work(deployment.name, target.student, rows, manifest.resolutions[0]))
    return TierCapability(
        model_version=shown(target.student),
        steps=target.steps,
        allowed_steps=sorted(deployment.current.allowed.get(target.student, ())),
        guidance=GuidanceRange(
            mode=guidance.mode, default=guidance.default, minimum=guidance.minimum, maximum=guidance.maximum
        ),
        refine=_refine(deployment, manifest, target.steps),
        alone_ms=None if alone_s is None else 1000 * alone_s,
        p50_ms=seen.p50_ms if seen else None,
        p95_ms=seen.p95_ms if seen else None,
    )


def _refine(deployment: Deployment, manifest: StudentManifest, steps: int) -> list[str]:
    version = refine.teacher_of(manifest, deployment.current.versions)
    if version is None:
        return []
    teacher = deployment.manifests[version]
    return [one.how for one in refine.ALL if fits(manifest, teacher, steps, one)]


def fits(student: StudentManifest, teacher: StudentManifest, steps: int, asked: refine.Refinement) -> bool:
    try:
        refine.plan(student, teacher, steps, None, asked)
    except InvalidRequest:
        return False
    return True
