"""Distils the embedded teacher with three seeds and judges each student at N = 10,000: `python -m bench.student`.

Each seed is a job as any other, worked on here instead of in a distiller: it resumes where it was, so a run that was
stopped is started again with the same command. Nothing is published and no server is needed.
"""

import argparse
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console

from bench import student_table
from distill_jobs import spec as specs
from distill_jobs.assessment import Assessor, TeacherAs, as_json, chosen
from distill_jobs.jobs import JobState
from distill_jobs.launchers.base import open_launcher
from distill_jobs.metrics import DistillMetrics
from distill_jobs.records import RESULT, JobRecords
from distill_jobs.run import JobRun, Surroundings
from distill_jobs.settings import DistillerSettings
from distill_jobs.teachers import publish
from distill_jobs.watch import Watch
from engines.errors import FewstepError, JobFailed
from engines.registry.base import Registry
from engines.registry.files import FilesRegistry

log = logging.getLogger(__name__)

_DEPLOYMENT = "shapes"
_OUT = Path(__file__).parent / "student.json"
_NOBODY = "nobody"  # no Redis takes part


class Alone(Watch):
    """A watch that nobody interrupts: Ctrl-C ends the whole process, and the next run goes on from the files."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def check(self) -> None:
        """Nothing can have happened."""

    def pause(self, seconds: float) -> None:
        self._stopped.wait(seconds)


class Bench:
    """The jobs of one working folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.registry: Registry = FilesRegistry(options.work / "registry")
        self.records = JobRecords(self.registry)
        self.settings = DistillerSettings(
            redis_url=_NOBODY,
            registry_url=str((options.work / "registry").resolve()),
            work_dir=options.work / "work",
            threads=options.threads,
            nice=0,
            backend=options.backend,
            precision=options.precision,
        )
        if self.registry.current(_DEPLOYMENT) is None:
            publish.publish(self.registry, _DEPLOYMENT, options.pipeline)

    def student(self, seed: int) -> dict[str, Any]:
        """The result of this seed's job: worked on from where it stands, or read if it ended.

        Raises:
            JobFailed: it ended without a student.
        """
        job = self.records.create(self._spec(seed).model_dump(mode="json"), idempotency_key=f"bench-student-{seed}")
        if not job.ended:
            claimed = self.records.claim(job.id, f"bench:{os.getpid()}")
            around = Surroundings(
                self.records,
                self.settings,
                DistillMetrics(CollectorRegistry()),
                lambda topic: None,
                self.assessor,
                open_launcher(self.settings),
            )
            run = JobRun(claimed, around, Alone())
            try:
                run.go()
            except FewstepError as error:
                self.records.move(
                    job.id, JobState.FAILED, fence=claimed.fence, error={"code": error.code, "message": error.message}
                )
                raise
        if self.records.get(job.id).state is not JobState.SUCCEEDED:
            raise JobFailed(f"seed {seed}: {job.id} ended without a student; remove {self.options.work} to start anew")
        return (self.records.read(job.id, RESULT) or {}) | {"seed": seed, "job": job.id}

    def teacher_at(self, counts: tuple[int, ...]) -> dict[str, Any]:
        """The guided teacher itself at few steps: what a student without training and without a search would be."""
        revision = self.registry.current(_DEPLOYMENT)
        assert revision is not None
        teacher = TeacherAs.of(self.registry.student(revision.tiers[publish.TIER].student))
        found = self.assessor(lambda: None).teacher_at(teacher, self.options.n, counts)
        return {str(k): as_json(m) for k, m in found.items()}

    def assessor(self, check: Callable[[], None]) -> Assessor:
        return Assessor(
            self.registry,
            choice=chosen(self.settings.backend, self.settings.precision),
            cache=self.settings.work_dir / "engines",
            answers=self.settings.work_dir / "answers",
            threads=self.settings.threads,
            check=check,
        )

    def _spec(self, seed: int) -> specs.DistillJobSpec:
        body = specs.preset(self.options.preset)
        body |= {
            "student": {**body["student"], "name": f"bench-{seed}"},
            "train": {**body["train"], "max_minutes": self.options.minutes, "seed": seed},
            "eval": {**body["eval"], "samples": self.options.n, "small_samples": min(256, self.options.n)},
            "publish": None,
        }
        return specs.parse(body)


def report(bench: Bench, results: list[dict[str, Any]]) -> dict[str, Any]:
    students = [{int(k): figures for k, figures in result["metrics"].items()} for result in results]
    counts = tuple(sorted(students[0]))
    asked = [rule for rule in student_table.ASKED if rule.steps in counts]
    choice = chosen(bench.settings.backend, bench.settings.precision)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m bench.student {' '.join(sys.argv[1:])}".strip(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "engine": {"backend": choice.backend, "precision": choice.precision},
        "minutes": bench.options.minutes,
        "n": bench.options.n,
        "lines": student_table.as_json(student_table.lines(students, asked)),
        "teacher": results[0]["teacher"],
        "teacher_at": bench.teacher_at(counts),
        "schedule": results[0]["schedule"]["metrics"],
        "students": {str(result["seed"]): result["metrics"] for result in results},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil the embedded teacher with several seeds and judge them.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=20, help="of one trainer thread for each seed")
    parser.add_argument("--n", type=int, default=10_000, help="pictures of each evaluation")
    parser.add_argument("--preset", default="shapes-fast", help="the job that is run")
    parser.add_argument("--pipeline", type=Path, help="the teacher's diffusers directory, if another")
    parser.add_argument("--work", type=Path, default=Path(".fewstep/bench-student"), help="continued from if there")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=_OUT)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    bench = Bench(options)
    results = []
    for seed in options.seeds:
        log.info("seed %d", seed)
        results.append(bench.student(seed))
    made = report(bench, results)
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    students = [{int(k): figures for k, figures in result["metrics"].items()} for result in results]
    asked = [rule for rule in student_table.ASKED if rule.steps in students[0]]
    Console().print(student_table.markdown(student_table.lines(students, asked)), soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
