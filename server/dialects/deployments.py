"""Students and deployments: what there is, what serves, and changing it behind live traffic.

Promote and rollback only propose. The workers stage, warm and verify the candidate and their
coordinator makes it current or drops it with its reason; the swap's address shows how far it is.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from engines.errors import Conflict, NotFound, RevisionConflict
from engines.registry.base import Candidate, Revision
from server import idempotency
from server.auth import Principal
from server.dialects import base
from server.dialects._deployment_records import (
    DeploymentList,
    DeploymentRecord,
    StudentList,
    StudentRecord,
    Swap,
    SwapStarted,
    deployment_record,
    page,
    student_record,
    swap_record,
)
from server.gateway import Gateway
from server.promotion import Proposal, merged

T = TypeVar("T")


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    student: Annotated[str, Meta(max_length=160)]
    steps: Annotated[int, Meta(ge=1, le=1000)]


class PromoteRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tiers to replace; the others stay. `if_revision` makes it fail if another revision is current."""

    tiers: Annotated[dict[str, Target], Meta(min_length=1, max_length=16)]
    default_tier: Annotated[str, Meta(max_length=64)] | None = None
    if_revision: Annotated[int, Meta(ge=0, le=10**8)] | None = None
    note: Annotated[str, Meta(max_length=1000)] = ""


class RollbackRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    if_revision: Annotated[int, Meta(ge=0, le=10**8)] | None = None


_promote = msgspec.json.Decoder(PromoteRequest)
_rollback = msgspec.json.Decoder(RollbackRequest)
_NAME = base.in_path("name", "A deployment")
_PAGE = (
    base.parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 100}, "How many, 20 if left out"),
    base.parameter("after", "query", {"type": "string"}, "The last id of the page before"),
)


class Deployments:
    busy = False
    schemas = (
        PromoteRequest,
        RollbackRequest,
        StudentList,
        StudentRecord,
        DeploymentList,
        DeploymentRecord,
        Swap,
        SwapStarted,
    )

    def router(self, gateway: Gateway) -> APIRouter:
        routes, endpoints = base.new_router("deployments"), _Endpoints(gateway)

        def get(path: str, endpoint: Any, record: type, *parameters: dict[str, Any]) -> None:
            content = {200: {"description": "As it is now", "content": base.json_of(record)}}
            extra = base.operation(*parameters)
            routes.get(path, responses=base.responses(content, 404), openapi_extra=extra)(endpoint)

        def post(path: str, endpoint: Any, body: type) -> None:
            content = {202: {"description": "Proposed; look at `location`", "content": base.json_of(SwapStarted)}}
            failures = (404, 409, 413, 415)
            extra = base.operation(_NAME, base.IDEMPOTENCY, body=body)
            routes.post(path, responses=base.responses(content, *failures), openapi_extra=extra)(endpoint)

        version = base.in_path("version", "name@digest, 12 to 64 digits")
        get("/v1/students", endpoints.students, StudentList, *_PAGE)
        get("/v1/students/{version}", endpoints.student, StudentRecord, version)
        get("/v1/deployments", endpoints.deployments, DeploymentList, *_PAGE)
        get("/v1/deployments/{name}", endpoints.deployment, DeploymentRecord, _NAME)
        get("/v1/deployments/{name}/swaps/{swap_id}", endpoints.swap, Swap, _NAME, base.in_path("swap_id", "A swap"))
        routes.get(
            "/v1/students/{version}/samples.png",
            responses=base.responses(
                {200: {"description": "Its sample sheet", "content": {"image/png": {"schema": {"type": "string"}}}}},
                404,
            ),
            openapi_extra=base.operation(version),
        )(endpoints.samples)
        post("/v1/deployments/{name}/promote", endpoints.promote, PromoteRequest)
        post("/v1/deployments/{name}/rollback", endpoints.rollback, RollbackRequest)
        return routes


DIALECT = Deployments()


