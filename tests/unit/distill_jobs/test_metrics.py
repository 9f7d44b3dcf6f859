from prometheus_client import CollectorRegistry, generate_latest

from distill_jobs.jobs import JobState
from distill_jobs.launchers.base import Usage
from distill_jobs.metrics import DistillMetrics, make


def value(metrics: DistillMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"fewstep_distill_{name}", {"job_id": "dj_1", **labels})


def test_progress_says_how_far_how_fast_and_how_long() -> None:
    metrics = DistillMetrics(CollectorRegistry())
    metrics.progress("dj_1", {"step": 3, "total_steps": 24, "it_s": 2.0, "eta_s": None})
    assert (value(metrics, "step"), value(metrics, "steps_planned")) == (3, 24)
    assert value(metrics, "iterations_per_second") == 2
    assert value(metrics, "eta_seconds") is None


def test_a_job_is_in_one_state_at_a_time() -> None:
    metrics = DistillMetrics(CollectorRegistry())
    metrics.entered("dj_1", JobState.PREPARING, 100.0)
    metrics.entered("dj_1", JobState.RUNNING, 160.0)
    assert value(metrics, "state_since_seconds", state="running") == 160
    assert value(metrics, "state_since_seconds", state="preparing") is None


def test_a_verdict_puts_the_teacher_beside_the_student() -> None:
    metrics = DistillMetrics(CollectorRegistry())
    teacher = {"fd": 2.0, "networks": {}, "at": {"4": {"fd": 9.0}}}
    metrics.judged("dj_1", {"metrics": {"4": {"fd": 3.0, "passed": None}}, "teacher": teacher})
    assert value(metrics, "metric", metric="fd@4", who="student") == 3
    assert value(metrics, "metric", metric="fd@4", who="teacher") == 9
    assert value(metrics, "metric", metric="fd", who="teacher") == 2


def test_what_the_trainer_uses_is_asked_at_each_reading() -> None:
    metrics, used = DistillMetrics(CollectorRegistry()), [Usage(1.0, 10), Usage(2.5, 20)]
    metrics.watch("dj_1", lambda: used[0])
    assert value(metrics, "cpu_seconds") == 1
    used.pop(0)
    assert (value(metrics, "cpu_seconds"), value(metrics, "memory_bytes")) == (2.5, 20)


def test_a_distiller_shows_its_own_process_too() -> None:
    assert b"process_cpu_seconds_total" in generate_latest(make().registry)
