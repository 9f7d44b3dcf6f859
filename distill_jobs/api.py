"""The HTTP routes of distillation jobs, mounted by the gateway; torch-free, and free of any rule of a job.

The router is given its authorisation and raises `engines.errors`; the gateway turns both into HTTP. Handlers are
plain functions, which run in threads: they read files and Redis.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field

from distill_jobs import catalogue, fine_tuning, job_report
from distill_jobs import spec as specs
from distill_jobs.estimate import Estimate, estimate, teacher_version
from distill_jobs.jobs import ENDED, DistillJob, JobState
from distill_jobs.needs import Needs
from distill_jobs.plan import expected
from distill_jobs.queue import JobQueue
from distill_jobs.records import PLAN, PROGRESS, RESULT, JobRecords
from engines.errors import InvalidRequest, JobNotFound, NotFound, StudentNotFound

PREFIX = "/v1/distillation"
_POLL_S = 0.25
_KEEP_ALIVE_S = 15.0
_LOG_TAIL_BYTES = 65_536
_REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a report brings all it needs


class Principal(Protocol):
    """Who asks. Objects belong to the key that made them; `sees` also knows the administrators."""

    @property
    def owner(self) -> str: ...
    def sees(self, owner: str) -> bool: ...


class Authorise(Protocol):
    """The principal behind an `Authorization` header, if its key has the scope; raises otherwise."""

    def __call__(self, authorization: str | None, scope: Literal["distill"], /) -> Principal: ...


class JobView(BaseModel):
    """A job as the API shows it. Times are RFC 3339 UTC."""

    id: str
    object: Literal["distillation.job"] = "distillation.job"
    status: JobState
    step: int | None = None
    total_steps: int | None = None
    eta_s: float | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    spec: dict[str, Any]
    estimated: Needs | None = Field(None, description="what training should need, from trials just before it")
    measured: Needs | None = Field(None, description="what it needed")
    student: str | None = Field(None, description="name@digest of what it made")
    schedule_student: str | None = Field(None, description="name@digest of the student without new weights")
    metrics: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    urls: dict[str, str] = {}


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    has_more: bool = False
    first_id: int | None
    last_id: int | None


class CheckpointView(BaseModel):
    object: Literal["distillation.checkpoint"] = "distillation.checkpoint"
    step: int
    at: str
    best: bool = False
    metrics: dict[str, Any] = {}


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointView]
    has_more: bool = False


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorInfo


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in (401, 403, *statuses)}


Authorization = Annotated[str | None, Header()]
SpecBody = Annotated[dict[str, Any], Body(description="a job; see docs", examples=[specs.preset("shapes-fast")])]


def router(jobs: JobQueue, authorise: Authorise) -> APIRouter:  # noqa: C901 - a list of routes
    """All routes of distillation jobs over one queue, in the native dialect and in OpenAI's."""
    records = jobs.records
    routes = APIRouter(prefix=PREFIX, tags=["distillation"])

    def mine(job_id: str, authorization: str | None) -> DistillJob:
        principal = authorise(authorization, "distill")
        job = records.get(job_id)
        if not principal.sees(job.owner):
            raise JobNotFound(f"no job is called {job_id!r}", param="job_id")
        return job

    def submit(
        body: dict[str, Any], authorization: str | None, idempotency_key: str | None, traceparent: str | None
    ) -> DistillJob:
        principal = authorise(authorization, "distill")
        spec = specs.parse(body)
        check_references(spec, records)
        said = spec.model_dump(mode="json")
        return jobs.submit(said, owner=principal.owner, idempotency_key=idempotency_key, traceparent=traceparent)

    def listed(authorization: str | None) -> list[DistillJob]:
        principal = authorise(authorization, "distill")
        return [job for job in records.all() if principal.sees(job.owner)]

    @routes.post("/jobs", status_code=201, responses=_errors(400, 404, 409, 501))
    def create(
        body: SpecBody,
        response: Response,
        authorization: Authorization = None,
        idempotency_key: Annotated[str | None, Header()] = None,
        traceparent: Annotated[str | None, Header()] = None,
    ) -> JobView:
        job = submit(body, authorization, idempotency_key, traceparent)
        response.headers["location"] = f"{PREFIX}/jobs/{job.id}"
        return view(job, records)

    @routes.get("/jobs", responses=_errors(400))
    def list_jobs(
        authorization: Authorization = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        status: JobState | None = None,
    ) -> JobList:
        seen = [job for job in listed(authorization) if status in (None, job.state)]
        page, more = _page(seen, limit, after)
        data = [view(job, records) for job in page]
        return JobList(data=data, has_more=more, first_id=_id(data, 0), last_id=_id(data, -1))

    @routes.get("/jobs/{job_id}", responses=_errors(404))
    def retrieve(job_id: str, authorization: Authorization = None) -> JobView:
        return view(mine(job_id, authorization), records)

    @routes.post("/jobs/{job_id}/{command}", responses=_errors(400, 404, 409, 503))
    def command(
        job_id: str, command: Literal["cancel", "pause", "resume"], authorization: Authorization = None
    ) -> JobView:
        mine(job_id, authorization)
        return view(jobs.command(job_id, command), records)

    @routes.get(
        "/jobs/{job_id}/events",
        response_model=EventList,
        responses={200: {"content": {"text/event-stream": {}}}, **_errors(400, 404)},
    )
    def events(
        job_id: str,
        request: Request,
        authorization: Authorization = None,
        last_event_id: Annotated[str | None, Header()] = None,
        after: Annotated[int, Query(ge=0)] = 0,
    ) -> Any:
        job = mine(job_id, authorization)
        start = _event_id(last_event_id) if last_event_id else after
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(_stream(records, job.id, start), media_type="text/event-stream")
        data = records.events(job.id, start)
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return EventList(data=data, first_id=first, last_id=last)

    @routes.get("/jobs/{job_id}/checkpoints", responses=_errors(404))
    def checkpoints(job_id: str, authorization: Authorization = None) -> CheckpointList:
        job = mine(job_id, authorization)
        kept = [event for event in records.events(job.id) if event["event"] == "checkpoint"]
        fields = CheckpointView.model_fields
        return CheckpointList(data=[CheckpointView(**{k: v for k, v in e.items() if k in fields}) for e in kept])

    @routes.get(
        "/jobs/{job_id}/samples",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **_errors(404)},
    )
    def samples(job_id: str, authorization: Authorization = None) -> Response:
        job = mine(job_id, authorization)
        return Response(_samples(job.id, records), media_type="image/png")

    @routes.get(
        "/jobs/{job_id}/report",
        response_class=HTMLResponse,
        responses={200: {"content": {"text/html": {}}}, **_errors(404)},
    )
    def report(job_id: str, authorization: Authorization = None) -> HTMLResponse:
        job = mine(job_id, authorization)
        return HTMLResponse(job_report.render(job, records), headers={"content-security-policy": _REPORT_POLICY})

    @routes.get("/jobs/{job_id}/log", response_class=PlainTextResponse, responses=_errors(404))
    def log(job_id: str, authorization: Authorization = None) -> PlainTextResponse:
        job = mine(job_id, authorization)
        data = records.registry.read_job_file(job.id, "log.txt") or b""
        return PlainTextResponse(data[-_LOG_TAIL_BYTES:].decode(errors="replace"))

    @routes.post("/estimate", responses=_errors(400, 404, 501))
    def estimate_job(body: SpecBody, authorization: Authorization = None) -> Estimate:
        principal = authorise(authorization, "distill")
        spec = specs.parse(body)
        check_references(spec, records)
        return estimate(spec, records, principal.sees)

    routes.include_router(catalogue.router(lambda header: authorise(header, "distill")), responses=_errors())

    both = APIRouter()
    both.include_router(routes)
    both.include_router(fine_tuning.router(jobs, mine, submit, listed), responses=_errors(400, 404, 409, 501, 503))
    return both


