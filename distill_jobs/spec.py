"""What a distillation job may say, checked in full when it is submitted.

A job that cannot run is refused before it is queued: unknown fields by name, a method's own fields
against `methods/schemas.json` (generated from the methods), data against what the methods need.
Torch-free, because the gateway validates with it.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill_jobs import forgetting
from distill_jobs.folders import FolderName
from distill_jobs.methods import _schemas
from distill_jobs.stages import (
    MethodSpec,
    SearchSpec,
    check_embeds,
    check_latents,
    check_network,
    check_roles,
    check_rows,
    check_settings,
    check_term,
    check_train,
)
from distill_jobs.student_spec import Steps, StudentSpec
from engines.errors import InvalidRequest, NotBuilt
from engines.manifest import Guidance, Name

Limit = Annotated[float, Field(gt=0)]
Limits = Limit | dict[Steps, Limit]
SCHEDULE_ENDING = "-schedule"  # of the name of the student without new weights
_MOST_NAME = 64
Metric = Literal["fd", "alignment", "diversity", "grain", "latency"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherSpec(_Frozen):
    id: str = Field(description="a deployment, whose teacher is meant, or a version name@digest")
    revision: int | None = Field(None, ge=1, description="revision of the deployment; the current one if missing")
    guidance: float | None = Field(None, ge=0, le=30, description="u + w(c - u); the teacher's own if missing")
    steps: Steps | None = Field(None, description="how many steps the teacher is judged at; its most if missing")


class DataSpec(_Frozen):
    """Where a job's data comes from; at most one of the three."""

    prompts: str | tuple[str, ...] | None = Field(None, description="a named source such as `shapes`, or the prompts")
    images: FolderName | None = Field(
        None,
        description="captioned pictures: a task's such as `shapes`, or a folder of the distiller's DISTILLER_DATA_DIR",
    )
    pairs: str | None = Field(None, description="id of a job whose teacher pairs are used again")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("prompts", "images", "pairs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"data names {' and '.join(given)}: choose one")
        if isinstance(self.prompts, tuple) and not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("data.prompts has an empty prompt")
        return self


class TrainSpec(_Frozen):
    iterations: int | None = Field(None, ge=1, le=10_000_000, description="optimiser steps; or say max_minutes")
    batch: int | None = Field(None, ge=1, le=4096, description="rows per update; each method's own if missing")
    lr: float | None = Field(None, gt=0, le=1, description="of the student; each method's own if missing")
    ema: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.98,)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    processes: int = Field(1, ge=1, le=1024, description="of one machine that train together; each takes its rows")
    shard: bool = Field(False, description="each process holds a part of every trained network (FSDP2)")
    micro_batch: int | None = Field(None, ge=1, description="most rows of one backward pass; gradients add up")
    gradient_checkpointing: bool = Field(False, description="compute activations anew instead of keeping them")
    max_minutes: float | None = Field(None, gt=0, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every_s: float = Field(30.0, gt=0)
    checkpoint_every: int | None = Field(None, ge=1, description="also every so many iterations")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.iterations is None and self.max_minutes is None:
            raise ValueError("train has no end: say iterations or max_minutes")
        if self.shard and self.processes == 1:
            raise ValueError("shard spreads networks over processes: say processes=2 or more")
        return self


class EvalSpec(_Frozen):
    every: int | None = Field(None, ge=1, description="iterations between small evaluations; a tenth if missing")
    samples: int = Field(2000, ge=16, le=100_000)
    small_samples: int = Field(256, ge=16, le=10_000, description="samples of an evaluation while training")
    metrics: tuple[Metric, ...] = ("fd", "alignment", "diversity", "grain", "latency")
    best_by: Literal["fd", "alignment", "diversity"] = "fd"
    networks: tuple[FolderName, ...] = Field(
        (),
        max_length=8,
        description="feature networks besides the task's own, such as DINOv2: directories of transformers with "
        "safetensors, below the distiller's DISTILLER_DATA_DIR",
    )

    @model_validator(mode="after")
    def _small_is_a_part(self) -> Self:
        if self.small_samples > self.samples and "small_samples" in self.model_fields_set:
            raise ValueError(
                f"small_samples ({self.small_samples}) must be at most samples ({self.samples}): "
                "the teacher answers no more questions"
            )
        return self

    @model_validator(mode="after")
    def _networks_are_distinct(self) -> Self:
        if len(set(self.networks)) != len(self.networks):
            raise ValueError(f"networks names one twice: {', '.join(self.networks)}")
        return self

    @property
    def while_training(self) -> int:
        """Samples of a small evaluation: the teacher's answers to the first of the questions are there."""
        return min(self.small_samples, self.samples)


class PublishSpec(_Frozen):
    deployment: Name
    tiers: dict[Name, Steps] = Field({}, description="tier: steps")
    when: Literal["on_pass", "never", "always"] = "on_pass"


class GateSpec(_Frozen):
    """The limits that each step count must keep; a number, or one per step count. None is no rule."""

    fd_ratio: Limits | None = 1.5
    alignment_ratio: Limits | None = 0.93
    diversity_ratio: Limits | None = 0.8
    grain_ratio: Limits | None = 3.0
    alignment_forgotten: Limits | None = Field(
        0.1, description="most that may be left of what the student forgets; judged where it forgets something"
    )
    latency_ms: Limits | None = None
    networks: dict[FolderName, Limits] = Field({}, description="of fd_ratio in a network of eval.networks, by its name")

    @property
    def limits(self) -> dict[str, Limits]:
        """Every rule that has a limit, by its name: `fd_ratio`, or `fd_ratio.<network>`."""
        own = {name: getattr(self, name) for name in GateSpec.model_fields if name != "networks"}
        named = {f"fd_ratio.{name}": limits for name, limits in self.networks.items()}
        return {name: limits for name, limits in (own | named).items() if limits is not None}


class DistillJobSpec(_Frozen):
    """A whole job."""

    teacher: TeacherSpec
    student: StudentSpec
    method: MethodSpec | tuple[MethodSpec, ...]
    schedule: SearchSpec | tuple[SearchSpec, ...] | None = Field(
        None, description="how the teacher's own few steps are found before training; of several the best per count"
    )
    data: DataSpec = DataSpec()
    train: TrainSpec
    eval: EvalSpec = EvalSpec()
    publish: PublishSpec | None = None
    gates: GateSpec = GateSpec()

    @property
    def stages(self) -> tuple[MethodSpec, ...]:
        return self.method if isinstance(self.method, tuple) else (self.method,)

    @property
    def trains(self) -> bool:
        """Whether any stage has a network to train; otherwise the stages are searches for a schedule."""
        return any(roles(self))

    @property
    def searches(self) -> tuple[SearchSpec, ...]:
        """The searches of step 0."""
        if not self.trains:
            return self.stages
        if self.schedule is None:
            return (SearchSpec(name="optimal_steps"),)
        return self.schedule if isinstance(self.schedule, tuple) else (self.schedule,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each stage's share of the budget, adding up to one; a stage that says none gets an equal part of the rest."""
        said = [stage.share for stage in self.stages]
        missing = said.count(None)
        rest = max(0.0, 1.0 - sum(share for share in said if share is not None))
        raw = [rest / missing if share is None else share for share in said]
        return tuple(share / sum(raw) for share in raw)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.stages:
            raise ValueError("method is an empty list: name at least one stage")
        said = sum(stage.share or 0.0 for stage in self.stages)
        if said > 1 + 1e-6 or (said >= 1 and any(stage.share is None for stage in self.stages)):
            raise ValueError(f"the shares of the stages leave nothing for some of them (sum {said:g})")
        self._counts_are_made("publish.tiers", (self.publish.tiers if self.publish else {}).values())
        if lost := sorted(set(self.gates.networks) - set(self.eval.networks)):
            raise ValueError(f"gates.networks names {', '.join(lost)}: eval.networks must too")
        for rule, limits in self.gates.limits.items():
            figure, _, network = rule.partition(".")
            field = f"gates.networks.{network}" if network else f"gates.{figure}"
            self._counts_are_made(field, limits if isinstance(limits, dict) else ())
            if isinstance(limits, dict) and (missing := sorted(set(self.student.steps) - set(limits))):
                raise ValueError(f"{field} has no limit for {missing} steps, which the student is made for")
        return self

    def _counts_are_made(self, field: str, counts: Any) -> None:
        unknown = sorted(set(counts) - set(self.student.steps))
        if unknown:
            raise ValueError(f"{field} asks for {unknown} steps; student.steps are {list(self.student.steps)}")

    def canonical(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def parse(body: Mapping[str, Any] | bytes) -> DistillJobSpec:
    """A spec that can run.

    Raises:
        InvalidRequest: `param` names the field at fault.
        NotBuilt: what is documented and refused until it exists.
    """
    try:
        data = json.loads(body) if isinstance(body, bytes) else body
        json.dumps(data, allow_nan=False)  # Python reads NaN and 1e999, which no range of a setting refuses
        spec = DistillJobSpec.model_validate(data)
    except ValidationError as error:
        raise _first_fault(error) from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the job is not JSON: {error}") from error
    _refuse_unbuilt(spec)
    _check_name(spec)
    _check_methods(spec)
    shard, processes = spec.train.shard, spec.train.processes
    check_network(spec.stages, spec.student, trains=spec.trains, shard=shard, processes=processes)
    _check_forgets(spec)
    return spec


def _first_fault(error: ValidationError) -> InvalidRequest:
    fault = max(error.errors(), key=lambda fault: len(fault["loc"]))  # of a union, the member that got furthest
    path = ".".join(str(part) for part in fault["loc"] if not _is_union_tag(str(part)))
    value = "" if fault["type"] in ("missing", "extra_forbidden") else f" (got {_brief(fault['input'])})"
    what = "unknown field" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{path or 'job'}: {what}{value}", param=path or None)


def _is_union_tag(part: str) -> bool:
    """Pydantic puts the tried member of a union into the path; users never wrote it."""
    return (
        part
        in {"MethodSpec", "SearchSpec", "LoraTrain", "EmbeddedGuidance", "constrained-float", "float", "int", "str"}
        or "[" in part
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_unbuilt(spec: DistillJobSpec) -> None:
    if spec.data.pairs is not None:
        raise NotBuilt("data.pairs is not built yet: use data.prompts", param="data.pairs")


def _check_name(spec: DistillJobSpec) -> None:
    most = _MOST_NAME - len(SCHEDULE_ENDING)
    if spec.trains and len(spec.student.name) > most:
        raise InvalidRequest(
            f"student.name has {len(spec.student.name)} characters: {most} at most leave room for the student without "
            f"new weights, NAME{SCHEDULE_ENDING}",
            param="student.name",
        )


def _check_methods(spec: DistillJobSpec) -> None:
    known = _schemas.schemas()
    for position, stage in enumerate(spec.stages):
        where = f"method.{position}" if isinstance(spec.method, tuple) else "method"
        last, experts = stage is spec.stages[-1], spec.student.experts or ()
        check_settings(stage, spec.student.steps, inputs(spec), where, last=last, experts=experts)
        check_train(stage, spec.student.lora is not None, inputs(spec), where)
        for term in stage.terms:
            check_term(term, where)
        check_rows(stage, spec.train.batch, spec.train.processes, where)
        if not known[stage.name]["roles"] and spec.trains:
            message = f"{where}: {stage.name} trains no weights: name it as the job's schedule, not as a stage"
            raise InvalidRequest(message, param=where)
        check_latents(stage, given=spec.data.images is not None, where=where)
        check_roles(stage, where)
        if spec.student.weights:
            check_embeds(stage, known[stage.name], where)
    _check_schedule(spec)


def _check_schedule(spec: DistillJobSpec) -> None:
    if spec.schedule is None:
        return
    if not spec.trains:
        message = (
            f"schedule: {spec.stages[0].name} is the search already, there is nothing to train: leave schedule out"
        )
        raise InvalidRequest(message, param="schedule")
    if not spec.searches:
        raise InvalidRequest("schedule is an empty list: name a search or leave it out", param="schedule")
    for position, named in enumerate(spec.searches):
        where = f"schedule.{position}" if isinstance(spec.schedule, tuple) else "schedule"
        check_settings(named, spec.student.steps, inputs(spec), where)
        if _schemas.schemas()[named.name]["roles"]:
            searches = ", ".join(name for name, one in sorted(_schemas.schemas().items()) if not one["roles"])
            message = f"{where}: {named.name} trains weights and finds no schedule: choose from {searches}"
            raise InvalidRequest(message, param=where)


def _check_forgets(spec: DistillJobSpec) -> None:
    """Of prompts that the job lists itself; those of a named source are read by the trainer."""
    if isinstance(spec.data.prompts, tuple):
        forgetting.check_heard(spec.data.prompts, spec.student.forgets)


def check_weights(spec: DistillJobSpec, teacher: Guidance) -> None:
    """Whether the teacher can be guided as the student is to be.

    Raises:
        InvalidRequest: its own weights do not hold the student's range, or the job's weight is outside of that.
    """
    if spec.student.weights is None:
        return
    low, high = spec.student.weights
    guided = teacher.mode in ("cfg", "embedded")
    if not guided or not teacher.minimum <= low < high <= teacher.maximum:
        can = f"{teacher.minimum}..{teacher.maximum}" if guided else "none at all"
        message = f"student.guidance.embedded={[low, high]} is outside the teacher's weights, {can}"
        raise InvalidRequest(message, param="student.guidance.embedded")
    w = teacher.default if spec.teacher.guidance is None else spec.teacher.guidance
    if not low <= w <= high:
        raise InvalidRequest(
            f"teacher.guidance={w} is outside student.guidance.embedded={[low, high]}: it is the student's default, "
            "at which it is judged",
            param="teacher.guidance",
        )


def inputs(spec: DistillJobSpec) -> frozenset[str]:
    """Which of s and w the student's network must read for these methods."""
    known = _schemas.schemas()
    reads = frozenset(name for stage in spec.stages if stage.name in known for name in known[stage.name]["inputs"])
    return reads | {"w"} if spec.student.weights else reads


def roles(spec: DistillJobSpec) -> tuple[tuple[str, ...], ...]:
    """The networks that each stage trains; all empty for a job that only searches for a schedule."""
    known = _schemas.schemas()
    return tuple(tuple(known[stage.name]["roles"]) if stage.name in known else () for stage in spec.stages)


def preset(name: str) -> dict[str, Any]:
    """The JSON of a job that is shipped, such as the demo's `shapes-fast`."""
    source = files("distill_jobs.presets").joinpath(f"{name}.json")
    if not source.is_file():
        raise InvalidRequest(f"no preset is called {name!r}", param="preset")
    body: dict[str, Any] = json.loads(source.read_bytes())
    return body
