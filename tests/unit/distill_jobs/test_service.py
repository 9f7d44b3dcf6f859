"""What becomes of a job whose work was interrupted or failed, and what a distiller says of its jobs."""

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import generate_latest

from distill_jobs.jobs import JobState
from distill_jobs.launchers.base import Usage
from distill_jobs.launchers.process import ProcessLauncher
from distill_jobs.queue import JobQueue, connect
from distill_jobs.records import JobRecords
from distill_jobs.service import Service, _identity, _is_dead
from distill_jobs.settings import DistillerSettings
from engines.errors import StorageFull
from engines.manifest import StudentManifest
from engines.registry.base import Registry
from engines.registry.files import FilesRegistry
from engines.registry.memory import MemoryRegistry
from tests.redis_server import RedisServer
from tests.unit.distill_jobs.test_api import deploy_teacher

SPEC: dict[str, Any] = {
    "teacher": {"id": "nobody@" + "0" * 64},
    "student": {"name": "small", "steps": [1]},
    "method": {"name": "kd"},
    "train": {"iterations": 1},
}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer().start()
    yield server
    server.close()


def service(server: RedisServer, registry: Registry, work: Path, **told: Any) -> Service:
    with server.client() as client:
        client.flushall()
    settings = DistillerSettings(
        redis_url=server.url, registry_url=str(work), work_dir=work / "work", backend="eager", lease_s=5.0, **told
    )
    return Service(settings, registry, JobQueue(connect(server.url), JobRecords(registry)))


def run(made: Service, spec: dict[str, Any], stop: threading.Event | None = None) -> tuple[JobState, Any]:
    job_id = made.queue.submit(spec).id
    job = made.queue.claim(made.owner)
    assert job is not None
    made.run_one(job, stop or threading.Event())
    now = made.records.get(job_id)
    return now.state, now.log[-1].error


def test_a_job_whose_teacher_is_gone_fails_with_the_reason(server: RedisServer, tmp_path: Path) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path)
    state, error = run(made, SPEC)
    assert (state, error["code"]) == (JobState.FAILED, "student_not_found")
    assert made.queue.claim("another") is None


def test_a_store_without_folders_is_refused_and_says_so(server: RedisServer, tmp_path: Path) -> None:
    state, error = run(service(server, MemoryRegistry(), tmp_path), SPEC)
    assert (state, error["code"]) == (JobState.FAILED, "not_built")


def test_more_processes_than_the_distiller_starts_are_refused_before_any_work(
    server: RedisServer, tmp_path: Path
) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path, max_processes=2)
    spec = {**SPEC, "method": {"name": "kd", "batch": 12}, "train": {"iterations": 1, "processes": 3}}
    state, error = run(made, spec)
    assert (state, error["code"]) == (JobState.FAILED, "invalid_request")
    assert "3 is more than this distiller starts, 2 (DISTILLER_MAX_PROCESSES)" in error["message"]
    state, error = run(made, {**spec, "train": {"iterations": 1, "processes": 2}})
    assert error["code"] == "student_not_found"  # and so it went on


def test_settings_that_contradict_are_refused_before_any_work(server: RedisServer, tmp_path: Path) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path)
    two, three = {"2": [1.0, 0.5]}, {"3": [1.0, 0.6, 0.3]}
    method = {"name": "perflow", "grids": {**two, **three}}
    state, error = run(made, {**SPEC, "student": {"name": "small", "steps": [2, 3]}, "method": method})
    assert (state, error["code"]) == (JobState.FAILED, "invalid_request")
    assert "must have every edge of the 2 windows" in error["message"]
    term = {"name": "diversity", "start": 0.5, "anchor": 0.6}
    _, error = run(made, {**SPEC, "method": {"name": "kd", "terms": [term]}})
    assert "anchor 0.6 must lie below start 0.5" in error["message"]


def test_concepts_that_nobody_could_measure_are_refused_before_any_work_unless_no_gate_asks(
    server: RedisServer, tmp_path: Path
) -> None:
    registry = FilesRegistry(str(tmp_path))
    teacher, made = deploy_teacher(registry), service(server, registry, tmp_path)

    def told(*concepts: str, **more: Any) -> tuple[str, list[str]]:
        forget = [{"concept": concept} for concept in concepts]
        run(made, {**SPEC, "teacher": {"id": teacher}, "student": {**SPEC["student"], "forget": forget}, **more})
        job = made.records.all()[0]
        assert job.state is JobState.FAILED  # this teacher's weights are none
        notes = [event["message"] for event in made.records.events(job.id) if event["event"] == "note"]
        return job.log[-1].error["message"], notes  # type: ignore[index]

    error, _ = told("Blue", "red  ring", "a cat")
    assert "what is left of 'red  ring', 'a cat' cannot be measured, only of one of these each: white, grey" in error
    assert "set gates.alignment_forgotten to null" in error
    error, notes = told("Blue", "a cat", gates={"alignment_forgotten": None})
    assert "cannot be measured" not in error
    assert [note for note in notes if "what is left of 'a cat' cannot be measured" in note]
    error, notes = told("Blue", "GREY over  black")
    assert "cannot be measured" not in " ".join([error, *notes])


def test_an_error_of_ours_fails_the_job_and_not_the_service(server: RedisServer, tmp_path: Path) -> None:
    state, error = run(service(server, FilesRegistry(str(tmp_path)), tmp_path), {"nonsense": 1})
    assert (state, error["code"]) == (JobState.FAILED, "internal_error")


