"""Our own dialect: picture bytes by `Accept`, or JSON; now, later or as events; cancelable.

`curl -H 'accept: image/png' -d '{"prompt": "a red circle"}' -o out.png` works, and is the fastest way
through the gateway: one message out, one back, and the bytes as the worker encoded them.
"""

from collections.abc import AsyncIterator

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engines.errors import AlreadyEnded, Gone, InvalidRequest
from server import idempotency
from server.auth import Principal
from server.brokers.base import Emitted, Status
from server.dialects import base
from server.dialects._forms import form_of, read_form
from server.dialects._generation import Generation, failed, finished, headers_of, headers_of_queued, in_progress
from server.dialects._native_request import (
    GenerationRequest,
    Preference,
    accepted_formats,
    cancels,
    intent_of,
    preference,
    repeated,
    wants_bytes,
)
from server.dialects._uploads import IMAGE, MASK, Changed, upload_of
from server.dialects.base import MIME, Event, format_of
from server.gateway import Gateway
from server.intent import Answer, Ticket

_decoder = msgspec.json.Decoder(GenerationRequest)
_NOW = Preference()
_ID = base.in_path("id", "The generation's id")
_PREFER = base.parameter(
    "Prefer", "header", {"type": "string"}, "`respond-async`: 202 at once. `wait=5`: 202 after five seconds"
)
_PICTURES = {mime: {"schema": {"type": "string", "format": "binary"}} for mime in MIME.values()}
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


class Native:
    busy = True
    schemas = (GenerationRequest, Generation)

    def router(self, gateway: Gateway) -> APIRouter:
        routes, endpoints = base.new_router("generations"), _Endpoints(gateway)
        made = {
            200: {"description": "The answer", "content": {**base.json_of(Generation), **_PICTURES, **_EVENTS}},
            202: {"description": "Queued; look at `location`", "content": base.json_of(Generation)},
        }
        routes.post(
            "/v1/generations",
            summary="Make pictures or videos, or change a picture",
            responses=base.responses(made, 404, 409, 410, 413, 415, 429, 501, 504),
            openapi_extra=base.operation(
                _PREFER,
                base.IDEMPOTENCY,
                body=GenerationRequest,
                form=form_of(GenerationRequest, {"image": IMAGE, "mask": MASK}, ["image"]),
            ),
        )(endpoints.create)
        one = {200: {"description": "How it stands", "content": base.json_of(Generation)}}
        routes.get(
            "/v1/generations/{id}",
            summary="Read a generation",
            responses=base.responses(one, 404, 410),
            openapi_extra=base.operation(_ID),
        )(endpoints.read)
        routes.delete(
            "/v1/generations/{id}",
            summary="Cancel a generation",
            responses=base.responses(one, 404, 409),
            openapi_extra=base.operation(_ID),
        )(endpoints.cancel)
        index = base.parameter("index", "path", {"type": "integer", "minimum": 0}, "Which picture")
        expires = base.parameter("expires", "query", {"type": "string"}, "Of a signed url")
        signature = base.parameter("signature", "query", {"type": "string"}, "Of a signed url; needs no API key")
        routes.get(
            "/v1/generations/{id}/images/{index}",
            summary="Fetch a picture or video",
            responses=base.responses({200: {"description": "Its bytes", "content": _PICTURES}}, 404, 410),
            openapi_extra=base.operation(_ID, index, expires, signature),
        )(endpoints.image)
        after = base.parameter("Last-Event-ID", "header", {"type": "integer", "minimum": 0}, "Go on after this event")
        routes.get(
            "/v1/generations/{id}/events",
            summary="Follow a generation",
            responses=base.responses({200: {"description": "Server-sent events", "content": _EVENTS}}, 404),
            openapi_extra=base.operation(_ID, after),
        )(endpoints.events)
        return routes


DIALECT = Native()


