"""What a job will need, before it is queued: memory from the sizes of the weights, time from what was measured here.

Nothing is guessed: a figure that cannot be known yet is null, and `basis` says what each one comes from.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import BaseModel

from distill_jobs import spec as specs
from distill_jobs.jobs import JobState
from distill_jobs.records import PROGRESS, JobRecords
from distill_jobs.student_spec import LoraSpec
from engines.errors import StudentNotFound
from engines.manifest import StudentManifest
from engines.registry.base import Registry

_FLOATS_PER_TRAINED_WEIGHT = 4  # weight, gradient and Adam's two moments
_BYTES_PER_FLOAT = 4


class Estimate(BaseModel):
    """`memory_bytes` is of weights and optimisers, without activations, which depend on the batch."""

    object: Literal["distillation.estimate"] = "distillation.estimate"
    memory_bytes: int
    train_seconds: float | None
    iterations_per_s: float | None
    hard_stop_seconds: float | None
    basis: dict[str, str]


def estimate(spec: specs.DistillJobSpec, records: JobRecords, sees: Callable[[str], bool]) -> Estimate:
    """Raises `StudentNotFound` for a teacher that is not there."""
    teacher = records.registry.student(teacher_version(spec, records.registry))
    shapes = _shapes(teacher, records.registry)
    weights = sum(math.prod(shape) for shape in shapes.values())
    lora = spec.student.lora
    each = weights if lora is None else _adapter_weights(shapes, lora)
    trained = max(len(names) for names in specs.roles(spec))
    copies = trained * _FLOATS_PER_TRAINED_WEIGHT + len(spec.train.ema)
    processes = spec.train.processes  # each holds a teacher, and the rest too unless it is spread
    spread = 1 if spec.train.shard else processes
    what = "network(s)" if lora is None else f"adapter(s) of {each} weights"
    speed, source = _measured_speed(spec, records, sees)
    seconds = _seconds(spec, speed)
    return Estimate(
        memory_bytes=_BYTES_PER_FLOAT * (weights * processes + each * copies * spread),
        train_seconds=seconds,
        iterations_per_s=speed,
        hard_stop_seconds=None if spec.train.max_minutes is None else 120.0 * spec.train.max_minutes,
        basis={
            "memory_bytes": f"{weights} weights in fp32: the teacher, {trained} trained {what} with gradient and "
            f"two moments, {len(spec.train.ema)} average(s), in {processes} process(es){', spread' * spec.train.shard}"
            "; activations are not in it",
            "train_seconds": "train.max_minutes" if spec.train.max_minutes else source,
            "iterations_per_s": source,
        },
    )


def teacher_version(spec: specs.DistillJobSpec, registry: Registry) -> str:
    """The full version of the teacher a job means: a version, or the teacher behind a deployment.

    Raises:
        StudentNotFound: the deployment serves no student made from, or being, a teacher.
    """
    if "@" in spec.teacher.id:
        manifest = registry.student(spec.teacher.id)
        return manifest.version if manifest.kind == "teacher" else (manifest.base or manifest.version)
    if spec.teacher.revision is None:
        revision = registry.current(spec.teacher.id)
    else:
        revision = registry.revision(spec.teacher.id, spec.teacher.revision)
    versions = [] if revision is None else sorted(revision.versions)
    manifests = [registry.student(version) for version in versions]
    teachers = [m.version for m in manifests if m.kind == "teacher"] or [m.base for m in manifests if m.base]
    if not teachers:
        message = f"deployment {spec.teacher.id!r} serves no teacher and nothing made from one"
        raise StudentNotFound(message, param="teacher.id")
    return teachers[0]


def _shapes(manifest: StudentManifest, registry: Registry) -> dict[str, tuple[int, ...]]:
    """Of the denoiser's weights, from the header of their safetensors file (https://github.com/huggingface/safetensors)."""
    with registry.blob_path(manifest.components["denoiser"].weights).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _adapter_weights(shapes: Mapping[str, tuple[int, ...]], lora: LoraSpec) -> int:
    """rank x (in + out) of every matrix and convolution that the targets name."""
    ends = (".weight",) if lora.targets == "auto" else tuple(f".{target}.weight" for target in lora.targets)
    able = [shape for name, shape in shapes.items() if f".{name}".endswith(ends) and len(shape) in (2, 4)]
    return sum(lora.rank * (out + math.prod(rest)) for out, *rest in able)


def _measured_speed(
    spec: specs.DistillJobSpec, records: JobRecords, sees: Callable[[str], bool]
) -> tuple[float | None, str]:
    """Iterations per second of the newest ended job of the same teacher and methods."""
    names = [stage.name for stage in spec.stages]
    for job in records.all():
        earlier = specs.DistillJobSpec.model_validate(job.spec)
        same = [stage.name for stage in earlier.stages] == names and earlier.teacher.id == spec.teacher.id
        if same and sees(job.owner) and job.state is JobState.SUCCEEDED:
            speed = (records.read(job.id, PROGRESS) or {}).get("mean_it_s")
            if speed:
                return float(speed), f"measured by {job.id}"
    return None, "no job with this teacher and these methods has ended here yet"


def _seconds(spec: specs.DistillJobSpec, speed: float | None) -> float | None:
    by_time = None if spec.train.max_minutes is None else 60.0 * spec.train.max_minutes
    by_count = None if spec.train.iterations is None or speed is None else spec.train.iterations / speed
    known = [seconds for seconds in (by_time, by_count) if seconds is not None]
    return min(known) if known else None
