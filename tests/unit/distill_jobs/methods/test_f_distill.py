"""f-distill where the density ratio is known: the gradient is that of each divergence, and dmd's for reverse KL."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.methods.base import resolve
from distill_jobs.methods.divergences import WEIGHTS, FDistill
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
    MEAN,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    fake_of,
    over,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, other_guidance, score_gradients, top

THREE = ("forward_kl", "reverse_kl", "jensen_shannon")
every_divergence = pytest.mark.parametrize("divergence", WEIGHTS)
of_three = pytest.mark.parametrize("divergence", THREE)
SIZE = math.prod(SHAPE)


class ExactRatio(nn.Module):
    """The discriminator that knows log p / q of a sample x_t [B, C, ...], the first half of what it is shown."""

    def __init__(self, process: Process, shift: float, std: float) -> None:
        super().__init__()
        self.process, self.shift, self.std = process, shift, std
        self.held = nn.Parameter(torch.zeros(()))

    def forward(self, seen: list[Tensor], angle: Tensor) -> Tensor:
        x = seen[0][:, : SHAPE[0]]
        t = self.process.t_of_angle(angle)
        a, b = (part(t).reshape(-1, 1, 1, 1) for part in (self.process.alpha, self.process.sigma))
        log_p, log_q = (
            -(var.log() + (x - a * mean).square() / var) / 2
            for mean, var in (
                (GUIDED_MEAN, a**2 * STD**2 + b**2),
                (MEAN + self.shift, a**2 * self.std**2 + b**2),
            )
        )
        return (log_p - log_q).flatten(1).sum(dim=1, keepdim=True)


def gradients(
    process: Process,
    kind: Kind,
    divergence: str,
    *,
    shift: float = TRUTH,
    std: float = STD,
    rows: int = 256,
    seeds: int = 4,
    counts: tuple[int, ...] = (1,),
    method: Any = FDistill,
    teacher: Any = None,
    **settings: Any,
) -> tuple[float, float]:
    """d loss / d (mean, log std) of a student N(MEAN + shift, std^2), whose critic and ratio are exact: the mean."""
    cast = Cast(
        teacher or teacher_of(process, kind),
        student=student_of(process, kind, shift=shift, std=std, reads_s=False),
        fake=fake_of(process, kind, shift=shift, std=std),
        disc=ExactRatio(process, shift, std),
    )
    grids = {k: tuple(top(kind) * (1 - i / k) for i in range(k)) for k in counts}
    told = {"counts": counts, "grids": grids, "gan_weight": 0, "divergence": divergence, **settings}
    one = method(cast, resolve("f_distill").config(told))
    with cast.only("student") as student:
        for seed in range(seeds):
            (sum(one.loss("student", batch_of(rows, seed)).values()) / seeds).backward()
    assert all(p.grad is None for role in (cast.teacher, cast["fake"], cast.module("disc")) for p in role.parameters())
    return float(student.net.shift.grad), float(student.net.log_std.grad)


# rest and direction --------------------------------------------------------------------------------------------------


@every_kind
@every_process
@of_three
def test_the_student_is_at_rest_at_the_truth(divergence: str, process: Process, kind: Kind) -> None:
    found = gradients(process, kind, divergence, counts=(1, 2, 4), rows=64)
    assert found == pytest.approx((0, 0), abs=1e-9)


@every_kind
@every_process
@of_three
@pytest.mark.parametrize("side", [-1, 1])
def test_the_student_is_pointed_back_to_the_truth(divergence: str, process: Process, kind: Kind, side: int) -> None:
    by_mean, _ = gradients(process, kind, divergence, shift=TRUTH + side * 0.3, seeds=1)
    _, by_std = gradients(process, kind, divergence, std=STD * (1.3 if side > 0 else 0.75), seeds=1)
    assert side * by_mean > 0.03
    assert side * by_std > 3e-3


class WrongSign(FDistill):
    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -super()._student_loss(y, batch)


def test_the_wrong_sign_fails_the_oracle() -> None:
    assert gradients(RF(), "flow", "jensen_shannon", shift=TRUTH + 0.3, method=WrongSign)[0] < -0.03


def test_the_other_guidance_convention_fails_the_oracle() -> None:
    assert abs(gradients(RF(), "flow", "jensen_shannon", teacher=other_guidance(RF(), "flow"))[0]) > 0.1


# numbers -------------------------------------------------------------------------------------------------------------

F: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "hellinger": lambda r: (1 - r.sqrt()).square(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened_reverse_kl": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "neyman": lambda r: (1 - r).square() / r,
}


@every_divergence
def test_the_weight_is_the_second_derivative_of_f_times_the_squared_ratio(divergence: str) -> None:
    def h(r: Tensor) -> Tensor:
        r = r.requires_grad_()
        (once,) = torch.autograd.grad(F[divergence](r).sum(), r, create_graph=True)
        (twice,) = torch.autograd.grad(once.sum(), r)
        return twice * r.square()

    r = torch.linspace(0.1, 20, 50, dtype=torch.float64)
    expected = h(r) / h(torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(WEIGHTS[divergence](r), expected.detach())


LEVEL = 0.4


class AtOneLevel(FDistill):
    """Samples are exact, where a process' noisiest state still has a little of the mean in it."""

    def generate(self, batch: Batch) -> Tensor:
        net = self.cast.student.net
        assert isinstance(net, GaussianNet)
        return over(batch.cond) + net.shift + net.log_std.exp() * batch.noise

    def levels(self, batch: Batch) -> Tensor:
        return torch.full_like(batch.noise[:, 0, 0, 0], LEVEL)


class Inverted(AtOneLevel):
    """The ratio is the student's density over the teacher's."""

    def weight(self, log_ratio: Tensor) -> Tensor:
        return super().weight(-log_ratio)


