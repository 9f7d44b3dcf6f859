"""What the gate is told: a student and its teacher, asked the same questions on the engine that will serve.

Judging the network in training would judge another picture than the one people get. Teachers' answers are kept by
version, steps, guidance and number, because a teacher never changes.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_jobs.evaluate.features import Floats
from distill_jobs.evaluate.network_reference import NetworkReference, network_reference
from distill_jobs.evaluate.networks import DirectoryNetwork
from distill_jobs.evaluate.networks import load as load_network
from distill_jobs.evaluate.pixels import Pixels
from distill_jobs.evaluate.questions import questions
from distill_jobs.evaluate.reference import Reference, kept_answers, teacher_path
from distill_jobs.evaluate.report import (
    Metrics,
    Sampler,
    evaluate,
    seen_by,
    sheet,
    teacher_metrics,
    teacher_reference,
)
from distill_jobs.forgetting import Forget
from distill_jobs.tasks import base as tasks
from distill_jobs.tasks.base import Task
from engines.backends.base import Choice, Profile, choose, device_of
from engines.cache import DiskCache
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import StudentManifest
from engines.registry.base import Registry
from engines.student import Aid, LoadedStudent, sample

Forgets = tuple[Forget, ...]

BATCH = 8
_REPEATS = 15
_SHEET_COLUMNS = 8
SEED = 0


def sampler_of(
    student: LoadedStudent, *, guidance: float | None = None, batch: int = BATCH, aid: Aid | None = None
) -> Sampler:
    """The evaluation's seam over a loaded student: what the server would answer for these seeds, before rounding.

    `aid` is what a teacher adds.
    """

    def draw(captions: Sequence[str], seeds: Sequence[int], steps: int) -> Pixels:
        made: Pixels = sample(
            student, captions, seeds, steps, guidance=guidance, batch=batch, rounded=False, aid=aid
        ).numpy()
        return made

    return draw


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one picture alone, in milliseconds, and of full batches."""

    latency_ms_p50: float
    latency_ms_p95: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class TeacherAs:
    """The teacher as a job means it."""

    version: str
    digest: str
    steps: int
    guidance: float
    task: Task

    @classmethod
    def of(cls, manifest: StudentManifest, *, steps: int | None = None, guidance: float | None = None) -> "TeacherAs":
        """Its most steps and its own guidance, where the job says none.

        Raises:
            StepsNotAllowed, InvalidRequest: the teacher was not made for these.
        """
        own_steps = max(manifest.schedules) if steps is None else steps
        own_guidance = manifest.guidance.default if guidance is None else guidance
        manifest.plan(own_steps, own_guidance)
        return cls(manifest.version, answers_digest(manifest), own_steps, own_guidance, tasks.of(manifest))


def answers_digest(manifest: StudentManifest) -> str:
    """Names what a version answers. Golden pictures are no part of it: another processor may round one otherwise,
    and answers that were shipped with the weights are still those of these weights."""
    return hashlib.sha256(manifest.model_copy(update={"golden": None}).canonical()).hexdigest()


