"""Divergences other than `dmd`'s and `sid`'s between what the student makes and the teacher, noised alike.

With F the critic's and T the teacher's clean prediction at a noised sample y_tau, the scores differ by
alpha / sigma^2 (F - T). `diff_instruct` follows the gradient of KL(student || teacher) integrated over tau, without a
normaliser. The next two lower a distance d of the scores, where u = T - F, and F moves with the student: since F is the
mean of y at y_tau, E v . dF = d E v . (y - F) for any v(y_tau), so no derivative of the critic's weights is needed.
`sim` takes the expectation of d under the samples as they are; its gradient is that of d'(u) . (F - y) through y, F
and T. Here d is pseudo-Huber: an outlier row counts linearly. `uni_instruct` takes it under the student's own
distribution, d(u) + 2 u . (F - y) with d(u) = |u|^2, weighted over tau such that it is KL(student || teacher) itself:

    -d KL(p_tau || q_tau) / d log(sigma / alpha) = (alpha / sigma)^2 E |F - T|^2.

log(sigma / alpha) is drawn uniformly, where that integrand is flat. The loss is KL in its value and its gradient.

`f_distill` takes any f-divergence E_q f(r), r = p / q of the teacher's density p and the student's q at a noised
sample: its gradient is dmd's, weighted row by row with h(r) = f''(r) r^2. Reverse KL has h = 1: it leaves modes out.
Divergences whose h grows with r ask most where the teacher puts more than the student, and cover modes. f is scaled
such that f''(1) = 1: next to the truth all are `dmd`, and so they are as long as the discriminator is undecided. log r
is the mean of a discriminator's logits at the same noised sample. It compares with the job's data, or the teacher's own
samples, which alone have the density of a guided teacher. The student also fools it, a little.

Source: Diff-Instruct arXiv 2305.18455 eq. 3.5; SIM 2410.16794 §3.2, §3.3; Uni-Instruct 2505.20755 (reverse KL);
f-distill 2502.15681 (theorem 1, the table of h); SGMD 2605.30116, as in its authors' code (below), whose critic and
student also take turns; EMD 2405.16852: the steps above are derived here, their sizes and weights are ours.
Left out: Uni-Instruct's other f-divergences and its GAN term; f-distill's normaliser of h within bins of noise level,
which needs more rows than a share of a batch has, and a discriminator on the critic's features (heads on the teacher's
instead); SGMD's diversity term (a job's to ask for).
Checked against: closed forms of Gaussian data: of its score differences and of its divergences (tests); for SGMD
ModelTC/LightX2V lightx2v_train/trainers/sgmd.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.discriminator import ROLE, Adversary, DiscriminatorConfig
from distill_jobs.losses import over_rows, scale_of, toward
from distill_jobs.methods._data import DataConfig, DataMethod
from distill_jobs.methods.base import Preset
from distill_jobs.methods.score_matching import CriticConfig, ScoreMatching, ScoreMatchingConfig
from distill_jobs.roles import Cast, Role
from engines.denoiser import BaseDenoiser
from engines.process import over


class DiffInstructConfig(CriticConfig):
    tau_mean: float = Field(-1.2, description="of log(sigma / alpha), which is drawn from a normal distribution")
    tau_std: float = Field(1.2, gt=0)
    snr_power: float = Field(0.0, ge=0, description="weight (alpha / sigma)^power; 2 is the KL divergence's own")


class DiffInstruct(ScoreMatching):
    Config = DiffInstructConfig
    term = "diff_instruct"

    def levels(self, batch: Batch) -> Tensor:
        """The logit of a noise level is log(sigma / alpha)."""
        c = self.config
        u = batch.draw(times.Bent(times.LogitNormal(c.tau_mean, c.tau_std), c.tau_shift))
        return u.clamp(c.tau_min, c.tau_max)

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            y_t, t = self.noised(y, batch)
            real, _ = self.cast.teacher(y_t, t, batch.cond)
            fake, _ = self.cast["fake"](y_t, t, batch.cond)
            weight = (self.process.alpha(t) / self.process.sigma(t)) ** self.config.snr_power
        return toward(y, over(weight, y) * (fake - real))


class _Implicit(ScoreMatching):
    """Divergences of scores: the gradient flows through both networks into the sample."""

    def _parts(self, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(T - F, F - y, tau)."""
        y_t, t = self.noised(y, batch)
        real, _ = self.cast.teacher(y_t, t, batch.cond)
        fake, _ = self.cast["fake"](y_t, t, batch.cond)
        return real - fake, fake - y, t


