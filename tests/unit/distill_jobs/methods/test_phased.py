"""Phased distribution matching in closed form: two experts of one Gaussian flow map, judged where their phase ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.experts import Experts, networks, weights_of
from distill_jobs.methods import trajectory_matching
from distill_jobs.methods.base import resolve
from distill_jobs.methods.trajectory_matching import PhasedDMD
from distill_jobs.progress import Hooks
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from distill_jobs.trainer import TrainConfig, Trainer
from engines import solvers
from engines.denoiser import BaseDenoiser, Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process, over
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    fake_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, other_guidance, top
from tests.unit.distill_jobs.test_trainer import same, wish_after
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher

SPLIT = 0.6


def pair(of: Any, process: Process, kind: Kind, **law: float) -> Experts:
    """Two experts of one law."""
    return Experts([of(process, kind, **law) for _ in range(2)], (SPLIT,))


class Phase(PhasedDMD):
    """Always at the second rung of one phase, which the first has led to."""

    at: int

    def rung(self, batch: Batch) -> Any:
        return self.schedules[4], 2 * self.at + 1


def in_phase(at: int, base: type[PhasedDMD] = PhasedDMD) -> Any:
    return type(f"Phase{at}", (Phase, base), {"at": at})


def gradients(
    process: Process,
    kind: Kind,
    at: int,
    *,
    method: type[PhasedDMD] = PhasedDMD,
    teacher: BaseDenoiser | None = None,
    seeds: int = 4,
    **law: float,
) -> tuple[float, float]:
    """d loss / d (mean, log std) of the phase's expert, by default the guided teacher's flow map, with an exact critic.
    The other expert has no gradient."""
    student, fake = (pair(of, process, kind, **law) for of in (student_of, fake_of))
    cast = Cast(teacher or teacher_of(process, kind), student=student, fake=fake)
    levels = (top(kind), 0.75, SPLIT, 0.3)
    one = in_phase(at, method)(cast, resolve("phased_dmd").config({"grids": {4: levels}}))
    with cast.only("student"):
        for seed in range(seeds):
            one.loss("student", batch_of(256, seed))["dmd"].backward()
    assert all(p.grad is None for role in (cast.teacher, cast["fake"]) for p in role.parameters())
    asked, idle = (list(networks(student).values())[k] for k in (at, 1 - at))
    assert all(p.grad is None for p in idle.parameters())
    net: Any = asked.net
    return float(net.shift.grad), float(net.log_std.grad)


# the student ---------------------------------------------------------------------------------------------------------


@every_kind
@every_process
@pytest.mark.parametrize("at", [0, 1])
def test_the_student_is_at_rest_at_the_truth_and_pointed_back_to_it_in_both_phases(
    process: Process, kind: Kind, at: int
) -> None:
    assert gradients(process, kind, at) == pytest.approx((0, 0), abs=1e-9)
    for side in (-1, 1):
        by_mean, _ = gradients(process, kind, at, shift=TRUTH + side * 0.5, seeds=1)
        _, by_std = gradients(process, kind, at, std=STD * (1.5 if side > 0 else 0.6), seeds=1)
        assert side * by_mean > 0.01
        assert side * by_std > 1e-3


class WrongSign(PhasedDMD):
    def _judged(self, *given: Any) -> tuple[Tensor, Tensor]:
        fake, real = super()._judged(*given)
        return real, fake


def test_mutants_of_the_gradient_fail_the_oracle() -> None:
    by_mean, _ = gradients(RF(), "flow", 0, shift=TRUTH + 0.5, method=WrongSign)
    assert by_mean < -0.1
    by_mean, _ = gradients(RF(), "flow", 0, teacher=other_guidance(RF(), "flow"))
    assert abs(by_mean) > 0.1


def test_each_expert_is_judged_where_its_phase_ends_and_at_noise_levels_of_its_phase() -> None:
    asked: list[Tensor] = []
    cast = Cast(teacher_of(RF(), "flow"), student=pair(student_of, RF(), "flow"), fake=pair(fake_of, RF(), "flow"))
    for judge in (cast.teacher, cast["fake"]):
        judge.register_forward_hook(lambda _, given, __: asked.append(given[1]))
    for at, (low, high) in enumerate([(SPLIT, 0.98), (0.02, SPLIT)]):
        one = in_phase(at)(cast, resolve("phased_dmd").config({}))
        asked.clear()
        for role in ("student", "fake"):
            one.loss(role, batch_of(512))
        assert len(asked) == 3  # both judges of the student, and the critic as it learns
        for t in asked:
            assert low - 1e-6 < t.min() < low + 0.02
            assert high - 0.02 < t.max() < high + 1e-6


@pytest.mark.parametrize("role", ["student", "fake"])
def test_a_rung_is_reached_as_sampling_reaches_it_by_jumps_to_the_ends_of_phases(role: str) -> None:
    told: list[float] = []
    cast = Cast(teacher_of(RF(), "flow"), student=pair(student_of, RF(), "flow"), fake=pair(fake_of, RF(), "flow"))
    cast.student.register_forward_hook(lambda _, given, __: told.append(float(given[3][0])))
    for at, ends in enumerate([[SPLIT, SPLIT], [SPLIT, SPLIT, 0.0, 0.0]]):
        told.clear()
        in_phase(at)(cast, resolve("phased_dmd").config({})).loss(role, batch_of(8))
        assert told == pytest.approx(ends)


# the critic ----------------------------------------------------------------------------------------------------------


class Line(BaseDenoiser):
    """F(x) = slope x + start as the clean prediction, at whatever time."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.slope, self.start = (torch.nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        return self.slope * x + self.start, x


