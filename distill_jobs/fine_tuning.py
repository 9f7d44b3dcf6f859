"""The same jobs in the shape of OpenAI's `fine_tuning.jobs`, so that its SDK is a working client for them.

`model` is the deployment whose teacher is distilled, `training_file` a prompt source, and `method.distillation` any
part of a native job; the rest comes from the shipped job. Fields of OpenAI's that mean nothing here are accepted.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field

from distill_jobs import spec as specs
from distill_jobs.jobs import DistillJob, JobState
from distill_jobs.queue import JobQueue
from distill_jobs.records import PROGRESS, RESULT, JobRecords

PREFIX = "/v1/fine_tuning/jobs"
_PRESET = "shapes-fast"
_METADATA = "metadata.json"
_STATUS = {JobState.PREPARING: "validating_files", JobState.CANCELED: "cancelled"} | {
    state: "running" for state in (JobState.EXPORTING, JobState.EVALUATING, JobState.PUBLISHING)
}
_LEVELS = {"alarm": "warn", "note": "warn"}

Find = Callable[[str, str | None], DistillJob]
"""(job id, authorization) -> the job, if it is the caller's."""
Authorization = Annotated[str | None, Header()]


class CreateJob(BaseModel):
    """What OpenAI's SDK sends. What only OpenAI uses (integrations, validation_file …) is accepted and not read."""

    model_config = ConfigDict(extra="ignore")

    model: str
    training_file: str | None = Field(None, description="a prompt source; the teacher's own task if missing")
    suffix: str | None = Field(None, description="names the student; `<model>-fast` if missing")
    seed: int | None = Field(None, ge=0)
    hyperparameters: dict[str, Any] = {}
    method: dict[str, Any] = {}
    metadata: dict[str, str] | None = None

    def native(self) -> dict[str, Any]:
        """The job as the native dialect would have it."""
        body = specs.preset(_PRESET)
        body["teacher"] = {"id": self.model}
        body["student"]["name"] = self.suffix or f"{self.model.partition('@')[0]}-fast"
        body["data"] = {} if self.training_file is None else {"prompts": self.training_file}
        body["publish"]["deployment"] = self.model.partition("@")[0]
        batch = self.hyperparameters.get("batch_size")
        body["train"] |= {"batch": batch} if isinstance(batch, int) else {}
        body["train"] |= {} if self.seed is None else {"seed": self.seed}
        return body | dict(self.method.get("distillation") or {})


