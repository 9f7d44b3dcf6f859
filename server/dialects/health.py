"""Is it alive, can it serve, and how is it doing: probes, Prometheus' text, and KServe's v2 shapes of both."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engines.errors import FewstepError, ModelNotFound, Unavailable
from engines.manifest import shown
from server.admission import unserved
from server.catalog import Deployment
from server.dialects import base
from server.gateway import Gateway


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    status: str = "alive"


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    status: str = "ready"
    workers: int
    models: list[str]


class ServerMetadata(msgspec.Struct, frozen=True, kw_only=True):
    name: str = "fewstep"
    version: str
    extensions: list[str] = []


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    versions: list[str]
    platform: str = "fewstep"
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    ready: bool


class Health:
    busy = False
    schemas = (Alive, Ready, ServerMetadata, ModelMetadata, ModelReady)

    def router(self, gateway: Gateway) -> APIRouter:
        routes, endpoints = base.new_router("operations"), _Endpoints(gateway)

        def get(path: str, endpoint: Any, content: dict[str, Any], *parameters: dict[str, Any]) -> None:
            failures = (404,) if parameters else ()
            routes.get(
                path,
                responses=base.responses({200: {"description": "Yes", "content": content}}, *failures),
                openapi_extra=base.operation(*parameters),
            )(endpoint)

        name, number = base.in_path("model", "A deployment"), base.in_path("version", "12 to 64 digits of its digest")
        get("/healthz", endpoints.alive, base.json_of(Alive))
        get("/readyz", endpoints.ready, base.json_of(Ready))
        get("/metrics", endpoints.metrics, {"text/plain": {"schema": {"type": "string"}}})
        get("/v2", endpoints.server, base.json_of(ServerMetadata))
        get("/v2/health/live", endpoints.alive_v2, base.json_of(Alive))
        get("/v2/health/ready", endpoints.ready_v2, base.json_of(Ready))
        get("/v2/models/{model}", endpoints.model, base.json_of(ModelMetadata), name)
        get("/v2/models/{model}/ready", endpoints.model_ready, base.json_of(ModelReady), name)
        get("/v2/models/{model}/versions/{version}", endpoints.model_version, base.json_of(ModelMetadata), name, number)
        get(
            "/v2/models/{model}/versions/{version}/ready",
            endpoints.model_version_ready,
            base.json_of(ModelReady),
            name,
            number,
        )
        return routes


DIALECT = Health()


class _Endpoints:
    """Probes need no key: they tell no more than whether and what serves."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def alive(self, request: Request) -> Response:
        return base.respond(Alive())

    async def ready(self, request: Request) -> Response:
        """Ready is: not stopping, broker reachable, a deployment there, and a live worker for one."""
        gateway = self._gateway
        view = gateway.catalog.view
        serving = [name for name in sorted(view.deployments) if gateway.catalog.num_workers(name)]
        if gateway.draining:
            raise Unavailable("this gateway is stopping", retry_after_s=1.0)
        if not await _answers(gateway):
            raise Unavailable("the broker does not answer: is Redis up?", retry_after_s=1.0)
        if not serving:
            loading = next(filter(None, map(gateway.catalog.loading, sorted(view.deployments))), None)
            raise unserved(loading)
        return base.respond(Ready(workers=len(view.workers), models=serving))

    async def alive_v2(self, request: Request) -> Response:
        return await self.alive(request)

    async def ready_v2(self, request: Request) -> Response:
        return await self.ready(request)

    async def metrics(self, request: Request) -> Response:
        text, content_type = self._gateway.metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def server(self, request: Request) -> Response:
        return base.respond(ServerMetadata(version=_release()))

    async def model(self, request: Request) -> Response:
        deployment = self._gateway.catalog.deployment(request.path_params["model"])
        return base.respond(_metadata(deployment, sorted(deployment.current.versions)))

    async def model_ready(self, request: Request) -> Response:
        deployment = self._gateway.catalog.deployment(request.path_params["model"])
        return self._readiness(deployment)

    async def model_version(self, request: Request) -> Response:
        deployment, full = self._version(request)
        return base.respond(_metadata(deployment, [full]))

    async def model_version_ready(self, request: Request) -> Response:
        deployment, _ = self._version(request)
        return self._readiness(deployment)

    def _readiness(self, deployment: Deployment) -> Response:
        if not self._gateway.catalog.num_workers(deployment.name):
            raise unserved(self._gateway.catalog.loading(deployment.name))
        return base.respond(ModelReady(name=deployment.name, ready=True))

    def _version(self, request: Request) -> tuple[Deployment, str]:
        deployment = self._gateway.catalog.deployment(request.path_params["model"])
        digits = request.path_params["version"].rpartition("@")[2]
        for full in sorted(deployment.current.versions):
            if len(digits) >= 12 and full.partition("@")[2].startswith(digits):
                return deployment, full
        has = ", ".join(shown(full) for full in sorted(deployment.current.versions))
        raise ModelNotFound(f"{deployment.name} does not serve version {digits!r}: it has {has}", param="version")


async def _answers(gateway: Gateway) -> bool:
    try:
        return await gateway.broker.ping()
    except (FewstepError, OSError):
        return False


def _metadata(deployment: Deployment, versions: list[str]) -> ModelMetadata:
    width, height = deployment.manifests[versions[0]].resolutions[0]
    return ModelMetadata(
        name=deployment.name,
        versions=[shown(full) for full in versions],
        inputs=[
            TensorMetadata(name="prompt", datatype="BYTES", shape=[1]),
            TensorMetadata(name="seed", datatype="INT64", shape=[1]),
        ],
        outputs=[TensorMetadata(name="image", datatype="UINT8", shape=[-1, height, width, 3])],
    )


def _release() -> str:
    try:
        return version("fewstep")
    except PackageNotFoundError:
        return "unknown"
