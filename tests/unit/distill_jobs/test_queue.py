"""Who works on what: a real Redis, whose loss at any point delays jobs and loses none."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_jobs.jobs import JobState
from distill_jobs.queue import JobQueue, Lease, connect
from distill_jobs.records import JobRecords
from engines.errors import AlreadyEnded, Conflict, LeaseLost, NotBuilt, Unavailable
from engines.registry.files import FilesRegistry
from tests.eventually import eventually
from tests.redis_server import RedisServer

SPEC = {"teacher": {"id": "shapes"}}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer().start()
    yield server
    server.close()


@pytest.fixture
def queue(server: RedisServer, tmp_path: Path) -> Iterator[JobQueue]:
    with server.client() as admin:
        admin.flushall()
    client = connect(server.url)
    yield JobQueue(client, JobRecords(FilesRegistry(str(tmp_path))), lease_s=0.3)
    client.close()


def test_jobs_are_claimed_in_the_order_they_came(queue: JobQueue) -> None:
    ids = [queue.submit({**SPEC, "n": n}).id for n in range(3)]
    claimed = [queue.claim("me") for _ in range(4)]
    assert [job.id if job else None for job in claimed] == [*ids, None]


def test_a_claimed_job_is_nobody_elses_until_its_lease_ends(queue: JobQueue) -> None:
    job = queue.submit(SPEC)
    mine = queue.claim("me")
    assert mine is not None
    assert queue.claim("you") is None

    theirs = eventually(lambda: queue.claim("you"), 2)

    assert theirs is not None
    assert theirs.id == job.id
    with pytest.raises(LeaseLost):
        queue.records.move(job.id, JobState.PREPARING, fence=mine.fence)


def test_a_renewed_lease_does_not_end(queue: JobQueue) -> None:
    job = queue.submit(SPEC)
    queue.claim("me")
    with Lease(queue, job.id, "me") as lease:
        assert not lease.lost.wait(1.0)  # three leases long
        assert queue.claim("you") is None


def test_a_lost_lease_is_told_to_its_owner(queue: JobQueue, server: RedisServer) -> None:
    job = queue.submit(SPEC)
    queue.claim("me")
    with Lease(queue, job.id, "me") as lease, server.client() as client:
        client.set(f"fewstep:v1:jobs:lease:{job.id}", "you", px=60_000)
        assert lease.lost.wait(3)


def test_a_redis_that_forgot_everything_is_filled_from_the_files(queue: JobQueue, server: RedisServer) -> None:
    waiting, paused, ended = (queue.submit({**SPEC, "n": n}) for n in range(3))
    queue.command(paused.id, "pause")
    queue.command(ended.id, "cancel")
    with server.client() as client:
        client.flushall()

    assert queue.claim("me") is None
    assert queue.rebuild() == 1
    claimed = queue.claim("me")

    assert claimed is not None
    assert claimed.id == waiting.id


def test_a_cluster_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    server = RedisServer(args=("--cluster-enabled", "yes")).start()
    client = connect(server.url)
    try:
        with pytest.raises(NotBuilt, match="single server"):
            JobQueue(client, JobRecords(FilesRegistry(str(tmp_path)))).rebuild()
    finally:
        client.close()
        server.close()


def test_the_jobs_of_a_dead_distiller_are_free_at_once(queue: JobQueue) -> None:
    queue.submit(SPEC)
    queue.lease_s = 60
    queue.claim("dead")
    queue.release_dead(lambda owner: owner == "dead")
    assert queue.claim("me") is not None


def test_a_waiting_job_is_canceled_without_a_distiller(queue: JobQueue) -> None:
    job = queue.submit(SPEC)
    assert queue.command(job.id, "cancel").state is JobState.CANCELED
    assert queue.claim("me") is None
    with pytest.raises(AlreadyEnded):
        queue.command(job.id, "cancel")


def test_a_paused_job_waits_for_resume(queue: JobQueue) -> None:
    job = queue.submit(SPEC)
    queue.command(job.id, "pause")
    assert queue.claim("me") is None
    assert queue.command(job.id, "resume").state is JobState.QUEUED
    assert queue.claim("me") is not None


def test_the_owner_of_a_job_is_told_what_to_do(queue: JobQueue) -> None:
    job = queue.submit(SPEC)
    claimed = queue.claim("me")
    assert claimed is not None
    queue.records.move(job.id, JobState.PREPARING, fence=claimed.fence)
    with pytest.raises(Conflict):
        queue.command(job.id, "resume")

    queue.command(job.id, "cancel")
    queue.command(job.id, "pause")  # comes too late: a cancel is not taken back

    assert queue.commanded(job.id) == "cancel"


def test_without_redis_a_job_is_kept_and_a_command_is_refused(tmp_path: Path) -> None:
    queue = JobQueue(connect(f"unix://{tmp_path}/none.sock"), JobRecords(FilesRegistry(str(tmp_path / "r"))))
    job = queue.submit(SPEC)
    assert queue.records.get(job.id).state is JobState.QUEUED
    claimed = queue.records.claim(job.id, "me")
    queue.records.move(job.id, JobState.PREPARING, fence=claimed.fence)
    with pytest.raises(Unavailable, match="try again"):
        queue.command(job.id, "cancel")


def test_a_job_is_canceled_once_however_many_ask(queue: JobQueue) -> None:
    job = queue.submit(SPEC)
    start, refused = threading.Barrier(4), []

    def cancel() -> None:
        start.wait()
        try:
            queue.command(job.id, "cancel")
        except AlreadyEnded as error:
            refused.append(error)

    threads = [threading.Thread(target=cancel) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(refused) == 3
