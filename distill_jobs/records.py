"""The files of a job in the registry's store, which are its truth.

    jobs/<id>/spec.json            who submitted what, written once
    jobs/<id>/states/<n:06d>.json  the state log, each entry created exclusively: two writers cannot both continue it
    jobs/<id>/events.jsonl         everything that happened, one line each; a line's number is its event id
    jobs/<id>/plan.json            what the budget buys, and what training should need
    jobs/<id>/progress.json        the latest progress event
    jobs/<id>/answers.safetensors  the teacher's, for evaluations while training
    jobs/<id>/result.json          student, metrics, gates, what training needed
    jobs/<id>/checkpoints/ panels/ log.txt samples.png
    jobs/<id>/report.html          for people, written when the job has ended

Torch-free and synchronous; entries never change once written, so those that were read are remembered.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from distill_jobs.jobs import DistillJob, Entry, JobState, claimed, first, moved
from engines.errors import AlreadyExists, IdempotencyConflict, JobNotFound, LeaseLost
from engines.registry.base import Registry

ANSWERS = "answers.safetensors"
EVENTS = "events.jsonl"
PLAN = "plan.json"
PROGRESS = "progress.json"
RESULT = "result.json"
TRAINER = "trainer.json"  # what a trainer is told, the version of its teacher among it
_RETRIES = 8


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JobRecords:
    """Reads and continues the records of all jobs. Thread-safe, and safe beside any number of other processes."""

    def __init__(self, registry: Registry, *, now: Callable[[], str] = utc_now) -> None:
        self._registry = registry
        self._now = now
        self._specs: dict[str, dict[str, Any]] = {}
        self._logs: dict[str, tuple[Entry, ...]] = {}

    @property
    def registry(self) -> Registry:
        return self._registry

    def create(
        self,
        spec: Mapping[str, Any],
        *,
        owner: str = "",
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> DistillJob:
        """A new queued job, or the one that this owner made with the same key and the same spec.

        Raises:
            IdempotencyConflict: the key was used for another spec.
        """
        job_id = _new_id(owner, idempotency_key)
        record = {"id": job_id, "owner": owner, "created_at": self._now(), "spec": dict(spec)}
        record |= {"traceparent": traceparent} if traceparent else {}
        try:
            self._registry.write_job_file(job_id, "spec.json", _json(record), exclusive=True)
        except AlreadyExists:
            if self._spec(job_id)["spec"] != json.loads(_json(dict(spec))):
                message = "this Idempotency-Key was used for another job: send a new key"
                raise IdempotencyConflict(message, param="Idempotency-Key") from None
        else:
            self.event(job_id, "status", status=JobState.QUEUED)
        return self.get(job_id)

    def ids(self) -> list[str]:
        return [job_id for job_id in self._registry.job_ids() if job_id.startswith("dj_")]

    def get(self, job_id: str) -> DistillJob:
        """The job as its files tell it now.

        Raises:
            JobNotFound: there is none of this id.
        """
        record = self._spec(job_id)
        log = self._log(job_id, record["created_at"])
        return DistillJob(job_id, record["spec"], log, record["owner"], record.get("traceparent"))

    def all(self) -> list[DistillJob]:
        """Every job, newest first."""
        jobs = [self.get(job_id) for job_id in self.ids() if self._readable(job_id)]
        return sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=True)

    def claim(self, job_id: str, owner: str) -> DistillJob:
        """Takes the job; who had it before is fenced off. Raises as `jobs.claimed`."""
        return self._append(job_id, lambda job: claimed(job, owner, self._now()))

    def move(
        self,
        job_id: str,
        to: JobState,
        *,
        fence: int | None = None,
        error: dict[str, Any] | None = None,
        note: str | None = None,
    ) -> DistillJob:
        """Takes the job to another state. Raises as `jobs.moved`."""
        job = self._append(job_id, lambda job: moved(job, to, at=self._now(), fence=fence, error=error, note=note))
        self.event(
            job_id, "status", status=to, **({"error": error} if error else {}), **({"note": note} if note else {})
        )
        return job

    def check_fence(self, job_id: str, fence: int) -> None:
        """Refuses an owner who was replaced, before it writes what no state log protects.

        Raises:
            LeaseLost: it was.
        """
        if (current := self.get(job_id).fence) > fence:
            raise LeaseLost(f"{job_id} was taken over (fence {current}, ours is {fence}): stop writing")

    def event(self, job_id: str, kind: str, **data: Any) -> None:
        line = json.dumps({"event": kind, "at": self._now(), **data}, separators=(",", ":"), allow_nan=False)
        self._registry.append_job_event(job_id, EVENTS, line.encode())

    def events(self, job_id: str, after: int = 0) -> list[dict[str, Any]]:
        """The events with an id above `after`. A line that is still being written is left for the next call."""
        data = self._registry.read_job_file(job_id, EVENTS) or b""
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        return [{"id": number, **json.loads(line)} for number, line in enumerate(lines[after:], after + 1)]

    def write(self, job_id: str, name: str, value: Mapping[str, Any]) -> None:
        self._registry.write_job_file(job_id, name, _json(value))

    def read(self, job_id: str, name: str) -> dict[str, Any] | None:
        data = self._registry.read_job_file(job_id, name)
        return None if data is None else json.loads(data)

    def _append(self, job_id: str, decide: Callable[[DistillJob], Entry]) -> DistillJob:
        for _ in range(_RETRIES):
            job = self.get(job_id)
            entry = decide(job)
            try:
                self._registry.write_job_file(job_id, _entry_name(entry.number), _json(asdict(entry)), exclusive=True)
            except AlreadyExists:
                continue  # somebody continued the log first: read what they wrote and decide again
            return self.get(job_id)
        raise AlreadyExists(f"{job_id}: others kept writing its state log; try again")

    def _spec(self, job_id: str) -> dict[str, Any]:
        if job_id not in self._specs:
            data = self._registry.read_job_file(job_id, "spec.json") if _plausible(job_id) else None
            if data is None:
                raise JobNotFound(f"no job is called {job_id!r}", param="job_id")
            self._specs[job_id] = json.loads(data)
        return self._specs[job_id]

    def _log(self, job_id: str, created_at: str) -> tuple[Entry, ...]:
        log = self._logs.get(job_id, (first(created_at),))
        while (data := self._registry.read_job_file(job_id, _entry_name(log[-1].number + 1))) is not None:
            fields = json.loads(data)
            log = (*log, Entry(**{**fields, "state": JobState(fields["state"])}))
        self._logs[job_id] = log
        return log

    def _readable(self, job_id: str) -> bool:
        try:
            self._spec(job_id)
        except JobNotFound:
            return False  # its folder exists, its spec is still being written
        return True


def _new_id(owner: str, idempotency_key: str | None) -> str:
    """Random, or made from the key: then creating it twice creates it once, wherever the second request lands."""
    if idempotency_key is None:
        return f"dj_{secrets.token_hex(12)}"
    return "dj_" + hashlib.sha256(f"{owner}\0{idempotency_key}".encode()).hexdigest()[:24]


def _plausible(job_id: str) -> bool:
    """Ids come from URLs: only what `_new_id` could have made may become part of a path."""
    return job_id.startswith("dj_") and job_id[3:].isalnum() and job_id.isascii() and len(job_id) <= 64


def _entry_name(number: int) -> str:
    return f"states/{number:06d}.json"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
