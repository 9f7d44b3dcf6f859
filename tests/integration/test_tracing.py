"""Spans as a collector gets them: of a request through real gateway, Redis and worker, of a swap, of a job."""

import asyncio
import io
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from distill_jobs import train
from distill_jobs.jobs import JobState
from distill_jobs.queue import JobQueue, connect
from distill_jobs.records import JobRecords
from distill_jobs.service import Service
from distill_jobs.settings import DistillerSettings
from engines.registry.base import Registry
from engines.registry.files import FilesRegistry
from engines.registry.memory import MemoryRegistry
from server import logs, tracing
from server.brokers.base import new_identity
from server.brokers.redis import RedisBroker
from server.commands.processes import log_job, trace_job
from tests import gateway_stack, prometheus_server, tiny_sd
from tests.eventually import aeventually, eventually
from tests.integration.worker_stack import MODEL, Running, copied, propose, running, student
from tests.otlp_receiver import Receiver, receiving
from tests.redis_server import RedisServer
from tests.unit.server.manifests import manifest, publish, revision

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SCRAPES = Path(__file__).parents[2] / "docker" / "prometheus" / "prometheus.yml"
BODY = {"model": MODEL, "prompt": "a red circle", "n": 2, "seed": 7, "store": False}
_SERVER, _CONSUMER = 2, 5  # kinds of OTLP


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        yield made


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    made = RedisServer().start()
    yield made
    made.close()


async def through_both(redis: RedisServer, *headers: dict[str, str]) -> tuple[list[httpx.Response], str]:
    """Answers to these requests by a gateway and a worker of their own, and the gateway's series afterwards."""
    registry = copied(tiny_sd.teacher())
    sides = [RedisBroker(redis.url, new_identity(name)) for name in ("gateway", "unused", "worker", "asks")]
    with tracing.opened("gateway") as front, tracing.opened("worker") as back:
        for side in sides[2:]:
            await side.start()
        try:
            async with running(sides[2], sides[3], registry=registry, tracing=back):
                return await asyncio.to_thread(asked, registry, (sides[0], sides[1]), front, headers)
        finally:
            for side in sides[2:]:
                await side.close()


def asked(
    registry: Registry,
    sides: tuple[RedisBroker, RedisBroker],
    front: tracing.Tracing | None,
    headers: tuple[dict[str, str], ...],
) -> tuple[list[httpx.Response], str]:
    with gateway_stack.running(registry=registry, worker=False, brokers=sides, tracing=front) as stack:
        eventually(lambda: stack.client.get("/readyz").status_code == 200, 20)
        answers = [stack.client.post("/v1/generations", json=BODY, headers=one) for one in headers]
        series = stack.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert series.headers["content-type"].startswith("application/openmetrics-text")
        return answers, series.text


async def test_a_request_is_one_trace_from_the_client_to_its_steps(collector: Receiver, redis: RedisServer) -> None:
    (answer,), series = await through_both(redis, {"traceparent": f"00-{TRACE}-{CLIENT}-01"})
    assert answer.status_code == 200, answer.text
    assert {span.trace_id for span in collector.spans} == {TRACE}

    http, generate = collector.one("POST /v1/generations"), collector.one("generate")
    assert (http.service, http.kind, http.parent_id) == ("fewstep-gateway", _SERVER, CLIENT)
    assert (generate.service, generate.kind, generate.parent_id) == ("fewstep-worker", _CONSUMER, http.span_id)
    assert http.attributes["http.response.status_code"] == 200
    assert http.attributes["fewstep.http.request_id"] == answer.headers["x-request-id"]
    assert generate.attributes["fewstep.request.id"] == answer.json()["id"]
    assert generate.attributes["fewstep.status"] == "succeeded"
    assert http.error is None
    assert generate.error is None

    rows = Counter[int]()  # its two pictures may share a call or not
    for step in collector.below(generate.span_id, "denoise"):
        rows[step.attributes["fewstep.step"]] += step.attributes["fewstep.rows"]
    assert rows == {1: 2, 2: 2, 3: 2, 4: 2}
    pictures = collector.below(generate.span_id, "image")
    assert {picture.attributes["fewstep.picture"] for picture in pictures} == {0, 1}
    assert f'trace_id="{TRACE}"' in line_of(series, "fewstep_request_seconds_bucket")


