"""Adversarial methods in closed form: of Gaussians the optimal discriminator is known, log p_real - log p_fake.

With it the student's gradient vanishes where its samples are the real ones' and points back from where they are not.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch, TensorSource
from distill_jobs.discriminator import Adversary, DiscriminatorConfig
from distill_jobs.methods.adversarial import Lightning
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from distill_jobs.terms.adversarial import Adversarial
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
    data_of,
    over,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top, trajectory_loss
from tests.unit.distill_jobs.terms.oracle import gradients_of, term_of
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher


class Optimal(Adversary):
    """Knows that real latents are N(GUIDED_MEAN, STD^2) and fake ones N(MEAN + shift, std^2)."""

    def __init__(self, cast: Cast, config: Any, shift: float = TRUTH, std: float = STD) -> None:
        super().__init__(cast, config)
        self.fake = (MEAN + shift, std)

    def logits(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return (self._log_p(x, t, GUIDED_MEAN, STD) - self._log_p(x, t, *self.fake)).flatten(1)

    def _log_p(self, x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
        alpha, sigma = over(self.process.alpha(t)), over(self.process.sigma(t))
        var = alpha.square() * std**2 + sigma.square()
        return -((x - alpha * mean).square() / var + var.log()) / 2


class Negated(Optimal):
    """The wrong sign: likes what is fake."""

    def logits(self, *args: Any) -> Tensor:
        return -super().logits(*args)


class Backwards(Optimal):
    """Time runs the other way: reads a sample as if it were as noisy as it is clean."""

    def logits(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return super().logits(x, self.process.t_of_angle(torch.pi / 2 - self.process.angle(t)), cond)


# the term ------------------------------------------------------------------------------------------------------------


def term_gradients(
    process: Process, kind: Kind, *, adversary: type[Optimal] = Optimal, gan: str = "softplus", **fake: float
) -> tuple[float, float]:
    one = term_of("adversarial", process, kind, settings={"gan": gan}, **fake)
    assert isinstance(one, Adversarial)
    one.adversary = adversary(one.cast, one.config, **fake)
    return gradients_of(one, rows=256)


@every_kind
@every_process
@pytest.mark.parametrize("gan", ["softplus", "hinge"])
def test_a_student_that_fools_the_optimal_discriminator_is_at_rest(process: Process, kind: Kind, gan: str) -> None:
    assert term_gradients(process, kind, gan=gan, shift=TRUTH, std=STD) == (0, 0)
    for side in (-1, 1):
        assert side * term_gradients(process, kind, gan=gan, shift=TRUTH + side * 0.5, std=STD)[0] > 0.02
        std = STD * (1.5 if side > 0 else 0.6)
        assert side * term_gradients(process, kind, gan=gan, shift=TRUTH, std=std)[1] > 2e-3


def test_a_discriminator_of_the_wrong_sign_fails_the_oracle() -> None:
    assert term_gradients(RF(), "flow", adversary=Negated, shift=TRUTH + 0.5, std=STD)[0] < -0.02


def own_loss(process: Process, adversary: type[Optimal] = Optimal, believed: float = 0.3) -> float:
    """The discriminator's, on fakes that are off by 0.3 and that it believes to be off by `believed`."""
    cast = Cast(teacher_of(process, "flow"), student=student_of(process, "flow"))
    judge, batch = adversary(cast, DiscriminatorConfig(r1=0.0), TRUTH + believed), batch_of(1024)
    real, fake = (GUIDED_MEAN + off + STD * batch.randn() for off in (0.0, 0.3))
    return float(judge.own_loss(fake, real, batch))


@every_process
def test_the_discriminators_loss_is_least_at_the_log_ratio_of_the_densities(process: Process) -> None:
    best = own_loss(process)
    assert best < min(own_loss(process, believed=0.1), own_loss(process, believed=0.6)) - 1e-3
    assert best < own_loss(process, Negated) - 0.02
    assert best < own_loss(process, Backwards) - 0.1


# ladd ----------------------------------------------------------------------------------------------------------------


def player(run_of: str, process: Process, kind: Kind, *, settings: dict[str, Any] | None = None, **student: Any) -> Any:
    """The named method on closed-form data with grids that start where the prediction kind can."""
    counts = resolve(run_of).config(settings or {}).counts  # type: ignore[attr-defined]
    grids = {k: tuple(top(kind) * u for u in times.uniform(k)) for k in counts}
    config = resolve(run_of).config({"grids": grids, **(settings or {})})
    cast = Cast(teacher_of(process, kind), student=student_of(process, kind, **student), disc=nn.Identity())
    return resolve(run_of).method(cast, config)


