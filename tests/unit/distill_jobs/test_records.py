"""The files of a job: written once, continued by one writer at a time, readable by everybody at any moment."""

import threading

import pytest

from distill_jobs.jobs import JobState
from distill_jobs.records import JobRecords
from engines.errors import Conflict, IdempotencyConflict, JobNotFound, LeaseLost
from engines.registry.files import FilesRegistry

SPEC = {"teacher": {"id": "shapes"}}


@pytest.fixture
def records(tmp_path: object) -> JobRecords:
    return JobRecords(FilesRegistry(str(tmp_path)))


def test_a_job_is_read_back_by_somebody_else(records: JobRecords) -> None:
    job = records.create(SPEC, owner="me")
    again = JobRecords(records.registry).get(job.id)
    assert (again.state, again.spec, again.owner) == (JobState.QUEUED, SPEC, "me")


def test_the_same_idempotency_key_makes_one_job(records: JobRecords) -> None:
    job = records.create(SPEC, owner="me", idempotency_key="k")
    assert records.create(SPEC, owner="me", idempotency_key="k").id == job.id
    assert records.create(SPEC, owner="you", idempotency_key="k").id != job.id
    with pytest.raises(IdempotencyConflict):
        records.create({"other": 1}, owner="me", idempotency_key="k")
    assert [event["status"] for event in records.events(job.id)] == ["queued"]


@pytest.mark.parametrize("job_id", ["dj_0", "dj_../../etc", "../x", "", "dj_" + "a" * 80])
def test_an_unknown_id_is_not_found_and_never_a_path(records: JobRecords, job_id: str) -> None:
    with pytest.raises(JobNotFound):
        records.get(job_id)


def test_two_claims_at_once_leave_one_owner(records: JobRecords) -> None:
    job = records.create(SPEC)
    start = threading.Barrier(4)

    def claim(name: str) -> None:
        start.wait()
        JobRecords(records.registry).claim(job.id, name)

    threads = [threading.Thread(target=claim, args=(str(i),)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    now = records.get(job.id)
    assert [entry.number for entry in now.log] == [1, 2, 3, 4, 5]
    records.move(job.id, JobState.PREPARING, fence=now.fence)
    with pytest.raises(LeaseLost):
        records.move(job.id, JobState.RUNNING, fence=now.log[-2].fence)


def test_events_are_numbered_and_can_be_continued(records: JobRecords) -> None:
    job = records.create(SPEC)
    for step in (1, 2, 3):
        records.event(job.id, "progress", step=step)
    assert [event["id"] for event in records.events(job.id)] == [1, 2, 3, 4]
    assert [event["step"] for event in records.events(job.id, after=2)] == [2, 3]


def test_a_line_that_is_still_being_written_waits(records: JobRecords) -> None:
    job = records.create(SPEC)
    folder = records.registry.job_path(job.id)
    assert folder is not None
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "prog')
    assert len(records.events(job.id)) == 1


def test_moving_tells_the_events_why(records: JobRecords) -> None:
    job = records.create(SPEC)
    records.claim(job.id, "a")
    records.move(job.id, JobState.FAILED, fence=2, error={"code": "job_failed", "message": "why"})
    assert records.events(job.id)[-1]["error"]["message"] == "why"
    with pytest.raises(Conflict):
        records.move(job.id, JobState.QUEUED)
