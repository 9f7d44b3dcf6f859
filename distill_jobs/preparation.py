"""Before training: the teacher's best schedule for few steps, and what an update costs here.

Both are done by the trainer's process, with its threads and its priority, and written down once: everything later
reads these files and never the clock.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jobs import plan as plans
from distill_jobs import times
from distill_jobs.batches import Source, make_batch
from distill_jobs.methods.optimal_steps import OptimalSteps, OptimalStepsConfig
from distill_jobs.plan import Costs, Plan
from distill_jobs.roles import Cast
from distill_jobs.spec import DistillJobSpec, roles
from distill_jobs.stage import Precision, Stage
from distill_jobs.timing import StageCost, measure, prepared_rows
from engines.denoiser import BaseDenoiser
from engines.manifest import Schedule

log = logging.getLogger(__name__)

SCHEDULE, PLAN = "schedule.json", "plan.json"


def search(spec: DistillJobSpec, teacher: BaseDenoiser, source: Source, proceed: Callable[[], bool]) -> dict[str, Any]:
    """Step 0: schedules for every count of the student, as JSON."""
    told = {"counts": spec.student.steps}
    for stage in spec.stages:
        told |= stage.fields if stage.name == "optimal_steps" else {}
    config = OptimalStepsConfig(**told)
    started = time.monotonic()
    batch = make_batch(source.rows(0, config.batch), source.shape, spec.train.seed)
    found = OptimalSteps(Cast(teacher), config).search(batch, proceed)
    return {
        "schedules": {str(k): f.schedule.model_dump(mode="json") for k, f in found.items()},
        "distance": {str(k): f.distance for k, f in found.items()},
        "uniform_distance": {str(k): f.uniform_distance for k, f in found.items()},
        "seconds": time.monotonic() - started,
    }


def schedules(found: Mapping[str, Any]) -> dict[int, Schedule]:
    return {int(k): Schedule.model_validate(value) for k, value in found["schedules"].items()}


Evaluate = Callable[[int, BaseDenoiser, Mapping[int, Schedule]], object]


def timed_plan(
    spec: DistillJobSpec,
    teacher: BaseDenoiser,
    student: BaseDenoiser,
    source: Source,
    *,
    evaluate: Evaluate,
    spent_s: float,
) -> Plan:
    """The job's stages and their precision: `auto` takes what is faster here. `spent_s` is gone of the budget."""
    if not any(roles(spec)):
        return Plan((), eval_every=1, bf16=False)
    stages = [Stage(draft.method, draft.iterations, draft.settings) for draft in plans.drafted(spec)]
    asked = spec.train.precision
    tried = {bf16: _costs(stages, teacher, student, source, bf16) for bf16 in _ASKED[asked]}
    bf16 = min(tried, key=lambda choice: sum(cost.iteration_s for cost in tried[choice]))
    started = time.perf_counter()
    if spec.train.max_minutes is not None:
        evaluate(0, student, _uniform(spec, student))
    evaluation_s = time.perf_counter() - started
    costs = [Costs(cost.iteration_s, cost.prepared_row_s, evaluation_s) for cost in tried[bf16]]
    log.info("measured %s, bf16 %s", costs, bf16)
    return plans.planned(spec, costs, [prepared_rows(stage) for stage in stages], spent_s=spent_s, bf16=bf16)


_ASKED = {"auto": (False, True), "fp32": (False,), "bf16": (True,)}


def _costs(
    stages: Sequence[Stage], teacher: BaseDenoiser, student: BaseDenoiser, source: Source, bf16: bool
) -> list[StageCost]:
    return [measure(stage, teacher, student, source, precision=Precision(bf16)) for stage in stages]


def _uniform(spec: DistillJobSpec, student: BaseDenoiser) -> dict[int, Schedule]:
    """Schedules to time an evaluation with."""
    return {k: Schedule(times=times.grid(student.process, times.uniform(k))) for k in spec.student.steps}


def write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
