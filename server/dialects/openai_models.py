"""OpenAI's models API: a model is a deployment."""

from datetime import datetime

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engines.manifest import shown
from server.catalog import Deployment
from server.dialects import base
from server.gateway import Gateway


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "fewstep"
    x_fewstep: dict[str, str]  # tier -> version


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


class OpenAIModels:
    busy = False
    schemas = (Model, ModelList)

    def router(self, gateway: Gateway) -> APIRouter:
        routes = base.new_router("openai")

        async def list_models(request: Request) -> Response:
            gateway.authorise(request.headers.get("authorization"), "generate")
            deployments = sorted(gateway.catalog.view.deployments.items())
            return base.respond(ModelList(data=[_model(deployment) for _, deployment in deployments]))

        async def read_model(request: Request) -> Response:
            gateway.authorise(request.headers.get("authorization"), "generate")
            return base.respond(_model(gateway.catalog.deployment(request.path_params["model"])))

        listed = {200: {"description": "Every model", "content": base.json_of(ModelList)}}
        one = {200: {"description": "One model", "content": base.json_of(Model)}}
        routes.get("/v1/models", summary="List models (OpenAI)", responses=base.responses(listed))(list_models)
        routes.get(
            "/v1/models/{model}",
            summary="Read a model (OpenAI)",
            responses=base.responses(one, 404),
            openapi_extra=base.operation(base.in_path("model", "A deployment")),
        )(read_model)
        return routes


DIALECT = OpenAIModels()


def _model(deployment: Deployment) -> Model:
    revision = deployment.current
    return Model(
        id=deployment.name,
        created=int(datetime.fromisoformat(revision.created_at).timestamp()),
        x_fewstep={tier: f"{shown(target.student)}:{target.steps}" for tier, target in revision.tiers.items()},
    )
