"""What a job may name: searches, methods and loss terms with their own settings, checked against the schemas.

Torch-free, as the spec is that they are parts of.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from distill_jobs.methods import _schemas
from distill_jobs.student_spec import StudentSpec
from engines.errors import InvalidRequest, NotBuilt


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TermSpec(BaseModel):
    """An extra term of the student's loss; what else it may say is its own schema's."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    weight: float = Field(1.0, ge=0)
    after: float = Field(0.0, ge=0, lt=1, description="share of the stage that passes before it counts")
    ramp: float = Field(0.0, ge=0, le=1, description="share of the stage over which its weight then rises")

    def parts(self) -> dict[str, Any]:
        """What stands in every term, and its own settings."""
        return self.model_dump(include=set(type(self).model_fields)) | {"settings": self.model_extra or {}}


class SearchSpec(_Frozen):
    """A search for a schedule and its own `fields`. Flat in JSON."""

    name: str
    fields: dict[str, Any] = Field({}, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = {key: value for key, value in data.items() if key in cls.model_fields.keys() - {"fields"}}
        rest = {key: value for key, value in data.items() if key not in own}
        return {**own, "fields": rest}

    @property
    def points(self) -> int:
        """How many x0 the student's network must give at once; several make it a policy."""
        return int(self.fields.get("points", _schemas.schemas()[self.name]["defaults"].get("points", 1)))

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        return {**handler(self), **self.fields}


class MethodSpec(SearchSpec):
    """One stage: a method, its own `fields`, and its `share` of the budget. Flat in JSON."""

    share: float | None = Field(None, gt=0, le=1)
    terms: tuple[TermSpec, ...] = ()


def check_settings(
    named: SearchSpec,
    counts: Sequence[int],
    reads: frozenset[str],
    where: str,
    *,
    last: bool = True,
    experts: Sequence[float] = (),
) -> None:
    """What a method's own schema says of its settings, and whether it makes students of these step counts, as a search
    and the `last` stage must; `reads` are the student's inputs, `experts` the levels where its networks change.

    Raises:
        UnknownPlugin: no such method.
        InvalidRequest: `param` names the setting, as found at `where` in the job.
    """
    told = {"counts": list(counts), **named.fields}
    try:
        _schemas.check(named.name, told)
        _schemas.check_counts(named.name, told, reads, experts)
    except InvalidRequest as error:
        own = (error.param or "method").replace("method", where, 1)
        raise type(error)(f"{where}: {error.message}", param=own) from error
    if last and sorted(told["counts"]) != sorted(counts):
        message = f"{where}.counts={list(told['counts'])} are not student.steps={list(counts)}: leave counts out"
        raise InvalidRequest(message, param=f"{where}.counts")


def check_network(
    stages: Sequence[MethodSpec], student: StudentSpec, *, trains: bool, shard: bool, processes: int
) -> None:
    """Whether the stages train the network that the job says, such as an adapter or one with fewer layers."""
    said = {"train.lora": student.lora} | {
        name: getattr(student, name) for name in ("slim", "quantise", "experts", "forget")
    }
    asked = [name for name, value in said.items() if value is not None]
    if asked and not trains:
        message = f"student.{asked[0]}: {stages[0].name} trains no weights: leave it out, or name a method that does"
        raise InvalidRequest(message, param=f"student.{asked[0]}")
    if student.lora and shard:
        message = "the roles of a LoRA share one backbone, which cannot be spread over processes: leave shard out"
        raise InvalidRequest(message, param="train.shard")
    teach = [name for name, one in _schemas.schemas().items() if one["file"] == "slimming"]
    if student.slim and (stages[0].name not in teach or len(stages) < 2):
        message = f"student.slim: the first stage must teach the smaller network ({' or '.join(sorted(teach))}), and a "
        raise InvalidRequest(f"{message}few-step method follow it", param="student.slim")
    if student.experts:
        _check_experts(stages, processes)


def _check_experts(stages: Sequence[MethodSpec], processes: int) -> None:
    known = _schemas.schemas()
    if lone := [stage.name for stage in stages if stage.points > 1 or known[stage.name]["file"] == "slimming"]:
        message = f"student.experts: {lone[0]} trains one network alone: leave experts out"
        raise InvalidRequest(message, param="student.experts")
    if processes > 1:  # whose rows may be of other experts than those of another
        raise NotBuilt("student.experts are trained by one process yet: say train.processes=1", param="train.processes")


def check_rows(stage: MethodSpec, batch: int | None, processes: int, where: str) -> None:
    """Each process takes as many rows of an update as the others; `batch` is what the job says for all stages."""
    schema = _schemas.schemas()[stage.name]
    if not schema["roles"]:
        return  # a search is the work of one process
    own = schema["config"]["properties"].get("batch", {}).get("default", 0)
    rows = stage.fields.get("batch", batch or schema["defaults"].get("batch", own))
    if rows % processes:
        raise InvalidRequest(
            f"{where}: a batch of {rows} rows cannot be shared equally by train.processes={processes}: "
            "choose a multiple of it",
            param="train.processes",
        )


def check_train(stage: MethodSpec, lora: bool, reads: frozenset[str], where: str) -> None:
    """What is trained is said once, and a LoRA only where the student's network is its teacher's."""
    said, told = stage.fields.get("train"), "lora" if lora else "full"
    if said not in (None, told):
        message = f"{where}.train={said} contradicts student.train, which says {told}: leave it out of the method"
        raise InvalidRequest(message, param=f"{where}.train")
    if lora and reads:
        raise NotBuilt(
            f"{where}: the student would read {' and '.join(sorted(reads))}, for which a network needs layers that no "
            "LoRA has: use student.train: full, or guidance: baked and methods that need none, such as kd and dmd",
            param="student.train",
        )


def check_term(term: TermSpec, where: str) -> None:
    try:
        _schemas.check_term(term.name, term.model_extra or {})
    except InvalidRequest as error:
        raise type(error)(f"{where}: {error.message}", param=f"{where}.{error.param}") from error


def check_latents(stage: MethodSpec, *, given: bool, where: str) -> None:
    """Whether there are latents for whoever compares with real ones: `given` by the job, or made by the teacher."""
    schema, terms = _schemas.schemas()[stage.name], _schemas.terms()
    told = schema["defaults"] | stage.fields
    makes = [told[key] for key in _schemas.PREPARED if key in told]
    if given or any(makes):
        return
    wanting = [stage.name] if makes else [term.name for term in stage.terms if "data" in terms[term.name]["needs"]]
    if wanting:
        way = "set generate above 0" if makes else "use a method that makes them, such as kd or ladd"
        message = f"{where}: {wanting[0]} needs latents, and there are none: give data.images, or {way}"
        raise InvalidRequest(message, param=where)


def check_roles(stage: MethodSpec, where: str) -> None:
    """Each network has one who trains it: a second discriminator would be the first."""
    trained = dict.fromkeys(_schemas.schemas()[stage.name]["roles"], stage.name)
    for term in stage.terms:
        for role in _schemas.terms()[term.name]["roles"]:
            if role in trained:
                message = f"{where}: {trained[role]} and {term.name} would train one network, {role}: leave one out"
                raise InvalidRequest(message, param=f"{where}.terms")
            trained[role] = term.name


def check_embeds(stage: MethodSpec, schema: Mapping[str, Any], where: str) -> None:
    """Whatever judges the student's samples would have to know their weight too; critics and discriminators do not."""
    judges = [] if schema["embeds_guidance"] else [stage.name]
    judges += [term.name for term in stage.terms if _schemas.terms()[term.name]["roles"]]
    if judges:
        able = ", ".join(sorted(name for name, one in _schemas.schemas().items() if one["embeds_guidance"]))
        raise InvalidRequest(
            f"student.guidance.embedded: {judges[0]} cannot train a student that reads its guidance weight: "
            f"use student.guidance: baked, or one of {able}",
            param=where,
        )
