"""Divergences beside dmd's and sid's: at rest at the closed-form truth, pointing back beside it, and the divergence
that each paper says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch, Rows, TensorSource, make_batch
from distill_jobs.losses import over_rows, toward
from distill_jobs.methods.base import resolve
from distill_jobs.methods.divergences import SIM, DiffInstruct, UniInstruct
from distill_jobs.methods.score_matching import DMD, ScoreMatching
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import SHAPE, STD, GaussianNet, batch_of, fake_of, student_of, teacher_of
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, other_guidance, score_gradients
from tests.unit.distill_jobs.tiny import TinyNet, tiny_source, tiny_student, tiny_teacher

FAMILY: dict[str, type[ScoreMatching]] = {"diff_instruct": DiffInstruct, "sim": SIM, "uni_instruct": UniInstruct}
every_one = pytest.mark.parametrize("name", FAMILY)

# rest and direction --------------------------------------------------------------------------------------------------


@every_kind
@every_process
@every_one
def test_the_student_is_at_rest_at_the_truth(name: str, process: Process, kind: Kind) -> None:
    assert score_gradients(name, process, kind, counts=(1, 2, 4)) == pytest.approx((0, 0), abs=1e-9)


@every_kind
@every_process
@every_one
@pytest.mark.parametrize("side", [-1, 1])
def test_the_student_is_pointed_back_to_the_truth(name: str, process: Process, kind: Kind, side: int) -> None:
    by_mean, _ = score_gradients(name, process, kind, shift=TRUTH + side * 0.5, seeds=2)
    _, by_std = score_gradients(name, process, kind, std=STD * (1.5 if side > 0 else 0.6), seeds=2)
    assert side * by_mean > 0.1
    assert side * by_std > 0.01


def wrong_sign(method: type[ScoreMatching]) -> Any:
    class WrongSign(method):  # type: ignore[valid-type, misc]
        def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
            (direction,) = torch.autograd.grad(super()._student_loss(y, batch), y)
            return toward(y, -direction * y.numel())

    return WrongSign


@every_one
def test_the_wrong_sign_fails_the_oracle(name: str) -> None:
    by_mean, _ = score_gradients(name, RF(), "flow", shift=TRUTH + 0.5, method=wrong_sign(FAMILY[name]))
    assert by_mean < -0.1


@every_one
def test_the_other_guidance_convention_fails_the_oracle(name: str) -> None:
    by_mean, _ = score_gradients(name, RF(), "flow", teacher=other_guidance(RF(), "flow"))
    assert abs(by_mean) > 0.1


# numbers -------------------------------------------------------------------------------------------------------------


class Answer(Denoiser):
    """A denoiser that answers one x0 whatever it is asked."""

    def __init__(self, value: float) -> None:
        super().__init__(lambda x, *_: x, RF(), "x0")
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x: Any, t: Any, cond: Any = None, s: Any = None, w: Any = None) -> Any:
        return self.value + 0 * x, (x - (1 - t).reshape(-1, 1, 1, 1) * self.value) / t.reshape(-1, 1, 1, 1)


def answers(name: str, unit: float = 1.0, **settings: Any) -> tuple[float, float]:
    """(loss, its gradient by the student's answer) of teacher 1, critic 3 and student 0, in some unit."""
    cast = Cast(Answer(unit), student=Answer(0.0), fake=Answer(3 * unit))
    method = resolve(name).method(cast, resolve(name).config({"counts": (1,), **settings}))
    with cast.only("student") as student:
        loss = method.loss("student", make_batch(Rows(cond=torch.zeros(4)), SHAPE, 0))[name]
        loss.backward()
    return loss.item(), student.value.grad.item()


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_the_gradient_of_diff_instruct_is_the_plain_disagreement(unit: float) -> None:
    assert answers("diff_instruct", unit)[1] == pytest.approx(2 * unit)


def test_the_loss_of_sim_is_the_papers() -> None:
    """u = T - F = -2, F - y = 3: (u / sqrt(u^2 + c^2)) (F - y)."""
    for c in (0.01, 2.0):
        assert answers("sim", huber=c)[0] == pytest.approx(-6 / math.sqrt(4 + c**2), rel=1e-5)


def kl(shift: float, std: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL of the student's N(shift, std^2) from the teacher's N(0, STD^2), both noised by sigma / alpha = noise, and
    its derivatives by shift and log std."""
    ours, theirs = std**2 + noise**2, STD**2 + noise**2
    value = (ours / theirs - 1 - (ours / theirs).log() + shift**2 / theirs) / 2
    return value, shift / theirs, std**2 * (1 / theirs - 1 / ours)


CASES = [(0.5, STD), (-0.5, STD), (0.0, 0.75), (0.0, 0.3), (0.3, 0.6)]
every_case = pytest.mark.parametrize(("shift", "std"), CASES)
ENDS = torch.tensor([0.02 / 0.98, 0.98 / 0.02], dtype=torch.float64)  # tau_min and tau_max as sigma / alpha


def per_value(name: str, process: Process, shift: float, std: float, **how: Any) -> list[float]:
    both = score_gradients(name, process, "flow", shift=TRUTH + shift, std=std, seeds=24, **how)
    return [each / 24 for each in both]


@every_process
@every_case
def test_the_gradient_of_uni_instruct_is_that_of_the_kl_divergence(process: Process, shift: float, std: float) -> None:
    _, by_mean, by_std = (float(low - high) for low, high in kl(shift, std, ENDS))
    assert per_value("uni_instruct", process, shift, std) == pytest.approx((by_mean, by_std), rel=0.05, abs=0.08)


@every_case
def test_the_value_of_uni_instruct_is_the_kl_divergence(shift: float, std: float) -> None:
    cast = Cast(
        teacher_of(RF(), "flow"),
        student=student_of(RF(), "flow", shift=TRUTH + shift, std=std, reads_s=False),
        fake=fake_of(RF(), "flow", shift=TRUTH + shift, std=std),
    )
    method = UniInstruct(cast, resolve("uni_instruct").config({"counts": (1,)}))
    seen = sum(float(method.loss("student", batch_of(256, seed))["uni_instruct"]) for seed in range(24)) / 24
    low, high = kl(shift, std, ENDS)[0].tolist()
    assert seen == pytest.approx(low - high, rel=0.05, abs=0.03)


@every_case
def test_diff_instruct_weighted_as_kl_follows_the_integral_of_its_gradient(shift: float, std: float) -> None:
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = (-1.2 + 1.2 * normal).exp().clamp(*ENDS.tolist())
    _, by_mean, by_std = (float(each.mean()) for each in kl(shift, std, noise))
    seen = per_value("diff_instruct", RF(), shift, std, settings={"snr_power": 2})
    assert seen == pytest.approx((by_mean, by_std), rel=0.03, abs=0.02)


class HeldUni(UniInstruct):
    """Forgets that the critic moves with the student."""

    def _parts(self, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        gap, residual, t = super()._parts(y, batch)
        return gap, residual.detach(), t


class FlatUni(UniInstruct):
    """Another weight: that of scores in the data's own unit, drawn uniformly in tau."""

    def levels(self, batch: Batch) -> Tensor:
        return ScoreMatching.levels(self, batch)


@pytest.mark.parametrize("mutant", [HeldUni, FlatUni])
def test_another_weight_or_a_held_critic_is_not_the_kl_divergence(mutant: type[UniInstruct]) -> None:
    _, by_mean, by_std = (float(low - high) for low, high in kl(0.3, 0.6, ENDS))
    wrong = per_value("uni_instruct", RF(), 0.3, 0.6, method=mutant)
    assert abs(wrong[0] - by_mean) > 0.15 * by_mean or abs(wrong[1] - by_std) > 0.15 * by_std


def moved_with_the_critic(shift: float, std: float) -> list[float]:
    """d / d (mean, log std) of the expected pseudo-Huber distance, through the weights of an exact critic alone."""
    teacher, fake = teacher_of(RF(), "flow"), fake_of(RF(), "flow", shift=TRUTH + shift, std=std)
    student = student_of(RF(), "flow", shift=TRUTH + shift, std=std, reads_s=False)
    method = SIM(Cast(teacher, student=student, fake=fake), resolve("sim").config({"counts": (1,)}))
    net = fake.net
    with method.cast.only("fake"):
        for seed in range(24):
            batch = batch_of(256, seed)
            with torch.no_grad():
                y_t, t = method.noised(method.generate(batch), batch)
                real, _ = teacher(y_t, t, batch.cond)
            gap = real - fake(y_t, t, batch.cond)[0]
            (over_rows(gap.square()) + method.config.huber**2).sqrt().mean().backward()
    assert isinstance(net, GaussianNet)
    return [float(part.grad) / 24 for part in (net.shift, net.log_std) if part.grad is not None]


@every_case
def test_sim_moves_the_student_as_the_distance_falls_when_the_critic_follows(shift: float, std: float) -> None:
    expected = moved_with_the_critic(shift, std)
    assert per_value("sim", RF(), shift, std) == pytest.approx(expected, rel=0.05, abs=0.02)


def test_the_levels_of_diff_instruct_are_log_normal_in_the_ratio_of_noise() -> None:
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), fake=fake_of(RF(), "flow"))
    u = DiffInstruct(cast, resolve("diff_instruct").config({})).levels(batch_of(50_000))
    ratio = (u / (1 - u)).log()
    assert ratio.mean() == pytest.approx(-1.2, abs=0.02)
    assert ratio.std() == pytest.approx(1.2, abs=0.02)