class SIMConfig(CriticConfig):
    huber: float = Field(1e-2, gt=0, description="root mean square of T - F below which the distance is quadratic")


class SIM(_Implicit):
    Config = SIMConfig
    term = "sim"

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        gap, residual, _ = self._parts(y, batch)
        length = (over_rows(gap.square()) + self.config.huber**2).sqrt()
        loss: Tensor = (over_rows(gap * residual) / length).mean()
        return loss


class SGMDConfig(ScoreMatchingConfig):
    fake_updates: int = Field(1, ge=1, description="critic updates per student update")
    correction: float = Field(0.1, ge=0, description="weight of what is subtracted; 0 has the truth at rest")


class SGMD(ScoreMatching):
    Config = SGMDConfig
    term = "sgmd"

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        y_t, t = self.noised(y, batch)
        with torch.no_grad():
            real, _ = self.cast.teacher(y_t, t, batch.cond)
        fake, _ = self.cast["fake"](y_t, t, batch.cond)
        fisher = 0.5 * ((fake - real).square() / scale_of(y - real, self.config.floor)).mean()
        residual = (fake - y) / over(self.process.sigma(t), y)
        loss: Tensor = fisher - self.config.correction * toward(fake, residual)
        return loss


class UniInstructConfig(CriticConfig):
    tau_min: float = Field(0.02, gt=0, lt=1, description="least noise level critic and teacher are compared at")
    tau_max: float = Field(0.98, gt=0, lt=1, description="most noise level they are compared at")


class UniInstruct(_Implicit):
    """KL(student || teacher) per value at `tau_min`, less that at `tau_max`."""

    Config = UniInstructConfig
    term = "uni_instruct"

    def levels(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self._low + self._span * batch.draw(times.Uniform()))

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        gap, residual, t = self._parts(y, batch)
        weight = (self.process.alpha(t) / self.process.sigma(t)).square()
        loss: Tensor = self._span * (weight * over_rows(gap * (gap + 2 * residual))).mean()
        return loss

    @property
    def _low(self) -> float:
        return _logit(self.config.tau_min) + math.log(self.config.tau_shift)

    @property
    def _span(self) -> float:
        return _logit(self.config.tau_max) - _logit(self.config.tau_min)


def _logit(u: float) -> float:
    return math.log(u / (1 - u))


class EMDConfig(DiffInstructConfig):
    counts: tuple[Annotated[int, Field(ge=1, le=1)], ...] = Field(
        (1,), min_length=1, max_length=1, description="only one step: its noise is the latent that is inferred"
    )
    langevin: int = Field(4, ge=1, description="Langevin steps per update")
    eps_step: float = Field(0.1, gt=0, lt=1, description="their size in the noise of x_tau")
    z_step: float = Field(1e-3, ge=0, lt=1, description="their size in the student's own noise")


