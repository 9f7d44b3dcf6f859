"""What a job will need, before it is queued: coarser than what its trainer finds by trying, just before it starts.

An equal job that has ended says it all. Without one, memory is counted from the sizes of weights, and time is known
only where the job names it: a figure that cannot be known yet is null, and `basis` says what each one comes from.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from distill_jobs import spec as specs
from distill_jobs.jobs import JobState
from distill_jobs.methods import _schemas
from distill_jobs.needs import Needs
from distill_jobs.records import PROGRESS, RESULT, TRAINER, JobRecords
from distill_jobs.stages import MethodSpec
from distill_jobs.student_spec import LoraSpec
from engines.errors import StudentNotFound
from engines.manifest import StudentManifest
from engines.registry.base import Registry

_BYTES_PER_FLOAT = 4
_FLOATS_IN_TRAINING = 3  # weight and Adam's two moments; only the network that is being updated has a gradient
Shapes = Mapping[str, tuple[int, ...]]


class Estimate(BaseModel):
    """`memory_bytes` is the peak of an equal job, or else of weights and optimisers alone, which is less: `basis` says
    which."""

    object: Literal["distillation.estimate"] = "distillation.estimate"
    memory_bytes: int
    train_seconds: float | None
    iterations_per_s: float | None
    hard_stop_seconds: float | None
    basis: dict[str, str]


def estimate(spec: specs.DistillJobSpec, records: JobRecords, sees: Callable[[str], bool]) -> Estimate:
    """Raises `StudentNotFound` for a teacher that is not there."""
    teacher = records.registry.student(teacher_version(spec, records.registry))
    counted = weights_bytes(spec, _shapes(teacher, records.registry))
    earlier = _equal(spec, teacher.version, records, sees)
    speed = None if earlier is None else earlier.iterations / earlier.needs.train_seconds
    source = "no equal job has ended here yet" if earlier is None else f"measured by {earlier.job_id}"
    told = "weights, gradients, moments and averages in fp32; a lower bound without activations and runtime"
    return Estimate(
        memory_bytes=counted if earlier is None else earlier.needs.memory_bytes,
        train_seconds=_seconds(spec, speed),
        iterations_per_s=speed,
        hard_stop_seconds=None if spec.train.max_minutes is None else 120.0 * spec.train.max_minutes,
        basis={
            "memory_bytes": told if earlier is None else source,
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


def _shapes(manifest: StudentManifest, registry: Registry) -> Shapes:
    """Of the denoiser's weights, from the header of their safetensors file (https://github.com/huggingface/safetensors)."""
    with registry.blob_path(manifest.components["denoiser"].weights).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def weights_bytes(spec: specs.DistillJobSpec, shapes: Shapes) -> int:
    """Of teacher, roles, gradient, moments, averages and the best student so far, in the stage that has most of them.
    `shapes` are those of the teacher's weights by name; what a student reads or lacks besides is not counted."""
    lora, processes = spec.student.lora, spec.train.processes
    network = sum(math.prod(shape) for shape in shapes.values())
    player = network if lora is None else _adapter_weights(shapes, lora)
    more = network * len(spec.student.experts or ())  # the student's further networks; a critic may have them too
    averages = (len(spec.train.ema) + 1) * (player + more) if spec.trains else 0
    trained = (_FLOATS_IN_TRAINING + 1) * more + max(_stage_floats(stage, player, shapes) for stage in spec.stages)
    spread = 1 if spec.train.shard else processes  # each process holds the teacher, and the rest unless it is spread
    return _BYTES_PER_FLOAT * (network * processes + (trained + averages) * spread)


def _stage_floats(stage: MethodSpec, player: int, shapes: Shapes) -> int:
    roles = list(_roles(stage, player, shapes))
    gradient = max((role.weights for role in roles if role.trained), default=0)
    return gradient + sum(role.weights * (_FLOATS_IN_TRAINING if role.trained else 1) for role in roles)


