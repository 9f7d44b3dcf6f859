"""Decoupled distribution matching and its form for any step count, in closed form.

Without guidance both are plain distribution matching, at rest at the truth. With it, one schedule for both terms makes
them the guided dmd, and the real schedule asks guidance below the rung alone.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import toward
from distill_jobs.methods.base import resolve
from distill_jobs.methods.score_matching import DMD
from distill_jobs.methods.trajectory_matching import CDM, DecoupledDMD
from distill_jobs.roles import Cast
from engines.denoiser import Guided
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
    MEAN,
    STD,
    batch_of,
    fake_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import (
    TRUTH,
    every_kind,
    every_process,
    other_guidance,
    score_gradients,
    top,
)

BOTH: dict[str, type[DecoupledDMD]] = {"decoupled_dmd": DecoupledDMD, "cdm": CDM}
every_one = pytest.mark.parametrize("name", BOTH)


def gradients(name: str, process: Process, kind: Kind, **how: Any) -> tuple[float, float]:
    """Of cdm, whose paths are deterministic, a student that is the flow map itself."""
    return score_gradients(name, process, kind, **{"counts": (1, 2, 4), "reads_s": name == "cdm", "seeds": 2, **how})


# without guidance ----------------------------------------------------------------------------------------------------


@every_kind
@every_process
@every_one
def test_the_student_of_an_unguided_teacher_is_at_rest_at_the_truth(name: str, process: Process, kind: Kind) -> None:
    for teacher in (teacher_of(process, kind, w=1.0), teacher_of(process, kind).denoiser):
        assert gradients(name, process, kind, shift=0.0, teacher=teacher) == pytest.approx((0, 0), abs=1e-9)


@every_kind
@every_process
@every_one
@pytest.mark.parametrize("side", [-1, 1])
def test_the_student_of_an_unguided_teacher_is_pointed_back(name: str, process: Process, kind: Kind, side: int) -> None:
    teacher = teacher_of(process, kind, w=1.0)
    by_mean, _ = gradients(name, process, kind, shift=side * 0.5, teacher=teacher)
    _, by_std = gradients(name, process, kind, shift=0.0, std=STD * (1.5 if side > 0 else 0.6), teacher=teacher)
    assert side * by_mean > 0.1
    assert side * by_std > 0.01


def wrong_sign(method: type[DecoupledDMD]) -> Any:
    class WrongSign(method):  # type: ignore[valid-type, misc]
        def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
            (direction,) = torch.autograd.grad(super()._student_loss(y, batch), y)
            return toward(y, -direction * y.numel())

    return WrongSign


@every_one
def test_matching_with_the_wrong_sign_fails_the_oracle(name: str) -> None:
    teacher = teacher_of(RF(), "flow", w=1.0)
    by_mean, _ = gradients(name, RF(), "flow", shift=0.5, teacher=teacher, method=wrong_sign(BOTH[name]), counts=(1,))
    assert by_mean < -0.1


# with guidance -------------------------------------------------------------------------------------------------------


class Shared(DecoupledDMD):
    """Both terms at one noised sample, as the guided dmd has them."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        self._probe = None
        return super().loss(role, batch)

    def noised(self, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        self._probe = self._probe or super().noised(y.detach(), batch)
        return self._probe

    def _augmentation(self, y: Tensor, rung: Tensor, batch: Batch) -> Tensor:
        return self._toward_guided(y, *self.noised(y, batch), batch)

    _probe: tuple[Tensor, Tensor] | None = None


@every_kind
@every_process
def test_at_one_noised_sample_both_terms_rest_where_the_guided_dmd_does(process: Process, kind: Kind) -> None:
    assert gradients("decoupled_dmd", process, kind, method=Shared) == pytest.approx((0, 0), abs=1e-9)
    by_mean, _ = gradients("decoupled_dmd", process, kind, shift=TRUTH + 0.5, method=Shared)
    assert by_mean > 0.1


def test_at_one_noised_sample_the_gradient_is_that_of_dmd_but_for_the_normaliser() -> None:
    """`floor` is above every normaliser, so that both divide by it."""
    settings = {"floor": 100.0}
    plain = score_gradients("dmd", RF(), "flow", shift=TRUTH + 0.3, method=DMD, settings=settings)
    shared = score_gradients("decoupled_dmd", RF(), "flow", shift=TRUTH + 0.3, method=Shared, settings=settings)
    assert shared == pytest.approx(plain, rel=1e-9)


class Full(DecoupledDMD):
    """Both terms at every noise level, whatever the rung."""

    def below(self, t: Tensor, batch: Batch) -> Tensor:
        return times.on(self.process, self.levels(batch))


@every_kind
@every_process
def test_one_step_rests_on_average_at_the_guided_truth(process: Process, kind: Kind) -> None:
    """The only rung is pure noise: both terms see the same levels, each with its own draw."""
    cls = DecoupledDMD if top(kind) == 1 else Full
    how: dict[str, Any] = {"method": cls, "counts": (1,), "seeds": 8}
    scale, _ = gradients("decoupled_dmd", process, kind, shift=TRUTH + 0.5, **how)
    assert gradients("decoupled_dmd", process, kind, **how) == pytest.approx((0, 0), abs=0.1 * scale)


def test_the_other_guidance_convention_fails_the_oracle() -> None:
    teacher = other_guidance(RF(), "flow")
    by_mean, _ = gradients("decoupled_dmd", RF(), "flow", teacher=teacher, method=Shared)
    assert abs(by_mean) > 0.1
    one_step, _ = gradients("decoupled_dmd", RF(), "flow", teacher=teacher, counts=(1,), seeds=8)
    scale, _ = gradients("decoupled_dmd", RF(), "flow", shift=TRUTH + 0.5, counts=(1,), seeds=8)
    assert abs(one_step) > 0.3 * scale


@every_one
def test_guidance_drives_the_student_from_the_unguided_truth_towards_the_guided_one(name: str) -> None:
    assert GUIDED_MEAN > MEAN
    by_mean, _ = gradients(name, RF(), "flow", shift=0.0)
    assert by_mean < -0.1


class Watched(Guided):
    """Keeps the noise levels at which it is asked as a guided teacher."""

    def __init__(self, teacher: Guided) -> None:
        super().__init__(teacher.denoiser, teacher.null_cond, teacher.w)
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        self.asked.append(times.level_of(self.process, t))
        return super().forward(x, t, cond, s, w)


class Above(DecoupledDMD):
    """The paper's time read backwards: guidance at the noisier levels."""

    def below(self, t: Tensor, batch: Batch) -> Tensor:
        level = times.level_of(self.process, t)
        return times.on(self.process, level + (1 - level) * self.levels(batch))


def guided_at(process: Process, cls: type[DecoupledDMD]) -> Tensor:
    """The noise levels of guidance at the second rung of two, 0.6."""
    teacher = Watched(teacher_of(process, "flow"))

    class Second(cls):  # type: ignore[valid-type, misc]
        def rung(self, batch: Batch) -> Any:
            return self.schedules[2], 1

    cast = Cast(teacher, student=student_of(process, "flow", reads_s=False), fake=fake_of(process, "flow"))
    Second(cast, resolve("decoupled_dmd").config({"counts": (2,)})).loss("student", batch_of(512))
    return torch.cat(teacher.asked)


@every_process
def test_guidance_is_asked_below_the_rung_and_over_all_of_that(process: Process) -> None:
    levels = guided_at(process, DecoupledDMD)
    assert len(levels) == 512
    assert 0.0199 < levels.min() < 0.05
    assert 0.55 < levels.max() < 0.6001


def test_guidance_with_time_reversed_fails_the_oracle() -> None:
    assert guided_at(RF(), Above).max() > 0.6


# any step count ------------------------------------------------------------------------------------------------------


def cdm(process: Process, kind: Kind = "flow", **settings: Any) -> CDM:
    cast = Cast(teacher_of(process, kind), student=student_of(process, kind), fake=fake_of(process, kind))
    return CDM(cast, resolve("cdm").config(settings))


@every_process
def test_schedules_are_random_in_length_and_levels_and_start_at_noise(process: Process) -> None:
    method = cdm(process, longest=5)
    drawn = [method.rung(batch_of(2, seed)) for seed in range(60)]
    assert {schedule.steps for schedule, _ in drawn} == {1, 2, 3, 4, 5}
    assert all(schedule.times[0] == method.schedules[1].times[0] and schedule.times[-1] == 0 for schedule, _ in drawn)
    assert all(rung < schedule.steps for schedule, rung in drawn)
    assert len({schedule.times for schedule, _ in drawn if schedule.steps > 1}) > 40
    assert method.rung(batch_of(2, 7)) == method.rung(batch_of(2, 7))


def test_a_schedule_starts_below_pure_noise_where_the_students_own_do() -> None:
    method = cdm(RF(), "eps", counts=(2,), grids={2: (0.9, 0.5)})
    for seed in range(20):
        assert method.rung(batch_of(2, seed))[0].times[0] == pytest.approx(0.9)


def test_matching_beside_the_trajectory_is_weighted() -> None:
    terms = [cdm(RF(), beside=weight).loss("student", batch_of(32)) for weight in (1.0, 0.5)]
    assert {"dm", "ca", "beside"} == set(terms[0])
    assert float(terms[1]["beside"].detach()) == pytest.approx(0.5 * float(terms[0]["beside"].detach()))


def test_the_point_beside_lies_on_the_flow_map_of_an_exact_student() -> None:
    """So the prediction made there is a sample of the truth too: what the student makes has its mean and deviation."""
    seen: list[Tensor] = []

    class Kept(CDM):
        def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
            seen.append(y.detach())
            return super()._student_loss(y, batch)

    method = cdm(RF())
    kept = Kept(method.cast, method.config)
    for seed in range(8):
        kept.loss("student", batch_of(256, seed))
    for y in (torch.cat(seen[0::2]), torch.cat(seen[1::2])):
        assert y.mean() == pytest.approx(GUIDED_MEAN, abs=0.02)
        assert y.std() == pytest.approx(STD, abs=0.02)
