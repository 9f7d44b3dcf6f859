"""Reading a request of the native dialect: its body, what its headers prefer, and the intent these make."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engines.errors import ContradictoryFields, InvalidRequest
from engines.frames import MAX_FPS
from engines.refine import Refine, asked
from server.dialects._uploads import Changed, Strength
from server.dialects.base import MIME
from server.intent import Intent
from server.media import PNG, Media, OutputFormat
from server.menu import Wanted

Pixels = Annotated[int, Meta(ge=1, le=16384)]
MAX_PROMPT_CHARS = 8192


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to make, how well, and how to answer.

    `num_frames` and `fps` are of videos; `strength` is of a picture that is changed, which comes in a form.
    """

    prompt: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
    model: Annotated[str, Meta(max_length=256)] | None = None
    negative_prompt: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)] | None = None
    n: Annotated[int, Meta(ge=1, le=10)] = 1
    width: Pixels | None = None
    height: Pixels | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    tier: Annotated[str, Meta(max_length=64)] | None = None
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    max_latency_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=1000)] | None = None
    refine: Refine | None = None
    redo_share: Annotated[float, Meta(ge=0.05, le=0.5)] | None = None
    strength: Strength | None = None
    output_format: OutputFormat | None = None
    num_frames: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    fps: Annotated[int, Meta(ge=1, le=MAX_FPS)] | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    priority: Annotated[int, Meta(ge=-10, le=10)] = 0
    timeout_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] = 0
    stream: bool = False
    store: bool = True
    on_disconnect: Literal["cancel", "finish"] | None = None


class Preference(msgspec.Struct, frozen=True):
    """What `Prefer` says: answer at once (`later`), or after that many seconds at most."""

    later: bool = False
    wait_s: int | None = None


def wants_bytes(body: GenerationRequest, accepted: Sequence[OutputFormat]) -> bool:
    """Whether the answer is the picture or video by itself, rather than JSON or events."""
    if (body.width is None) != (body.height is None):
        raise InvalidRequest("width and height go together: send both, or neither", param="width")
    if not accepted or body.stream:
        return False
    said = " or ".join(MIME[one] for one in accepted)
    if body.output_format not in (None, *accepted):
        raise ContradictoryFields(
            f"Accept says {said} and output_format={body.output_format}: leave one of the two out",
            param="output_format",
        )
    if body.n > 1:
        raise InvalidRequest(
            f"n={body.n} pictures do not fit into one {said} answer: send 'Accept: application/json'", param="n"
        )
    return True


def repeated(body: GenerationRequest, data: bytes, accepted: Sequence[OutputFormat]) -> bytes:
    """What a repeat under an idempotency key has in common with its request: all of it, and the format it prefers."""
    preferred = body.output_format or (accepted[0] if accepted else PNG.output_format)
    return data + preferred.encode()


def intent_of(
    body: GenerationRequest,
    accepted: tuple[OutputFormat, ...],
    traceparent: str | None,
    changed: Changed | None = None,
) -> Intent:
    if changed is None and body.strength is not None:
        raise InvalidRequest(
            "strength is of a picture that is changed: send multipart/form-data with the file 'image'", param="strength"
        )
    size = (body.width, body.height) if body.width is not None and body.height is not None else None
    return Intent(
        wanted=Wanted(
            model=body.model or "",
            tier=body.tier,
            steps=body.steps,
            max_latency_ms=body.max_latency_ms,
            guidance=body.guidance_scale,
            size=size,
            media=Media(body.output_format, body.num_frames, body.fps, accepted=accepted),
            refinement=asked(body.refine, body.redo_share),
            strength=changed.strength if changed else None,
        ),
        prompt=body.prompt,
        upload=changed.upload if changed else None,
        negative_prompt=body.negative_prompt,
        n=body.n,
        seed=body.seed,
        compression=body.output_compression,
        priority=body.priority,
        timeout_ms=body.timeout_ms,
        partial_images=body.partial_images,
        events=body.stream or body.partial_images > 0,
        traceparent=traceparent,
    )


def cancels(body: GenerationRequest, *, default: bool) -> bool:
    return default if body.on_disconnect is None else body.on_disconnect == "cancel"


@lru_cache(maxsize=256)
def accepted_formats(accept: str) -> tuple[OutputFormat, ...]:
    """The types of pictures and videos that an `Accept` header prefers over JSON, the most wanted first."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        weights[kind] = _weight(weight)
    asked = {kind: weights.get(mime, weights.get(f"{mime.partition('/')[0]}/*", 0.0)) for kind, mime in MIME.items()}
    least = weights.get("application/json", 0.0)
    return tuple(sorted((kind for kind in asked if asked[kind] > least), key=lambda kind: -asked[kind]))


def _weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


@lru_cache(maxsize=256)
def preference(header: str) -> Preference:
    """`Prefer: respond-async, wait=5` (RFC 7240). What it does not understand it ignores, as the RFC asks."""
    parts = [part.strip().lower() for part in header.split(",")]
    waits = [part[5:].strip() for part in parts if part.startswith("wait=")]
    wait_s = int(waits[0]) if waits and waits[0].isascii() and waits[0].isdigit() and len(waits[0]) < 6 else None
    return Preference(later="respond-async" in parts and wait_s is None, wait_s=wait_s)
