"""Simple and fast distillation at the closed-form flow map: zero there at every rung, and not beside it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.methods.sfd import SFD, PathThrough
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import STD as SPREAD
from tests.unit.distill_jobs.closed_form import batch_of, exact_pairs, student_of, teacher_of
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, top, trajectory_loss
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher


def sfd_loss(process: Process, kind: Kind, counts: tuple[int, ...] = (1, 2), **other: Any) -> float:
    grids = {k: tuple(top(kind) * u for u in times.uniform(k)) for k in counts}
    rungs = tuple(sorted({u for grid in grids.values() for u in grid}, reverse=True))
    return trajectory_loss("sfd_v", process, kind, settings={"counts": counts, "grids": grids}, rungs=rungs, **other)


@every_kind
@every_process
def test_sfd_is_zero_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    assert sfd_loss(process, kind) < 1e-6
    assert sfd_loss(process, kind, shift=TRUTH + OFF) > 0.01
    assert sfd_loss(process, kind, std=1.2 * SPREAD) > 0.01


class Held(SFD):
    """Targets of the rung before: the student is to stand still."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        late = torch.cat([batch.rows.pair[:, :1], batch.rows.pair[:, :-1]], dim=1)
        return super().loss(role, Batch(Rows(batch.cond, pair=late), batch.noise, batch.generator))


class Reversed(SFD):
    """Time the wrong way."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        return super().loss(role, Batch(Rows(batch.cond, pair=batch.rows.pair.flip(1)), batch.noise, batch.generator))


@pytest.mark.parametrize("mutant", [Held, Reversed])
def test_sfd_with_other_targets_fails_the_oracle(mutant: type[SFD]) -> None:
    assert sfd_loss(RF(), "flow", method=mutant) > 0.1


def test_each_rung_starts_from_what_the_student_made_and_takes_no_gradient_from_later_ones() -> None:
    """One evaluation a rung, the first at the noise, each next at the end of the one before."""
    student = student_of(RF(), "flow", shift=TRUTH + OFF)
    method = SFD(Cast(teacher_of(RF(), "flow"), student=student), resolve("sfd").config({"counts": (2,)}))
    pair, seen = exact_pairs(RF(), batch_of().noise, (1.0, 0.5)), list[tuple[Tensor, Tensor]]()
    student.net.register_forward_hook(lambda net, told, made: seen.append((told[0], told[1])))
    with method.cast.only("student"):
        method.loss("student", batch_of(pair=pair))
    (first, t), (second, s) = seen
    assert torch.equal(first, pair[:, 0])
    assert (float(t[0]), float(s[0])) == (1.0, 0.5)
    assert not second.requires_grad
    torch.testing.assert_close(second, student.jump(first, t, s, batch_of().cond).detach())
    assert float((second - pair[:, 1]).abs().max()) > 0.01


def test_the_teachers_path_goes_through_every_rung() -> None:
    path = PathThrough((1.0, 0.7, 0.31), steps=3, solver="ab2")
    assert path.levels == pytest.approx((1.0, 0.7, 0.31), abs=1e-12)
    assert path.grid[:4] == pytest.approx((1.0, 0.9, 0.8, 0.7))
    assert len(path.grid) == 9


def test_several_counts_need_a_student_that_reads_where_it_goes() -> None:
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow", reads_s=False))
    with pytest.raises(InvalidRequest, match="sfd_v"):
        SFD(cast, resolve("sfd").config({"counts": (1, 2)}))
    SFD(cast, resolve("sfd").config({"counts": (2,)}))


def test_a_short_fine_tune_brings_the_students_sampling_to_the_teachers_path() -> None:
    run = StageRun(0, Stage("sfd", 60, {**STAGES["sfd"], "counts": (2,), "lr": 3e-3}), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    losses = [run.iterate(tiny_source())["loss.student.sfd"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
