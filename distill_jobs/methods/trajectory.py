"""Consistency trajectories: a jump from t to any s must agree with one teacher step followed by the rest of the jump.

For u in s..t and the teacher's step x_u from x_t, f(x_t, t -> s) = f(x_u, u -> s); the right side is a slow average of
the student. `tcd` compares at s, with u one long DDIM step below t. `ctm` draws u anywhere above s, follows the teacher
there by Heun steps, and compares after both sides have jumped on to 0 through the frozen average: an error at s weighs
as much as it changes the picture. It adds denoising where the jump has no length, x0(x_t, t -> t) = x0.

Source: CTM arXiv 2310.02279 eq. 9 to 11; TCD 2402.19159 §4, its sampler's gamma is eta. In `ctm` times are continuous,
not Karras' rungs. Left out: LPIPS, the GAN term, the weight of denoising by gradient norms.
Checked against: the closed-form flow map of Gaussian data (tests).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.methods.base import Preset
from distill_jobs.methods.consistency import END, Distillation, DistillationConfig, TeacherStep, TeacherStepConfig
from engines.denoiser import Cond

_FLAT = 0.05  # the noise level below which the weight of denoising stays


class TCDConfig(DistillationConfig):
    eta: float = Field(0.3, ge=0, le=1, description="the sampler's gamma: it jumps to (1 - eta) s and re-noises to s")


class TCD(Distillation):
    Config = TCDConfig
    inputs = frozenset({"s"})

    def ends(self, batch: Batch, u: Tensor, r: Tensor) -> Tensor:
        return times.on(self.process, r * batch.draw(times.Uniform()))


class CTMConfig(TeacherStepConfig):
    eta: float = Field(0.0, ge=0, le=1, description="the sampler's gamma: it jumps to (1 - eta) s and re-noises to s")
    keep: float = Field(0.999, ge=0, lt=1, description="of the averaged target per update")
    solver: Literal["ddim", "heun"] = Field("heun", description="the teacher's step")
    substeps: int = Field(4, ge=1, description="teacher steps from t to u")
    dsm: float = Field(1.0, ge=0, description="weight of denoising")


class CTM(TeacherStep):
    Config = CTMConfig
    inputs = frozenset({"s"})

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u = self.config.top * batch.draw(times.WithFirst(times.Uniform(2 * END, 1.0), self.config.first_share))
        return u, END + (u - END) * batch.draw(times.Uniform())

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.x is not None
        u, low = self.levels(batch)
        middle = low + (u - low) * batch.draw(times.Uniform())
        t, near, s = (times.on(self.process, level) for level in (u, middle, low))
        x = self.process.mix(batch.rows.x, batch.noise, t)
        target = self.target(self.neighbour(batch, x, t, near), near, s, batch.cond)
        guess = self.cast.student.jump(x, t, s, batch.cond)
        ours, theirs = (self.picture(side, s, batch.cond) for side in (guess, target))
        found = {"consistency": self.distance(ours - theirs, self.weight(u, low))}
        return found | ({"dsm": self.config.dsm * self.denoising(x, t, u, batch)} if self.config.dsm else {})

    def picture(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Where the frozen average takes x from s to 0; the gradient passes through it."""
        return self.cast["target"].jump(x, s, torch.zeros_like(s), cond)

    def denoising(self, x: Tensor, t: Tensor, u: Tensor, batch: Batch) -> Tensor:
        """The error of x0 where the jump has no length, weighted as flow matching."""
        guess, _ = self.cast.student(x, t, batch.cond)
        loss: Tensor = (over_rows((guess - batch.rows.x).square()) / u.clamp_min(_FLAT).square()).mean()
        return loss


PRESETS = {
    "ctm": Preset(
        CTM, "Consistency trajectories, compared where they end in the picture, with denoising.", "2310.02279"
    ),
    "tcd": Preset(
        TCD, "Consistency trajectories after long teacher steps, sampled with a share of noise.", "2402.19159"
    ),
}
