"""What jobs hold, and what those that have ended leave behind. Torch-free.

A job that has not ended may go on, and holds its checkpoints and every version that its files name. One that has ended
never goes on: its checkpoints and trained weights are of no use to anybody once its student is published, and go some
time after its end. What tells of it stays: spec, states, events, result, report, samples.
"""

import json
import re
from contextlib import suppress
from datetime import UTC, datetime

from pydantic import ValidationError

from distill_jobs import spec as specs
from distill_jobs.estimate import teacher_version
from distill_jobs.jobs import DistillJob
from distill_jobs.records import ANSWERS, RESULT, TRAINER, JobRecords
from engines.errors import NotFound
from engines.registry.retention import Garbage, Retention

_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]*@[0-9a-f]{12,64}")


def needs(records: JobRecords) -> dict[str, set[str]]:
    """By job that goes on, the full versions that its files name, and its teacher."""
    return {job.id: _versions(records, job) for job in records.all() if not job.ended}


def _versions(records: JobRecords, job: DistillJob) -> set[str]:
    registry = records.registry
    said = [job.spec, records.read(job.id, TRAINER), records.read(job.id, RESULT)]
    found = set()
    for version in _VERSION.findall(json.dumps(said)):
        with suppress(NotFound):
            found.add(registry.student(version).version)
    with suppress(NotFound, ValidationError):  # such a job fails as soon as it is taken up
        found.add(teacher_version(specs.DistillJobSpec.model_validate(job.spec), registry))
    return found


def left_behind(records: JobRecords, retention: Retention, after_s: float) -> list[Garbage]:
    """Checkpoints and trained weights of jobs that ended more than `after_s` ago."""
    before = datetime.fromtimestamp(max(retention.now_s() - after_s, 0.0), UTC)
    found = []
    for job in records.all():
        if job.finished_at is None or datetime.fromisoformat(job.finished_at) > before:
            continue
        files = {name: size for name, size in retention.sizes(f"jobs/{job.id}").items() if _heavy(name)}
        if files:
            names = tuple(f"jobs/{job.id}/{name}" for name in sorted(files))
            found.append(Garbage("checkpoint", job.id, sum(files.values()), f"job has {job.state}", names))
    return found


def _heavy(name: str) -> bool:
    if name.startswith("checkpoints/") or name == ANSWERS:
        return True
    return name.startswith("trained/") and name.endswith((".safetensors", ".partial"))  # whole or half-written
