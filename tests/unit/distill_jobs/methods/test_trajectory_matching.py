"""Trajectory distribution matching in closed form: the student is a flow map, whose every rung has a known marginal."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.losses import over_rows, toward
from distill_jobs.methods import trajectory_matching
from distill_jobs.methods.base import resolve
from distill_jobs.methods.trajectory_matching import TDM
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process, over
from tests.unit.distill_jobs.closed_form import MEAN, SHAPE, STD, GaussianNet, batch_of, fake_of, student_of, teacher_of
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, other_guidance, score_gradients


def gradients(process: Process, kind: Kind, **how: Any) -> tuple[float, float]:
    return score_gradients("tdm", process, kind, **{"counts": (4,), "reads_s": True, "seeds": 6, **how})


# the student ---------------------------------------------------------------------------------------------------------


@every_kind
@every_process
@pytest.mark.parametrize("counts", [(4,), (1, 2, 4)])
def test_the_student_is_at_rest_at_the_truth(process: Process, kind: Kind, counts: tuple[int, ...]) -> None:
    assert gradients(process, kind, counts=counts, seeds=3) == pytest.approx((0, 0), abs=1e-9)


class Rung(TDM):
    """Always at one rung of the four."""

    at: int

    def rung(self, batch: Batch) -> Any:
        return self.schedules[4], self.at


def at_rung(rung: int, base: type[TDM] = Rung) -> Any:
    return type(f"Rung{rung}", (base,), {"at": rung})


@every_kind
@every_process
@pytest.mark.parametrize("rung", range(4))
def test_the_student_is_pointed_back_at_every_rung(process: Process, kind: Kind, rung: int) -> None:
    how: dict[str, Any] = {"method": at_rung(rung), "seeds": 1}
    for side in (-1, 1):
        by_mean, _ = gradients(process, kind, shift=TRUTH + side * 0.5, **how)
        _, by_std = gradients(process, kind, std=STD * (1.5 if side > 0 else 0.6), **how)
        assert side * by_mean > 0.01
        assert side * by_std > 1e-3


class WrongSign(TDM):
    def _student_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        (direction,) = torch.autograd.grad(super()._student_loss(x_s, s, t, batch), x_s)
        return toward(x_s, -direction * x_s.numel())


def test_the_wrong_sign_fails_the_oracle() -> None:
    by_mean, _ = gradients(RF(), "flow", shift=TRUTH + 0.5, method=WrongSign)
    assert by_mean < -0.1


def test_the_other_guidance_convention_fails_the_oracle() -> None:
    by_mean, _ = gradients(RF(), "flow", teacher=other_guidance(RF(), "flow"))
    assert abs(by_mean) > 0.1


# the critic ----------------------------------------------------------------------------------------------------------


def critic(
    process: Process, kind: Kind, rung: int, *, shift: float = TRUTH, std: float = STD, method: type[TDM] = TDM
) -> tuple[float, float]:
    """d loss / d (mean, log std) of a critic that is exact for the guided truth, where the student's states at the end
    of this segment are those of N(MEAN + shift, std^2)."""
    player = student_of(process, kind)
    cast = Cast(teacher_of(process, kind), student=player, fake=fake_of(process, kind))
    one = method(cast, resolve("tdm").config({}))
    t, s = (torch.full((256,), end, dtype=torch.float64) for end in one.schedules[4].times[rung : rung + 2])
    with cast.only("fake") as fake:
        for seed in range(6):
            batch = batch_of(256, seed)
            x_s = process.mix(MEAN + shift + std * batch.randn(), batch.noise, s)
            one._fake_loss(x_s, s, t, batch).backward()
    return float(fake.net.shift.grad) / 6, float(fake.net.log_std.grad) / 6


SEEN = {0: 0.0, 1: 0.05, 2: 0.5, 3: 0.5}  # of a wider student, by the critic's std: nothing through the noise of rung 0


@every_kind
@every_process
@pytest.mark.parametrize("rung", range(4))
def test_the_critic_is_at_rest_where_it_knows_each_rungs_marginal(process: Process, kind: Kind, rung: int) -> None:
    assert critic(process, kind, rung) == pytest.approx((0, 0), abs=0.02)
    by_mean, _ = critic(process, kind, rung, shift=TRUTH + 0.3)
    _, by_std = critic(process, kind, rung, std=1.6 * STD)
    assert by_mean < -0.4  # towards what the student makes
    assert by_std < -SEEN[rung]


class Biased(TDM):
    """Takes x_s, at the scale of clean data, for a clean picture."""

    def _fake_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        tau, eps = self._within(s, t, batch), batch.randn()
        keep, fresh = trajectory_matching._kernel(self.process, s, tau)
        guess, _ = self.cast["fake"](over(keep, x_s) * x_s + over(fresh, x_s) * eps, tau, batch.cond)
        return over_rows((guess - x_s / over(self.process.alpha(s), x_s)).square()).mean()


def test_a_critic_taught_without_the_noise_below_its_segment_fails_the_oracle() -> None:
    _, by_std = critic(RF(), "flow", 2, method=Biased)
    assert by_std < -0.1


def test_the_critics_loss_asks_it_at_the_states_the_student_reaches() -> None:
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), fake=fake_of(RF(), "flow"))
    method = at_rung(2)(cast, resolve("tdm").config({}))
    first, t, s = (torch.full((8,), end, dtype=torch.float64) for end in (1.0, 0.55, 0.3))
    batch, again = batch_of(8, 3), batch_of(8, 3)
    x_s = cast.student.jump(again.noise, first, s, again.cond)  # the flow map takes it there in one jump
    torch.testing.assert_close(method.loss("fake", batch)["dsm"], method._fake_loss(x_s, s, t, again))


def test_the_target_is_the_velocity_of_the_paper_in_rectified_flow() -> None:
    """-x_s / (1 - s) + eps (tau + (1 - tau) s^2 / (1 - s)^2) / b, from the loss of a critic that answers nothing."""
    s, t = (torch.full((8,), end, dtype=torch.float64) for end in (0.3, 0.6))
    fake = Denoiser(lambda x, *_: torch.zeros_like(x), RF(), "x0")
    method = TDM(Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), fake=fake), resolve("tdm").config({}))
    x_s = batch_of(8, 5).noise
    loss = method._fake_loss(x_s, s, t, batch_of(8, 3))
    again = batch_of(8, 3)
    tau, eps = method._within(s, t, again), again.randn()
    b = over((tau**2 - ((1 - tau) / (1 - s) * s) ** 2).sqrt(), eps)
    x = over((1 - tau) / (1 - s), eps) * x_s + b * eps
    tau, low = over(tau, eps), over(s, eps)
    velocity = -x_s / (1 - low) + eps * (tau + (1 - tau) * low**2 / (1 - low) ** 2) / b
    clean = x - tau * velocity
    assert loss.item() == pytest.approx(float((b * clean / tau**2).square().mean()), rel=1e-9)


def test_of_one_step_the_critic_denoises_clean_samples() -> None:
    """z = y where the segment ends at data."""
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), fake=fake_of(RF(), "flow"))
    method = TDM(cast, resolve("tdm").config({"counts": (1,)}))
    y, zero, one = batch_of(8, 5).noise, torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    batch, again = batch_of(8, 3), batch_of(8, 3)
    loss = method._fake_loss(y, zero, one, batch)
    tau, eps = method._within(zero, one, again), again.randn()
    guess, _ = cast["fake"](RF().mix(y, eps, tau), tau, batch.cond)
    assert loss.item() == pytest.approx(float((over_rows((guess - y).square()) / tau**2).mean()), rel=1e-9)


# times ---------------------------------------------------------------------------------------------------------------


@every_process
def test_each_segment_is_compared_at_its_own_noise_levels(process: Process) -> None:
    cast = Cast(teacher_of(process, "flow"), student=student_of(process, "flow"), fake=fake_of(process, "flow"))
    method = TDM(cast, resolve("tdm").config({}))
    ends = method.schedules[4].times
    for rung, (low, high) in enumerate([(0.8, 0.98), (0.55, 0.8), (0.3, 0.55), (0.02, 0.3)]):
        t, s = (torch.full((512,), end, dtype=torch.float64) for end in ends[rung : rung + 2])
        u = times.level_of(process, method._within(s, t, batch_of(512)))
        assert low - 1e-6 < u.min() < low + 0.02
        assert high - 0.02 < u.max() < high + 1e-6


def test_a_student_of_tdm_is_sampled_without_fresh_noise() -> None:
    assert {schedule.eta for schedule in StageRun(0, Stage("tdm", 1), *_toys()).schedules.values()} == {0.0}
    with pytest.raises(InvalidRequest, match="method setting eta"):
        resolve("tdm").config({"eta": 0.5})


# learning ------------------------------------------------------------------------------------------------------------


def _toys() -> tuple[Denoiser, Denoiser]:
    """An unguided teacher of N(1, STD^2), and a flow map of N(1 + 0.8, 1) for its student."""
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    return teacher, Denoiser(GaussianNet(RF(), "flow", shift=0.8, std=1.0).float(), RF(), "flow", inputs={"s"})


def test_a_student_of_four_steps_reaches_the_mean_and_std_of_the_teacher() -> None:
    settings = {"lr": 2e-2, "fake_lr": 5e-2, "beta1": 0.5, "batch": 64}
    run = StageRun(0, Stage("tdm", 150, settings), *_toys(), ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    before = copy.deepcopy(run.cast.weights("student"))
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert before["net.shift"] == pytest.approx(0.8)
    assert final["net.shift"].item() == pytest.approx(0, abs=0.05)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.04)
