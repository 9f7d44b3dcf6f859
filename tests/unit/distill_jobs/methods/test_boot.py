"""BOOT at a truth that is known in closed form, and the signal ODE it integrates."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.methods import flow_map
from distill_jobs.methods.base import resolve
from distill_jobs.methods.flow_map import BOOT
from distill_jobs.roles import Cast
from engines.denoiser import Denoiser, Guided
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, TRIG, VP, Process, secant
from tests.unit.distill_jobs.closed_form import (
    NULL_MEAN,
    STD,
    GaussianNet,
    W,
    batch_of,
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


def exact_teacher(process: Process, kind: Kind, guided: type[Guided] = Guided) -> Guided:
    """The guided teacher whose steps of any length are those of its flow map."""
    net = Denoiser(GaussianNet(process, kind), process, kind, inputs={"s"})
    return guided(net, torch.tensor([NULL_MEAN], dtype=torch.float64), W)


def boot_loss(process: Process, kind: Kind, settings: dict[str, Any] | None = None, **other: Any) -> float:
    told = {"grids": {1: (top(kind),)}, **(settings or {})}
    given = {"teacher": exact_teacher(process, kind), "settings": told, **other}
    return trajectory_loss("boot", process, kind, **given)


@every_kind
@every_process
def test_boot_is_zero_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    assert boot_loss(process, kind) < 1e-9
    assert boot_loss(process, kind, shift=TRUTH + OFF) > 0.004
    assert boot_loss(process, kind, std=1.2 * STD) > 0.004


@every_kind
@every_process
def test_boot_tends_to_zero_with_the_step_of_a_plain_teacher(process: Process, kind: Kind) -> None:
    coarse, fine = (
        boot_loss(process, kind, {"delta": delta}, teacher=teacher_of(process, kind)) for delta in (0.2, 0.02)
    )
    assert fine < 0.05 * coarse
    assert fine < 0.5 * boot_loss(
        process, kind, {"delta": 0.02}, teacher=teacher_of(process, kind), shift=TRUTH + 4 * OFF
    )


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("process", [RF(), VP(), TRIG()], ids=["rf", "vp", "trig"])
def test_the_teachers_step_is_the_exact_solution_of_the_signal_ode(process: Process) -> None:
    """With f = 3 and y = 1: y_s = y_t + (1 - exp(lambda_s - lambda_t)) (f - y_t), lambda = log(sigma / alpha)."""
    f, y, delta = 3.0, 1.0, 0.1
    teacher, student = (Denoiser(Constant(value), process, "x0", inputs) for value, inputs in ((f, ()), (y, {"s"})))
    method = BOOT(Cast(teacher, student=student), resolve("boot").config({"delta": delta, "boundary": 0.5}))
    seen = method.loss("student", batch_of(64, 5))
    end = batch_of(64, 5).draw(times.Uniform(0, 1 - delta))
    ratio = end / (1 - end) / ((end + delta) / (1 - end - delta))
    assert float(seen["bootstrap"]) == pytest.approx(float((((1 - ratio) * (f - y) / delta).square()).mean()), rel=1e-6)
    assert float(seen["boundary"]) == pytest.approx(0.5 * (f - y) ** 2)


def test_boot_needs_noise_and_conditions_alone() -> None:
    assert batch_of().rows.x is None
    assert batch_of().rows.pair is None
    method = BOOT(Cast(exact_teacher(RF(), "flow"), student=student_of(RF(), "flow")), resolve("boot").config({}))
    assert float(sum(method.loss("student", batch_of()).values())) < 1e-9
    assert method.needs == {"prompts"}
    assert method.schedules[1].times == (1.0, 0.0)


def test_boot_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert boot_loss(RF(), "flow", teacher=exact_teacher(RF(), "flow", OtherGuidance)) > 0.1


class Backwards(Denoiser):
    """Steps as far to more noise as it was asked to less."""

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None, w: Any = None) -> Tensor:
        return super().jump(x, t, (2 * t - s).clamp(max=1.0), cond, w)


def test_boot_with_the_teachers_step_reversed_fails_the_oracle() -> None:
    wrong = Backwards(GaussianNet(RF(), "flow", TRUTH), RF(), "flow", {"s"})
    assert boot_loss(RF(), "flow", teacher=wrong) > 0.1


def test_boot_that_takes_the_state_for_the_signal_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_map, "secant", lambda process, x, t, there, s: (there, secant(process, x, t, there, s)[1]))
    assert boot_loss(RF(), "flow") > 0.1


def test_boot_without_its_boundary_still_starts_at_the_teachers_first_step() -> None:
    """The bootstrap alone is anchored: at s + delta = T the student's state is the noise itself."""
    assert boot_loss(RF(), "flow", {"boundary": 0.0}, shift=TRUTH + OFF) > 0.004


def test_boot_refuses_a_network_that_does_not_read_s() -> None:
    plain = student_of(RF(), "flow", reads_s=False)
    with pytest.raises(InvalidRequest, match="must read s"):
        BOOT(Cast(teacher_of(RF(), "flow"), student=plain), resolve("boot").config({}))
    with pytest.raises(InvalidRequest, match=r"counts.*less than or equal to 1"):
        resolve("boot").config({"counts": (2,)})