def net_of(method: Any) -> GaussianNet:
    net = method.cast.student.net
    assert isinstance(net, GaussianNet)
    return net


def gradients(method: Any, seeds: int = 1) -> tuple[float, float]:
    net = net_of(method)
    with method.cast.only("student"):
        for seed in range(seeds):
            method.loss("student", batch_of(128, seed, x=data_of(128)))["gan"].backward()
    assert all(p.grad is None for p in method.cast.teacher.parameters())
    assert net.shift.grad is not None
    assert net.log_std.grad is not None
    return float(net.shift.grad), float(net.log_std.grad)


def ladd_gradients(
    process: Process, kind: Kind, *, adversary: type[Optimal] = Optimal, reads_s: bool = True, **fake: float
) -> tuple[float, float]:
    method = player("ladd", process, kind, settings={"easy": 0, "first_share": 0.5}, reads_s=reads_s, **fake)
    method.adversary = adversary(method.cast, method.config, **fake)
    return gradients(method)


@every_kind
@every_process
@pytest.mark.parametrize("reads_s", [True, False], ids=["flow map", "plain network"])
def test_ladd_rests_at_the_truth_and_points_back_to_it(process: Process, kind: Kind, reads_s: bool) -> None:
    assert ladd_gradients(process, kind, reads_s=reads_s) == (0, 0)
    for side in (-1, 1):
        fake = {"shift": TRUTH + side * 0.5, "std": STD}
        assert side * ladd_gradients(process, kind, reads_s=reads_s, **fake)[0] > 0.01
        fake = {"shift": TRUTH, "std": STD * (1.5 if side > 0 else 0.6)}
        assert side * ladd_gradients(process, kind, reads_s=reads_s, **fake)[1] > 2e-3


def test_ladd_with_a_discriminator_of_the_wrong_sign_fails_the_oracle() -> None:
    assert ladd_gradients(RF(), "flow", adversary=Negated, shift=TRUTH + 0.5)[0] < -0.01


def test_ladd_judges_the_denoising_of_the_very_rows_it_noised() -> None:
    """At the truth a jump keeps what its row had: from little noise, the latent itself."""
    method = player("ladd", RF(), "flow", settings={"counts": (1,), "grids": {1: (0.01,)}, "easy": 0})
    seen: list[tuple[Tensor, Tensor]] = []
    method.adversary.own_loss = lambda y, real, batch: seen.append((y, real)) or y.mean()
    batch = batch_of(x=data_of())
    method.loss("disc", batch)
    ((y, real),) = seen
    assert torch.equal(real, batch.rows.x)
    assert (y - real).abs().max() < 0.1
    assert not y.requires_grad


def test_ladd_starts_with_the_less_noisy_rungs_and_then_gives_pure_noise_its_share() -> None:
    method = player("ladd", RF(), "flow", settings={"counts": (4,), "easy": 2})
    assert set(method._times(batch_of(512)).tolist()) == {0.5, 0.25}
    method.after(0)
    assert method.curriculum == {"easy": 1.0}
    method.after(1)
    assert method.curriculum == {"easy": 0.0}
    drawn = method._times(batch_of(4096)).tolist()
    assert set(drawn) == {1.0, 0.75, 0.5, 0.25}
    assert drawn.count(1.0) / 4096 == pytest.approx(0.7, abs=0.03)
    assert drawn.count(0.5) / 4096 == pytest.approx(0.1, abs=0.02)


