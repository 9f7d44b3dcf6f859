"""OpenAI's images API, so that its SDKs and what is built on them work unchanged.

`quality` is honoured: it is the tier; left out it is `auto`, as OpenAI defines. Fields that OpenAI defines and we
have no use for (`moderation`, `style`, `user`, `input_fidelity`, `background` other than transparent) are accepted;
unknown ones are refused by name. An edit changes one picture; what its mask has transparent may change.
"""

from dataclasses import replace

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engines.errors import InvalidRequest, InvalidSize
from engines.refine import asked
from server import idempotency
from server.dialects import base
from server.dialects._forms import form_of, read_form
from server.dialects._openai_answers import OpenAIAnswers
from server.dialects._openai_records import (
    ImageEditRequest,
    ImageEvent,
    ImageGenerationRequest,
    ImagesResponse,
    ImageVariationRequest,
)
from server.dialects._uploads import IMAGE, MASK, upload_of
from server.gateway import Gateway
from server.intent import Intent
from server.media import OF_PICTURES, Media
from server.menu import AUTO, Names, Wanted

_NAMES = Names(tier="quality", steps="num_inference_steps")
_TIERS = {"standard": "medium", "hd": "high"}


_decoder = msgspec.json.Decoder(ImageGenerationRequest)


class OpenAIImages:
    busy = True
    schemas = (ImageGenerationRequest, ImagesResponse, ImageEvent)

    def router(self, gateway: Gateway) -> APIRouter:
        routes, endpoints = base.new_router("openai"), _Endpoints(gateway)
        events = {"text/event-stream": {"schema": base.ref(ImageEvent)}}
        made = {200: {"description": "The pictures", "content": {**base.json_of(ImagesResponse), **events}}}
        answers = base.responses(made, 404, 409, 410, 413, 415, 429, 501, 504)
        routes.post(
            "/v1/images/generations",
            summary="Make pictures (OpenAI)",
            responses=answers,
            openapi_extra=base.operation(base.IDEMPOTENCY, body=ImageGenerationRequest),
        )(endpoints.generate)
        edit = form_of(ImageEditRequest, {"image": IMAGE, "mask": MASK}, ["image"])
        routes.post(
            "/v1/images/edits",
            summary="Change a picture (OpenAI)",
            responses=answers,
            openapi_extra=base.operation(base.IDEMPOTENCY, form=edit),
        )(endpoints.edit)
        routes.post(
            "/v1/images/variations",
            summary="Vary a picture (OpenAI)",
            responses=answers,
            openapi_extra=base.operation(
                base.IDEMPOTENCY, form=form_of(ImageVariationRequest, {"image": IMAGE}, ["image"])
            ),
        )(endpoints.vary)
        return routes


DIALECT = OpenAIImages()


class _Endpoints:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._made, self._edited = (OpenAIAnswers(gateway, name) for name in ("image_generation", "image_edit"))

    async def generate(self, request: Request) -> Response:
        gateway, headers = self._gateway, request.headers
        principal = gateway.authorise(headers.get("authorization"), "generate")
        body, data = await base.read_json(request, _decoder)
        intent = _intent(body, headers.get("traceparent"))
        key = idempotency.read(headers.get("idempotency-key"), principal.owner, request.url.path, data)
        return await self._made.respond(request, body, intent, principal, key)

    async def edit(self, request: Request) -> Response:
        return await self._change(request, ImageEditRequest, ("image", "mask"))

    async def vary(self, request: Request) -> Response:
        return await self._change(request, ImageVariationRequest, ("image",))

    async def _change(self, request: Request, record: type[ImageEditRequest], files: tuple[str, ...]) -> Response:
        gateway, headers = self._gateway, request.headers
        principal = gateway.authorise(headers.get("authorization"), "generate")
        form = await read_form(request, record, files)
        changed = upload_of(form.files, form.body.strength, gateway.settings.max_image_pixels)
        intent = _intent(form.body, headers.get("traceparent"))
        wanted = replace(intent.wanted, strength=changed.strength)
        intent = replace(intent, wanted=wanted, upload=changed.upload)
        key = idempotency.read(headers.get("idempotency-key"), principal.owner, request.url.path, form.fingerprint)
        return await self._edited.respond(request, form.body, intent, principal, key)


def _intent(body: ImageGenerationRequest, traceparent: str | None) -> Intent:
    n = body.n or 1
    if body.background == "transparent":
        raise InvalidRequest("background=transparent cannot be made here: use opaque or auto", param="background")
    if body.stream and n > 1:
        raise InvalidRequest(f"a stream is of one picture: n={n} needs stream=false", param="n")
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images need stream=true", param="partial_images")
    if body.stream and body.response_format == "url":
        raise InvalidRequest("a stream carries b64_json: leave response_format out", param="response_format")
    return Intent(
        wanted=Wanted(
            model=body.model or "",
            tier=_TIERS.get(body.quality, body.quality) if body.quality else AUTO,
            steps=body.num_inference_steps,
            max_latency_ms=body.max_latency_ms,
            guidance=body.guidance_scale,
            size=_size(body.size),
            media=Media(body.output_format, sayable=OF_PICTURES),
            refinement=asked(body.refine, body.redo_share),
            names=_NAMES,
        ),
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        n=n,
        seed=body.seed,
        compression=body.output_compression,
        priority=body.priority or 0,
        timeout_ms=body.timeout_ms,
        partial_images=body.partial_images or 0,
        events=bool(body.partial_images),
        traceparent=traceparent,
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None or text == "auto":
        return None
    width, x, height = text.partition("x")
    if not (x and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidSize(f"size={text!r} is neither 'auto' nor like '64x64' (width, x, height)", param="size")
    return int(width), int(height)