def test_prometheus_keeps_the_trace_of_a_request_beside_its_latency(collector: Receiver, tmp_path: Path) -> None:
    registry, painted, began_s = MemoryRegistry(), manifest("shapes-fast", 4), time.time()
    sampled = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
    publish(registry, painted)

    def marks() -> list[dict[str, Any]]:
        return prometheus.exemplars("fewstep_request_seconds_bucket", began_s, time.time())

    with (
        tracing.opened("gateway") as front,
        gateway_stack.running(revision(1, {"medium": (painted, 4)}), registry=registry, tracing=front) as stack,
        prometheus_server.running(
            tmp_path, {"fewstep-gateway": [stack.url.removeprefix("http://")]}, SCRAPES
        ) as prometheus,
    ):
        answer = stack.client.post("/v1/generations", json=BODY | {"model": "shapes"}, headers=sampled)
        assert answer.status_code == 200, answer.text
        [mark] = eventually(marks, 20)
    assert mark["labels"]["trace_id"] == TRACE
    assert 0 < float(mark["value"]) < 10


async def test_its_times_are_those_of_the_answer(collector: Receiver, redis: RedisServer) -> None:
    (answer,), _ = await through_both(redis, {})
    timing, generate = answer.json()["timing"], collector.one("generate")
    for name in ("queue", "encode", "denoise", "decode", "image"):
        spans = collector.below(generate.span_id, name)
        assert sum(span.ms for span in spans) == pytest.approx(timing[f"{name}_ms"], abs=0.01), name
    children = collector.below(generate.span_id)
    assert min(child.begun_ns for child in children) == generate.begun_ns
    assert all(child.ended_ns <= generate.ended_ns for child in children)
    (sent,) = collector.below(generate.span_id, "answer")
    assert (sent.begun_ns - generate.begun_ns) / 1e6 == pytest.approx(timing["total_ms"], abs=0.01)


async def test_what_is_not_sampled_leaves_nothing(
    collector: Receiver, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unsampled,), series = await through_both(redis, {"traceparent": f"00-{TRACE}-{CLIENT}-00"})
    assert unsampled.status_code == 200
    assert "trace_id" not in series
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    (off,), _ = await through_both(redis, {})
    assert off.status_code == 200
    assert collector.spans == []


