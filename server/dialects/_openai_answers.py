"""Answers in OpenAI's shape: pictures at once, or as events. What is made and what is changed differ in a name."""

import math
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from engines.errors import FewstepError
from server.auth import Principal
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
from server.dialects.base import Event, format_of
from server.gateway import Gateway
from server.idempotency import Idempotency
from server.intent import Answer, Intent, Ticket


class OpenAIAnswers:
    """`events` begins the names of streamed events: image_generation, image_edit."""

    def __init__(self, gateway: Gateway, events: str) -> None:
        self._gateway, self._events = gateway, events

    async def respond(
        self,
        request: Request,
        body: ImageGenerationRequest,
        intent: Intent,
        principal: Principal,
        key: Idempotency | None,
    ) -> Response:
        gateway = self._gateway
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

    async def _follow(self, ticket: Ticket, intent: Intent) -> AsyncIterator[Event]:
        gateway = self._gateway
        try:
            if intent.partial_images:
                async for emitted in gateway.events(ticket.id):
                    if emitted.event.kind == "partial_image" and emitted.data is not None:
                        yield self._partial(emitted.data, emitted.event.partial_index, ticket)
            answer = await gateway.answer(ticket)
        except FewstepError as error:
            yield base.error_event(error)
            return
        completed = ImageEvent(
            type=f"{self._events}.completed",
            b64_json=answer.images[0],
            created_at=int(time.time()),
            size=self._size(answer, ticket, intent),
            quality=answer.result.tier,
            background="opaque",
            output_format=format_of(answer.images[0]),
            usage=self._usage(answer, ticket, intent),
            x_fewstep=provenance(answer),
        )
        yield Event(completed.type, base.encode(completed))
        yield Event(None, b"[DONE]")

    def _partial(self, data: bytes, index: int, ticket: Ticket) -> Event:
        choice = ticket.choice
        partial = ImageEvent(
            type=f"{self._events}.partial_image",
            b64_json=data,
            created_at=int(time.time()),
            size=f"{choice.width}x{choice.height}" if choice else "auto",
            quality=choice.tier if choice else "auto",
            background="opaque",
            output_format=format_of(data),
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
            output_format=format_of(answer.images[0]),
            quality=answer.result.tier,
            size=self._size(answer, ticket, intent),
            data=data,
            usage=self._usage(answer, ticket, intent),
            x_fewstep=provenance(answer),
        )

    def _size(self, answer: Answer, ticket: Ticket, intent: Intent) -> str:
        size = (ticket.choice.width, ticket.choice.height) if ticket.choice else intent.wanted.size
        if size is None:
            manifest = self._gateway.catalog.manifest(answer.result.version)
            size = manifest.resolutions[0] if manifest else None
        return "auto" if size is None else f"{size[0]}x{size[1]}"

    def _usage(self, answer: Answer, ticket: Ticket, intent: Intent) -> Usage:
        manifest, choice = self._gateway.catalog.manifest(answer.result.version), ticket.choice
        picture_tokens = 0
        if manifest is not None:
            width, height = (choice.width, choice.height) if choice else manifest.resolutions[0]
            picture_tokens = math.prod(manifest.latent_shape(width, height)[1:])
        text_tokens, read = answer.result.text_tokens, picture_tokens if intent.upload else 0
        written = picture_tokens * len(answer.images)
        return Usage(
            input_tokens=text_tokens + read,
            input_tokens_details=TokenDetails(image_tokens=read, text_tokens=text_tokens),
            output_tokens=written,
            output_tokens_details=TokenDetails(image_tokens=written, text_tokens=0),
            total_tokens=text_tokens + read + written,
        )
