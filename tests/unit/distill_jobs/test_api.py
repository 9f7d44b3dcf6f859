"""The routes of distillation jobs over real files and a real Redis, as a client sees them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from openai import BadRequestError, OpenAI
from safetensors.torch import save

from distill_jobs.api import router
from distill_jobs.jobs import JobState
from distill_jobs.methods import _schemas
from distill_jobs.plan import Plan, StagePlan
from distill_jobs.queue import JobQueue, connect
from distill_jobs.records import JobRecords
from engines.errors import AuthenticationFailed, FewstepError
from engines.manifest import Component, Schedule, StudentManifest
from engines.registry.base import Registry, Revision, TierTarget
from engines.registry.files import FilesRegistry
from tests.redis_server import RedisServer

WEIGHTS = {"to_q.weight": torch.zeros(40, 30), "conv.weight": torch.zeros(5, 10, 3, 3), "norm.weight": torch.zeros(100)}
JOBS = "/v1/distillation/jobs"
SPEC: dict[str, Any] = {
    "teacher": {"id": "shapes"},
    "student": {"name": "small", "steps": [1, 2]},
    "method": {"name": "kd"},
    "train": {"iterations": 100},
}


@dataclass(frozen=True)
class Who:
    owner: str

    def sees(self, owner: str) -> bool:
        return self.owner in (owner, "admin")


def authorise(authorization: str | None, scope: str) -> Who:
    if authorization is None:
        raise AuthenticationFailed("no API key")
    return Who(authorization)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer().start()
    yield server
    server.close()


@pytest.fixture
def queue(server: RedisServer, tmp_path: Path) -> Iterator[JobQueue]:
    registry = FilesRegistry(str(tmp_path))
    deploy_teacher(registry)
    with server.client() as admin:
        admin.flushall()
    client = connect(server.url)
    yield JobQueue(client, JobRecords(registry))
    client.close()


@pytest.fixture
def http(queue: JobQueue) -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(router(queue, authorise))

    @app.exception_handler(FewstepError)
    async def answer(request: Request, error: FewstepError) -> JSONResponse:
        return JSONResponse({"code": error.code, "message": error.message, "param": error.param}, 400)

    with TestClient(app, headers={"authorization": "me"}) as client:
        yield client


def teacher_of(queue: JobQueue) -> str:
    revision = queue.records.registry.current("shapes")
    assert revision is not None
    return revision.tiers["high"].student


def deploy_teacher(registry: Registry, *, number: int = 1, steps: int = 2) -> str:
    part = Component(weights=registry.put_blob(save(WEIGHTS)), files={})
    manifest = StudentManifest(
        name="shapes",
        family="sd",
        kind="teacher",
        components={"encoder": part, "denoiser": part, "decoder": part},
        schedules={steps: Schedule(times=tuple(1 - i / steps for i in range(steps + 1)))},
        resolutions=((64, 64),),
        latent_channels=4,
        downscale=8,
    )
    version = registry.publish(manifest)
    registry.commit(
        Revision(
            deployment="shapes",
            number=number,
            tiers={"high": TierTarget(student=version, steps=steps)},
            default_tier="high",
            allowed={version: [steps]},
            created_at="2026-01-01T00:00:00Z",
        )
    )
    return version


def test_a_job_is_created_and_found(http: TestClient) -> None:
    created = http.post(JOBS, json=SPEC)
    assert created.status_code == 201
    job = created.json()
    assert created.headers["location"] == f"{JOBS}/{job['id']}"
    assert (job["object"], job["status"]) == ("distillation.job", "queued")
    assert http.get(f"{JOBS}/{job['id']}").json() == job


def test_a_repeated_post_with_its_key_makes_one_job(http: TestClient) -> None:
    first, second = (http.post(JOBS, json=SPEC, headers={"idempotency-key": "k"}).json()["id"] for _ in range(2))
    assert first == second
    other = http.post(JOBS, json={**SPEC, "train": {"iterations": 1}}, headers={"idempotency-key": "k"})
    assert other.json()["code"] == "idempotency_conflict"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"teacher": {"id": "nobody"}}, "not_found", "teacher.id"),
        ({"teacher": {"id": "shapes", "revision": 9}}, "not_found", "teacher.revision"),
        ({"teacher": {"id": "shapes@" + "0" * 64}}, "student_not_found", "teacher.id"),
        ({"publish": {"deployment": "nowhere", "tiers": {"low": 1}}}, "invalid_request", "publish.deployment"),
        ({"train": {"iterations": 1, "processes": 3}}, "invalid_request", "train.processes"),
    ],
)
def test_a_job_that_cannot_run_is_refused_when_it_is_submitted(
    http: TestClient, changes: dict[str, Any], code: str, param: str | None
) -> None:
    answer = http.post(JOBS, json={**SPEC, **changes}).json()
    assert (answer["code"], answer["param"]) == (code, param)
    assert http.get(JOBS).json()["data"] == []


def test_jobs_of_others_are_not_there(http: TestClient) -> None:
    job_id = http.post(JOBS, json=SPEC).json()["id"]
    stranger, admin = {"authorization": "you"}, {"authorization": "admin"}
    assert http.get(f"{JOBS}/{job_id}", headers=stranger).json()["code"] == "job_not_found"
    assert http.post(f"{JOBS}/{job_id}/cancel", headers=stranger).json()["code"] == "job_not_found"
    assert http.get(JOBS, headers=stranger).json()["data"] == []
    assert http.get(f"{JOBS}/{job_id}", headers=admin).status_code == 200


def test_the_list_is_newest_first_and_paged(http: TestClient) -> None:
    ids = [http.post(JOBS, json=SPEC).json()["id"] for _ in range(3)]
    page = http.get(JOBS, params={"limit": 2}).json()
    rest = http.get(JOBS, params={"limit": 2, "after": page["last_id"]}).json()
    assert [job["id"] for job in page["data"] + rest["data"]] == ids[::-1]
    assert (page["has_more"], rest["has_more"]) == (True, False)
    assert http.get(JOBS, params={"after": "dj_0"}).json()["param"] == "after"


def test_a_job_is_paused_resumed_and_canceled(http: TestClient) -> None:
    job_id = http.post(JOBS, json=SPEC).json()["id"]
    states = [http.post(f"{JOBS}/{job_id}/{verb}").json()["status"] for verb in ("pause", "resume", "cancel")]
    assert states == ["paused", "queued", "canceled"]
    assert http.post(f"{JOBS}/{job_id}/cancel").json()["code"] == "already_ended"


def test_the_stream_continues_after_the_last_event_and_ends_with_the_job(http: TestClient, queue: JobQueue) -> None:
    job_id = http.post(JOBS, json=SPEC).json()["id"]
    for step in (1, 2):
        queue.records.event(job_id, "progress", step=step)
    queue.records.move(job_id, JobState.CANCELED)
    headers = {"accept": "text/event-stream", "last-event-id": "2"}
    with http.stream("GET", f"{JOBS}/{job_id}/events", headers=headers) as response:
        text = "".join(response.iter_text())
    data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["id"] for event in data] == [3, 4]
    assert data[-1]["status"] == "canceled"
    assert text.endswith("data: [DONE]\n\n")


def test_events_are_a_list_too(http: TestClient, queue: JobQueue) -> None:
    job_id = http.post(JOBS, json=SPEC).json()["id"]
    queue.records.event(job_id, "checkpoint", step=7, best=True, metrics={"fd_ratio": 1.5})
    events = http.get(f"{JOBS}/{job_id}/events").json()
    assert [event["event"] for event in events["data"]] == ["status", "checkpoint"]
    assert http.get(f"{JOBS}/{job_id}/checkpoints").json()["data"][0]["step"] == 7
    assert http.get(f"{JOBS}/{job_id}/events", headers={"last-event-id": "x"}).json()["param"] == "Last-Event-ID"


def test_samples_are_the_newest_panel_until_the_sheet_is_there(http: TestClient, queue: JobQueue) -> None:
    job_id = http.post(JOBS, json=SPEC).json()["id"]
    assert http.get(f"{JOBS}/{job_id}/samples").json()["code"] == "not_found"
    registry = queue.records.registry
    for name in ("panels/000010.png", "panels/000200.png"):
        registry.write_job_file(job_id, name, name.encode())
    assert http.get(f"{JOBS}/{job_id}/samples").content == b"panels/000200.png"
    registry.write_job_file(job_id, "samples.png", b"sheet")
    answer = http.get(f"{JOBS}/{job_id}/samples")
    assert (answer.content, answer.headers["content-type"]) == (b"sheet", "image/png")


def test_the_report_is_a_page_that_may_load_nothing(http: TestClient) -> None:
    job = http.post(JOBS, json=SPEC).json()
    answer = http.get(job["urls"]["report"])
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert job["id"] in answer.text
    assert http.get(job["urls"]["report"], headers={"authorization": "you"}).json()["code"] == "job_not_found"


ESTIMATE = "/v1/distillation/estimate"


def test_an_estimate_says_what_it_knows_and_where_from(http: TestClient) -> None:
    """Of each network in training weight and two moments; one gradient, one average, one best student."""
    unknown = http.post(ESTIMATE, json=SPEC).json()
    assert unknown["train_seconds"] is None
    assert unknown["memory_bytes"] == 1750 * 4 * (1 + 3 + 3)
    assert "lower bound without activations" in unknown["basis"]["memory_bytes"]
    timed = {**SPEC, "method": {"name": "sid"}, "train": {"max_minutes": 5}}
    known = http.post(ESTIMATE, json=timed).json()
    assert (known["train_seconds"], known["hard_stop_seconds"]) == (300.0, 600.0)
    assert known["memory_bytes"] == 1750 * 4 * (1 + 2 * 3 + 3)


def test_an_estimate_is_what_an_equal_job_needed(http: TestClient, queue: JobQueue) -> None:
    records = queue.records
    job = records.claim(http.post(JOBS, json=SPEC).json()["id"], "distiller")
    records.write(job.id, "progress.json", {"step": 50})
    records.write(job.id, "result.json", {"measured": {"memory_bytes": 7_000_000, "train_seconds": 5.0}})
    records.write(job.id, "trainer.json", {"teacher": teacher_of(queue)})
    longer = {**SPEC, "student": {**SPEC["student"], "name": "other"}, "train": {"iterations": 300}}
    assert http.post(ESTIMATE, json=longer).json()["train_seconds"] is None  # it has not ended
    for state in list(JobState)[1:3] + list(JobState)[4:8]:
        records.move(job.id, state, fence=job.fence)
    told = http.post(ESTIMATE, json=longer).json()
    assert (told["memory_bytes"], told["iterations_per_s"], told["train_seconds"]) == (7_000_000, 10.0, 30.0)
    assert set(told["basis"].values()) == {f"measured by {job.id}"}
    for unlike in ({"method": {"name": "sid"}}, {"train": {"iterations": 300, "batch": 8}}):
        assert http.post(ESTIMATE, json={**SPEC, **unlike}).json()["train_seconds"] is None
    assert http.post(ESTIMATE, json=longer, headers={"authorization": "you"}).json()["train_seconds"] is None


def test_an_equal_job_has_the_same_teacher_under_whatever_name(http: TestClient, queue: JobQueue) -> None:
    records, first = queue.records, teacher_of(queue)
    job = records.claim(http.post(JOBS, json=SPEC).json()["id"], "distiller")
    records.write(job.id, "progress.json", {"step": 50})
    records.write(job.id, "result.json", {"measured": {"memory_bytes": 7_000_000, "train_seconds": 5.0}})
    records.write(job.id, "trainer.json", {"teacher": first})
    for state in list(JobState)[1:3] + list(JobState)[4:8]:
        records.move(job.id, state, fence=job.fence)
    deploy_teacher(records.registry, number=2, steps=4)

    def seconds(**teacher: Any) -> Any:
        return http.post(ESTIMATE, json={**SPEC, "teacher": teacher}).json()["train_seconds"]

    assert seconds(id="shapes") is None
    assert seconds(id="shapes", revision=2) is None
    assert seconds(id="shapes", revision=1) == 10.0
    assert seconds(id=first) == 10.0


def test_a_job_of_an_earlier_release_is_no_equal_and_no_obstacle(http: TestClient, queue: JobQueue) -> None:
    records = queue.records
    job = queue.submit({**SPEC, "train": {"iterations": 300, "warmup": 5}}, owner="me")
    fence = records.claim(job.id, "distiller").fence
    for state in list(JobState)[1:3] + list(JobState)[4:8]:
        records.move(job.id, state, fence=fence)
    assert http.post(ESTIMATE, json=SPEC).status_code == 200


def test_a_job_shows_what_training_should_need_and_what_it_needed(http: TestClient, queue: JobQueue) -> None:
    job = http.post(JOBS, json=SPEC).json()
    assert (job["estimated"], job["measured"]) == (None, None)
    plan = Plan((StagePlan("kd", 5, seconds=2.5),), eval_every=5, bf16=False, memory_bytes=10)
    queue.records.write(job["id"], "plan.json", plan.as_dict())
    queue.records.write(job["id"], "result.json", {"measured": {"memory_bytes": 12, "train_seconds": 3.0}})
    shown = http.get(f"{JOBS}/{job['id']}").json()
    assert shown["estimated"] == {"memory_bytes": 10, "train_seconds": 2.5}
    assert shown["measured"] == {"memory_bytes": 12, "train_seconds": 3.0}
    before = {key: value for key, value in plan.as_dict().items() if key != "memory_bytes"}
    queue.records.write(job["id"], "plan.json", before)
    assert http.get(f"{JOBS}/{job['id']}").json()["estimated"] is None


def test_the_estimate_of_a_lora_has_one_backbone_and_small_trained_matrices(http: TestClient) -> None:
    for targets, weights in (("auto", 3 * (40 + 30) + 3 * (5 + 10 * 9)), (["to_q"], 3 * (40 + 30))):
        lora = {"rank": 3, "targets": targets}
        body = {**SPEC, "student": {**SPEC["student"], "train": {"lora": lora}}, "method": {"name": "sid"}}
        told = http.post(ESTIMATE, json=body).json()
        assert told["memory_bytes"] == 4 * (1750 + weights * (2 * 3 + 1 + 1 + 1))


def test_the_methods_and_terms_that_a_job_may_name_are_listed(http: TestClient) -> None:
    listed = http.get("/v1/distillation/methods").json()
    methods = {one["name"]: one for one in listed["data"]}
    assert methods.keys() == _schemas.schemas().keys()
    assert methods["kd"]["paper"] == "2101.02388"
    assert methods["lsd"]["inputs"] == ["s"]
    assert methods["sid"]["roles"] == ["fake", "student"]
    assert methods["kd"]["settings"]["properties"]["teacher_steps"]["default"] == 16
    assert {one["name"] for one in listed["terms"]} == _schemas.terms().keys()


def test_the_documented_shapes_are_complete(http: TestClient) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths[f"{JOBS}/{{job_id}}/{{command}}"]["post"]["responses"]) >= {"200", "400", "404", "409", "503"}
    assert "application/json" in paths[f"{JOBS}"]["post"]["responses"]["201"]["content"]


@pytest.fixture
def sdk(http: TestClient) -> Iterator[OpenAI]:
    """OpenAI's own client over the same application."""
    with OpenAI(base_url=f"{http.base_url}/v1", api_key="me", http_client=http, max_retries=0) as client:
        yield client


