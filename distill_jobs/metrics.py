"""What a distiller counts, under the names that the dashboard reads. The series of an ended job are removed.

A job's label is `job_id`: Prometheus itself calls what it scrapes `job`, and would rename a label of that name.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.process_collector import ProcessCollector

from distill_jobs.jobs import JobState
from distill_jobs.launchers.base import Usage


class DistillMetrics:
    """The series of one distiller; the registry is injected."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.jobs = Gauge("fewstep_distill_jobs", "Jobs by state", ["state"], registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fewstep_distill_{name}", text, ["job_id", *labels], registry=registry)

        self.since = gauge("state_since_seconds", "Unix time at which the job on hand entered its state", "state")
        self.step = gauge("step", "Iterations done")
        self.steps = gauge("steps_planned", "Iterations of the whole job")
        self.speed = gauge("iterations_per_second", "Of the stage that trains")
        self.eta = gauge("eta_seconds", "Training time left")
        self.loss = gauge("loss", "Latest loss", "role")
        self.metric = gauge("metric", "Latest evaluation", "metric", "who")
        self.cpu = gauge("cpu_seconds", "CPU time of the trainer's processes that live")
        self.memory = gauge("memory_bytes", "Resident memory of the trainer's processes")
        self.deaths = Counter("fewstep_distill_trainer_deaths_total", "Trainers that died unasked", registry=registry)

    def follow(self, states: Callable[[], Sequence[JobState]]) -> None:
        """Counts what `states` says whenever somebody reads the metrics."""
        for state in JobState:
            self.jobs.labels(state).set_function(partial(_number, states, state))

    def progress(self, job_id: str, event: Mapping[str, Any]) -> None:
        """Takes over one progress event of the trainer."""
        shown = {"step": self.step, "total_steps": self.steps, "it_s": self.speed, "eta_s": self.eta}
        for name, family in shown.items():
            if event.get(name) is not None:
                family.labels(job_id).set(event[name])
        for role, value in (event.get("losses") or {}).items():
            self.loss.labels(job_id, role).set(value)
        for name, value in (event.get("metrics") or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.metric.labels(job_id, name, "student").set(value)

    def entered(self, job_id: str, state: JobState, now_s: float) -> None:
        """The job on hand is in this state from now on."""
        self.since.remove_by_labels({"job_id": job_id})
        self.since.labels(job_id, state).set(now_s)

    def judged(self, job_id: str, figures: Mapping[str, Any]) -> None:
        """Takes over a verdict: the student at each count, the teacher at its own, and at the student's in `at`."""
        teacher = {**figures["teacher"].get("at", {}), "": figures["teacher"]}
        for who, by_count in (("student", figures["metrics"]), ("teacher", teacher)):
            for count, metrics in by_count.items():
                for name, value in metrics.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        self.metric.labels(job_id, f"{name}@{count}" if count else name, who).set(value)

    def watch(self, job_id: str, used: Callable[[], Usage]) -> None:
        """Asks what the trainer uses whenever somebody reads the metrics."""
        self.cpu.labels(job_id).set_function(lambda: used().cpu_s)
        self.memory.labels(job_id).set_function(lambda: used().memory_bytes)

    def forget(self, job_id: str) -> None:
        families = (self.since, self.step, self.steps, self.speed, self.eta, self.loss, self.metric)
        for family in (*families, self.cpu, self.memory):
            family.remove_by_labels({"job_id": job_id})


def make() -> DistillMetrics:
    """The metrics of one process, with its memory and CPU beside them."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return DistillMetrics(registry)


def _number(states: Callable[[], Sequence[JobState]], state: JobState) -> float:
    return states().count(state)