class OneTime(PhasedDMD):
    tau: float

    def _within(self, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return torch.full_like(s, self.tau)


class Biased(OneTime):
    """Takes x_s, at the scale of clean data, for a clean picture."""

    def _fake_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        tau, eps = self._within(s, t, batch), batch.randn()
        keep, fresh = trajectory_matching._kernel(self.process, s, tau)
        guess, _ = self.cast["fake"](over(keep, x_s) * x_s + over(fresh, x_s) * eps, tau, batch.cond)
        loss: Tensor = (guess - x_s / over(self.process.alpha(s), x_s)).square().mean()
        return loss


def at_one_time(process: Process, fake: BaseDenoiser, level: float, base: type[OneTime] = OneTime) -> OneTime:
    cast = Cast(teacher_of(process, "x0"), student=pair(student_of, process, "x0"), fake=fake)
    (tau,) = times.grid(process, (level,))[:1]
    made: OneTime = type("At", (base,), {"tau": tau})(cast, resolve("phased_dmd").config({}))
    return made


def fitted(process: Process, level: float, end: float, base: type[OneTime]) -> list[float]:
    """[slope, start] of the line that minimises the critic's loss at one noise level: the loss is quadratic. The
    student's states at the end of the phase are those of N(MEAN, STD^2)."""
    line, rows = Line(process), 4096
    one, (s,) = at_one_time(process, line, level, base), times.grid(process, (end,))[:1]
    line.requires_grad_(True)
    low, total = torch.full((rows,), s, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for seed in range(8):
        batch = batch_of(rows, seed)
        x_s = process.mix(MEAN + STD * batch.randn(), batch.noise, low)
        total = total + one._fake_loss(x_s, low, low, batch)
    gradient = torch.autograd.grad(total, [line.slope, line.start], create_graph=True)
    curve = [torch.autograd.grad(part, [line.slope, line.start], retain_graph=True) for part in gradient]
    found: list[float] = torch.linalg.solve(
        torch.stack([torch.stack(row) for row in curve]).detach(), -torch.stack(gradient).detach()
    ).tolist()
    return found


def expectation(process: Process, level: float) -> list[float]:
    """[slope, start] of E[x0 | x_tau] for x0 of N(MEAN, STD^2): what clean pictures would have taught."""
    t = torch.tensor(times.grid(process, (level,))[0], dtype=torch.float64)
    a, b = float(process.alpha(t)), float(process.sigma(t))
    slope = a * STD**2 / (a**2 * STD**2 + b**2)
    return [slope, MEAN * (1 - slope * a)]


@every_process
@pytest.mark.parametrize(("level", "end"), [(0.7, 0.6), (0.9, 0.6), (0.4, 0.0)])
def test_what_minimises_the_critics_loss_is_the_conditional_expectation(
    process: Process, level: float, end: float
) -> None:
    expected = expectation(process, level)
    assert fitted(process, level, end, OneTime) == pytest.approx(expected, abs=0.01)
    if end > 0:
        assert fitted(process, level, end, Biased) != pytest.approx(expected, abs=0.02)


class Told(Line):
    """Says what it is told beforehand."""

    clean: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        return self.clean, x


def test_in_rectified_flow_the_target_is_the_velocity_of_phased_dmd() -> None:
    tau, s, fake = 0.8, SPLIT, Told(RF())
    one = at_one_time(RF(), fake, tau)
    batch, again = batch_of(64, 3), batch_of(64, 3)
    x_s, low, eps = data_like(64), torch.full((64,), s, dtype=torch.float64), again.randn()
    k = (1 - tau) / (1 - s)
    b = (tau**2 - k**2 * s**2) ** 0.5
    velocity = -x_s / (1 - s) + eps * (tau + (1 - tau) * s**2 / (1 - s) ** 2) / b
    fake.clean = k * x_s + b * eps - tau * velocity
    assert float(one._fake_loss(x_s, low, low, batch)) == pytest.approx(0, abs=1e-12)


def data_like(rows: int) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("at", [0, 1])
def test_the_critics_loss_teaches_the_expert_of_the_phase_alone(at: int) -> None:
    student, fake = (pair(of, RF(), "flow") for of in (student_of, fake_of))
    cast = Cast(teacher_of(RF(), "flow"), student=student, fake=fake)
    one = in_phase(at)(cast, resolve("phased_dmd").config({}))
    with cast.only("fake"):
        one.loss("fake", batch_of(256))["dsm"].backward()
    taught, idle = (list(networks(fake).values())[k] for k in (at, 1 - at))
    assert all(p.grad is not None for p in taught.parameters())
    assert all(p.grad is None for role in (student, idle) for p in role.parameters())


# sampling ------------------------------------------------------------------------------------------------------------


def toys(shift: float = 0.8) -> tuple[Denoiser, Experts]:
    """An unguided teacher of N(1, STD^2), and two flow maps of N(1 + shift, 1) for its student."""
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    flows = [Denoiser(GaussianNet(RF(), "flow", shift, 1.0).float(), RF(), "flow", {"s"}) for _ in range(2)]
    return teacher, Experts(flows, (SPLIT,))


def test_each_step_leads_to_the_end_of_its_phase_before_it_is_renoised() -> None:
    run = StageRun(0, Stage("phased_dmd", 1, {"counts": [2, 3, 5]}), *toys())
    two, three, five = (run.schedules[k] for k in (2, 3, 5))
    assert (two.times, two.nets) == ((1.0, 0.6, 0.0), ("denoiser", "denoiser_2"))
    assert three.times == pytest.approx((1.0, 0.8, 0.6, 0.0))
    assert five.times == pytest.approx((1.0, 13 / 15, 11 / 15, 0.6, 0.3, 0.0))
    assert five.nets == ("denoiser",) * 3 + ("denoiser_2",) * 2
    for schedule in run.schedules.values():
        ends = [(1 - step.eta) * step.s for step in schedule.expand(None, None, "denoiser")]
        assert ends == pytest.approx([SPLIT if net == "denoiser" else 0.0 for net in schedule.nets or ()])
    path = StageRun(0, Stage("phased_dmd", 1, {"eta": 0}), *toys()).schedules[4]
    assert path.eta == (0.0,) * 4


def test_a_sample_in_training_is_that_of_the_solver_with_the_same_noise() -> None:
    run = StageRun(0, Stage("phased_dmd", 1, {"counts": [5]}), *toys())
    schedule, student = run.schedules[5], run.cast.student
    draws = [torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    cond = torch.ones(4)
    made = solvers.sample(student, draws[5], schedule.times, cond, schedule.eta, draw=lambda i: draws[i])
    plan = schedule.expand(None, None, "denoiser")
    solver = solvers.make("ddim", RF(), "flow", plan)
    state = solver.start(draws[5])
    while not solver.done(state):
        step, target = plan[state.i], torch.full((4,), solver.target(state))
        x0, eps = networks(student)[step.net](state.x, torch.full((4,), step.t), cond, target)
        state = solver.move(state, x0, eps, draws[state.i])
    torch.testing.assert_close(made, state.x)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"counts": [1]}, "2 phases need at least a step each"),
        ({"grids": {4: (1.0, 0.8, 0.5, 0.3)}}, r"grids\[4\] must hold the levels where a phase ends"),
        ({"splits": (0.3, 0.6)}, "splits must fall"),
    ],
)
def test_phases_that_sampling_cannot_go_through_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        StageRun(0, Stage("phased_dmd", 1, settings), *toys())


