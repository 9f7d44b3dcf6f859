"""The queue of jobs in Redis: who may work on what, and what people asked of it. Rebuilt from the files at any time.

Keys (`fewstep:v1:jobs:…`)
    waiting          sorted set of job ids by submission; a job stays in it until it ends or is paused
    lease:<id>       the distiller that works on it, 30 s, renewed by its thread
    command:<id>     `cancel` or `pause`, for the owner to obey
Only the lease is decided here. What it protects, the state log, protects itself by its fencing numbers: should
Redis lose everything, two distillers may start the same job, and the first claim can write no more.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast

import redis

from distill_jobs.jobs import UNOWNED, DistillJob, JobState, check_command
from distill_jobs.records import JobRecords
from engines import redis_address
from engines.errors import AlreadyEnded, Conflict, Unavailable

log = logging.getLogger(__name__)

LEASE_S = 30.0
_PREFIX = "fewstep:v1:jobs"
_WAITING = f"{_PREFIX}:waiting"
_ANNOUNCE = "fewstep:v1:announce"  # the channel that `server.brokers` names

# KEYS lease · ARGV owner, milliseconds: extends the lease of `owner`, or takes it back if nobody has it.
_RENEW = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# KEYS lease · ARGV owner: gives the lease up if it is `owner`'s.
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


def connect(url: str) -> "redis.Redis":
    return redis_address.connect(url, decode_responses=True, socket_timeout=5.0, socket_connect_timeout=5.0)


class JobQueue:
    """Submitting, commanding and claiming jobs. The API uses the first half, the service the second."""

    def __init__(self, client: "redis.Redis", records: JobRecords, *, lease_s: float = LEASE_S) -> None:
        self._redis = client
        self.records = records
        self.lease_s = lease_s

    # --- for the API -----------------------------------------------------------------------------

    def submit(
        self,
        spec: Mapping[str, Any],
        *,
        owner: str = "",
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> DistillJob:
        """Records a job, then queues it. Redis being down delays the job and loses nothing."""
        job = self.records.create(spec, owner=owner, idempotency_key=idempotency_key, traceparent=traceparent)
        self._enqueue(job)
        return job

    def command(self, job_id: str, command: str) -> DistillJob:
        """Cancels, pauses or resumes: at once where nobody works on the job, else by telling its owner.

        Raises:
            AlreadyEnded, Conflict: the job has no use for this command.
            Unavailable: the owner cannot be told now.
        """
        job = self.records.get(job_id)
        check_command(job, command)
        if job.state in UNOWNED:
            try:
                return self._move_unowned(job, command)
            except Conflict as error:
                if isinstance(error, AlreadyEnded) or self.records.get(job_id).state in UNOWNED:
                    raise  # else a distiller has just claimed it: tell that one
        self._tell(job_id, command)
        return self.records.get(job_id)

    def _move_unowned(self, job: DistillJob, command: str) -> DistillJob:
        to = {"cancel": JobState.CANCELED, "pause": JobState.PAUSED, "resume": JobState.QUEUED}[command]
        moved = self.records.move(job.id, to)
        if to is JobState.QUEUED:
            self._enqueue(moved)
        return moved

    def _tell(self, job_id: str, command: str) -> None:
        try:
            if command == "pause":
                self._redis.set(_key("command", job_id), command, nx=True)  # never in place of a cancel
            else:
                self._redis.set(_key("command", job_id), command)
        except redis.RedisError as error:
            raise Unavailable(
                f"{command} of {job_id} did not reach Redis: try again in some seconds", retry_after_s=2.0
            ) from error

    def _enqueue(self, job: DistillJob) -> None:
        created_s = datetime.fromisoformat(job.created_at).timestamp()
        try:
            self._redis.zadd(_WAITING, {job.id: created_s}, nx=True)
        except redis.RedisError:
            log.warning("job is recorded but not queued; a distiller will find it", extra={"job_id": job.id})

    # --- for the service -------------------------------------------------------------------------

    def rebuild(self) -> int:
        """Queues every job that has not ended and is not paused; how many those are.

        Raises:
            NotBuilt: this Redis is a Cluster.
        """
        redis_address.refuse_cluster(bool(self._redis.info("cluster").get("cluster_enabled")))
        open_jobs = [job for job in self.records.all() if not job.ended and job.state is not JobState.PAUSED]
        for job in open_jobs:
            self._enqueue(job)
        return len(open_jobs)

    def claim(self, owner: str) -> DistillJob | None:
        """The oldest job that nobody works on, claimed for `owner`; None if there is none."""
        waiting = cast(list[str], self._redis.zrange(_WAITING, 0, -1))
        for job_id in waiting:
            if not self._redis.set(_key("lease", job_id), owner, nx=True, px=int(self.lease_s * 1000)):
                continue
            try:
                return self.records.claim(job_id, owner)
            except Conflict:  # it ended or was paused since
                self.done(job_id, owner)
        return None

    def release_dead(self, is_dead: Callable[[str], bool]) -> None:
        """Gives back the jobs of distillers that are known to have died, without waiting for their leases to end."""
        for job_id in cast(list[str], self._redis.zrange(_WAITING, 0, -1)):
            owner = cast(str | None, self._redis.get(_key("lease", job_id)))
            if owner is not None and is_dead(owner):
                self.release(job_id, owner)

    def renew(self, job_id: str, owner: str) -> bool:
        """False if somebody else holds the job by now."""
        keys, args = [_key("lease", job_id)], [owner, str(int(self.lease_s * 1000))]
        return bool(self._redis.eval(_RENEW, len(keys), *keys, *args))

    def done(self, job_id: str, owner: str) -> None:
        """Ends the owner's work on a job that ended or was paused."""
        self._redis.zrem(_WAITING, job_id)
        self._redis.delete(_key("command", job_id))
        self.release(job_id, owner)

    def release(self, job_id: str, owner: str) -> None:
        """Gives the job back, so that another distiller can go on with it at once."""
        self._redis.eval(_RELEASE, 1, _key("lease", job_id), owner)

    def commanded(self, job_id: str) -> str | None:
        """What people asked of this job since it was claimed; stands until the job is `done`."""
        return cast(str | None, self._redis.get(_key("command", job_id)))

    def announce(self, topic: str) -> None:
        """Wakes gateways and workers to look at the registry; they would look by themselves a little later."""
        try:
            self._redis.publish(_ANNOUNCE, topic)
        except redis.RedisError as error:
            log.warning("redis is away: nothing announced", extra={"topic": topic, "error": str(error)})


class Lease:
    """Keeps a claimed job ours from a thread; a context manager. `lost` is set when somebody else has it.

    While Redis is away nothing is lost: nobody else can take the job either, and the fence protects its files.
    """

    def __init__(self, queue: JobQueue, job_id: str, owner: str) -> None:
        self._queue = queue
        self._job_id = job_id
        self._owner = owner
        self._stop = threading.Event()
        # What it logs belongs to the same job and trace.
        told = contextvars.copy_context()
        self._thread = threading.Thread(target=told.run, args=(self._renew,), name=f"lease-{job_id}", daemon=True)
        self.lost = threading.Event()

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._stop.wait(self._queue.lease_s / 3):
            if not _patiently(lambda: self._queue.renew(self._job_id, self._owner), otherwise=True):
                log.warning("lost the lease of a job", extra={"job_id": self._job_id})
                self.lost.set()
                return


def _patiently(ask: Callable[[], bool], *, otherwise: bool) -> bool:
    try:
        return ask()
    except redis.RedisError as error:
        log.warning("redis is away", extra={"error": str(error), "at": time.monotonic()})
        return otherwise


def _key(kind: str, job_id: str) -> str:
    return f"{_PREFIX}:{kind}:{job_id}"