class _Full(FilesRegistry):
    """Has no room for whatever becomes of its students."""

    def __init__(self, folder: Path, error: Exception) -> None:
        super().__init__(folder)
        self._error = error

    def student(self, version: str) -> StudentManifest:
        raise self._error


FULL = StorageFull("no space is left")


@pytest.mark.parametrize("error", [FULL, OSError(errno.ENOSPC, "of a library")])
def test_a_job_without_space_is_paused_and_says_why(server: RedisServer, tmp_path: Path, error: Exception) -> None:
    made = service(server, _Full(tmp_path, error), tmp_path)
    state, failure = run(made, SPEC)
    assert (state, failure) == (JobState.PAUSED, None)
    note = made.records.all()[0].log[-1].note
    assert note is not None
    assert note.startswith("no space is left")
    assert made.queue.claim("another") is None


def test_one_that_is_judged_is_paused_too_and_does_nothing_twice_when_it_goes_on(
    server: RedisServer, tmp_path: Path
) -> None:
    made = service(server, _Full(tmp_path, FULL), tmp_path)
    job_id = made.queue.submit(SPEC).id
    made.records.write(job_id, "result.json", {"schedule": {}, "student": "small"})
    made.records.write(job_id, "trained/result.json", {})
    for _ in range(2):
        job = made.queue.claim(made.owner)
        assert job is not None
        made.run_one(job, threading.Event())
        assert made.records.get(job_id).state is JobState.PAUSED
        made.queue.command(job_id, "resume")
    states = [str(entry.state) for entry in made.records.get(job_id).log if not entry.claim]
    assert states == ["queued", *2 * ["running", "exporting", "evaluating", "paused", "queued"]]


def test_a_stopping_service_leaves_the_job_to_the_next_at_once(server: RedisServer, tmp_path: Path) -> None:
    made, stop = service(server, FilesRegistry(str(tmp_path)), tmp_path), threading.Event()
    stop.set()
    state, _ = run(made, SPEC, stop)
    assert state is JobState.QUEUED
    assert made.queue.claim("another") is not None


class _Left(ProcessLauncher):
    """Has a trainer left of every job that it is asked about."""

    def __init__(self, jobs: list[str]) -> None:
        self.jobs = jobs

    def sweep(self, over: Callable[[str], bool]) -> None:
        self.jobs = [job for job in self.jobs if not over(job)]


@pytest.mark.parametrize(("command", "state"), [("cancel", JobState.CANCELED), ("pause", JobState.PAUSED)])
def test_a_command_that_came_with_the_claim_is_obeyed_and_no_trainer_left_of_an_earlier_one(
    server: RedisServer, tmp_path: Path, command: str, state: JobState
) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path)
    job, other = made.queue.submit(SPEC), made.queue.submit(SPEC)
    made.launcher = left = _Left([job.id, other.id, "dj_unknown"])
    with server.client() as client:
        client.set(f"fewstep:v1:jobs:command:{job.id}", command)
    claimed = made.queue.claim(made.owner)
    assert claimed is not None
    made.run_one(claimed, threading.Event())
    assert made.records.get(job.id).state is state
    assert made.queue.commanded(job.id) is None
    assert left.jobs == [other.id, "dj_unknown"]


def test_who_lost_the_job_writes_nothing_more(server: RedisServer, tmp_path: Path) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path)
    job_id = made.queue.submit(SPEC).id
    mine = made.queue.claim(made.owner)
    assert mine is not None
    made.records.claim(job_id, "another")
    before = made.records.get(job_id).log
    made.metrics.progress(job_id, {"step": 3})
    made.run_one(mine, threading.Event())
    assert made.records.get(job_id).log == before
    assert job_id not in generate_latest(made.metrics.registry).decode()


def test_the_metrics_count_jobs_by_state_as_they_are_now(server: RedisServer, tmp_path: Path) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path)
    made.queue.submit(SPEC)
    text = generate_latest(made.metrics.registry).decode()
    assert 'fewstep_distill_jobs{state="queued"} 1.0' in text
    assert 'fewstep_distill_jobs{state="failed"} 0.0' in text


def test_the_series_of_an_ended_job_are_gone(server: RedisServer, tmp_path: Path) -> None:
    made = service(server, FilesRegistry(str(tmp_path)), tmp_path)
    made.metrics.progress("dj_1", {"step": 3, "losses": {"student": 0.5}, "metrics": {"fd": 1.5}})
    assert made.metrics.registry.get_sample_value("fewstep_distill_step", {"job_id": "dj_1"}) == 3
    made.metrics.entered("dj_1", JobState.RUNNING, 1.0)
    made.metrics.watch("dj_1", lambda: Usage(cpu_s=1.0, memory_bytes=2))
    made.metrics.judged("dj_1", {"metrics": {"4": {"fd": 1.0}}, "teacher": {"fd": 1.0}})
    made.metrics.forget("dj_1")
    assert b"dj_1" not in generate_latest(made.metrics.registry)


def test_a_dead_distiller_of_this_machine_is_known_as_one() -> None:
    host, me = socket.gethostname(), psutil.Process()
    assert not _is_dead(_identity())
    assert _is_dead(f"{host}:{me.pid}:1.00")  # another process had this id
    assert _is_dead(f"{host}:{2**22 + 1}:1.00")
    assert not _is_dead(f"elsewhere:{os.getpid()}:1.00")
    assert not _is_dead("unreadable")
