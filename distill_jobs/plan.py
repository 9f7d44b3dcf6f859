"""What a job's budget buys: stages with iterations, from measured costs; computed once and written down (pure).

Every schedule of training reads iterations, so that a run which was interrupted ends where it would have ended. The
clock speaks only here, and in the hard stop at twice the budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from distill_jobs.methods import _schemas
from distill_jobs.needs import Needs
from distill_jobs.spec import DistillJobSpec, TrainSpec

HARD_STOP = 2.0
_MOST_PAIRS_SHARE = 1 / 3  # of a stage's time for the teacher's pairs: few of them are learnt by heart
_LEAST_ITERATIONS = 10
_EVALUATIONS_SHARE = 0.06  # of the budget for small evaluations,
_MOST_EVALUATIONS, _LEAST_EVALUATIONS = 10, 2  # so many of them
_PAIRS_STEP = 64  # and so many are tried


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one stage, measured: seconds of an iteration, a teacher pair, a small evaluation and a checkpoint; bytes of a
    pair that is kept in memory, and the peak with one step of them."""

    iteration_s: float
    pair_s: float = 0.0
    evaluation_s: float = 0.0
    checkpoint_s: float = 0.0
    pair_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """`seconds` is what it should take, once it is planned."""

    method: str
    iterations: int
    settings: dict[str, Any] = field(default_factory=dict)
    hard_stop_s: float | None = None
    seconds: float = 0.0
    terms: tuple[dict[str, Any], ...] = ()  # what `TermSpec.parts` says of each


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a run. `eval_every` is in iterations of a stage, `memory_bytes` the peak that is to be expected."""

    stages: tuple[StagePlan, ...]
    eval_every: int
    bf16: bool
    memory_bytes: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(self.memory_bytes, sum(stage.seconds for stage in self.stages))

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
        """Also of a plan that was written before needs were counted, whose stages may say null seconds."""
        told = (
            stage | {"terms": tuple(stage.get("terms", ())), "seconds": stage["seconds"] or 0.0}
            for stage in data["stages"]
        )
        stages = tuple(StagePlan(**stage) for stage in told)
        return cls(stages, data["eval_every"], data["bf16"], data.get("memory_bytes", 0))


def expected(data: Mapping[str, Any]) -> Needs | None:
    """What a plan says that training should need; None where it was written before that was counted."""
    return Plan.of(data).needs if "memory_bytes" in data else None


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
        return _expected(spec, stages, costs, pairs, evaluations=_MOST_EVALUATIONS, bf16=bf16)
    left_s = max(1.0, 60 * spec.train.max_minutes - spent_s)
    times = _evaluations(left_s, max(cost.evaluation_s for cost in costs))
    parts = zip(drafts, costs, pairs, spec.shares, strict=True)
    timed = [
        _timed(spec.train, stage, cost, count, seconds=share * left_s, evaluations=times * share)
        for stage, cost, count, share in parts
    ]
    if spec.train.iterations is not None:
        most = [max(1, round(share * spec.train.iterations)) for share in spec.shares]
        timed = [replace(stage, iterations=min(stage.iterations, n)) for stage, n in zip(timed, most, strict=True)]
    return _expected(spec, timed, costs, pairs, evaluations=times, bf16=bf16)


def _evaluations(seconds: float, evaluation_s: float) -> int:
    """How many small evaluations the budget has room for: on a slow machine they must not eat the training."""
    affordable = int(_EVALUATIONS_SHARE * seconds / evaluation_s) if evaluation_s else _MOST_EVALUATIONS
    return max(_LEAST_EVALUATIONS, min(_MOST_EVALUATIONS, affordable))


def _timed(
    train: TrainSpec, stage: StagePlan, cost: Costs, pairs: int, *, seconds: float, evaluations: float
) -> StagePlan:
    told = dict(stage.settings)
    prepared = _prepared(stage)
    if pairs and cost.pair_s > 0 and prepared:
        most = int(_MOST_PAIRS_SHARE * seconds / cost.pair_s) // _PAIRS_STEP * _PAIRS_STEP
        pairs = max(_PAIRS_STEP, min(pairs, most))
        told[prepared] = pairs
    rest_s = seconds - pairs * cost.pair_s - evaluations * cost.evaluation_s
    iterations = max(_LEAST_ITERATIONS, int(rest_s / _pace(train, cost)))
    return replace(stage, iterations=iterations, settings=told, hard_stop_s=HARD_STOP * seconds)


def _prepared(stage: StagePlan) -> str | None:
    """The setting that says how many pairs the stage makes."""
    known = _schemas.schemas()[stage.method]["config"]["properties"]
    return next((key for key in _schemas.PREPARED if key in known), None)


def _pace(train: TrainSpec, cost: Costs) -> float:
    """Seconds of an iteration with its share of the checkpoints."""
    per_iteration = max(cost.iteration_s / train.checkpoint_every_s, 1 / (train.checkpoint_every or math.inf))
    return cost.iteration_s + per_iteration * cost.checkpoint_s


def _expected(
    spec: DistillJobSpec,
    stages: Sequence[StagePlan],
    costs: Sequence[Costs],
    pairs: Sequence[int],
    *,
    evaluations: int,
    bf16: bool,
) -> Plan:
    """The plan of these stages, with what they should need."""
    total = sum(stage.iterations for stage in stages)
    every = spec.eval.every or max(1, -(-total // evaluations))
    rows = [stage.settings.get(_prepared(stage) or "", count) for stage, count in zip(stages, pairs, strict=True)]
    timed = [
        replace(stage, seconds=_seconds(spec.train, stage, cost, count, every))
        for stage, cost, count in zip(stages, costs, rows, strict=True)
    ]
    peaks = [
        cost.peak_bytes + max(0, count - _PAIRS_STEP) * cost.pair_bytes for cost, count in zip(costs, rows, strict=True)
    ]
    return Plan(tuple(timed), every, bf16, max(peaks))


def _seconds(train: TrainSpec, stage: StagePlan, cost: Costs, pairs: int, eval_every: int) -> float:
    """Of a stage, which is judged at its end too, and saved."""
    evaluations = (stage.iterations - 1) // eval_every + 1
    once = pairs * cost.pair_s + evaluations * cost.evaluation_s + cost.checkpoint_s
    return once + stage.iterations * _pace(train, cost)
