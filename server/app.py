"""The gateway's FastAPI application: every dialect, one error body, an exact OpenAPI document.

Dialects are found by file name, so a new one is one file. Nothing here knows Redis or files: the
composition root hands them in.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engines import plugins
from engines.errors import FewstepError
from engines.registry.base import Registry
from server import http_errors
from server.auth import Principal, Scope
from server.brokers.base import Broker
from server.dialects.base import FORM, Dialect
from server.edge import Edge
from server.gateway import Gateway
from server.metrics import Metrics
from server.metrics import make as make_metrics
from server.settings import GatewaySettings
from server.traced import Traced
from server.tracing import Tracing

_DIALECTS = "server.dialects"
Authorise = Callable[[str | None, Scope], Principal]  # of an Authorization header


def create_app(
    settings: GatewaySettings,
    broker: Broker,
    registry: Registry,
    *,
    jobs_router: APIRouter | Callable[[Authorise], APIRouter] | None = None,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application. `broker` has been started, or is before the first request; its owner closes it.

    `jobs_router` may be a function of `Gateway.authorise`, which exists only here. The gateway is
    `app.state.gateway`; its `refuse()` has it answer 503 before the process stops.
    """
    gateway = Gateway(settings, broker, registry, metrics or make_metrics())
    app = FastAPI(
        title="Fewstep",
        summary="Few-step image generation and distillation",
        lifespan=_lifespan(gateway),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    for error in (FewstepError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, _answer)
    dialects: list[Dialect] = [plugins.load(_DIALECTS, name, "DIALECT") for name in plugins.names(_DIALECTS)]
    routers = [dialect.router(gateway) for dialect in sorted(dialects, key=lambda dialect: not dialect.busy)]
    for router in routers:
        app.include_router(router)
    if jobs_router is not None:
        app.include_router(jobs_router if isinstance(jobs_router, APIRouter) else jobs_router(gateway.authorise))
    app.add_middleware(
        Edge,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        uploads=_uploads(routers),
    )
    if tracing is not None:
        app.add_middleware(Traced, tracing=tracing)  # the outermost: it sees what Edge answers
    app.openapi = _documented(app, dialects)  # type: ignore[method-assign]
    return app


def _lifespan(gateway: Gateway) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    return lifespan


async def _answer(_: Request, error: Exception) -> Response:
    return http_errors.respond(error)


def _uploads(routers: Sequence[APIRouter]) -> list[str]:
    """The paths whose documents say that they take a form."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    bodies = {route.path: (route.openapi_extra or {}).get("requestBody", {}) for route in routes}
    return [path for path, body in bodies.items() if FORM in body.get("content", {})]


# --- OpenAPI ---------------------------------------------------------------------------------------


def _documented(app: FastAPI, dialects: list[Dialect]) -> Callable[[], dict[str, Any]]:
    """FastAPI's document with the records of the dialects in it and its own 422 out of it."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            records = [http_errors.ErrorResponse, *(record for dialect in dialects for record in dialect.schemas)]
            _, schemas = msgspec.json.schema_components(records, ref_template="#/components/schemas/{name}")
            document = generate()
            components = document.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **schemas}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]
            _without_422(document)
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _without_422(document: dict[str, Any]) -> None:
    """Validation is answered with 400 and our body here, never with FastAPI's 422."""
    refused = {
        "description": "The request cannot be served as it stands; `param` names the field",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }
    for path in document["paths"].values():
        for operation in path.values():
            if operation["responses"].pop("422", None) is not None:
                operation["responses"].setdefault("400", refused)
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
