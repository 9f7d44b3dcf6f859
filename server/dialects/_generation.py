"""A generation as the native dialect shows it, and the headers that every generation's answer has."""

from datetime import UTC, datetime

import msgspec

from engines.manifest import shown
from engines.refine import Refine
from server import http_errors
from server.brokers.base import Status
from server.http_errors import ErrorInfo
from server.intent import Answer, Ticket
from server.messages import GenerateResult, TierSteps, Timing
from server.signing import Signer


class GenerationImage(msgspec.Struct, frozen=True, kw_only=True):
    """One picture: where it is, or itself where nothing is stored."""

    seed: int
    content_url: str | None = None
    b64: bytes | None = None


class GenerationTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time went, milliseconds."""

    queue_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    image_ms: float
    load_ms: float
    total_ms: float


class RefinedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the teacher of the student added; `redone` are the pictures, by place, that it made again."""

    refine: Refine
    teacher: str
    redone: list[int] = []


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "generation"
    status: str
    model: str
    model_version: str | None
    tier: str | None = None
    steps: int | None = None
    backend: str | None = None
    queue_position: int | None = None
    created_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    error: ErrorInfo | None = None
    timing: GenerationTiming | None = None
    images: list[GenerationImage] = []
    ignored_words: list[str] = []
    downgraded_from: TierSteps | None = None
    refined: RefinedRecord | None = None


def in_progress(status: Status) -> Generation:
    return Generation(
        id=status.id,
        status=status.state,
        model=status.deployment,
        model_version=shown(status.version),
        queue_position=status.position,
        created_at=rfc3339(status.enqueued_ms),
        started_at=rfc3339(status.started_ms),
    )


def failed(status: Status) -> Generation:
    result = status.result
    assert result is not None
    assert result.error is not None
    made = in_progress(status)
    error = http_errors.info(result.error.exception())
    return msgspec.structs.replace(
        made, status=result.status, error=error, queue_position=None, completed_at=rfc3339(status.ended_ms)
    )


def finished(signer: Signer, answer: Answer, *, store: bool, model: str, status: Status | None = None) -> Generation:
    """`answer.images` may be empty where they are only pointed at."""
    result = answer.result
    return Generation(
        id=result.id,
        status=result.status,
        model=model,
        model_version=shown(result.version),
        tier=result.tier,
        steps=result.steps,
        backend=result.backend,
        created_at=rfc3339(status.enqueued_ms) if status else None,
        started_at=rfc3339(status.started_ms) if status else None,
        completed_at=rfc3339(status.ended_ms) if status else None,
        timing=_timing(result.timing),
        images=_images(signer, answer, store=store),
        ignored_words=result.ignored_words,
        downgraded_from=result.downgraded_from,
        refined=refined(result),
    )


def refined(result: GenerateResult) -> RefinedRecord | None:
    found = result.refined
    if found is None:
        return None
    return RefinedRecord(refine=found.refine, teacher=shown(found.teacher), redone=found.redone)


def content_path(request_id: str, index: int) -> str:
    return f"/v1/generations/{request_id}/images/{index}"


def headers_of(result: GenerateResult) -> dict[str, str]:
    """What every answered generation says of itself."""
    timing = result.timing
    spent = (
        f"queue;dur={timing.queue_ms:.2f}, load;dur={timing.load_ms:.2f}, encode;dur={timing.encode_ms:.2f}, "
        f"denoise;dur={timing.denoise_ms:.2f}, decode;dur={timing.decode_ms:.2f}, image;dur={timing.image_ms:.2f}, "
        f"total;dur={timing.total_ms:.2f}"
    )
    return {
        "x-model-version": shown(result.version),
        "x-generation-id": result.id,
        "x-seed": str(result.seeds[0]) if result.seeds else "",
        "x-steps": str(result.steps),
        "x-tier": result.tier,
        "x-backend": result.backend,
        "server-timing": spent,
        **_downgraded(result.downgraded_from),
        **_refined(refined(result)),
    }


def headers_of_queued(ticket: Ticket) -> dict[str, str]:
    """What is known of a generation whose answer is still to come."""
    return {"x-generation-id": ticket.id, **_downgraded(ticket.choice.downgraded_from if ticket.choice else None)}


def _downgraded(above: TierSteps | None) -> dict[str, str]:
    """What would have served it with less load or more time, as RFC 8941 writes an item: `medium;steps=4`."""
    return {"x-downgraded-from": f"{above.tier};steps={above.steps}"} if above else {}


def _refined(found: RefinedRecord | None) -> dict[str, str]:
    """What the teacher added, as RFC 8941 writes an item: `first_step;teacher="shapes@3f2a91c0de11"`."""
    if found is None:
        return {}
    redone = f';redone="{" ".join(map(str, found.redone))}"' if found.redone else ""
    return {"x-refined": f'{found.refine};teacher="{found.teacher}"{redone}'}


def rfc3339(ms: int | None) -> str | None:
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _timing(timing: Timing) -> GenerationTiming:
    return GenerationTiming(**{name: round(getattr(timing, name), 3) for name in Timing.__struct_fields__})


def _images(signer: Signer, answer: Answer, *, store: bool) -> list[GenerationImage]:
    result = answer.result
    seeds = result.seeds[: result.num_images]
    if store:
        urls = [signer.url(content_path(result.id, index)) for index in range(len(seeds))]
        return [GenerationImage(seed=seed, content_url=url) for seed, url in zip(seeds, urls, strict=True)]
    return [GenerationImage(seed=seed, b64=data) for seed, data in zip(seeds, answer.images, strict=False)]