# learning ------------------------------------------------------------------------------------------------------------


def learnt(name: str, **settings: Any) -> dict[str, Tensor]:
    """Where a student N(1 + 0.8, 1) of an unguided teacher N(1, STD^2) ends up."""
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    student = Denoiser(GaussianNet(RF(), "flow", shift=0.8, std=1.0, endpoint=True).float(), RF(), "flow")
    settings = {"counts": (1,), "lr": 2e-2, "fake_lr": 5e-2, "beta1": 0.5, "batch": 64, "fake_updates": 2, **settings}
    run = StageRun(0, Stage(name, 150, settings), teacher, student, ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    while not run.done:
        run.iterate(source)
    return run.averages[0].weights


@pytest.mark.parametrize(("name", "ida"), [("diff_instruct", 1.0), ("sim", 0.9), ("uni_instruct", 0.9)])
def test_the_student_reaches_the_mean_and_std_of_the_teacher(name: str, ida: float) -> None:
    final = learnt(name, ida=ida)
    assert final["net.shift"].item() == pytest.approx(0, abs=0.05)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.04)


# a critic that follows the student -----------------------------------------------------------------------------------


def test_the_critic_follows_the_student_after_each_of_its_updates_alone() -> None:
    cast = Cast(tiny_teacher(), student=tiny_student(), fake=Denoiser(TinyNet(2), RF(), "flow"))
    method = DMD(cast, resolve("dmd").config({"ida": 0.75, "fake_warmup": 10, "fake_updates": 5}))
    before = {name: value.clone() for name, value in cast.weights("fake").items()}
    method.after(1)  # the student starts after two iterations of warm-up
    assert all(torch.equal(value, before[name]) for name, value in cast.weights("fake").items())
    method.after(2)
    for name, value in cast.weights("fake").items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * cast.weights("student")[name])


