"""Policy imitation at a truth that is known: the x0 of Gaussian data along the exact way from any state.

Between points the truth is a curve and the policy a chain of lines, so what is left falls with the number of points.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.methods.base import resolve
from distill_jobs.methods.policy import PiFlow
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import BaseDenoiser, Denoiser, Guided
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.policy import Policy
from engines.process import RF, Process
from engines.solvers import sample
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    over,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top


class WayNet(GaussianNet):
    """`points` predictions side by side: the optimal x0 along the exact way from x at t to s."""

    def __init__(self, process: Process, kind: Kind, points: int, **data: float) -> None:
        super().__init__(process, kind, **{"shift": TRUTH, **data})
        self.points = points

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        (x, t), s = self._state(x, t), self._end(s)
        high, low = (times.level_of(self.process, time) for time in (t, s))
        parts = []
        for j in range(self.points):
            level = torch.lerp(high, low, j / max(1, self.points - 1))
            time = torch.minimum(times.on(self.process, level), t)
            parts.append(self.process.join(x0 := self.x0(x, t, time, cond), (x - self._a(t) * x0) / self._b(t),
                                           self.kind, t))  # fmt: skip
        return torch.cat(parts, dim=1)

    def x0(self, x: Tensor, t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """At `time` of the way from x at t."""
        mean, var = over(cond) + self.shift, (2 * self.log_std).exp()
        spread, there = (self._a(u) ** 2 * var + self._b(u) ** 2 for u in (t, time))
        return mean + self._a(time) * var / (there * spread).sqrt() * (x - self._a(t) * mean)

    def _a(self, t: Tensor) -> Tensor:
        return over(self.process.alpha(t))

    def _b(self, t: Tensor) -> Tensor:
        return over(self.process.sigma(t))


def student(process: Process, kind: Kind, points: int = 16, **data: float) -> Denoiser:
    return Denoiser(WayNet(process, kind, points, **data), process, kind, {"s"}, points)


def method(process: Process, kind: Kind, player: BaseDenoiser, teacher: BaseDenoiser | None = None) -> PiFlow:
    grids = {k: tuple(top(kind) * u for u in times.uniform(k)) for k in (1, 2, 4)}
    config = resolve("pi_flow").config({"grids": grids, "states": 2})
    return PiFlow(Cast(teacher or teacher_of(process, kind), student=player), config)


def loss(
    process: Process,
    kind: Kind,
    *,
    teacher: BaseDenoiser | None = None,
    made: type[PiFlow] = PiFlow,
    points: int = 16,
    **data: float,
) -> float:
    """The largest over some batches, which take different counts and rungs."""
    one = method(process, kind, student(process, kind, points, **data), teacher)
    one.__class__ = made
    return max(float(one.loss("student", batch_of(seed=seed))["imitation"]) for seed in range(4))


@every_kind
@every_process
def test_imitation_is_zero_at_the_true_way_only(process: Process, kind: Kind) -> None:
    right = loss(process, kind)
    assert right < 2e-3
    assert loss(process, kind, shift=TRUTH + OFF) > 0.004 + 2 * right
    assert loss(process, kind, std=1.2 * STD) > 0.004 + 2 * right


@every_process
def test_what_is_left_at_the_truth_falls_with_the_points(process: Process) -> None:
    coarse, fine = (loss(process, "flow", points=n) for n in (4, 8))
    assert fine < coarse / 4


def test_one_point_is_not_enough_for_a_curved_way() -> None:
    assert loss(RF(), "flow", points=1) > 20 * loss(RF(), "flow", points=8)


# mutants -------------------------------------------------------------------------------------------------------------


def test_the_other_guidance_convention_fails_the_oracle() -> None:
    assert loss(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1
    assert loss(RF(), "flow", teacher=teacher_of(RF(), "flow", w=1.0)) > 0.1


class Backwards(PiFlow):
    """The points are read from s to t."""

    def way(self, batch: Batch) -> tuple[Tensor, Policy]:
        x, policy = super().way(batch)
        return x, Policy(policy.process, policy.t, policy.s, policy.points.flip(0))


class OffPolicy(PiFlow):
    """States lie on the straight line to the end of the way, not on the way."""

    def imitation(self, batch: Batch, x: Tensor, policy: Policy) -> Tensor:
        end = policy.points[-1:]
        return super().imitation(batch, x, Policy(policy.process, policy.t, policy.s, end))


class Negative(Guided):
    """The teacher leads away."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> tuple[Tensor, Tensor]:
        x0, eps = super().forward(x, t, cond, s, w)
        return -x0, -eps


