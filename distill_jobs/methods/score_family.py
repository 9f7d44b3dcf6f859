"""The family of score matching: other divergences between what the student makes and the teacher, noised alike.

With F the critic's and T the teacher's clean prediction at a noised sample y_tau, the scores differ by
alpha / sigma^2 (F - T). `diff_instruct` follows the gradient of KL(student || teacher) integrated over tau, without a
normaliser. The others lower a distance d of the scores, where u = T - F, and F moves with the student: since F is the
mean of y at y_tau, E v . dF = d E v . (y - F) for any v(y_tau), so no derivative of the critic's weights is needed.
`sim` takes the expectation of d under the samples as they are; its gradient is that of d'(u) . (F - y) through y, F
and T. Here d is pseudo-Huber: an outlier row counts linearly. `uni_instruct` takes it under the student's own
distribution, d(u) + 2 u . (F - y) with d(u) = |u|^2, weighted over tau such that it is KL(student || teacher) itself:

    -d KL(p_tau || q_tau) / d log(sigma / alpha) = (alpha / sigma)^2 E |F - T|^2.

log(sigma / alpha) is drawn uniformly, where that integrand is flat. The loss is KL in its value and its gradient.

Source: Diff-Instruct arXiv 2305.18455 eq. 3.5; SIM 2410.16794 §3.2, §3.3; Uni-Instruct 2505.20755 (reverse KL).
Left out: Uni-Instruct's other f-divergences, which need the density ratio of a discriminator (as `f_distill` does); the
GAN term; SGMD (2605.30116), whose correction does not vanish where student, critic and teacher agree.
Checked against: the closed form of Gaussian data, and of its KL divergence (tests).
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, toward
from distill_jobs.methods.base import Preset
from distill_jobs.methods.score_matching import CriticConfig, ScoreMatching
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


PRESETS = {
    "diff_instruct": Preset(
        DiffInstruct, "Follows the plain score difference: the gradient of an integral KL divergence.", "2305.18455"
    ),
    "sim": Preset(SIM, "Score implicit matching: a pseudo-Huber distance of scores, through both.", "2410.16794"),
    "uni_instruct": Preset(
        UniInstruct, "Score divergence weighted over noise such that it is the KL divergence itself.", "2505.20755"
    ),
}
