"""The records of OpenAI's images API: what it sends and gets, with our own fields beside."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engines.manifest import shown
from engines.refine import Refine
from server.dialects._generation import RefinedRecord, refined
from server.dialects._native_request import MAX_PROMPT_CHARS
from server.dialects._uploads import Strength
from server.intent import Answer, ImageFormat
from server.messages import TierSteps


class ImageGenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's fields, then ours as `extra_body` sends them."""

    prompt: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
    model: Annotated[str, Meta(max_length=256)] | None = None
    n: Annotated[int, Meta(ge=1, le=10)] | None = None
    size: Annotated[str, Meta(max_length=32)] | None = None
    quality: Annotated[str, Meta(max_length=64)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: ImageFormat | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    moderation: str | None = None
    style: str | None = None
    user: str | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=1000)] | None = None
    negative_prompt: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)] | None = None
    max_latency_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    refine: Refine | None = None
    redo_share: Annotated[float, Meta(ge=0.05, le=0.5)] | None = None
    priority: Annotated[int, Meta(ge=-10, le=10)] | None = None
    timeout_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None


class ImageEditRequest(ImageGenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of the form, beside the files `image` and `mask`."""

    strength: Strength | None = None
    input_fidelity: Literal["high", "low"] | None = None


class ImageVariationRequest(ImageEditRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An edit without words."""

    prompt: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)] = ""


class ImageData(msgspec.Struct, frozen=True, kw_only=True):
    b64_json: bytes | None = None
    url: str | None = None
    revised_prompt: str | None = None


class TokenDetails(msgspec.Struct, frozen=True, kw_only=True):
    image_tokens: int
    text_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """An image token is one position of the latent picture."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What made the pictures, and where the time went."""

    model_version: str
    tier: str
    steps: int
    seeds: list[int]
    backend: str
    queue_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    image_ms: float
    ignored_words: list[str]
    downgraded_from: TierSteps | None = None
    refined: RefinedRecord | None = None


class ImagesResponse(msgspec.Struct, frozen=True, kw_only=True):
    created: int
    background: str
    output_format: str
    quality: str
    size: str
    data: list[ImageData]
    usage: Usage
    x_fewstep: Provenance


class ImageEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`image_generation.partial_image` and `image_generation.completed`; of edits, `image_edit.…`."""

    type: str
    b64_json: bytes
    created_at: int
    size: str
    quality: str
    background: str
    output_format: str
    partial_image_index: int | None = None
    usage: Usage | None = None
    x_fewstep: Provenance | None = None


def provenance(answer: Answer) -> Provenance:
    result, timing = answer.result, answer.result.timing
    return Provenance(
        model_version=shown(result.version),
        tier=result.tier,
        steps=result.steps,
        seeds=result.seeds,
        backend=result.backend,
        queue_ms=round(timing.queue_ms, 3),
        encode_ms=round(timing.encode_ms, 3),
        denoise_ms=round(timing.denoise_ms, 3),
        decode_ms=round(timing.decode_ms, 3),
        image_ms=round(timing.image_ms, 3),
        ignored_words=result.ignored_words,
        downgraded_from=result.downgraded_from,
        refined=refined(result),
    )
