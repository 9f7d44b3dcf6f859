"""Progressive distillation at a truth that is known in closed form.

A guided flow map is itself a teacher whose two steps are exact, so the truth is exact at any number of steps.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.methods import progressive
from distill_jobs.methods._line import snr_error
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.methods.progressive import Progressive
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import BaseDenoiser, Denoiser, Guided
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process, secant
from tests.unit.distill_jobs.closed_form import (
    NULL_MEAN,
    STD,
    GaussianNet,
    W,
    batch_of,
    data_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import (
    OFF,
    TRUTH,
    OtherGuidance,
    every_kind,
    every_process,
    top,
    trajectory_loss,
)
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher


def exact_teacher(process: Process, kind: Kind, guided: type[Guided] = Guided) -> Guided:
    """The guided teacher whose steps of any length are those of its flow map."""
    net = Denoiser(GaussianNet(process, kind), process, kind, inputs={"s"})
    return guided(net, torch.tensor([NULL_MEAN], dtype=torch.float64), W)


def settings(kind: Kind, count: int = 4) -> dict[str, Any]:
    return {"counts": (count,), "grids": {count: tuple(top(kind) * u for u in times.uniform(count))}}


# progressive ---------------------------------------------------------------------------------------------------------


def progressive_loss(process: Process, kind: Kind, **other: Any) -> float:
    given = {"teacher": exact_teacher(process, kind), "settings": settings(kind), **other}
    return trajectory_loss("progressive", process, kind, **given)


@every_kind
@every_process
def test_progressive_is_zero_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    assert progressive_loss(process, kind) < 1e-9
    assert progressive_loss(process, kind, shift=TRUTH + OFF) > 0.004
    assert progressive_loss(process, kind, std=1.2 * STD) > 0.004


@every_kind
@every_process
def test_one_ddim_step_of_the_target_lands_where_two_of_the_teacher_do(process: Process, kind: Kind) -> None:
    teacher, batch = teacher_of(process, kind), batch_of(x=data_of())
    method = Progressive(
        Cast(teacher, student=student_of(process, kind)), resolve("progressive").config(settings(kind))
    )
    x, t, s, line = method._step(batch)
    grid = times.grid(process, method.levels(3)[:-1])
    assert len(grid) == 33
    mid = t.new_tensor([grid[2 * n + 1] for n in ((t[:, None] - t.new_tensor(grid[::2])).abs().argmin(1).tolist())])
    landed = teacher.jump(teacher.jump(x, t, mid, batch.cond), mid, s, batch.cond)
    torch.testing.assert_close(process.mix(*line, t), x)
    torch.testing.assert_close(process.mix(*line, s), landed)
    assert not torch.allclose(landed, teacher.jump(x, t, s, batch.cond), rtol=1e-3)


class WithoutS(Denoiser):
    """Asked without s, as a network that knows only t."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        return super().forward(x, t, cond, None, w)


def test_the_instantaneous_velocity_is_not_the_secant() -> None:
    right = student_of(RF(), "flow")
    cast = Cast(exact_teacher(RF(), "flow"), student=WithoutS(right.net, RF(), "flow", {"s"}))
    loss = Progressive(cast, resolve("progressive").config({})).loss("student", batch_of(x=data_of()))
    assert float(loss["progressive"]) > 1e-3


class Upwards(Progressive):
    """The guide goes back to more noise."""

    def _step(self, batch: Batch) -> Any:
        x, t, s, _ = super()._step(batch)
        there = self.guide.jump(x, s, t, batch.cond)
        return x, t, s, secant(self.process, x, t, there, s)


def test_progressive_with_time_reversed_fails_the_oracle() -> None:
    assert progressive_loss(RF(), "flow", method=Upwards) > 0.01


def test_progressive_with_its_secant_turned_round_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressive, "secant", lambda process, x, t, there, s: secant(process, there, t, x, s))
    assert progressive_loss(RF(), "flow") > 0.01


def test_progressive_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert progressive_loss(RF(), "flow", teacher=exact_teacher(RF(), "flow", OtherGuidance)) > 0.1