async def test_the_share_that_is_sampled_is_told_by_the_variables(
    collector: Receiver, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By trace id, of which the lowest 64 bits count: a half of zeros is in every share, one of ones in none."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    low, high = "1" * 16 + "0" * 15 + "1", "1" * 16 + "f" * 16
    await through_both(redis, *({"traceparent": f"00-{trace}-{CLIENT}-01"} for trace in (low, high)))
    assert {span.trace_id for span in collector.spans} == {low}
    assert {span.name for span in collector.spans} >= {"POST /v1/generations", "generate"}


async def test_a_failed_request_says_why(collector: Receiver, redis: RedisServer) -> None:
    registry = copied(tiny_sd.teacher())
    gateway, worker = (RedisBroker(redis.url, new_identity(name)) for name in ("gateway", "worker"))
    with tracing.opened("worker") as traced:
        await gateway.start()
        await worker.start()
        async with running(worker, gateway, registry=registry, tracing=traced) as up:
            await up.answer(up.request("r1", steps=3))
        await gateway.close()
        await worker.close()
    generate = collector.one("generate")
    assert generate.parent_id == ""
    assert (generate.error or "").startswith("steps_not_allowed: ")


async def test_a_swap_is_a_span_with_its_phases(collector: Receiver, redis: RedisServer) -> None:
    registry = copied(tiny_sd.teacher())
    gateway, worker = (RedisBroker(redis.url, new_identity(name)) for name in ("gateway", "worker"))
    with tracing.opened("worker") as traced:
        await gateway.start()
        await worker.start()
        async with running(worker, gateway, registry=registry, tracing=traced) as up:
            above = f"00-{TRACE}-{CLIENT}-01"
            good = propose(registry, student(registry, 0.9), 4, traceparent=above)
            assert (await up.outcome(good)).state == "live"
            await drained(up, good.swap_id)
            base = registry.student(student(registry, 1.1, name="bad"))
            golden = registry.student(good.tiers["low"].student).golden
            bad = propose(registry, registry.publish(base.model_copy(update={"golden": golden})), 4)
            assert (await up.outcome(bad)).state == "dropped"
        await gateway.close()
        await worker.close()
    swap, dropped = sorted((one for one in collector.spans if one.name == "swap"), key=lambda one: one.begun_ns)
    assert (swap.trace_id, swap.parent_id, swap.error) == (TRACE, CLIENT, None)
    assert swap.attributes["fewstep.swap.id"] == good.swap_id
    phases = collector.below(swap.span_id)
    names = [phase.name for phase in phases]
    assert names[0] == "staged"
    assert names[-3:] == ["ready", "live", "draining"]
    assert "verifying" in names
    assert sum(phase.ms for phase in phases) == pytest.approx(swap.ms, abs=0.001)
    assert dropped.trace_id != TRACE
    assert (dropped.error or "").startswith("golden_mismatch at verifying")


async def drained(up: Running, swap_id: str) -> None:
    async def check() -> bool:
        return any(phase.phase == "drained" for phase in (await up.gateway.phases(swap_id)).values())

    await aeventually(check, 20)


def test_a_job_is_a_span_with_its_states(collector: Receiver) -> None:
    times = (f"2026-01-01T00:00:{second:02d}.000Z" for second in range(60))
    records = JobRecords(MemoryRegistry(), now=lambda: next(times))
    job = records.create({"teacher": "x"}, traceparent=f"00-{TRACE}-{CLIENT}-01")
    fence = records.claim(job.id, "distiller").fence
    for state in (JobState.PREPARING, JobState.RUNNING):
        records.move(job.id, state, fence=fence)
    records.move(job.id, JobState.FAILED, fence=fence, error={"code": "job_failed", "message": "it diverged"})
    with tracing.opened("distiller") as traced:
        trace_job(traced, records.get(job.id))
    span = collector.one("job")
    assert (span.service, span.trace_id, span.parent_id) == ("fewstep-distiller", TRACE, CLIENT)
    assert span.attributes == {"fewstep.job.id": job.id, "fewstep.job.status": "failed"}
    assert span.error == "job_failed: it diverged"
    states = collector.below(span.span_id)
    assert [state.name for state in states] == ["queued", "preparing", "running"]
    assert sum(state.ms for state in states) == span.ms > 0


def test_every_line_about_a_job_names_its_trace(redis: RedisServer, tmp_path: Path) -> None:
    records = JobRecords(FilesRegistry(tmp_path / "registry"))
    queue = JobQueue(connect(redis.url), records)
    settings = DistillerSettings(redis_url=redis.url, registry_url=str(tmp_path / "registry"), work_dir=tmp_path)
    job = queue.submit({"teacher": "x"}, traceparent=f"00-{TRACE}-{CLIENT}-01")
    stop, written = threading.Event(), io.StringIO()
    service = Service(settings, records.registry, queue, working=log_job, ended=lambda job: stop.set())
    with logging_to(written):
        service.run_forever(stop)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["message"] for line in lines if line["level"] == "INFO"] == ["claimed a job", "left a job"]
    assert {(line["job_id"], line["trace_id"]) for line in lines} == {(job.id, TRACE)}


def test_the_trainers_own_lines_name_it_too(tmp_path: Path) -> None:
    registry = FilesRegistry(tmp_path)
    job = JobRecords(registry).create({"teacher": "x"}, traceparent=f"00-{TRACE}-{CLIENT}-01")
    other = JobRecords(registry).create({"teacher": "x"}, traceparent="nonsense")
    formats = [train.log_format(registry.job_path(one.id) or tmp_path) for one in (job, other)]
    assert [f"trace_id={TRACE}" in one for one in formats] == [True, False]


@contextmanager
def logging_to(stream: io.StringIO) -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers, root.level
    logs.configure("distiller", "info", stream)
    try:
        yield
    finally:
        root.handlers, root.level = before


def line_of(series: str, name: str) -> str:
    """The buckets of a series, those with an exemplar."""
    return "\n".join(line for line in series.splitlines() if line.startswith(name) and " # " in line)
