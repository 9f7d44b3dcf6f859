"""What a job may name: methods and loss terms with papers, needs and settings, as the generated schemas say it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header
from pydantic import BaseModel, Field

from distill_jobs.methods import _schemas


class MethodView(BaseModel):
    """A method or a term of the student's loss."""

    object: Literal["distillation.method", "distillation.term"]
    name: str
    description: str
    paper: str = Field(description="arXiv number, or where else it is written")
    needs: list[str] = Field(description="of prompts, data, pairs and preferences")
    inputs: list[str] = Field(description="of s (second time) and w (guidance): what the student's network must read")
    roles: list[str] = Field(description="networks that are trained or kept beside the teacher")
    settings: dict[str, Any] = Field(description="JSON schema of its own fields, with defaults")
    rank: int | None = Field(
        None, description="place in the leaderboard, of methods given equal work; none if not in it"
    )
    fd_ratio: dict[int, float] = Field(
        {}, description="there: distance by steps as a ratio to the teacher's, mean of the tasks; 1 is equal"
    )
    experimental: bool = Field(
        False, description="its students there were no better than the teacher at the same steps"
    )


class MethodList(BaseModel):
    object: Literal["list"] = "list"
    data: list[MethodView]
    terms: list[MethodView]
    has_more: bool = False


def router(check: Callable[[str | None], object]) -> APIRouter:
    """The listing, for whoever passes `check` (which raises otherwise)."""
    routes = APIRouter()

    @routes.get("/methods")
    def methods(authorization: Annotated[str | None, Header()] = None) -> MethodList:
        check(authorization)
        return MethodList(
            data=[_view("distillation.method", name, one) for name, one in sorted(_schemas.schemas().items())],
            terms=[_view("distillation.term", name, one) for name, one in sorted(_schemas.terms().items())],
        )

    return routes


def _view(kind: Literal["distillation.method", "distillation.term"], name: str, schema: dict[str, Any]) -> MethodView:
    return MethodView(
        object=kind,
        name=name,
        description=schema["description"],
        paper=schema["paper"],
        needs=schema["needs"],
        inputs=schema.get("inputs", []),
        roles=schema["roles"],
        settings=schema["config"],
        **(_schemas.leaderboard().get(name, {}) if kind == "distillation.method" else {}),
    )
