"""Trajectory distribution matching: at each rung of its own deterministic path the student has the teacher's marginal.

From a rung at t the student jumps to the next, s. Its x_s is noised further, x_tau = k x_s + b eps with k = alpha_tau /
alpha_s and b^2 = sigma_tau^2 - k^2 sigma_s^2, to a time tau of this segment [s, t] alone; there the student follows the
difference of the critic's and the teacher's prediction, F - T, as the gradient of a pseudo-Huber distance. So the
segments share one critic: each teaches it its own times.

The critic must learn the score of x_tau though no clean picture is known at s > 0. Its target is the clean prediction
whose score is that of the noising, -eps / b: z = (x_tau - sigma_tau^2 eps / b) / alpha_tau, in which the noise of x_s
averages out. Its variance grows as 1 / b^2, which the weight takes back. At s = 0 all this is denoising.

Source: TDM arXiv 2503.06674; the target as in Phased DMD 2510.27684. Left out: TDM's importance weights (the target
replaces them) and its input for the number of steps: of several counts the critic learns the mixture.
Checked against: the closed form of Gaussian data (tests).
"""

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows, toward
from distill_jobs.methods.base import Count, Preset
from distill_jobs.methods.score_matching import CriticConfig, WithCritic
from engines.process import Process, over
from engines.solvers import sample


class TDMConfig(CriticConfig):
    counts: tuple[Count, ...] = Field((4,), min_length=1, description="step counts the student is made for")
    eta: float = Field(0.0, ge=0, le=0, description="the trajectory is deterministic")
    huber: float = Field(1e-3, gt=0, description="root mean square of F - T below which the distance is quadratic")


class TDM(WithCritic):
    Config = TDMConfig

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        schedule, rung = self.rung(batch)
        x = sample(self.cast.student, batch.noise, schedule.times[: rung + 1], batch.cond)
        t, s = (batch.noise.new_full((len(batch),), end) for end in schedule.times[rung : rung + 2])
        if role == "fake":
            with torch.no_grad():
                x_s = self.cast.student.jump(x, t, s, batch.cond)
            return {"dsm": self._fake_loss(x_s, s, t, batch)}
        return {"tdm": self._student_loss(self.cast.student.jump(x, t, s, batch.cond), s, t, batch)}

    def _student_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            tau = self._within(s, t, batch)
            keep, fresh = _kernel(self.process, s, tau)
            x = over(keep, x_s) * x_s + over(fresh, x_s) * batch.randn()
            gap = self.cast["fake"](x, tau, batch.cond)[0] - self.cast.teacher(x, tau, batch.cond)[0]
            direction = gap / over((over_rows(gap.square()) + self.config.huber**2).sqrt(), gap)
        return toward(x_s, direction)

    def _fake_loss(self, x_s: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """|F - z|^2 with the weight of flow matching times (b / sigma_tau)^2, free of divisions by b."""
        tau, eps = self._within(s, t, batch), batch.randn()
        keep, fresh = _kernel(self.process, s, tau)
        alpha, sigma = self.process.alpha(tau), self.process.sigma(tau)
        b, a_tau, s_tau = (over(part, x_s) for part in (fresh, alpha, sigma))
        x = over(keep, x_s) * x_s + b * eps
        guess, _ = self.cast["fake"](x, tau, batch.cond)
        error = b / s_tau * guess - (b * x / s_tau - s_tau * eps) / a_tau
        loss: Tensor = (((alpha + sigma) / sigma).square() * over_rows(error.square())).mean()
        return loss

    def _within(self, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Times [B] whose noise levels are spread over the segment from s to t, as far as tau_min and tau_max go."""
        c = self.config
        low, high = (times.level_of(self.process, end) for end in (s, t))
        low = low.clamp_min(c.tau_min)
        high = torch.maximum(low, high.clamp_max(c.tau_max))
        return times.on(self.process, low + (high - low) * batch.draw(times.Bent(times.Uniform(), c.tau_shift)))


def _kernel(process: Process, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(k, b) [B] of x_t = k x_s + b eps: the noising from s on to t."""
    keep = process.alpha(t) / process.alpha(s)
    return keep, (process.sigma(t).square() - (keep * process.sigma(s)).square()).clamp_min(0).sqrt()


PRESETS = {
    "tdm": Preset(TDM, "Matches the teacher's marginals along the student's deterministic path.", "2503.06674"),
}
