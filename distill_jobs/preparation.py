"""Before training: which precision is faster here, the teacher's best schedule for few steps, what an update costs.

All are done by the trainer's process, with its threads and its priority, and written down once: everything later
reads these files and never the clock.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill_jobs import plan as plans
from distill_jobs import times
from distill_jobs.batches import Source, make_batch, seed_of
from distill_jobs.group import Group
from distill_jobs.methods._search import Found, Search, SearchConfig, measured
from distill_jobs.methods.base import apart, resolve
from distill_jobs.plan import Plan, StagePlan
from distill_jobs.progress import Evaluate
from distill_jobs.roles import Cast, Decode
from distill_jobs.spec import DistillJobSpec
from distill_jobs.stage import Precision, Stage
from distill_jobs.stages import SearchSpec
from distill_jobs.terms.base import Wanted
from distill_jobs.timing import measure, prepared_rows
from distill_jobs.trainer import TrainConfig
from engines.denoiser import BaseDenoiser
from engines.manifest import Schedule

log = logging.getLogger(__name__)

SCHEDULE = "schedule.json"
_TIMED_ROWS, _TIMED_TIMES = 32, 3
_COMPARED_ROWS = 64


def check(spec: DistillJobSpec) -> None:
    """Every configuration as a whole, with the rules that no schema can say.

    Raises:
        InvalidRequest: settings that contradict; the message names them.
    """
    for stage in stages(plans.drafted(spec)) if spec.trains else ():
        resolve(stage.method).config(stage.settings)
        for wanted in stage.terms:
            wanted.resolve()
    for named in spec.searches:
        _configured(named, spec)


def precision(spec: DistillJobSpec, teacher: BaseDenoiser, source: Source) -> Precision:
    """What the job asks for; for `auto`, what asks the teacher faster here."""
    if spec.train.precision != "auto":
        return Precision(spec.train.precision == "bf16")
    batch = make_batch(source.rows(0, _TIMED_ROWS), source.shape, spec.train.seed)
    t = batch.noise.new_full((len(batch),), times.grid(teacher.process, (0.5,))[0])

    def seconds(tried: Precision) -> float:
        started = time.perf_counter()
        with torch.no_grad(), tried.context():
            teacher(batch.noise, t, batch.cond)
        return time.perf_counter() - started

    choices = (Precision(False), Precision(True))
    best = {tried: min(seconds(tried) for _ in range(_TIMED_TIMES)) for tried in choices}
    log.info("seconds by precision %s", best)
    return min(choices, key=lambda tried: best[tried])


def search(
    spec: DistillJobSpec, teacher: BaseDenoiser, source: Source, precision: Precision, proceed: Callable[[], bool]
) -> dict[str, Any]:
    """Step 0: schedules for every count of the student, as JSON; of several searches the best for each count."""
    started = time.monotonic()
    with precision.context():
        names = apart([named.name for named in spec.searches])
        found = [_searched(named, spec, teacher, source, proceed) for named in spec.searches]
        tried = dict(zip(names, found, strict=True))
        # A search looks best on the rows that it was made on, so several are compared on other ones.
        judged = _judged(spec, teacher, source, tried) if len(tried) > 1 else tried
    chosen = {k: _nearest(k, judged) for k in sorted({k for found in judged.values() for k in found})}
    best = {k: judged[name][k] for k, name in chosen.items()}
    return {
        "schedules": {str(k): f.schedule.model_dump(mode="json") for k, f in best.items()},
        "search": {str(k): name for k, name in chosen.items()},
        "distance": {str(k): f.distance for k, f in best.items()},
        "uniform_distance": {str(k): f.uniform_distance for k, f in best.items()},
        "distances": {str(k): {name: found[k].distance for name, found in judged.items() if k in found} for k in best},
        "seconds": time.monotonic() - started,
        "bf16": precision.bf16,
    }


Searched = Mapping[int, Found]


def _searched(
    named: SearchSpec, spec: DistillJobSpec, teacher: BaseDenoiser, source: Source, proceed: Callable[[], bool]
) -> Searched:
    """What one search finds."""
    config = _configured(named, spec)
    method = resolve(named.name).method(Cast(teacher), config)
    assert isinstance(method, Search)
    return method.search(make_batch(source.rows(0, config.batch), source.shape, spec.train.seed), proceed)


def _configured(named: SearchSpec, spec: DistillJobSpec) -> SearchConfig:
    config = resolve(named.name).config({"counts": spec.student.steps, **named.fields})
    assert isinstance(config, SearchConfig)
    return config


def _judged(
    spec: DistillJobSpec, teacher: BaseDenoiser, source: Source, tried: Mapping[str, Searched]
) -> dict[str, Searched]:
    """The same schedules with their distances on rows that none was made on."""
    batch = make_batch(source.rows(1, _COMPARED_ROWS), source.shape, seed_of(spec.train.seed, 1))
    return {name: measured(teacher, batch, found) for name, found in tried.items()}


def _nearest(k: int, tried: Mapping[str, Searched]) -> str:
    return min((name for name in tried if k in tried[name]), key=lambda name: tried[name][k].distance)


def schedules(found: Mapping[str, Any]) -> dict[int, Schedule]:
    return {int(k): Schedule.model_validate(value) for k, value in found["schedules"].items()}


def stages(plan: Sequence[StagePlan]) -> list[Stage]:
    """A plan's stages as the trainer takes them."""
    return [
        Stage(s.method, s.iterations, s.settings, s.hard_stop_s, tuple(Wanted(**term) for term in s.terms))
        for s in plan
    ]


def timed_plan(
    spec: DistillJobSpec,
    teacher: BaseDenoiser,
    beginner: Callable[[], BaseDenoiser],
    source: Source,
    *,
    config: TrainConfig,
    folder: Path,
    group: Group,
    evaluate: Evaluate | None,
    spent_s: float,
    decode: Decode | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """The job's stages and what training will need. Each stage is tried in `folder` on a student that `beginner` makes.
    `spent_s` is gone of the budget, and so is what this takes. Only a group's leader evaluates, and its plan counts."""
    began = clock()
    tried = partial(measure, source=source, config=config, folder=folder, group=group, decode=decode, clock=clock)
    drafts = stages(plans.drafted(spec))
    with torch.random.fork_rng(devices=[]):  # a run that finds its plan begins with the same randomness
        costs = [tried(stage, teacher, beginner(), evaluate=evaluate) for stage in drafts]
    log.info("measured %s with bf16=%s", costs, config.bf16)
    spent_s += clock() - began
    return plans.planned(spec, costs, [prepared_rows(stage) for stage in drafts], spent_s=spent_s, bf16=config.bf16)


def write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