@every_process
def test_errors_weigh_the_truncated_snr(process: Process) -> None:
    """Two lines through one state, whose x0 differ by 2: max(alpha^2 / sigma^2, 1) 4."""
    t = times.on(process, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
    x0, x = torch.zeros(5, 1, 2, 2, dtype=torch.float64), torch.randn(5, 1, 2, 2, dtype=torch.float64)
    lines = [process.split(x0 + by, "x0", x, t) for by in (1.0, 3.0)]
    snr = (process.alpha(t) / process.sigma(t)).square()
    torch.testing.assert_close(snr_error(lines[0], lines[1]), 4 * snr.clamp_min(1))
    assert (snr > 1).any()
    assert (snr < 1).any()


@every_process
def test_a_secant_goes_through_both_states(process: Process) -> None:
    t, s = (times.on(process, torch.tensor(u, dtype=torch.float64)) for u in ([1.0, 0.6, 0.2], [0.5, 0.0, 0.19]))
    x, there = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    line = secant(process, x, t, there, s)
    torch.testing.assert_close(process.mix(*line, t), x)
    torch.testing.assert_close(process.mix(*line, s), there)


# its phases ----------------------------------------------------------------------------------------------------------


def phased(phase: int = 2, **more: Any) -> StageRun:
    told = {**STAGES["progressive"], "counts": [4], "halvings": 2, "phase": phase, **more}
    run = StageRun(0, Stage("progressive", 20, told), tiny_teacher(), tiny_student())
    assert run.method.prepare(tiny_source(), Workspace())
    return run


def test_the_steps_halve_phase_by_phase_until_the_last() -> None:
    run, seen = phased(), []
    for _ in range(8):
        assert isinstance(run.method, Progressive)
        _, t, s, _ = run.method._step(run.batch(tiny_source(), 0))
        torch.testing.assert_close(t - s, (t - s)[:1].expand(len(t)))
        seen.append(round(1 / float(t[0] - s[0])))
        run.iterate(tiny_source())
    assert seen == [16, 16, 8, 8, 4, 4, 4, 4]


def test_every_step_is_halved_in_noise_level_and_the_final_grid_is_the_schedules() -> None:
    run = phased(grids={4: [1.0, 0.6, 0.4, 0.2]})
    assert isinstance(run.method, Progressive)
    assert run.method.levels(0) == (1.0, 0.6, 0.4, 0.2, 0.0) == run.schedules[4].times
    assert run.method.levels(1) == pytest.approx((1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0))
    assert all(v < u for u, v in pairwise(run.method.levels(3)))


def test_the_guide_is_the_teacher_first_and_then_the_student_of_the_phase_before() -> None:
    run = phased()
    assert isinstance(run.method, Progressive)
    assert run.method.guide is run.cast.teacher
    run.iterate(tiny_source())
    assert run.method.guide is run.cast.teacher
    run.iterate(tiny_source())
    assert run.method.guide is run.cast["guide"]
    frozen = {name: value.clone() for name, value in run.cast.weights("guide").items()}
    assert all(torch.equal(value, run.cast.weights("student")[name]) for name, value in frozen.items())
    run.iterate(tiny_source())
    assert all(torch.equal(value, run.cast.weights("guide")[name]) for name, value in frozen.items())
    assert not all(torch.equal(value, run.cast.weights("student")[name]) for name, value in frozen.items())


def test_in_later_phases_the_guide_is_what_is_learnt_from() -> None:
    truth, off = student_of(RF(), "flow"), student_of(RF(), "flow", shift=TRUTH + OFF)

    def loss(guide: BaseDenoiser, student: BaseDenoiser) -> float:
        config = resolve("progressive").config(settings("flow"))
        method = Progressive(Cast(exact_teacher(RF(), "flow"), student=student, guide=guide), config)
        method.curriculum = {"phase": 1.0}
        return float(method.loss("student", batch_of(x=data_of()))["progressive"])

    assert loss(truth, truth) < 1e-9
    assert loss(off, off) < 1e-9  # the errors of a phase stay
    assert loss(truth, off) > 0.004
    assert loss(off, truth) > 0.004


@pytest.mark.parametrize("name", ["progressive", "boot"])
def test_a_student_of_one_count_is_refused_others(name: str) -> None:
    with pytest.raises(InvalidRequest, match="counts"):
        resolve(name).config({"counts": (1, 2, 4)})