def test_a_student_of_one_network_goes_through_phases_too() -> None:
    for settings, times_of_4 in (({}, (1.0, 0.75, 0.5, 0.25, 0.0)), ({"splits": (0.4,)}, (1.0, 0.7, 0.4, 0.2, 0.0))):
        run = StageRun(0, Stage("phased_dmd", 1, settings), tiny_teacher(), tiny_student())
        assert run.schedules[4].times == pytest.approx(times_of_4)
        assert run.schedules[4].nets is None


# learning ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_as_an_uninterrupted_one_with_both_experts_trained(tmp_path: Path) -> None:
    def run(folder: Path | None = None, hooks: Hooks | None = None) -> Trainer:
        config, told = (
            TrainConfig(seed=3, checkpoint_every=1, checkpoint_every_s=1e9),
            STAGES["phased_dmd"],
        )
        began = Experts([tiny_student() for _ in range(2)], (SPLIT,))
        stages = [Stage("phased_dmd", 10, told | {"ida": 0.97})]
        return Trainer(stages, tiny_teacher(), began, tiny_source(), config, folder=folder, hooks=hooks or Hooks())

    whole = run().fit()
    assert run(tmp_path, Hooks(poll=wish_after(6, "pause"))).fit().state == "paused"
    assert same(run(tmp_path).fit().weights, whole.weights)
    began = dict(tiny_student().state_dict())
    assert all(
        not same(part, began) for part in weights_of(Experts([tiny_student()] * 2, (SPLIT,)), whole.weights).values()
    )


def test_both_experts_reach_the_mean_and_std_of_the_teacher() -> None:
    settings = {"lr": 2e-2, "fake_lr": 5e-2, "beta1": 0.5, "batch": 64}
    run = StageRun(0, Stage("phased_dmd", 200, settings), *toys(), ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    while not run.done:
        run.iterate(source)
    for weights in weights_of(run.cast.student, run.averages[0].weights).values():
        assert weights["net.shift"].item() == pytest.approx(0, abs=0.05)
        assert weights["net.log_std"].exp().item() == pytest.approx(STD, abs=0.04)
