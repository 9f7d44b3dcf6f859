"""Divergences beside dmd's and sid's: at rest at the closed-form truth, pointing back beside it, and the divergence
that each paper says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, TensorSource, make_batch
from distill_jobs.losses import over_rows, toward
from distill_jobs.methods.base import resolve
from distill_jobs.methods.divergences import EMD, SGMD, SIM, DiffInstruct, UniInstruct
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


# score gradients and inferred latents --------------------------------------------------------------------------------

NEXT: dict[str, dict[str, Any]] = {"sgmd": {"correction": 0.0}, "emd": {}}
every_next = pytest.mark.parametrize("name", NEXT)


def pulls(
    name: str, process: Process | None = None, kind: Kind = "flow", seeds: int = 4, **how: Any
) -> tuple[float, float]:
    """d loss / d (mean, log std) of a student of one step, whose critic is exact."""
    by_mean, by_std = score_gradients(name, process or RF(), kind, seeds=seeds, **{"settings": NEXT[name], **how})
    return by_mean / seeds, by_std / seeds


@every_kind
@every_process
@every_next
def test_the_next_are_at_rest_at_the_truth(name: str, process: Process, kind: Kind) -> None:
    assert pulls(name, process, kind) == pytest.approx((0, 0), abs=1e-9)


@every_kind
@every_process
@every_next
@pytest.mark.parametrize("side", [-1, 1])
def test_the_next_point_back_to_the_truth(name: str, process: Process, kind: Kind, side: int) -> None:
    by_mean, _ = pulls(name, process, kind, 2, shift=TRUTH + side * 0.5)
    _, by_std = pulls(name, process, kind, 2, std=STD * (1.5 if side > 0 else 0.6))
    assert side * by_mean > 0.1
    assert side * by_std > 0.01


@every_next
def test_the_next_with_the_other_guidance_convention_fail_the_oracle(name: str) -> None:
    assert abs(pulls(name, teacher=other_guidance(RF(), "flow"))[0]) > 0.05


class Backwards(SGMD):
    """The critic is moved away from the teacher."""

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -super()._student_loss(y, batch)


def test_sgmd_with_the_wrong_sign_fails_the_oracle() -> None:
    assert pulls("sgmd", shift=TRUTH + 0.5, method=Backwards)[0] < -0.1


def test_sgmd_moves_the_sample_through_the_critic_and_not_through_the_teacher() -> None:
    """Teacher 1 and critic 3 whatever they are asked: the loss is (3 - 1)^2 / 2 over |0 - 1|, and moves nothing."""
    assert answers("sgmd", correction=0.0) == pytest.approx((2.0, 0.0))
    assert answers("sgmd", 100.0, correction=0.0) == pytest.approx((200.0, 0.0))


@every_process
def test_the_correction_of_sgmd_asks_for_a_smaller_deviation_at_the_truth_alone(process: Process) -> None:
    """d / d log std of -(F - y)^2 / (2 sigma) through F is alpha^2 S^2 sigma / (alpha^2 S + sigma^2)^2, S = STD^2."""
    t = times.on(process, torch.linspace(0.02, 0.98, 4001, dtype=torch.float64))
    alpha, sigma, var = process.alpha(t), process.sigma(t), STD**2
    expected = float((alpha**2 * var**2 * sigma / (alpha**2 * var + sigma**2) ** 2).mean())
    by_mean, by_std = pulls("sgmd", process, seeds=24, settings={"correction": 1.0})
    assert by_mean == pytest.approx(0, abs=0.02)
    assert by_std == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_emd_of_any_steps_follows_a_constant_disagreement_as_diff_instruct_does(unit: float) -> None:
    for langevin in (1, 5):
        assert answers("emd", unit, langevin=langevin)[1] == pytest.approx(2 * unit)


def held(std: float, tau: float = 0.2) -> tuple[float, float, float]:
    """(alpha, variances at noise level tau of a student's N(m, std^2) and of the teacher's N(m, STD^2))."""
    return 1 - tau, (1 - tau) ** 2 * std**2 + tau**2, (1 - tau) ** 2 * STD**2 + tau**2


@pytest.mark.parametrize("langevin", [1, 8, 64])
def test_emd_goes_from_the_reverse_to_the_forward_divergence(langevin: int) -> None:
    """With z held, eps gains on average sigma k alpha b z a (1 - r^n) / (1 - r), where k = 1 / V_q - 1 / V_p and
    r = 1 - a + a sigma^2 k: at n = 1 it is the score difference, and without end the posterior's mean."""
    a, tau, std = 0.1, 0.2, 0.3
    _, ours, theirs = held(std, tau)
    k = 1 / ours - 1 / theirs
    r = 1 - a + a * tau**2 * k
    gained = a * (1 - r**langevin) / (1 - r) / (1 - (1 - a) ** langevin)
    settings = {"langevin": langevin, "eps_step": a, "z_step": 0.0, "tau_min": tau, "tau_max": tau}
    _, by_std = pulls("emd", std=std, settings=settings, seeds=12)
    assert by_std == pytest.approx(-(tau**2) * k * std**2 * gained, rel=0.05)


def latents(std: float, shift: float, *, exchanged: bool = False) -> Tensor:
    """What many small Langevin steps infer of the student's noise."""
    tau, told = 0.2, {"langevin": 400, "eps_step": 0.02, "z_step": 0.02}
    teacher, fake = teacher_of(RF(), "flow"), fake_of(RF(), "flow", shift=TRUTH + shift, std=std)
    student = student_of(RF(), "flow", shift=TRUTH + shift, std=std, reads_s=False)
    cast = Cast(fake if exchanged else teacher, student=student, fake=teacher if exchanged else fake)
    one: Any = EMD(cast, resolve("emd").config({**told, "tau_min": tau, "tau_max": tau}))
    with one.cast.only("student"):
        z: Tensor = one.inferred(batch_of(1024))[0]
    return z


def test_emd_infers_the_latents_of_the_teachers_samples() -> None:
    """z given x_tau is normal, of mean alpha b (x - alpha m) / V_q and variance sigma^2 / V_q; x_tau the teacher's."""
    std, shift, tau = 0.3, 0.3, 0.2
    alpha, ours, theirs = held(std, tau)
    gain = alpha * std / ours
    z = latents(std, shift)
    assert z.mean() == pytest.approx(-gain * alpha * shift, rel=0.05)
    assert z.var() == pytest.approx(gain**2 * theirs + tau**2 / ours, rel=0.05)


def test_emd_with_teacher_and_critic_exchanged_fails_the_oracle() -> None:
    assert latents(0.3, 0.3, exchanged=True).mean() > 0.1


class WithNoise(EMD):
    """The noise of the last step is regressed on too."""

    def inferred(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        z, added, t = super().inferred(batch)
        return z, added + (2 * self.config.eps_step) ** 0.5 * batch.randn(), t


def test_emd_with_the_noise_of_its_steps_fails_the_oracle() -> None:
    assert max(map(abs, pulls("emd", method=WithNoise))) > 1e-4


def test_emd_is_for_one_step() -> None:
    with pytest.raises(InvalidRequest, match=r"counts.*less than or equal to 1"):
        resolve("emd").config({"counts": (2,)})


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


@pytest.mark.parametrize(
    ("name", "ida"), [("diff_instruct", 1.0), ("sim", 0.9), ("uni_instruct", 0.9), ("emd", 1.0), ("sgmd", 0.9)]
)
def test_the_student_reaches_the_mean_and_std_of_the_teacher(name: str, ida: float) -> None:
    final = learnt(name, ida=ida, **NEXT.get(name, {}))
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