def test_the_critic_is_left_alone_unless_it_is_told_to_follow() -> None:
    cast = Cast(tiny_teacher(), student=tiny_student(), fake=Denoiser(TinyNet(2), RF(), "flow"))
    before = {name: value.clone() for name, value in cast.weights("fake").items()}
    DMD(cast, resolve("dmd").config({"fake_warmup": 0})).after(0)
    assert all(torch.equal(value, before[name]) for name, value in cast.weights("fake").items())


def test_a_critic_of_another_network_cannot_follow() -> None:
    other = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    with pytest.raises(InvalidRequest, match="must be one network"):
        StageRun(0, Stage("dmd", 1, {"ida": 0.9}), other, tiny_student())


def test_a_following_critic_is_resumed_bit_by_bit() -> None:
    def run() -> StageRun:
        settings = {"ida": 0.9, "batch": 8, "fake_updates": 2, "fake_warmup": 2}
        return StageRun(0, Stage("dmd", 6, settings), tiny_teacher(), tiny_student())

    whole, first, second = run(), run(), run()
    for _ in range(6):
        whole.iterate(tiny_source())
    for _ in range(3):
        first.iterate(tiny_source())
    second.restore(first.tensors(), first.counters())
    for _ in range(3):
        second.iterate(tiny_source())
    for role in ("fake", "student"):
        theirs = whole.cast.weights(role)
        assert all(torch.equal(value, theirs[name]) for name, value in second.cast.weights(role).items())