def view(job: DistillJob, records: JobRecords) -> JobView:
    """The public face of a job: its log, its latest progress and its result."""
    progress = records.read(job.id, PROGRESS) or {}
    result = records.read(job.id, RESULT) or {}
    plan = records.read(job.id, PLAN)
    return JobView(
        id=job.id,
        status=job.state,
        step=progress.get("step"),
        total_steps=progress.get("total_steps"),
        eta_s=None if job.ended else progress.get("eta_s"),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        spec=job.spec,
        estimated=None if plan is None else expected(plan),
        measured=result.get("measured"),
        student=result.get("student"),
        schedule_student=result.get("schedule_student"),
        metrics=result.get("metrics") or progress.get("metrics"),
        gates=result.get("gates"),
        error=job.log[-1].error,
        urls={name: f"{PREFIX}/jobs/{job.id}/{name}" for name in ("events", "checkpoints", "samples", "report", "log")},
    )


def check_references(spec: specs.DistillJobSpec, records: JobRecords) -> None:
    """Refuses what the job names and nobody has.

    Raises:
        NotFound: its teacher or the job whose pairs it wants.
        InvalidRequest: a deployment that cannot be served with what the job makes.
    """
    registry = records.registry
    if "@" in spec.teacher.id:
        try:
            registry.student(spec.teacher.id)
        except StudentNotFound as error:
            raise StudentNotFound(error.message, param="teacher.id") from error
    elif (revision := registry.current(spec.teacher.id)) is None:
        raise NotFound(f"teacher.id={spec.teacher.id!r} is no deployment and no name@digest", param="teacher.id")
    elif spec.teacher.revision is not None and spec.teacher.revision > revision.number:
        message = f"teacher.revision={spec.teacher.revision}: the newest of {spec.teacher.id} is {revision.number}"
        raise NotFound(message, param="teacher.revision")
    teacher = registry.student(teacher_version(spec, registry))
    specs.check_weights(spec, teacher.guidance)
    if spec.publish and spec.publish.tiers and registry.current(spec.publish.deployment) is None:
        raise InvalidRequest(
            f"publish.deployment={spec.publish.deployment!r} does not exist: promote its teacher first",
            param="publish.deployment",
        )


