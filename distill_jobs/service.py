"""The distiller: takes one job at a time from the queue and works on it to its end, whatever dies meanwhile.

The service itself holds nothing that is not in the files: killed at any moment, the next one (or another machine's)
continues. It only decides what becomes of a job when its work was interrupted or failed.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import psutil
import redis
from prometheus_client import start_http_server

from distill_jobs.assessment import Assessor, chosen
from distill_jobs.job_report import REPORT, render
from distill_jobs.jobs import DistillJob, JobState
from distill_jobs.launchers.base import open_launcher
from distill_jobs.metrics import DistillMetrics, make
from distill_jobs.queue import JobQueue, Lease
from distill_jobs.run import JobRun, Surroundings
from distill_jobs.settings import DistillerSettings
from distill_jobs.watch import Interrupted, Watch
from engines import space
from engines.errors import FewstepError, InternalError, JobNotFound, LeaseLost, StorageFull
from engines.registry.base import Registry

log = logging.getLogger(__name__)

_REBUILD_EVERY = 40  # idle looks at the queue
_REMEMBER_S = 0.5


class Service:
    """One distiller."""

    def __init__(
        self,
        settings: DistillerSettings,
        registry: Registry,
        queue: JobQueue,
        *,
        metrics: DistillMetrics | None = None,
        working: Callable[[DistillJob], AbstractContextManager[object]] = nullcontext,
        ended: Callable[[DistillJob], None] = lambda job: None,
    ) -> None:
        """`working` is entered for as long as a job is worked on; `ended` hears of each job that ends here."""
        self.settings, self.registry, self.queue = settings, registry, queue
        queue.lease_s = settings.lease_s
        self._working, self._ended = working, ended
        self.records = queue.records
        self.metrics = metrics or make()
        self.metrics.follow(_Remembered(lambda: [job.state for job in self.records.all()]))
        self.owner = _identity()
        self.launcher = open_launcher(settings)

    def run_forever(self, stop: threading.Event) -> None:
        """Works until `stop` is set; a running trainer then checkpoints, and the job waits for the next distiller."""
        if self.settings.metrics_port:
            host, port = self.settings.metrics_host, self.settings.metrics_port
            start_http_server(port, host, registry=self.metrics.registry)
        idle = 0
        while not stop.is_set():
            try:
                if idle % _REBUILD_EVERY == 0:
                    self._look_round()
                job = self.queue.claim(self.owner)
            except redis.RedisError as error:
                log.warning("redis is away", extra={"error": str(error)})
                job = None
            except StorageFull as error:
                log.error("a job cannot be claimed", extra={"reason": error.message})
                job = None
            if job is None:
                idle += 1
                stop.wait(self.settings.poll_s)
            else:
                idle = 0
                with self._working(job):
                    self.run_one(job, stop)

    def run_one(self, job: DistillJob, stop: threading.Event) -> None:
        """Works on a claimed job until it ends, is paused, or somebody else should go on."""
        log.info("claimed a job", extra={"job_id": job.id, "state": job.state})
        with Lease(self.queue, job.id, self.owner) as lease:
            watch = Watch(self.queue, job.id, lease, stop, lambda: self._can_pause(job.id))
            try:
                JobRun(job, self._surroundings(), watch).go()
            except Interrupted as interrupted:
                self._interrupted(job, interrupted)
            except LeaseLost as error:
                log.warning("somebody else owns this job now", extra={"job_id": job.id, "reason": str(error)})
                self.metrics.forget(job.id)
                return
            except StorageFull as error:
                self._out_of_space(job, error)
            except FewstepError as error:
                self._failed(job, error)
            except Exception as error:
                log.exception("work on a job ended in an error of ours", extra={"job_id": job.id})
                if (full := self._full(job.id, error)) is not None:
                    self._out_of_space(job, full)
                else:
                    self._failed(job, InternalError("an error in the distiller itself; its log has the traceback"))
        self._leave(job)

    def _interrupted(self, job: DistillJob, interrupted: Interrupted) -> None:
        if interrupted.why == "cancel":
            self._settle(job, JobState.CANCELED)
        elif interrupted.why == "pause":
            self._settle(job, JobState.PAUSED)

    def _out_of_space(self, job: DistillJob, error: StorageFull) -> None:
        """What it has made is whole: it waits for somebody who makes room and resumes it, rather than fail."""
        log.error("a job has no space left", extra={"job_id": job.id, "reason": error.message})
        self._settle(job, JobState.PAUSED, note=error.message)

    def _full(self, job_id: str, error: Exception) -> StorageFull | None:
        """What an error of ours was if one of the disks that a job is worked on has no room left."""
        folders = (self.registry.job_path(job_id), self.settings.work_dir)
        full = [folder for folder in folders if folder and folder.is_dir() and space.is_full(error, folder)]
        return space.full(full[0]) if full else None

    def _failed(self, job: DistillJob, error: FewstepError) -> None:
        log.warning("a job failed", extra={"job_id": job.id, "code": error.code, "reason": error.message})
        self._settle(job, JobState.FAILED, error={"code": error.code, "message": error.message})

    def _settle(
        self, job: DistillJob, state: JobState, error: dict[str, str] | None = None, note: str | None = None
    ) -> None:
        try:
            self.records.move(job.id, state, fence=job.fence, error=error, note=note)
        except FewstepError as refused:
            log.warning("could not settle a job", extra={"job_id": job.id, "reason": refused.message})

    def _leave(self, job: DistillJob) -> None:
        """Off the queue if it ended or is paused; else anybody may go on with it at once."""
        now = self.records.get(job.id)
        over = now.ended or now.state is JobState.PAUSED
        self.metrics.forget(job.id)
        if over:
            self.launcher.sweep(self._is_over)
        if now.ended:
            self._report(now)
        try:
            (self.queue.done if over else self.queue.release)(job.id, self.owner)
        except redis.RedisError as error:
            log.warning("redis is away", extra={"job_id": job.id, "error": str(error)})
        log.info("left a job", extra={"job_id": job.id, "state": now.state})
        if now.ended:
            self._ended(now)

    def _report(self, job: DistillJob) -> None:
        """Leaves the report beside the job's files. The job has ended, so nothing that goes wrong here may end more."""
        try:
            self.registry.write_job_file(job.id, REPORT, render(job, self.records).encode())
        except Exception:
            log.exception("a job's report could not be written", extra={"job_id": job.id})

    def _can_pause(self, job_id: str) -> bool:
        return self.records.get(job_id).state in (JobState.PREPARING, JobState.RUNNING, JobState.QUEUED)

    def _look_round(self) -> None:
        """Jobs that Redis lost, and those of a distiller on this machine that died; trainers that nobody needs."""
        self.queue.rebuild()
        self.queue.release_dead(_is_dead)
        self.launcher.sweep(self._is_over)

    def _is_over(self, job_id: str) -> bool:
        """Whether no trainer may be at work on a job. One that is unknown is left alone: its files may be elsewhere."""
        try:
            job = self.records.get(job_id)
        except JobNotFound:
            return False
        return job.ended or job.state is JobState.PAUSED

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            self.records, self.settings, self.metrics, self.queue.announce, self._assessor, self.launcher
        )

    def _assessor(self, check: Callable[[], None]) -> Assessor:
        return Assessor(
            self.registry,
            choice=chosen(self.settings.backend, self.settings.precision),
            cache=self.settings.work_dir / "engines",
            answers=self.settings.work_dir / "answers",
            data=self.settings.data_dir,
            threads=self.settings.threads,
            check=check,
        )


class _Remembered:
    """An answer that is asked for once per state in one reading of the metrics, and read from the files once."""

    def __init__(self, ask: Callable[[], list[JobState]]) -> None:
        self._ask = ask
        self._answer: list[JobState] = []
        self._at = float("-inf")

    def __call__(self) -> list[JobState]:
        if time.monotonic() - self._at > _REMEMBER_S:
            self._answer, self._at = self._ask(), time.monotonic()
        return self._answer


def _identity() -> str:
    """This process, so that others on its machine can tell whether it still lives."""
    me = psutil.Process()
    return f"{socket.gethostname()}:{me.pid}:{me.create_time():.2f}"


def _is_dead(owner: str) -> bool:
    """Whether an owner was a process of this machine that is gone; unknown ones count as alive."""
    host, _, rest = owner.partition(":")
    pid, _, created = rest.partition(":")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != created
    except psutil.NoSuchProcess:
        return True