def test_openais_sdk_drives_a_job_through_its_life(sdk: OpenAI, http: TestClient, queue: JobQueue) -> None:
    job = sdk.fine_tuning.jobs.create(
        model="shapes",
        training_file="shapes",
        suffix="from-sdk",
        seed=7,
        metadata={"ticket": "1"},
        extra_body={"method": {"type": "distillation", "distillation": {"train": {"iterations": 5}}}},
    )
    assert (job.object, job.status, job.model, job.metadata) == ("fine_tuning.job", "queued", "shapes", {"ticket": "1"})
    native = http.get(f"{JOBS}/{job.id}", headers={"authorization": "Bearer me"}).json()
    assert native["spec"]["student"]["name"] == "from-sdk"
    assert native["spec"]["train"]["iterations"] == 5

    assert [found.id for found in sdk.fine_tuning.jobs.list()] == [job.id]
    assert sdk.fine_tuning.jobs.pause(job.id).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job.id).status == "queued"
    queue.records.event(job.id, "checkpoint", step=3, best=True, metrics={"fd": 1.5})
    assert [c.step_number for c in sdk.fine_tuning.jobs.checkpoints.list(job.id)] == [3]
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert messages[0] == "canceled"
    assert len(messages) == 5  # paged by two, newest first
    assert sdk.fine_tuning.jobs.retrieve(job.id).finished_at is not None


def test_openais_sdk_is_refused_what_the_native_dialect_refuses(sdk: OpenAI) -> None:
    with pytest.raises(BadRequestError):
        sdk.fine_tuning.jobs.create(model="nobody", training_file="shapes")
    with pytest.raises(BadRequestError):
        sdk.fine_tuning.jobs.retrieve("dj_0")