class _Endpoints:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def create(self, request: Request) -> Response:
        gateway, headers = self._gateway, request.headers
        principal = gateway.authorise(headers.get("authorization"), "generate")
        body, data, changed = await self._read(request)
        accepted = accepted_formats(headers.get("accept", "*/*"))
        prefer = preference(headers.get("prefer", ""))
        as_bytes = wants_bytes(body, accepted)
        intent = intent_of(body, accepted, headers.get("traceparent"), changed)
        said = repeated(body, data, accepted)
        key = idempotency.read(headers.get("idempotency-key"), principal.owner, request.url.path, said)
        ticket = await gateway.submit(intent, principal, key)
        if body.stream or prefer != _NOW:
            gateway.expire_later(ticket)
        if body.stream:
            told = headers_of_queued(ticket)
            return self._stream(ticket.id, cancels(body, default=key is None), store=body.store, headers=told)
        if prefer.later or (prefer.wait_s is not None and not await gateway.wait(ticket, prefer.wait_s)):
            return await self._later(ticket, principal, prefer)
        cancel = cancels(body, default=key is None and prefer.wait_s is None)
        async with base.Watched(request, (lambda: gateway.cancel_soon(ticket.id)) if cancel else None):
            answer = await gateway.answer(ticket)
        if as_bytes:
            data = answer.images[0]
            return Response(data, 200, headers_of(answer.result), media_type=MIME[format_of(data)])
        made = finished(gateway.signer, answer, store=body.store, model=ticket.model)
        return base.respond(made, 200, headers_of(answer.result))

    async def read(self, request: Request) -> Response:
        principal = self._gateway.authorise(request.headers.get("authorization"), "generate")
        return base.respond(await self._shown(await self._status(request, principal)))

    async def cancel(self, request: Request) -> Response:
        gateway = self._gateway
        principal = gateway.authorise(request.headers.get("authorization"), "generate")
        status = await self._status(request, principal)
        if not await gateway.cancel(status.id):
            raise AlreadyEnded(f"generation {status.id} has ended already: there is nothing to cancel")
        return base.respond(await self._shown(await self._status(request, principal)))

    async def image(self, request: Request) -> Response:
        gateway, path = self._gateway, request.url.path
        index = _index(request.path_params["index"])
        signature = request.query_params.get("signature")
        if signature is not None:
            gateway.signer.check(path, request.query_params.get("expires", ""), signature)
        else:
            principal = gateway.authorise(request.headers.get("authorization"), "generate")
            await self._status(request, principal)
        data = await gateway.broker.image(request.path_params["id"], index)
        if data is None:
            raise Gone(f"picture {index} of {request.path_params['id']} is not there: never made, or expired by now")
        return Response(data, 200, {"cache-control": "private, max-age=600"}, media_type=MIME[format_of(data)])

    async def events(self, request: Request) -> Response:
        principal = self._gateway.authorise(request.headers.get("authorization"), "generate")
        status = await self._status(request, principal)
        last = request.headers.get("last-event-id", "0")
        if not (last.isascii() and last.isdigit() and len(last) < 10):
            raise InvalidRequest(
                f"Last-Event-ID is a number that came with an event, not {last!r}", param="Last-Event-ID"
            )
        headers = {"x-generation-id": status.id}
        return self._stream(status.id, cancel=False, store=True, headers=headers, after=int(last))

    # --- inside ----------------------------------------------------------------------------------

    async def _read(self, request: Request) -> tuple[GenerationRequest, bytes, Changed | None]:
        """A request, what its repeats have in common, and where it is a form, the picture that it changes."""
        if not request.headers.get("content-type", "").lower().startswith(base.FORM):
            return *await base.read_json(request, _decoder), None
        form = await read_form(request, GenerationRequest, ("image", "mask"))
        changed = upload_of(form.files, form.body.strength, self._gateway.settings.max_image_pixels)
        return form.body, form.fingerprint, changed

    async def _status(self, request: Request, principal: Principal) -> Status:
        return await self._gateway.status(request.path_params["id"], principal)

    async def _shown(self, status: Status) -> Generation:
        result = status.result
        if result is None:
            return in_progress(status)
        if result.error is not None:
            return failed(status)
        return finished(self._gateway.signer, Answer(result, []), store=True, model=status.deployment, status=status)

    async def _later(self, ticket: Ticket, principal: Principal, prefer: Preference) -> Response:
        body = await self._shown(await self._gateway.status(ticket.id, principal))
        applied = "respond-async" if prefer.later else f"wait={prefer.wait_s}"
        headers = headers_of_queued(ticket) | {
            "location": f"/v1/generations/{ticket.id}",
            "preference-applied": applied,
        }
        return base.respond(body, 202, headers)

    def _stream(
        self, request_id: str, cancel: bool, *, store: bool, headers: dict[str, str], after: int = 0
    ) -> Response:
        gateway = self._gateway

        def gone() -> None:
            if cancel:
                gateway.cancel_soon(request_id)

        return base.EventStream(self._follow(request_id, after, store=store), gone=gone, headers=headers)

    async def _follow(self, request_id: str, after: int, *, store: bool) -> AsyncIterator[Event]:
        number = after
        async for emitted in self._gateway.events(request_id, after):
            number += 1
            event = emitted.event
            if event.kind == "ended":
                yield await self._ended(request_id, number, store=store)
                return
            if event.kind != "running":
                yield Event(event.kind, base.encode(_progress(emitted)), str(number))
        yield await self._ended(request_id, number + 1, store=store)

    async def _ended(self, request_id: str, number: int, *, store: bool) -> Event:
        gateway = self._gateway
        status = await gateway.broker.status(request_id)
        if status is None or status.result is None:
            return base.error_event(Gone(f"{request_id} has been forgotten"), "error")
        if status.result.error is not None:
            return base.error_event(status.result.error.exception(), "error")
        images = [] if store else await gateway.broker.images(request_id, status.result.num_images)
        answer = Answer(status.result, [image for image in images if image is not None])
        made = finished(gateway.signer, answer, store=store, model=status.deployment, status=status)
        return Event("completed", base.encode(made), str(number))


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of `queued`, `step` and `partial_image` events."""

    type: str
    id: str
    step: int = 0
    total_steps: int = 0
    image_index: int = 0
    partial_image_index: int | None = None
    b64: bytes | None = None


def _progress(emitted: Emitted) -> Progress:
    event = emitted.event
    partial = event.kind == "partial_image"
    return Progress(
        type=event.kind,
        id=event.id,
        step=event.step,
        total_steps=event.total,
        image_index=event.image_index,
        partial_image_index=event.partial_index if partial else None,
        b64=emitted.data,
    )


def _index(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4):
        raise InvalidRequest(f"a picture's index is a number from 0 on, not {text!r}", param="index")
    return int(text)
