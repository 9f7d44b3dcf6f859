"""What a distiller counts, under the names that the dashboard reads. The series of an ended job are removed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from distill_jobs.jobs import JobState


class DistillMetrics:
    """The series of one distiller; the registry is injected."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.jobs = Gauge("fewstep_distill_jobs", "Jobs by state", ["state"], registry=registry)
        self.step = Gauge("fewstep_distill_step", "Iterations done", ["job"], registry=registry)
        self.loss = Gauge("fewstep_distill_loss", "Latest loss", ["job", "role"], registry=registry)
        self.metric = Gauge("fewstep_distill_metric", "Latest evaluation", ["job", "metric", "who"], registry=registry)
        self.deaths = Counter("fewstep_distill_trainer_deaths_total", "Trainers that died unasked", registry=registry)

    def follow(self, states: Callable[[], Sequence[JobState]]) -> None:
        """Counts what `states` says whenever somebody reads the metrics."""
        for state in JobState:
            self.jobs.labels(state).set_function(partial(_number, states, state))

    def progress(self, job_id: str, event: Mapping[str, Any]) -> None:
        """Takes over one progress event of the trainer."""
        if "step" in event:
            self.step.labels(job_id).set(event["step"])
        for role, value in (event.get("losses") or {}).items():
            self.loss.labels(job_id, role).set(value)
        for name, value in (event.get("metrics") or {}).items():
            if isinstance(value, int | float):
                self.metric.labels(job_id, name, "student").set(value)

    def forget(self, job_id: str) -> None:
        for family in (self.step, self.loss, self.metric):
            family.remove_by_labels({"job": job_id})


def _number(states: Callable[[], Sequence[JobState]], state: JobState) -> float:
    return states().count(state)