BARE: dict[str, Any] = {"floor": 1e6, "ratio_min": 1e-9, "ratio_max": 1e9}  # one normaliser for all rows


def per_value(divergence: str, process: Process, shift: float, std: float, method: Any = AtOneLevel) -> list[float]:
    """The gradient of the divergence per value of a sample, at LEVEL: the loss's over sigma^2 / alpha^2."""
    t = times.on(process, torch.tensor([LEVEL], dtype=torch.float64))
    unit = 1e6 * float((process.alpha(t) / process.sigma(t)).square())
    found = gradients(
        process, "flow", divergence, shift=TRUTH + shift, std=std, rows=4096, seeds=6, method=method, **BARE
    )
    return [unit * each for each in found]


def kl_gradient(divergence: str, process: Process, shift: float, std: float) -> tuple[float, float]:
    """d KL / d (shift, log std) of one value, between N(0, STD^2) and N(shift, std^2), both noised to LEVEL."""
    t = times.on(process, torch.tensor([LEVEL], dtype=torch.float64))
    a, b = float(process.alpha(t)), float(process.sigma(t))
    m, log_std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (shift, math.log(std)))
    var_p, var_q = a**2 * STD**2 + b**2, a**2 * (2 * log_std).exp() + b**2
    top_, low = (var_p, var_q) if divergence == "forward_kl" else (var_q, var_p)
    ((top_ / low - 1 - (top_ / low).log() + (a * m).square() / low) / 2).backward()
    assert m.grad is not None
    assert log_std.grad is not None
    return float(m.grad), float(log_std.grad)


CASES = [(0.15, STD), (-0.15, STD), (0.0, 1.12 * STD), (0.0, 0.9 * STD)]
every_case = pytest.mark.parametrize(("shift", "std"), CASES)


@every_process
@every_case
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_gradient_is_that_of_the_kl_divergences(
    divergence: str, process: Process, shift: float, std: float
) -> None:
    expected = kl_gradient(divergence, process, shift, std)
    scale = max(map(abs, expected))
    assert per_value(divergence, process, shift, std) == pytest.approx(expected, abs=0.05 * scale)


def jensen_shannon(process: Process, shift: float) -> float:
    """d JS / d shift per value: between N(0, 1) and N(D, 1), D the distance of all values in noised deviations; with
    f''(1) = 1 it is twice what f = r log r - (1 + r) log((1 + r) / 2) makes it."""
    t = times.on(process, torch.tensor([LEVEL], dtype=torch.float64))
    a, b = float(process.alpha(t)), float(process.sigma(t))
    m = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    apart = SIZE**0.5 * a * m / (a**2 * STD**2 + b**2) ** 0.5
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    p, q = (torch.exp(-((x - at) ** 2) / 2) / (2 * math.pi) ** 0.5 for at in (torch.zeros(()), apart))
    (2 * torch.trapezoid(q * F["jensen_shannon"](p / q), x)).backward()
    assert m.grad is not None
    return float(m.grad) / SIZE


@every_process
@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_the_gradient_is_that_of_the_jensen_shannon_divergence(process: Process, shift: float) -> None:
    expected = jensen_shannon(process, shift)
    found = per_value("jensen_shannon", process, shift, STD)[0]
    assert found == pytest.approx(expected, rel=0.03)
    assert abs(kl_gradient("reverse_kl", process, shift, STD)[0] / expected - 1) > 0.06  # and not of dmd's


def test_the_ratio_upside_down_fails_the_oracle() -> None:
    expected = kl_gradient("forward_kl", RF(), 0.0, 1.12 * STD)[1]
    wrong = per_value("forward_kl", RF(), 0.0, 1.12 * STD, method=Inverted)[1]
    assert abs(wrong / expected - 1) > 0.2


@every_process
@every_kind
def test_reverse_kl_is_dmd(process: Process, kind: Kind) -> None:
    where: dict[str, Any] = {"shift": TRUTH + 0.4, "std": 1.2 * STD}
    ours = gradients(process, kind, "reverse_kl", **where, seeds=1)
    assert ours == pytest.approx(score_gradients("dmd", process, kind, **where, seeds=1))


def test_a_ratio_is_believed_within_its_bounds() -> None:
    config = resolve("f_distill").config({"divergence": "forward_kl"})
    student, fake = student_of(RF(), "flow"), fake_of(RF(), "flow")
    one = FDistill(Cast(teacher_of(RF(), "flow"), student=student, fake=fake), config)
    seen = one.weight(torch.tensor([-50.0, 0.0, 1.0, 50.0]))
    torch.testing.assert_close(seen, torch.tensor([0.1, 1.0, math.e, 20.0]))


def test_logits_of_hinge_are_no_ratio() -> None:
    with pytest.raises(InvalidRequest, match="method setting gan"):
        resolve("f_distill").config({"gan": "hinge"})


# learning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_the_student_reaches_the_mean_and_std_of_the_teacher(divergence: str) -> None:
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    student = Denoiser(GaussianNet(RF(), "flow", shift=0.8, std=1.0, endpoint=True).float(), RF(), "flow")
    settings = {"counts": (1,), "lr": 2e-2, "fake_lr": 5e-2, "beta1": 0.5, "batch": 64, "fake_updates": 2, "width": 16}
    told = {**settings, "divergence": divergence}
    run = StageRun(0, Stage("f_distill", 150, told), teacher, student, ema=(0.9,))
    generator = torch.Generator().manual_seed(3)
    source = TensorSource(torch.ones(1024), SHAPE, x=1 + STD * torch.randn(1024, *SHAPE, generator=generator))
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.06)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.05)