@pytest.mark.parametrize("made", [Backwards, OffPolicy])
def test_a_way_read_backwards_or_left_fails_the_oracle(made: type[PiFlow]) -> None:
    assert loss(RF(), "flow", made=made) > 50 * loss(RF(), "flow")


def test_the_wrong_sign_fails_the_oracle() -> None:
    right = teacher_of(RF(), "flow")
    assert loss(RF(), "flow", teacher=Negative(right.denoiser, right.null_cond, right.w)) > 0.1


# ways ----------------------------------------------------------------------------------------------------------------


@every_kind
@every_process
def test_one_evaluation_of_the_true_policy_lands_where_the_flow_map_does(process: Process, kind: Kind) -> None:
    batch = batch_of()
    grid = times.grid(process, (top(kind),))
    exact = sample(student_of(process, kind), batch.noise, grid, batch.cond)
    made = sample(student(process, kind, points=32), batch.noise, grid, batch.cond)
    torch.testing.assert_close(made, exact, atol=0.02, rtol=0.01)
    straight = sample(student(process, kind, points=1), batch.noise, grid, batch.cond)
    assert (made - exact).abs().mean() < 0.1 * (straight - exact).abs().mean()


def test_the_teacher_is_asked_within_the_step_where_the_policy_leads() -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    player = student(RF(), "flow")

    class Watched(Guided):
        def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None, w: Any = None) -> Any:
            asked.append((x, t))
            return super().forward(x, t, cond, s, w)

    right = teacher_of(RF(), "flow")
    one = method(RF(), "flow", player, Watched(right.denoiser, right.null_cond, right.w))
    x, way = one.way(batch_of())
    one.imitation(batch_of(), x, way)
    state, t = asked[-1]
    assert bool(((t <= way.t) & (t >= way.s.clamp_min(0.02))).all())
    exact = student_of(RF(), "flow").jump(x, way.t, t, batch_of().cond)
    torch.testing.assert_close(state, exact, atol=0.01, rtol=0.01)


def test_schedules_say_that_a_policy_is_followed() -> None:
    one = method(RF(), "flow", student(RF(), "flow"))
    assert {(k, s.solver, s.eta) for k, s in one.schedules.items()} == {(1, "dx", 0.0), (2, "dx", 0.0), (4, "dx", 0.0)}
    with pytest.raises(InvalidRequest, match="eta"):
        resolve("pi_flow").config({"eta": 0.5})


# learning ------------------------------------------------------------------------------------------------------------


class TwoEnds(nn.Module):
    """x0 = mean + share_j (x - a mean) at every point: what the student has to find for one step."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.0))
        self.shares = nn.Parameter(torch.zeros(points))

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        return torch.cat([self.mean + share * x for share in self.shares], dim=1)


def test_imitation_reaches_the_mean_and_deviation_of_the_teacher_in_one_step() -> None:
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    player = Denoiser(TwoEnds(8), RF(), "x0", {"s"}, 8)
    run = StageRun(0, Stage("pi_flow", 250, {"counts": (1,), "lr": 2e-2, "batch": 64}), teacher, player, ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    while not run.done:
        run.iterate(source)
    made = sample(run.student_with(run.averages[0].weights), torch.randn(512, *SHAPE), (1.0, 0.0), torch.ones(512))
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(made.std()) == pytest.approx(STD, abs=0.03)
