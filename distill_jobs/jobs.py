"""A job and its states: which follows which, and how a log of entries becomes what people see (pure).

The log is the truth. Its entries are numbered and created exclusively, so two writers cannot both
continue it; an entry's `fence` is the number of the owner's claim, and an owner that was replaced
can write nothing more. Who may write which entry is decided here, with time as an argument.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from engines import traceparent
from engines.errors import AlreadyEnded, Conflict, LeaseLost


class JobState(StrEnum):
    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSED = "paused"
    EXPORTING = "exporting"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED})
UNOWNED = frozenset({JobState.QUEUED, JobState.PAUSED})
"""States in which no distiller works on the job, so that anybody may continue its log."""

_NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.PREPARING, JobState.RUNNING, JobState.PAUSED, *ENDED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELED, JobState.FAILED}),
    JobState.PREPARING: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELED}),
    JobState.RUNNING: frozenset({JobState.EXPORTING, JobState.PAUSED, JobState.FAILED, JobState.CANCELED}),
    JobState.EXPORTING: frozenset({JobState.EVALUATING, JobState.PAUSED, JobState.FAILED, JobState.CANCELED}),
    JobState.EVALUATING: frozenset({JobState.PUBLISHING, JobState.PAUSED, JobState.FAILED, JobState.CANCELED}),
    JobState.PUBLISHING: frozenset({JobState.SUCCEEDED, JobState.PAUSED, JobState.FAILED, JobState.CANCELED}),
}
_NEXT[JobState.QUEUED] -= {JobState.SUCCEEDED}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a job's log. `claim` entries keep the state and hand the job to `owner` under a new `fence`."""

    number: int
    state: JobState
    at: str
    fence: int = 0
    owner: str | None = None
    claim: bool = False
    error: dict[str, Any] | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class DistillJob:
    """A job as its log tells it. `spec` is the validated JSON, `owner` whose it is."""

    id: str
    spec: dict[str, Any]
    log: tuple[Entry, ...]
    owner: str = ""
    traceparent: str | None = None  # of the request that submitted it
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> JobState:
        return self.log[-1].state

    @property
    def fence(self) -> int:
        return max(entry.fence for entry in self.log)

    @property
    def trace_id(self) -> str | None:
        return traceparent.trace_id(self.traceparent)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def marks(self) -> tuple[tuple[str, int], ...]:
        """The states that it came to, and when: nanoseconds of Unix time, known to the millisecond."""
        return tuple((str(entry.state), _ns(entry.at)) for entry in self.log if not entry.claim)

    @property
    def created_at(self) -> str:
        return self.log[0].at

    @property
    def started_at(self) -> str | None:
        return next((entry.at for entry in self.log if entry.claim), None)

    @property
    def finished_at(self) -> str | None:
        return self.log[-1].at if self.ended else None


def _ns(at: str) -> int:
    return round(datetime.fromisoformat(at).timestamp() * 1000) * 1_000_000


def first(at: str) -> Entry:
    return Entry(number=1, state=JobState.QUEUED, at=at)


def claimed(job: DistillJob, owner: str, at: str) -> Entry:
    """The entry by which `owner` takes the job; every earlier owner is fenced off by it.

    Raises:
        AlreadyEnded: there is nothing left to do.
        Conflict: it is paused; resume it first.
    """
    if job.ended:
        raise AlreadyEnded(f"{job.id} has ended as {job.state}")
    if job.state is JobState.PAUSED:
        raise Conflict(f"{job.id} is paused: resume it first")
    number = job.log[-1].number + 1
    return Entry(number=number, state=job.state, at=at, fence=number, owner=owner, claim=True)


def moved(
    job: DistillJob,
    to: JobState,
    *,
    at: str,
    fence: int | None = None,
    error: dict[str, Any] | None = None,
    note: str | None = None,
) -> Entry:
    """The entry that takes the job to `to`. Whoever owns it says its `fence`; nobody else may, unless it is unowned.

    Raises:
        AlreadyEnded: the job is over.
        LeaseLost: the job has another owner by now.
        Conflict: that state does not follow the present one.
    """
    if job.ended:
        raise AlreadyEnded(f"{job.id} has already ended as {job.state}")
    if fence is not None and fence < job.fence:
        raise LeaseLost(f"{job.id} was taken over (fence {job.fence}, ours is {fence}): stop writing")
    if fence is None and job.state not in UNOWNED:
        raise Conflict(f"{job.id} is {job.state} and owned by {job.log[-1].owner}: send its owner a command")
    if to not in _NEXT[job.state]:
        allowed = ", ".join(sorted(_NEXT[job.state]))
        raise Conflict(f"{job.id} is {job.state}, which cannot become {to}: it can become {allowed}")
    number = job.log[-1].number + 1
    return Entry(number=number, state=to, at=at, fence=job.fence if fence is None else fence, error=error, note=note)


COMMANDS: dict[str, frozenset[JobState]] = {
    "cancel": frozenset(JobState) - ENDED,
    "pause": frozenset({JobState.QUEUED, JobState.PREPARING, JobState.RUNNING}),
    "resume": frozenset({JobState.PAUSED}),
}


def check_command(job: DistillJob, command: str) -> None:
    """Refuses a command that the job's state has no use for.

    Raises:
        AlreadyEnded: the job is over.
        Conflict: it is at a point where this cannot be done.
    """
    if job.ended:
        raise AlreadyEnded(f"{job.id} has already ended as {job.state}: there is nothing to {command}")
    if job.state not in COMMANDS[command]:
        allowed = ", ".join(sorted(COMMANDS[command]))
        raise Conflict(f"{job.id} is {job.state}: {command} is possible while it is {allowed}")