class Page(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | None
    last_id: str | None


def router(
    jobs: JobQueue,
    find: Find,
    create: Callable[[dict[str, Any], str | None, str | None, str | None], DistillJob],
    listed: Callable[[str | None], list[DistillJob]],
) -> APIRouter:
    """OpenAI's paths over the same queue; `find`, `create` and `listed` bring the native dialect's rules."""
    records = jobs.records
    routes = APIRouter(prefix=PREFIX, tags=["fine_tuning"])

    @routes.post("")
    def create_job(
        body: CreateJob,
        authorization: Authorization = None,
        idempotency_key: Annotated[str | None, Header()] = None,
        traceparent: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        job = create(body.native(), authorization, idempotency_key, traceparent)
        if body.metadata is not None:
            records.write(job.id, _METADATA, body.metadata)
        return shape(job, records)

    @routes.get("")
    def list_jobs(
        authorization: Authorization = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> Page:
        return _page([shape(job, records) for job in listed(authorization)], limit, after)

    @routes.get("/{job_id}")
    def retrieve(job_id: str, authorization: Authorization = None) -> dict[str, Any]:
        return shape(find(job_id, authorization), records)

    @routes.post("/{job_id}/{command}")
    def command(
        job_id: str, command: Literal["cancel", "pause", "resume"], authorization: Authorization = None
    ) -> dict[str, Any]:
        find(job_id, authorization)
        return shape(jobs.command(job_id, command), records)

    @routes.get("/{job_id}/events")
    def events(
        job_id: str,
        authorization: Authorization = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> Page:
        """Newest first, as OpenAI lists them."""
        job = find(job_id, authorization)
        return _page([_event(job.id, event) for event in reversed(records.events(job.id))], limit, after)

    @routes.get("/{job_id}/checkpoints")
    def checkpoints(
        job_id: str,
        authorization: Authorization = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
        after: str | None = None,
    ) -> Page:
        job = find(job_id, authorization)
        kept = [event for event in reversed(records.events(job.id)) if event["event"] == "checkpoint"]
        return _page([_checkpoint(job, event) for event in kept], limit, after)

    return routes


def shape(job: DistillJob, records: JobRecords) -> dict[str, Any]:
    """A job as `fine_tuning.job`."""
    result, progress = records.read(job.id, RESULT) or {}, records.read(job.id, PROGRESS) or {}
    train = job.spec["train"]
    error = job.log[-1].error
    eta_s = progress.get("eta_s")
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.spec["teacher"]["id"],
        "fine_tuned_model": result.get("student"),
        "created_at": _unix(job.created_at),
        "finished_at": None if job.finished_at is None else _unix(job.finished_at),
        "estimated_finish": None if job.ended or eta_s is None else int(datetime.now().timestamp() + eta_s),
        "status": _STATUS.get(job.state, str(job.state)),
        "error": None if error is None else {"code": error["code"], "message": error["message"], "param": None},
        "hyperparameters": {"batch_size": train["batch"] or "auto", "n_epochs": "auto"},
        "method": {"type": "distillation", "distillation": job.spec},
        "metadata": records.read(job.id, _METADATA),
        "seed": train["seed"] % 2**31,
        "training_file": _source(job.spec["data"]),
        "validation_file": None,
        "trained_tokens": None,
        "organization_id": job.owner or "none",
        "result_files": [],
        "integrations": None,
    }


def _event(job_id: str, event: dict[str, Any]) -> dict[str, Any]:
    kind = event["event"]
    about = {key: value for key, value in event.items() if key not in ("id", "at", "event")}
    is_metrics = kind in ("progress", "metric")
    return {
        "id": f"{job_id}-event-{event['id']}",
        "object": "fine_tuning.job.event",
        "created_at": _unix(event["at"]),
        "level": "error" if event.get("status") == JobState.FAILED else _LEVELS.get(kind, "info"),
        "message": _sentence(kind, event),
        "type": "metrics" if is_metrics else "message",
        "data": about,
    }


def _sentence(kind: str, event: dict[str, Any]) -> str:
    if kind == "status":
        reason = (event.get("error") or {}).get("message")
        return f"{event['status']}: {reason}" if reason else str(event["status"])
    if kind in ("progress", "metric", "checkpoint"):
        return f"step {event.get('step')}: {kind}"
    return str(event.get("message") or kind)


def _checkpoint(job: DistillJob, event: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{job.id}-checkpoint-{event['id']}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": _unix(event["at"]),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": f"{job.spec['student']['name']}:step-{event['step']}",
        "step_number": event["step"],
        "metrics": {"step": event["step"]} | dict(event.get("metrics") or {}),
    }


def _page(data: list[dict[str, Any]], limit: int, after: str | None) -> Page:
    ids = [row["id"] for row in data]
    start = ids.index(after) + 1 if after in ids else 0
    part = data[start : start + limit]
    first, last = (part[0]["id"], part[-1]["id"]) if part else (None, None)
    return Page(data=part, has_more=start + limit < len(data), first_id=first, last_id=last)


def _source(data: Mapping[str, Any]) -> str:
    """OpenAI's clients want a text: the source's name, or how the prompts were given."""
    named = data.get("images") or data.get("prompts")
    return named if isinstance(named, str) else "inline" if named else "default"


def _unix(at: str) -> int:
    return int(datetime.fromisoformat(at).timestamp())
