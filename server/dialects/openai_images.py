"""OpenAI's images API, so that its SDKs and what is built on them work unchanged.

`quality` is honoured: it is the tier; left out it is `auto`, as OpenAI defines. Fields that OpenAI defines and we
have no use for (`moderation`, `style`, `user`, `background` other than transparent) are accepted; unknown ones are
refused by name.
"""

import time
from collections.abc import AsyncIterator

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engines.errors import FewstepError, InvalidRequest, InvalidSize, NotBuilt
from engines.refine import asked
from server import idempotency
from server.dialects import base
from server.dialects._generation import content_path, headers_of, headers_of_queued
from server.dialects._openai_records import (
    ImageData,
    ImageEvent,
    ImageGenerationRequest,
    ImagesResponse,
    TokenDetails,
    Usage,
    provenance,
)
from server.dialects.base import Event
from server.gateway import Gateway
from server.intent import Answer, Intent, Ticket
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
        routes.post(
            "/v1/images/generations",
            summary="Make pictures (OpenAI)",
            responses=base.responses(made, 404, 409, 410, 413, 415, 429, 501, 504),
            openapi_extra=base.operation(base.IDEMPOTENCY, body=ImageGenerationRequest),
        )(endpoints.generate)
        for path in ("/v1/images/edits", "/v1/images/variations"):
            routes.post(path, include_in_schema=False)(endpoints.not_built)
        return routes


DIALECT = OpenAIImages()


class _Endpoints:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def generate(self, request: Request) -> Response:
        gateway, headers = self._gateway, request.headers
        principal = gateway.authorise(headers.get("authorization"), "generate")
        body, data = await base.read_json(request, _decoder)
        intent = _intent(body, headers.get("traceparent"))
        key = idempotency.read(headers.get("idempotency-key"), principal.owner, request.url.path, data)
        ticket = await gateway.submit(intent, principal, key)

        def gone() -> None:
            if key is None:  # who sends a key means to come back for the answer
                gateway.cancel_soon(ticket.id)

        if body.stream:
            gateway.expire_later(ticket)
            return base.EventStream(self._follow(ticket, intent), gone=gone, headers=headers_of_queued(ticket))
        async with base.Watched(request, gone if key is None else None):
            answer = await gateway.answer(ticket)
        made = self._made(answer, ticket, intent, as_url=body.response_format == "url")
        return base.respond(made, 200, headers_of(answer.result))

    async def not_built(self, request: Request) -> Response:
        self._gateway.authorise(request.headers.get("authorization"), "generate")
        raise NotBuilt(f"{request.url.path} is not built yet: only /v1/images/generations is")

    async def _follow(self, ticket: Ticket, intent: Intent) -> AsyncIterator[Event]:
        gateway = self._gateway
        try:
            if intent.partial_images:
                async for emitted in gateway.events(ticket.id):
                    if emitted.event.kind == "partial_image" and emitted.data is not None:
                        yield self._partial(emitted.data, emitted.event.partial_index, ticket, intent)
            answer = await gateway.answer(ticket)
        except FewstepError as error:
            yield base.error_event(error)
            return
        completed = ImageEvent(
            type="image_generation.completed",
            b64_json=answer.images[0],
            created_at=int(time.time()),
            size=self._size(answer, ticket, intent),
            quality=answer.result.tier,
            background="opaque",
            output_format=intent.output_format,
            usage=self._usage(answer, ticket),
            x_fewstep=provenance(answer),
        )
        yield Event(completed.type, base.encode(completed))
        yield Event(None, b"[DONE]")

    def _partial(self, data: bytes, index: int, ticket: Ticket, intent: Intent) -> Event:
        choice = ticket.choice
        partial = ImageEvent(
            type="image_generation.partial_image",
            b64_json=data,
            created_at=int(time.time()),
            size=f"{choice.width}x{choice.height}" if choice else "auto",
            quality=choice.tier if choice else "auto",
            background="opaque",
            output_format=intent.output_format,
            partial_image_index=index,
        )
        return Event(partial.type, base.encode(partial))

    def _made(self, answer: Answer, ticket: Ticket, intent: Intent, *, as_url: bool) -> ImagesResponse:
        sign = self._gateway.signer.url
        if as_url:
            data = [ImageData(url=sign(content_path(ticket.id, index))) for index in range(len(answer.images))]
        else:
            data = [ImageData(b64_json=image) for image in answer.images]
        return ImagesResponse(
            created=int(time.time()),
            background="opaque",
            output_format=intent.output_format,
            quality=answer.result.tier,
            size=self._size(answer, ticket, intent),
            data=data,
            usage=self._usage(answer, ticket),
            x_fewstep=provenance(answer),
        )

    def _size(self, answer: Answer, ticket: Ticket, intent: Intent) -> str:
        size = (ticket.choice.width, ticket.choice.height) if ticket.choice else intent.wanted.size
        if size is None:
            manifest = self._gateway.catalog.manifest(answer.result.version)
            size = manifest.resolutions[0] if manifest else None
        return "auto" if size is None else f"{size[0]}x{size[1]}"

    def _usage(self, answer: Answer, ticket: Ticket) -> Usage:
        manifest, choice = self._gateway.catalog.manifest(answer.result.version), ticket.choice
        image_tokens = 0
        if manifest is not None:
            width, height = (choice.width, choice.height) if choice else manifest.resolutions[0]
            _, rows, columns = manifest.latent_shape(width, height)
            image_tokens = rows * columns * len(answer.images)
        text_tokens = answer.result.text_tokens
        return Usage(
            input_tokens=text_tokens,
            input_tokens_details=TokenDetails(image_tokens=0, text_tokens=text_tokens),
            output_tokens=image_tokens,
            output_tokens_details=TokenDetails(image_tokens=image_tokens, text_tokens=0),
            total_tokens=text_tokens + image_tokens,
        )


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
            refinement=asked(body.refine, body.redo_share),
            names=_NAMES,
        ),
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        n=n,
        seed=body.seed,
        output_format=body.output_format or "png",
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
