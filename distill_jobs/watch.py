"""What may interrupt a distiller's work on a job: people's commands, the service's own end, a lost lease.

Asked often and cheap: between batches, between two looks at the trainer. Redis is only asked now and then.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

import redis

from distill_jobs.queue import JobQueue, Lease
from engines.errors import LeaseLost

log = logging.getLogger(__name__)

_ASK_EVERY_S = 0.2


class Interrupted(Exception):
    """Somebody wants this work to end now. `why` says what becomes of the job."""

    def __init__(self, why: Literal["cancel", "pause", "stop"]) -> None:
        super().__init__(why)
        self.why = why


class Watch:
    """Of one job. `can_pause` is asked when a pause is wished: later than training it comes too late."""

    def __init__(
        self, queue: JobQueue, job_id: str, lease: Lease, stop: threading.Event, can_pause: Callable[[], bool]
    ) -> None:
        self._queue, self._job_id, self._lease, self._stop, self._can_pause = queue, job_id, lease, stop, can_pause
        self._asked_at = 0.0

    def check(self) -> None:
        """
        Raises:
            Interrupted: end the work as its `why` says.
            LeaseLost: somebody else owns the job; write nothing more.
        """
        if self._lease.lost.is_set():
            raise LeaseLost(f"{self._job_id} belongs to another distiller now")
        if self._stop.is_set():
            raise Interrupted("stop")
        now = time.monotonic()
        if now - self._asked_at < _ASK_EVERY_S:
            return
        self._asked_at = now
        self._obey(self._commanded())

    def pause(self, seconds: float) -> None:
        """Waits that long, or until the service stops, then checks."""
        self._stop.wait(seconds)
        self.check()

    def _commanded(self) -> str | None:
        try:
            return self._queue.commanded(self._job_id)
        except redis.RedisError as error:
            log.warning("redis is away", extra={"job_id": self._job_id, "error": str(error)})
            return None

    def _obey(self, command: str | None) -> None:
        if command == "cancel":
            raise Interrupted("cancel")
        if command == "pause" and self._can_pause():
            raise Interrupted("pause")