class _Endpoints:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._registry = gateway, gateway.registry

    async def students(self, request: Request) -> Response:
        self._authorise(request)
        versions, has_more = page(await _read(self._registry.students), request)
        data = [await self._student(version) for version in versions]
        first, last = (versions[0], versions[-1]) if versions else (None, None)
        return base.respond(StudentList(data=data, has_more=has_more, first_id=first, last_id=last))

    async def student(self, request: Request) -> Response:
        self._authorise(request)
        return base.respond(await self._student(request.path_params["version"]))

    async def samples(self, request: Request) -> Response:
        self._authorise(request)
        version = (await _read(lambda: self._registry.student(request.path_params["version"]))).version
        data = await _read(lambda: self._registry.read_file(version, "samples.png"))
        if data is None:
            raise NotFound(f"{version} has no sample sheet")
        return Response(data, media_type="image/png")

    async def deployments(self, request: Request) -> Response:
        self._authorise(request)
        names, has_more = page(await _read(self._registry.deployments), request)
        data = [await self._deployment(name) for name in names]
        first, last = (names[0], names[-1]) if names else (None, None)
        return base.respond(DeploymentList(data=data, has_more=has_more, first_id=first, last_id=last))

    async def deployment(self, request: Request) -> Response:
        self._authorise(request)
        return base.respond(await self._deployment(request.path_params["name"]))

    async def swap(self, request: Request) -> Response:
        self._authorise(request)
        name, swap_id = request.path_params["name"], request.path_params["swap_id"]
        candidate = await _read(lambda: self._registry.candidate(name, swap_id))
        outcome = await _read(lambda: self._registry.outcome(name, swap_id))
        phases = await self._gateway.broker.phases(swap_id)
        return base.respond(swap_record(candidate, outcome, phases))

    async def promote(self, request: Request) -> Response:
        principal = self._authorise(request, admin=True)
        body, data = await base.read_json(request, _promote)
        name = request.path_params["name"]
        targets = {tier: (target.student, target.steps) for tier, target in body.tiers.items()}

        def propose() -> Candidate:
            current = self._current(name, body.if_revision)
            proposal = merged(self._registry, name, current, targets, body.default_tier)
            return self._propose(name, current, proposal, body.note, request.headers.get("traceparent"))

        return await self._started(request, principal, data, propose)

    async def rollback(self, request: Request) -> Response:
        principal = self._authorise(request, admin=True)
        body, data = await base.read_json(request, _rollback)
        name = request.path_params["name"]

        def propose() -> Candidate:
            current = self._current(name, body.if_revision)
            assert current is not None
            earlier = [number for number in self._registry.history(name) if number < current.number]
            if not earlier:
                raise Conflict(f"{name} has one revision only: there is nothing to go back to")
            previous = self._registry.revision(name, earlier[-1])
            note = f"rollback to revision {previous.number}"
            return self._propose(name, current, Proposal.of(previous), note, request.headers.get("traceparent"))

        return await self._started(request, principal, data, propose, needs_current=True)

    # --- inside ----------------------------------------------------------------------------------

    def _authorise(self, request: Request, *, admin: bool = False) -> Principal:
        return self._gateway.authorise(request.headers.get("authorization"), "admin" if admin else "generate")

    def _current(self, name: str, if_revision: int | None) -> Revision | None:
        current = self._registry.current(name)
        number = current.number if current else 0
        if if_revision is not None and if_revision != number:
            raise RevisionConflict(
                f"{name} is at revision {number}, not {if_revision}: read it again and decide anew", param="if_revision"
            )
        return current

    def _propose(
        self, name: str, current: Revision | None, proposal: Proposal, note: str, traceparent: str | None
    ) -> Candidate:
        return self._registry.propose(
            name,
            proposal.tiers,
            default_tier=proposal.default_tier,
            allowed=proposal.allowed,
            base_revision=current.number if current else 0,
            note=note,
            traceparent=traceparent,
        )

    async def _started(
        self,
        request: Request,
        principal: Principal,
        data: bytes,
        propose: Callable[[], Candidate],
        *,
        needs_current: bool = False,
    ) -> Response:
        """Proposes once per idempotency key, wakes the workers and says where to look."""
        name = request.path_params["name"]
        if needs_current and await _read(lambda: self._registry.current(name)) is None:
            raise NotFound(f"there is no deployment {name!r}", param="name")
        key = idempotency.read(request.headers.get("idempotency-key"), principal.owner, request.url.path, data)
        broker, ttl_s = self._gateway.broker, self._gateway.settings.idempotency_ttl_s
        if key is None:
            swap_id = await _proposed(propose)
        else:
            swap_id = await idempotency.once(broker, key, lambda: _proposed(propose), ttl_s, owner=principal.owner)
        await broker.announce(f"deployments/{name}")
        location = f"/v1/deployments/{name}/swaps/{swap_id}"
        return base.respond(SwapStarted(swap_id=swap_id, deployment=name), 202, {"location": location})

    async def _student(self, version: str) -> StudentRecord:
        manifest = await _read(lambda: self._registry.student(version))
        report = await _read(lambda: self._registry.report(manifest.version))
        return student_record(manifest, report)

    async def _deployment(self, name: str) -> DeploymentRecord:
        current = await _read(lambda: self._registry.current(name))
        if current is None:
            raise NotFound(f"there is no deployment {name!r}: see /v1/deployments", param="name")
        history = await _read(lambda: self._registry.history(name))
        pending = await _read(lambda: self._registry.pending(name))
        return deployment_record(current, history, pending, self._gateway.catalog.view.workers)


async def _read(work: Callable[[], T]) -> T:
    """Files may be slow: not in the loop that serves."""
    return await asyncio.to_thread(work)


async def _proposed(propose: Callable[[], Candidate]) -> str:
    return (await _read(propose)).swap_id
