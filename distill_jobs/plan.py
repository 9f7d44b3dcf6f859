"""What a job's budget buys: stages with iterations, from measured costs; computed once and written down (pure).

Every schedule of training reads iterations, so that a run which was interrupted ends where it would have ended. The
clock speaks only here, and in the hard stop at twice the budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from distill_jobs.methods import _schemas
from distill_jobs.spec import DistillJobSpec

HARD_STOP = 2.0
_MOST_PAIRS_SHARE = 1 / 3  # of a stage's time for the teacher's pairs: few of them are learnt by heart
_LEAST_ITERATIONS = 10
_EVALUATIONS_SHARE = 0.06  # of the budget for small evaluations,
_MOST_EVALUATIONS, _LEAST_EVALUATIONS = 10, 2  # so many of them
_PAIRS_STEP = 64


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds: one iteration of a stage, one teacher pair, one small evaluation."""

    iteration_s: float
    pair_s: float = 0.0
    evaluation_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StagePlan:
    method: str
    iterations: int
    settings: dict[str, Any] = field(default_factory=dict)
    hard_stop_s: float | None = None
    seconds: float | None = None
    terms: tuple[dict[str, Any], ...] = ()  # name, weight and settings of each


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a run. `eval_every` is in iterations of a stage."""

    stages: tuple[StagePlan, ...]
    eval_every: int
    bf16: bool

    @property
    def iterations(self) -> int:
        return sum(stage.iterations for stage in self.stages)

    def done_before(self, stage: int) -> int:
        """Iterations of the stages before this one."""
        return sum(earlier.iterations for earlier in self.stages[:stage])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Plan":
        stages = (StagePlan(**{**stage, "terms": tuple(stage.get("terms", ()))}) for stage in data["stages"])
        return cls(tuple(stages), data["eval_every"], data["bf16"])


def settings(spec: DistillJobSpec) -> list[dict[str, Any]]:
    """What each stage's method is told: the job's general wishes, over them the stage's own."""
    general: dict[str, Any] = {"counts": list(spec.student.steps)}
    if spec.student.lora is not None:
        general["train"] = "lora"
    if spec.train.batch is not None:
        general["batch"] = spec.train.batch
    if spec.train.lr is not None:
        general["lr"] = spec.train.lr
    return [{**general, **stage.fields} for stage in spec.stages]


def drafted(spec: DistillJobSpec) -> list[StagePlan]:
    """The stages before anything was measured, as one iteration each."""
    return [
        StagePlan(stage.name, 1, told, terms=tuple(term.parts() for term in stage.terms))
        for stage, told in zip(spec.stages, settings(spec), strict=True)
    ]


def planned(
    spec: DistillJobSpec, costs: Sequence[Costs], pairs: Sequence[int], *, spent_s: float = 0.0, bf16: bool = False
) -> Plan:
    """Stages that fit the budget. `pairs` is how many each stage would make, `spent_s` what is already gone of it."""
    drafts = drafted(spec)
    if spec.train.max_minutes is None:
        assert spec.train.iterations is not None
        shares = [share * spec.train.iterations for share in spec.shares]
        stages = [replace(stage, iterations=max(1, round(n))) for stage, n in zip(drafts, shares, strict=True)]
        return _with_evaluations(spec, stages, bf16, _MOST_EVALUATIONS)
    left_s = max(1.0, 60 * spec.train.max_minutes - spent_s)
    times = _evaluations(left_s, max(cost.evaluation_s for cost in costs))
    parts = zip(drafts, costs, pairs, spec.shares, strict=True)
    timed = [
        _timed(stage, cost, count, seconds=share * left_s, evaluations=times * share)
        for stage, cost, count, share in parts
    ]
    if spec.train.iterations is not None:
        most = [max(1, round(share * spec.train.iterations)) for share in spec.shares]
        timed = [replace(stage, iterations=min(stage.iterations, n)) for stage, n in zip(timed, most, strict=True)]
    return _with_evaluations(spec, timed, bf16, times)


def _evaluations(seconds: float, evaluation_s: float) -> int:
    """How many small evaluations the budget has room for: on a slow machine they must not eat the training."""
    affordable = int(_EVALUATIONS_SHARE * seconds / evaluation_s) if evaluation_s else _MOST_EVALUATIONS
    return max(_LEAST_EVALUATIONS, min(_MOST_EVALUATIONS, affordable))


def _timed(stage: StagePlan, cost: Costs, pairs: int, *, seconds: float, evaluations: float) -> StagePlan:
    told = dict(stage.settings)
    known = _schemas.schemas()[stage.method]["config"]["properties"]
    prepared = next((key for key in _schemas.PREPARED if key in known), None)
    if pairs and cost.pair_s > 0 and prepared:
        most = int(_MOST_PAIRS_SHARE * seconds / cost.pair_s) // _PAIRS_STEP * _PAIRS_STEP
        pairs = max(_PAIRS_STEP, min(pairs, most))
        told[prepared] = pairs
    rest_s = seconds - pairs * cost.pair_s - evaluations * cost.evaluation_s
    iterations = max(_LEAST_ITERATIONS, int(rest_s / cost.iteration_s))
    return replace(stage, iterations=iterations, settings=told, hard_stop_s=HARD_STOP * seconds, seconds=seconds)


def _with_evaluations(spec: DistillJobSpec, stages: Sequence[StagePlan], bf16: bool, evaluations: int) -> Plan:
    total = sum(stage.iterations for stage in stages)
    return Plan(tuple(stages), spec.eval.every or max(1, -(-total // evaluations)), bf16)