@dataclass(frozen=True, slots=True)
class _Role:
    weights: int
    trained: bool


def _roles(stage: MethodSpec, player: int, shapes: Shapes) -> Iterator[_Role]:
    """The networks of a method and of its terms beside the teacher: each a `player`, or heads on its features."""
    method, terms = _schemas.schemas()[stage.name], _schemas.terms()
    said = [(method, method["defaults"] | stage.fields)]
    said += [(terms[term.name], term.parts()["settings"]) for term in stage.terms]
    for schema, settings in said:
        for name in schema["roles"]:
            weights = _heads_weights(schema, settings, shapes) if name in schema["heads"] else player
            yield _Role(weights, name not in schema["frozen"])


def _heads_weights(schema: Mapping[str, Any], settings: Mapping[str, Any], shapes: Shapes) -> int:
    """Of a discriminator: per feature of the teacher that it reads a 3 x 3 convolution, two biases, the noise level and
    the feature's size, and the way out."""
    known = schema["config"]["properties"]
    width = int(settings.get("width", known["width"]["default"]))
    ends = tuple(f".{tap}" for tap in settings.get("taps", known["taps"]["default"]))
    modules = {module for name in shapes for module in accumulate(name.split("."), "{}.{}".format)}
    features = sum(f".{module}".endswith(ends) for module in modules) or 1
    return features * (9 * width**2 + 5 * width)


def _adapter_weights(shapes: Shapes, lora: LoraSpec) -> int:
    """rank x (in + out) of every matrix and convolution that the targets name."""
    ends = (".weight",) if lora.targets == "auto" else tuple(f".{target}.weight" for target in lora.targets)
    able = [shape for name, shape in shapes.items() if f".{name}".endswith(ends) and len(shape) in (2, 4)]
    return sum(lora.rank * (out + math.prod(rest)) for out, *rest in able)


@dataclass(frozen=True, slots=True)
class _Earlier:
    job_id: str
    needs: Needs
    iterations: int


def _equal(
    spec: specs.DistillJobSpec, teacher: str, records: JobRecords, sees: Callable[[str], bool]
) -> _Earlier | None:
    """The newest ended job that trains the same networks by the same methods, for however long: from this version of a
    teacher, whatever either job calls it, for what a deployment serves changes."""
    for job in records.all():
        if job.state is not JobState.SUCCEEDED or not sees(job.owner):
            continue
        try:
            said = specs.DistillJobSpec.model_validate(job.spec)
        except ValidationError:  # what an earlier release allowed is equal to nothing of now
            continue
        told = records.read(job.id, TRAINER) or {}
        same = _costs(said) == _costs(spec) and told.get("teacher") == teacher
        if same and (found := _ended(job.id, records)):
            return found
    return None


def _ended(job_id: str, records: JobRecords) -> _Earlier | None:
    measured = (records.read(job_id, RESULT) or {}).get("measured")
    steps = (records.read(job_id, PROGRESS) or {}).get("step")
    return _Earlier(job_id, Needs(**measured), steps) if measured and steps else None


def _costs(spec: specs.DistillJobSpec) -> tuple[Any, ...]:
    """What memory and the cost of an iteration follow from, besides the teacher."""
    budget = {"iterations", "max_minutes", "seed", "lr", "checkpoint_every", "checkpoint_every_s"}
    return (
        spec.student.model_dump(exclude={"name"}),
        [stage.model_dump() for stage in spec.stages],
        spec.train.model_dump(exclude=budget),
    )


def _seconds(spec: specs.DistillJobSpec, speed: float | None) -> float | None:
    by_time = None if spec.train.max_minutes is None else 60.0 * spec.train.max_minutes
    by_count = None if spec.train.iterations is None or speed is None else spec.train.iterations / speed
    known = [seconds for seconds in (by_time, by_count) if seconds is not None]
    return min(known) if known else None
