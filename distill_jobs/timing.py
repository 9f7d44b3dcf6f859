"""What a stage costs on this machine, by trying it: turns a budget of minutes into iterations once, before training,
and says what training will need.

A trial is a run of some iterations by the trainer itself, so it prepares, judges and saves as training does.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from distill_jobs.batches import Source
from distill_jobs.group import Group
from distill_jobs.methods._schemas import PREPARED
from distill_jobs.methods.base import resolve
from distill_jobs.pairs import SHARD
from distill_jobs.plan import Costs
from distill_jobs.progress import Evaluate, Hooks
from distill_jobs.roles import Decode
from distill_jobs.stage import Stage
from distill_jobs.trainer import TrainConfig, Trainer, prepared_folder
from engines.denoiser import BaseDenoiser
from engines.manifest import Schedule

_LEADS = ("fake_warmup", "disc_warmup", "mse")  # settings that let one role wait for another


def prepared_rows(stage: Stage) -> int:
    """How many rows the stage's `prepare` makes with its settings (for `lsd`: without data)."""
    config = resolve(stage.method).config(stage.settings)
    return int(sum(getattr(config, key, 0) for key in PREPARED))


def shortened(stage: Stage, iterations: int) -> Stage:
    """The stage for a trial: one shard of preparation, and every role and term due from the first iteration."""
    known = resolve(stage.method).method.Config.model_fields
    fewer = {key: SHARD for key in PREPARED if key in known}
    due = {key: 0 for key in _LEADS if key in known}
    terms = tuple(replace(term, after=0.0, ramp=0.0) for term in stage.terms)
    return replace(stage, iterations=iterations, settings={**stage.settings, **fewer, **due}, terms=terms)


def measure(
    stage: Stage,
    teacher: BaseDenoiser,
    student: BaseDenoiser,
    source: Source,
    *,
    config: TrainConfig,
    folder: Path,
    group: Group | None = None,
    evaluate: Evaluate | None = None,
    decode: Decode | None = None,
    iterations: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Trains `student` in `folder`, which it empties: one shard of preparation and a few iterations with every role
    due, after one to warm up; then it is judged and saved. Every process of a group tries, the leader's clock counts.
    """
    group, said = group or Group(), _Said(clock)
    quiet = replace(config, eval_every=None, checkpoint_every=None, checkpoint_every_s=math.inf, report_every_s=0.0)
    trainer = Trainer(
        [shortened(stage, iterations + 1)],
        teacher,
        student,
        source,
        quiet,
        folder=folder,
        hooks=Hooks(event=said, panel=said.shown, evaluate=evaluate and said.asked(evaluate), clock=clock),
        group=group,
        decode=decode,
    )
    _empty(folder, group)
    needs = trainer.fit().needs
    kept = group.size * _row_bytes(prepared_folder(folder, 0), source)  # every process reads all rows
    _empty(folder, group)
    return said.costs(iterations, SHARD * group.size, pair_bytes=kept, peak_bytes=needs.memory_bytes)


class _Said:
    """When a trial's events came, by type."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at: dict[str, list[float]] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._at.setdefault(str(event["type"]), []).append(self._clock())

    def shown(self, iteration: int, latents: Mapping[str, Tensor]) -> None:
        """A panel was made; what stands between it and the evaluation is done once in a run."""
        self({"type": "panel"})

    def asked(self, evaluate: Evaluate) -> Evaluate:
        """The same evaluation, which says when it begins."""

        def ask(iteration: int, student: BaseDenoiser, schedules: Mapping[int, Schedule]) -> Mapping[str, float]:
            self({"type": "asked"})
            return evaluate(iteration, student, schedules)

        return ask

    def costs(self, iterations: int, rows: int, *, pair_bytes: int, peak_bytes: int) -> Costs:
        """A trial says stage, preparing where it makes rows, progress after every iteration, panel; where it is judged
        asked, evaluation and best; of a group the leader alone checkpoint."""
        at = self._at
        (began, *_), (warm, *_, trained) = at["stage"], at["progress"]
        prepared = at.get("preparing", [began])[-1]
        shown = at.get("panel", [trained])[-1]
        judged = at.get("best", at.get("evaluation", [shown]))[-1]
        return Costs(
            iteration_s=(trained - warm) / iterations,
            pair_s=(prepared - began) / rows,
            evaluation_s=shown - trained + judged - at.get("asked", [judged])[-1],
            checkpoint_s=at.get("checkpoint", [judged])[-1] - judged,
            pair_bytes=pair_bytes,
            peak_bytes=peak_bytes,
        )


def _row_bytes(prepared: Path, source: Source) -> int:
    """Of one row that `prepare` made and keeps in memory, with its condition; 0 where it makes none."""
    made = sum(path.stat().st_size for path in prepared.glob("*"))
    if not made:
        return 0
    cond = tree_leaves(source.rows(0, 1).cond)
    return made // SHARD + sum(part.nbytes for part in cond if isinstance(part, Tensor))


def _empty(folder: Path, group: Group) -> None:
    """Once for all processes, when none is at work in it."""
    group.meet()
    if group.leads:
        shutil.rmtree(folder, ignore_errors=True)
    group.meet()
