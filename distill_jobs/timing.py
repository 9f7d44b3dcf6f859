"""What a stage costs on this machine, by trying it: turns a budget of minutes into iterations once, before training.

The student that is timed is a copy; nothing of the run changes.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from distill_jobs.batches import Source
from distill_jobs.methods._schemas import PREPARED
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.pairs import SHARD
from distill_jobs.stage import Execution, Precision, Stage, StageRun
from engines.denoiser import BaseDenoiser

_LEADS = ("fake_warmup", "disc_warmup", "mse")  # settings that let one role wait for another


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of one iteration, and of one row that `prepare` makes (0 where it makes none)."""

    iteration_s: float
    prepared_row_s: float

    def iterations_in(self, seconds: float, prepared_rows: int = 0) -> int:
        """How many iterations a budget pays for after its preparation; at least 1."""
        return max(1, int((seconds - prepared_rows * self.prepared_row_s) / self.iteration_s))


def prepared_rows(stage: Stage) -> int:
    """How many rows the stage's `prepare` makes with its settings (for `lsd`: without data)."""
    config = resolve(stage.method).config(stage.settings)
    return int(sum(getattr(config, key, 0) for key in PREPARED))


def shortened(stage: Stage, iterations: int) -> Stage:
    """The stage for a trial: one shard of preparation, and every role due from the first iteration."""
    known = resolve(stage.method).method.Config.model_fields
    fewer = {key: SHARD for key in PREPARED if key in known}
    due = {key: 0 for key in _LEADS if key in known}
    return replace(stage, iterations=iterations, settings={**stage.settings, **fewer, **due})


def measure(
    stage: Stage,
    teacher: BaseDenoiser,
    student: BaseDenoiser,
    source: Source,
    *,
    precision: Precision | None = None,
    execution: Execution | None = None,
    iterations: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> StageCost:
    """Times one shard of preparation and a few iterations with every role due, after one to warm up."""
    tried = shortened(stage, iterations + 1)
    execution = execution or Execution()
    run = StageRun(0, tried, teacher, copy.deepcopy(student), precision=precision or Precision(), execution=execution)
    began = clock()
    with run.precision.context():
        run.method.prepare(source, Workspace(device=run.precision.device))
    prepared = clock()
    run.iterate(source)
    warm = clock()
    for _ in range(iterations):
        run.iterate(source)
    return StageCost(
        (clock() - warm) / iterations,
        (prepared - began) / (SHARD * execution.group.size) if prepared_rows(tried) else 0.0,
    )
