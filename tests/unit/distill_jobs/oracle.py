"""The closed-form oracle, for any method by name: its loss at a truth that is known, and the gradients there.

Trajectory methods have zero loss at the true flow map and not beside it; the gradients of score matching vanish where
critic, student and teacher agree. A mutant (wrong sign, other guidance convention, time backwards) must fail.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.methods import score_matching
from distill_jobs.methods.base import Method, resolve
from distill_jobs.roles import Cast
from engines.denoiser import BaseDenoiser, Guided
from engines.manifest import Kind
from engines.process import Process
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
    KINDS,
    MEAN,
    PROCESSES,
    STD,
    batch_of,
    data_of,
    exact_pairs,
    fake_of,
    student_of,
    teacher_of,
)

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_kind = pytest.mark.parametrize("kind", KINDS)
TRUTH = GUIDED_MEAN - MEAN  # the shift of the student that is the guided teacher's flow map
OFF = 0.05 * GUIDED_MEAN
RUNGS = (1.0, 0.75, 0.5, 0.25)


def top(kind: Kind) -> float:
    """The first noise level: at pure noise an eps prediction says nothing about x0."""
    return 0.9 if kind == "eps" else 1.0


class OtherGuidance(Guided):
    """The other convention, c + w (c - u)."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        return super().forward(x, t, cond, s, torch.full_like(t, self.w + 1))


def other_guidance(process: Process, kind: Kind) -> OtherGuidance:
    right = teacher_of(process, kind)
    return OtherGuidance(right.denoiser, right.null_cond, right.w)


def trajectory_loss(
    name: str,
    process: Process,
    kind: Kind,
    *,
    settings: Mapping[str, Any] | None = None,
    method: type[Method] | None = None,
    teacher: BaseDenoiser | None = None,
    reads_s: bool = True,
    rungs: tuple[float, ...] = RUNGS,
    seeds: int = 2,
    **student: float,
) -> float:
    """The student's loss of the named method, summed over its terms, the largest over some batches.

    The student is the exact flow map of N(MEAN + shift, std^2), by default the guided teacher's own; roles besides it
    are copies of it. Batches carry data of the guided teacher as `x`, and its exact states at `rungs` as `pair`.
    """
    preset = resolve(name)
    config = preset.config(settings or {})
    player = student_of(process, kind, reads_s=reads_s, **student)
    others = {role: copy.deepcopy(player) for role in preset.method.roles(config) if role != "student"}
    one = (method or preset.method)(Cast(teacher or teacher_of(process, kind), student=player, **others), config)
    pairs = exact_pairs(process, batch_of().noise, times.grid(process, rungs)[:-1])
    batches = (batch_of(seed=seed, x=data_of(), pair=pairs) for seed in range(seeds))
    return max(float(sum(one.loss("student", batch).values())) for batch in batches)


def score_gradients(
    name: str,
    process: Process,
    kind: Kind,
    *,
    shift: float = TRUTH,
    std: float = STD,
    teacher: Guided | None = None,
    counts: tuple[int, ...] = (1,),
    method: Any = None,
    settings: Mapping[str, Any] | None = None,
    reads_s: bool = False,
    seeds: int = 4,
) -> tuple[float, float]:
    """d loss / d (mean, log std) of a student N(MEAN + shift, std^2) whose critic is exact, summed over batches."""
    preset = resolve(name)
    cast = Cast(
        teacher or teacher_of(process, kind),
        student=student_of(process, kind, shift=shift, std=std, reads_s=reads_s),
        fake=fake_of(process, kind, shift=shift, std=std),
    )
    grids = {k: tuple(top(kind) * u for u in score_matching.GRIDS[k]) for k in counts}
    one = (method or preset.method)(cast, preset.config({"counts": counts, "grids": grids, **(settings or {})}))
    with cast.only("student") as student:
        for seed in range(seeds):
            sum(one.loss("student", batch_of(256, seed)).values()).backward()
    assert all(p.grad is None for role in (cast.teacher, cast["fake"]) for p in role.parameters())
    return float(student.net.shift.grad), float(student.net.log_std.grad)