def test_the_discriminator_leads_by_its_warm_up() -> None:
    settings = {**STAGES["ladd"], "disc_warmup": 3}
    run = StageRun(0, Stage("ladd", 6, settings), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    for _ in range(4):
        run.iterate(tiny_source())
    assert run.updates == {"disc": 4, "student": 1}


# lightning -----------------------------------------------------------------------------------------------------------


def mse(process: Process, kind: Kind, **parts: Any) -> float:
    grids = {4: tuple(top(kind) * u for u in times.uniform(4))}
    settings = {"counts": (4,), "grids": grids, "teacher_steps": 48}
    return trajectory_loss("lightning", process, kind, settings=settings, seeds=3, **parts)


@every_kind
@every_process
def test_lightning_begins_as_a_regression_that_is_zero_at_the_true_jumps_only(process: Process, kind: Kind) -> None:
    assert mse(process, kind) < 0.01  # the teacher's path has steps
    assert mse(process, kind, shift=TRUTH + OFF) > 0.02
    assert mse(process, kind, std=1.2 * STD) > 0.02


def test_lightning_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert mse(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1


class BackwardLightning(Lightning):
    """The teacher is asked for the way back."""

    def _teacher(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
        there = super()._teacher(x, t, s, cond)
        return 2 * x - there


def test_lightning_with_the_teachers_jump_reversed_fails_the_oracle() -> None:
    assert mse(RF(), "flow", method=BackwardLightning) > 0.1


class Faithful(Lightning):
    """Its discriminator knows the teacher's jump: the nearer the end to the true one, the more real."""

    sign = -1.0

    def logits(self, end: Tensor, s: Tensor, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        true = student_of(self.process, "x0").jump(x, t, s, batch.cond)
        return self.sign * (end - true).flatten(1).square()


class Faithless(Faithful):
    sign = 1.0


def lightning_gradients(
    process: Process, kind: Kind, cls: type[Faithful] = Faithful, **student: float
) -> tuple[float, float]:
    parent = player("lightning", process, kind, settings={"mse": 0}, **student)
    return gradients(cls(parent.cast, parent.config), seeds=4)


@every_kind
@every_process
def test_lightning_rests_where_its_jumps_are_the_teachers(process: Process, kind: Kind) -> None:
    assert lightning_gradients(process, kind) == pytest.approx((0, 0), abs=1e-6)
    for side in (-1, 1):
        assert side * lightning_gradients(process, kind, shift=TRUTH + side * 0.3)[0] > 0.01
        assert side * lightning_gradients(process, kind, std=STD * (1.5 if side > 0 else 0.6))[1] > 1e-3


def test_lightning_with_a_discriminator_of_the_wrong_sign_fails_the_oracle() -> None:
    assert lightning_gradients(RF(), "flow", Faithless, shift=TRUTH + 0.3)[0] < -0.01


def test_lightnings_discriminator_sees_where_a_jump_started_until_the_last_phase() -> None:
    run = StageRun(0, Stage("lightning", 9, STAGES["lightning"]), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    method, batch = run.method, run.batch(tiny_source(), 0)
    assert isinstance(method, Lightning)
    for weight in run.cast.parameters("disc").values():
        nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    t, s = torch.full((len(batch),), 0.75), torch.full((len(batch),), 0.5)
    starts = batch.randn(), batch.randn()
    blind = []
    for phase in (1.0, 2.0):
        method.curriculum["phase"] = phase
        blind.append(torch.equal(*(method.logits(batch.noise, s, x, t, batch) for x in starts)))
    assert blind == [False, True]


def test_lightnings_phases_follow_the_iterations() -> None:
    method = player("lightning", RF(), "flow", settings={"mse": 2, "conditional": 3})
    phases = [method.curriculum["phase"]]
    for i in range(6):
        method.after(i)
        phases.append(method.curriculum["phase"])
    assert phases == [0, 0, 1, 1, 1, 2, 2]


def test_lightning_for_several_counts_needs_a_student_that_reads_s() -> None:
    player("lightning", RF(), "flow", settings={"counts": (2, 4)})
    with pytest.raises(InvalidRequest, match="must read s"):
        player("lightning", RF(), "flow", settings={"counts": (2, 4)}, reads_s=False)


def test_ladd_with_learnt_heads_brings_a_student_towards_the_teachers_mean() -> None:
    source = TensorSource(torch.full((1024,), MEAN), SHAPE, x=data_of(1024).float())
    teacher = teacher_of(RF(), "flow").float()
    teacher.null_cond = teacher.null_cond.float()
    student = student_of(RF(), "flow", shift=TRUTH + 0.5).float()
    settings = {"counts": (1,), "batch": 16, "width": 16, "lr": 5e-3, "disc_lr": 1e-2, "easy": 0}
    run = StageRun(0, Stage("ladd", 150, settings), teacher, student)
    for _ in range(100):
        run.iterate(source)
    assert isinstance(student.net, GaussianNet)
    assert float(student.net.shift) == pytest.approx(TRUTH, abs=0.25)