def _samples(job_id: str, records: JobRecords) -> bytes:
    """The final sheet, or the newest panel while there is none."""
    files = records.registry.job_files(job_id)
    panels = sorted(name for name in files if name.startswith("panels/"))
    for name in ("samples.png", *reversed(panels)):
        if data := records.registry.read_job_file(job_id, name):
            return data
    raise NotFound(f"{job_id} has made no samples yet: they come with its first evaluation")


def _page(jobs: list[DistillJob], limit: int, after: str | None) -> tuple[list[DistillJob], bool]:
    ids = [job.id for job in jobs]
    if after is not None and after not in ids:
        raise InvalidRequest(f"after={after!r} is none of your jobs", param="after")
    start = 0 if after is None else ids.index(after) + 1
    return jobs[start : start + limit], start + limit < len(jobs)


def _id(data: list[JobView], position: int) -> str | None:
    return data[position].id if data else None


def _event_id(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise InvalidRequest(f"Last-Event-ID={text!r} is not an event id: ids are whole numbers", param="Last-Event-ID")
    return int(text)


async def _stream(records: JobRecords, job_id: str, after: int) -> AsyncIterator[str]:
    """The events as they come, until the one that ends the job."""
    silent_s = 0.0
    while True:
        # Asked before reading: whatever ended the job is then in what is read.
        ended = (await asyncio.to_thread(records.get, job_id)).ended
        fresh = await asyncio.to_thread(records.events, job_id, after)
        for event in fresh:
            after = event["id"]
            yield f"id: {after}\nevent: {event['event']}\ndata: {json.dumps(event)}\n\n"
        if any(event.get("status") in ENDED for event in fresh) or (ended and not fresh):
            yield "data: [DONE]\n\n"
            return
        silent_s = 0.0 if fresh else silent_s + _POLL_S
        if silent_s >= _KEEP_ALIVE_S:
            silent_s = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(_POLL_S)