class Assessor:
    """Loads versions on one engine and asks them. `check` is called between batches and between the resamples of an
    interval; it may raise to stop the work.

    `answers` is where teachers' answers are kept, beside those that a task ships; `data` is where further feature
    networks are.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        choice: Choice,
        cache: Path,
        answers: Path,
        data: Path | None = None,
        threads: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.choice = choice
        self._registry = registry
        self._answers = answers
        self._data = data
        self._check = check
        self._references: dict[tuple[Path, Forgets, tuple[str, ...]], Reference] = {}
        profile = Profile((1, BATCH), choice.precision, threads, device=device_of(choice.backend))
        self._loader = Loader(registry, choice, profile, GraphStore(DiskCache(cache)))

    def reference(self, teacher: TeacherAs, n: int, forget: Forgets = (), networks: tuple[str, ...] = ()) -> Reference:
        """What students are compared with that `forget` something, in further feature networks too; each is made once,
        because it keeps what it drew.

        Raises:
            InvalidRequest: a network is not there or cannot be loaded.
        """
        key = self.features_file(teacher, n), forget, networks
        if key not in self._references:
            own = Reference.load(key[0], task=teacher.task).forgetting(forget)
            loaded = [load_network(name, self._data) for name in networks]
            self._references[key] = own.beside([self._in_network(network, teacher, n, own) for network in loaded])
        return self._references[key]

    def _in_network(self, network: DirectoryNetwork, teacher: TeacherAs, n: int, own: Reference) -> NetworkReference:
        """The teacher is asked again, n times, where this network has not seen its answers yet."""

        def answers() -> Floats:
            loaded = self._loader.load(self._registry.student(teacher.version))
            try:
                ask = sampler_of(loaded, guidance=teacher.guidance)
                return seen_by(ask, network, n=n, seed=SEED, steps=teacher.steps, reference=own, progress=self._looked)
            finally:
                self._loader.release(loaded)

        return network_reference(
            network,
            own.kept(questions(n, SEED, teacher.task)),
            own.size,
            self._answers,
            without=own.forget,
            teacher=f"{teacher.digest[:12]}-{teacher.steps}-{teacher.guidance:g}-{n}",
            answers=answers,
            check=self._check,
        )

    def _looked(self, done: int, total: int) -> None:
        self._check()

    def features_file(self, teacher: TeacherAs, n: int) -> Path:
        """Where the teacher's answers are; it is asked 2 n times where nobody has asked as much yet."""
        name: dict[str, Any] = {"steps": teacher.steps, "guidance": teacher.guidance, "n": n}
        found = kept_answers((teacher.task.answers, self._answers), teacher.digest, **name)
        if found is not None:
            return found
        loaded = self._loader.load(self._registry.student(teacher.version))
        try:
            teacher_reference(
                sampler_of(loaded, guidance=teacher.guidance),
                digest=teacher.digest,
                seed=SEED,
                **name,
                reference=Reference.load(task=teacher.task),
                folder=self._answers,
                progress=self._looked,
            )
        finally:
            self._loader.release(loaded)
        return teacher_path(self._answers, teacher.digest, **name)

    def metrics(
        self,
        version: str,
        n: int,
        reference: Reference,
        counts: Sequence[int],
        *,
        guidance: float | None = None,
    ) -> dict[int, Metrics]:
        """The version's figures at each step count, with its own guidance unless another is given."""
        student = self._loader.load(self._registry.student(version))
        try:
            ask = sampler_of(student, guidance=guidance)
            return {k: self._asked(ask, n, k, reference) for k in sorted(counts)}
        finally:
            self._loader.release(student)

    def teacher_at(
        self,
        teacher: TeacherAs,
        n: int,
        counts: Sequence[int],
        forget: Forgets = (),
        networks: tuple[str, ...] = (),
    ) -> dict[int, Metrics]:
        """The guided teacher at few steps, what a student has to beat; kept beside its answers, shipped ones included.
        Counts that it was not made for are left out."""
        own = self._registry.student(teacher.version).schedules
        reference = self.reference(teacher, n, forget, networks)
        judged = f"{teacher.digest[:12]}-{teacher.steps}-{teacher.guidance:g}-{n}-{reference.digest[:12]}"
        path = self._answers / f"few-steps-{judged}.json"  # its ratios are to the teacher at its own steps
        kept = _few_steps(teacher.task.answers / path.name) | _few_steps(path)
        missing = [k for k in counts if k in own and k not in kept]
        if missing:
            kept |= self.metrics(teacher.version, n, reference, missing, guidance=teacher.guidance)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({k: m.model_dump(mode="json") for k, m in sorted(kept.items())}))
            partial.replace(path)
        return {k: kept[k] for k in counts if k in kept}

    def teacher_metrics(self, n: int, reference: Reference) -> Metrics:
        return teacher_metrics(n, SEED, reference, self._check)

    def speeds(
        self, version: str, teacher: TeacherAs, counts: Sequence[int], *, guidance: float | None = None
    ) -> dict[str, Speed]:
        """Of the version by steps and of the `teacher`, measured in turn, so that both meet the same neighbours."""
        student = self._loader.load(self._registry.student(version))
        other = self._loader.load(self._registry.student(teacher.version))
        try:
            runs: dict[str, Callable[[int], Pixels]] = {
                str(k): _rows(sampler_of(student, guidance=guidance), teacher.task, k) for k in sorted(counts)
            }
            runs["teacher"] = _rows(sampler_of(other, guidance=teacher.guidance), teacher.task, teacher.steps)
            return self._timed(runs)
        finally:
            self._loader.release(student)
            self._loader.release(other)

    def sheet(self, version: str, teacher: TeacherAs, counts: Sequence[int]) -> bytes:
        """PNG: the teacher and the student at each count, the same captions and seeds."""
        asked = questions(2 * _SHEET_COLUMNS, SEED, teacher.task)
        captions, seeds = asked.captions[::2], asked.seeds[::2]
        rows: list[tuple[str, Pixels]] = []
        for who, name, steps, guidance in (
            ("teacher", teacher.version, [teacher.steps], teacher.guidance),
            ("student", version, sorted(counts, reverse=True), None),
        ):
            loaded = self._loader.load(self._registry.student(name))
            ask = sampler_of(loaded, guidance=guidance)
            rows += [(f"{who}, {k} step{'s' * (k > 1)}", ask(captions, seeds, k)) for k in steps]
            self._loader.release(loaded)
        return sheet(rows, captions)

    def _asked(self, ask: Sampler, n: int, steps: int, reference: Reference) -> Metrics:
        return evaluate(ask, n=n, seed=SEED, steps=steps, reference=reference, progress=self._looked, check=self._check)

    def _timed(self, runs: dict[str, Callable[[int], Pixels]]) -> dict[str, Speed]:
        singles: dict[str, list[float]] = {name: [] for name in runs}
        batches: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(_REPEATS):
            for name, run in runs.items():
                self._check()
                singles[name].append(_seconds(run, 1))
                if repeat % 5 == 0:
                    batches[name].append(_seconds(run, BATCH))
        return {
            name: Speed(
                latency_ms_p50=1000 * statistics.median(values),
                latency_ms_p95=1000 * sorted(values)[int(0.95 * (len(values) - 1))],
                images_per_s=BATCH / statistics.median(batches[name]),
            )
            for name, values in singles.items()
        }


def _few_steps(path: Path) -> dict[int, Metrics]:
    read = json.loads(path.read_bytes()) if path.exists() else {}
    return {int(k): Metrics.model_validate(figures) for k, figures in read.items()}


def chosen(backend: str, precision: str) -> Choice:
    """The engine of the settings' words: the same choice that a worker makes."""
    return choose(backend, precision)


def as_json(metrics: Metrics, speed: Speed | None = None) -> dict[str, Any]:
    return metrics.model_dump(mode="json") | (asdict(speed) if speed else {})


def _rows(ask: Sampler, task: Task, steps: int) -> Callable[[int], Pixels]:
    asked = questions(BATCH, SEED, task)
    return lambda rows: ask(asked.captions[:rows], asked.seeds[:rows], steps)


def _seconds(run: Callable[[int], Pixels], rows: int) -> float:
    started = time.perf_counter()
    run(rows)
    return time.perf_counter() - started