class EMD(DiffInstruct):
    Config = EMDConfig
    term = "emd"

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        if role == "fake":
            return super().loss(role, batch)
        c = self.config
        z, added, t = self.inferred(batch)
        ratio = over(self.process.alpha(t) / self.process.sigma(t), z)
        steps = 1 - (1 - c.eps_step) ** c.langevin  # what a constant pull of 1 would have added
        return {
            self.term: toward(self.generate(replace(batch, noise=z)), -(ratio ** (c.snr_power - 1)) * added / steps)
        }

    def inferred(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(z, what the scores have added to eps, tau), without gradient."""
        c, z, eps = self.config, batch.noise, batch.randn()
        t, added = times.on(self.process, self.levels(batch)), torch.zeros_like(eps)
        alpha, sigma = (over(part, z) for part in (self.process.alpha(t), self.process.sigma(t)))
        for _ in range(c.langevin):
            z = z.detach().requires_grad_()
            y = self.generate(replace(batch, noise=z))
            with torch.no_grad():
                y_t = alpha * y + sigma * eps
                gap = self.cast.teacher(y_t, t, batch.cond)[0] - self.cast["fake"](y_t, t, batch.cond)[0]
                pull = alpha / sigma * gap  # sigma (s_p - s_q)
                added = (1 - c.eps_step) * added + c.eps_step * pull
                eps = (1 - c.eps_step) * eps + c.eps_step * pull + (2 * c.eps_step) ** 0.5 * batch.randn()
            (slope,) = torch.autograd.grad(y, z, alpha / sigma * pull)
            z = (1 - c.z_step) * z.detach() + c.z_step * slope + (2 * c.z_step) ** 0.5 * batch.randn()
        return z, added, t


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: 2 * r / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: (1 + r) / 2,
    "softened_reverse_kl": lambda r: 2 / (1 + r),
    "neyman": lambda r: 1 / r,
}
"""h(r) of each divergence, 1 at r = 1."""


class FDistillConfig(DiscriminatorConfig, ScoreMatchingConfig, DataConfig):
    divergence: Literal[
        "reverse_kl", "forward_kl", "jensen_shannon", "hellinger", "jeffreys", "softened_reverse_kl", "neyman"
    ] = "jensen_shannon"
    gan: Literal["softplus"] = Field(
        "softplus", description="whose logits are log r", json_schema_extra={"enum": ["softplus"]}
    )
    disc_updates: int = Field(2, ge=1, description="discriminator updates per student update")
    r1: float = Field(1.0, ge=0, description="weight of |h(x) - h(x + a eps)|^2 on real latents; it shrinks log r")
    tau_mean: float = Field(0.0, description="of the logit-normal noise levels at which the discriminator learns")
    tau_std: float = Field(1.5, gt=0)
    ratio_min: float = Field(0.1, gt=0, le=1, description="least r that is believed")
    ratio_max: float = Field(20.0, ge=1, description="greatest r that is believed")
    gan_weight: float = Field(1e-3, ge=0, description="of fooling the discriminator")


class FDistill(ScoreMatching, DataMethod):
    Config = FDistillConfig
    term = "f_distill"

    def __init__(self, cast: Cast, config: FDistillConfig) -> None:
        super().__init__(cast, config)
        self.adversary = Adversary(cast, config)

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {ROLE: config.disc_role()} | super().roles(config)

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        heads: nn.Module = config.heads(denoiser)
        return heads

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        if role == "fake":
            return super().loss(role, batch)
        y = self.generate(batch)
        if role == ROLE:
            assert batch.rows.x is not None
            return {"gan": self.adversary.own_loss(y.detach(), batch.rows.x, batch)}
        found = {self.term: self._student_loss(y, batch)}
        weight = self.config.gan_weight
        return found | ({"gan": weight * self.adversary.student_loss(y, batch)} if weight else {})

    def _student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            y_t, t = self.noised(y, batch)
            real, _ = self.cast.teacher(y_t, t, batch.cond)
            fake, _ = self.cast["fake"](y_t, t, batch.cond)
            weight = self.weight(self.adversary.logits(y_t, t, batch.cond).mean(dim=1))
            direction = over(weight, y) * (fake - real) / scale_of(y - real, self.config.floor)
        return toward(y, direction)

    def weight(self, log_ratio: Tensor) -> Tensor:
        """h(r) [B]."""
        ratio = log_ratio.exp().clamp(self.config.ratio_min, self.config.ratio_max)
        return WEIGHTS[self.config.divergence](ratio)


PRESETS = {
    "diff_instruct": Preset(
        DiffInstruct, "Follows the plain score difference: the gradient of an integral KL divergence.", "2305.18455"
    ),
    "sim": Preset(SIM, "Score implicit matching: a pseudo-Huber distance of scores, through both.", "2410.16794"),
    "sgmd": Preset(
        SGMD, "Score gradient matching: the critic is moved to the teacher, the student moves it.", "2605.30116"
    ),
    "emd": Preset(
        EMD, "EM distillation: Langevin steps towards the teacher's joint samples, then regression.", "2405.16852"
    ),
    "uni_instruct": Preset(
        UniInstruct, "Score divergence weighted over noise such that it is the KL divergence itself.", "2505.20755"
    ),
    "f_distill": Preset(
        FDistill, "dmd for other divergences, weighted by a discriminator's density ratio.", "2502.15681", {"lr": 5e-4}
    ),
}
